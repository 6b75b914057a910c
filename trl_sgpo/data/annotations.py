"""Strategies by rule from worked solutions with calculator annotations, as GSM8K has them."""

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from .final_answers import final_answer


_ANNOTATION = re.compile(r"<<([^<>=]{1,200})=([^<>=]{1,40})>>")
_ANY_ANNOTATION = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(r"=\s*+(?:[$€£]\s*+)?\d")
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_NUMBER = re.compile(r"(?<!\d)\d{1,40}(?:,\d{3})*(?:\.\d+)?(?!\d)|\.\d+")
_FRACTION = re.compile(r"(?<![\d/.])(\d{1,40})/(\d{1,40})(?![\d/])")
_PLAIN = re.compile(r"[+-]?[\d.]{1,100}(?:/\d{1,100})?")
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_GIVEN, _IMPLIED = "a given number", "an implied number"
# What wording implies: counts, parts, percents, units of time and of measure
_IMPLIED_VALUES = {Fraction(value) for value in (*range(1, 13), 16, 20, 24, 30, 31, 52, 60, 100, 360, 365, 1000, 3600)}
_IMPLIED_VALUES |= {Fraction(text) for text in (".01", ".05", ".1", ".2", ".25", ".33", ".5", ".75", "1.5", "2.5")}
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def worked_execution(worked: str, answer: str | None) -> str | None:
    r"""
    Converts a worked solution to the form of an execution.

    Args:
        worked (`str`):
            A worked solution, with calculator annotations like `<<48/2=24>>`, `#### 24` or `\boxed{24}`, or none.
        answer (`str` or `None`):
            The short answer, if known.

    Returns:
        `str` or `None`: The solution without annotations, with `#### answer` as last line. `None` if there is no
        answer.
    """
    text = _ANY_ANNOTATION.sub("", worked).strip()
    answer = answer or final_answer(text)
    if answer is None:
        return None
    steps = text.rpartition("####")[0].rstrip("#") if "####" in text else text
    return f"{steps.strip()}\n#### {answer.strip()}".strip()


def strategy_from_annotations(worked: str, problem: str) -> str | None:
    """
    Describes the calculations of an annotated solution in words, without numbers of the instance.

    Args:
        worked (`str`):
            A worked solution with calculator annotations, like those of GSM8K: `<<48/2=24>>`.
        problem (`str`):
            Text of the problem, to distinguish given numbers from implied ones (half, a week).

    Returns:
        `str` or `None`: The strategy. `None` if there are no annotations or more than ten, a calculation is not
        annotated, is wrong, has other operations than + - * / or a number of unknown origin, or the last result is
        not the answer.
    """
    annotations = _ANNOTATION.findall(worked)
    if not 1 <= len(annotations) <= len(_ORDINALS) or len(annotations) != worked.count("<<"):
        return None
    if len(_RESULT.findall(_ANY_ANNOTATION.sub("", worked))) > len(annotations):
        return None
    given = _numbers(problem)
    results: list[Fraction] = []
    steps = []
    try:
        for expression, result in annotations:
            tree = ast.parse(_LEADING_ZEROS.sub("", expression.strip()), mode="eval").body
            value = _fraction(result)
            if not math.isclose(_value(tree), value, rel_tol=0.01, abs_tol=0.01) or not isinstance(tree, ast.BinOp):
                return None
            steps.append(_phrase(tree, given, results, imperative=True))
            results.append(value)
        answer = _fraction((final_answer(worked) or "").replace(",", "").replace("$", ""))
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    if results[-1] != answer:
        return None
    if len(steps) == 1:
        return f"To solve a word problem in one step, {steps[0]}."
    order = ["first", *["then"] * (len(steps) - 2), "finally"]
    told = "; ".join(f"{when} {step}" for when, step in zip(order, steps, strict=True))
    return f"To solve a word problem in {_WORDS[len(steps)]} steps, {told}."


def _fraction(text: str) -> Fraction:
    """A number without exponent: `1e999999999` would fill the memory."""
    if _PLAIN.fullmatch(text.strip()) is None:
        raise ValueError("no number")
    return Fraction(text.strip())


def _numbers(problem: str) -> set[Fraction]:
    """Values that a problem names in digits or small number words; a percentage also as a share."""
    numbers = {Fraction(number.replace(",", "")) for number in _NUMBER.findall(problem)}
    numbers |= {Fraction(int(top), int(bottom)) for top, bottom in _FRACTION.findall(problem) if int(bottom)}
    if "%" in problem or "percent" in problem.casefold():
        numbers |= {number / 100 for number in numbers}
    words = set(re.findall(r"[a-z]+", problem.casefold()))
    return numbers | {Fraction(value) for value, word in enumerate(_WORDS) if word in words}


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    raise ValueError("not a calculation")


def _phrase(node: ast.expr, given: set[Fraction], results: list[Fraction], imperative: bool = False) -> str:
    """A calculation in words, as an instruction or as a noun phrase."""
    if not isinstance(node, ast.BinOp):
        return _operand(_value(node), given, results)
    additive = isinstance(node.op, ast.Add | ast.Sub)
    plain, inverse = _chain(node, (ast.Add, ast.Sub) if additive else (ast.Mult, ast.Div))
    first = [_phrase(part, given, results) for part in plain]
    second = [_phrase(part, given, results) for part in inverse]
    whole = first[0] if len(first) == 1 else f"the {'sum' if additive else 'product'} of {_list(first)}"
    if not second and imperative:
        return f"add {_list(first)}" if additive else f"multiply {_list(first)}"
    if not second:
        return whole
    if imperative:
        return f"subtract {_list(second)} from {whole}" if additive else f"divide {whole} by {_list(second)}"
    return f"the {'difference' if additive else 'quotient'} of {whole} and {_list(second)}"


def _chain(node: ast.expr, operators: tuple[type[ast.operator], type[ast.operator]]) -> tuple[list[Any], list[Any]]:
    """The parts of a sum (or product), and those that are subtracted (or divided by)."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, operators):
        return [node], []
    plain, inverse = _chain(node.left, operators)
    more, less = _chain(node.right, operators)
    if isinstance(node.op, operators[1]):
        more, less = less, more
    return plain + more, inverse + less


def _operand(value: Fraction, given: set[Fraction], results: list[Fraction]) -> str:
    if results and value == results[-1]:
        return "the last result"
    if value in given:
        return _GIVEN
    if value in results:
        return f"the {_ORDINALS[results.index(value)]} result"
    if abs(value) in _IMPLIED_VALUES:
        return _IMPLIED
    raise ValueError("a number from nowhere: the annotations leave a calculation out")


def _list(parts: Sequence[str]) -> str:
    """Parts joined in their order, given and implied numbers counted."""
    counted = Counter(parts)
    phrases = []
    for part, times in counted.items():
        if times == 1:
            phrases.append(part)
        elif part in (_GIVEN, _IMPLIED):
            phrases.append(f"{_WORDS[times] if times < len(_WORDS) else 'several'} {part.split(' ', 1)[1]}s")
        else:
            phrases += [part] * times
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
