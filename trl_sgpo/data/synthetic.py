"""Synthetic two-phase data, the pure part: which strategies are kept, the rule for annotated solutions, the files."""

import ast
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from ..bank.audit import control_tokens
from ..errors import DataError
from ..method.prompts import ParsedStrategy
from ..method.rewards import copied_literals, leak
from .tasks import final_answer
from .worked import Trace


# Acceptance


@dataclass(frozen=True)
class Executed:
    """
    A strategy executed on a problem.

    Args:
        problem (`str`):
            Id of the problem.
        text (`str`):
            The execution.
        outcome (`float` or `None`):
            Its outcome in [0, 1], `None` where the verifier cannot tell.
        baseline (`float`, *optional*):
            Mean outcome of answers to the problem without a strategy, `None` if not measured.
        sibling (`bool`, *optional*, defaults to `False`):
            Whether the strategy was written for another problem.
    """

    problem: str
    text: str
    outcome: float | None
    baseline: float | None = None
    sibling: bool = False


@dataclass(frozen=True)
class Tried:
    """
    A strategy that was written, and what came of it.

    Args:
        strategy (`str`):
            Its text.
        problem_class (`str`):
            Class of the problems it was written for.
        sources (`tuple[str, ...]`):
            Ids of these problems.
        flaw (`str`, *optional*):
            Why it was not executed: see [`find_flaw`].
        executions (`tuple[Executed, ...]`, *optional*, defaults to `()`):
            Its executions, on the problems it was written for and on siblings.
    """

    strategy: str
    problem_class: str
    sources: tuple[str, ...]
    flaw: str | None = None
    executions: tuple[Executed, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Tried":
        executions = tuple(Executed(**execution) for execution in row["executions"])
        return cls(**row | {"sources": tuple(row["sources"]), "executions": executions})


def find_flaw(strategy: ParsedStrategy, problem: str, answer: str | None) -> str | None:
    """
    What is wrong with a strategy before it is executed.

    Args:
        strategy ([`~trl_sgpo.method.prompts.ParsedStrategy`]):
            The strategy.
        problem (`str`):
            Text of the problem it was written for.
        answer (`str` or `None`):
            Its short answer, if known.

    Returns:
        `str` or `None`: `"malformed (...)"` (by its format, or with control tokens of chat templates), `"leak"`,
        `"copied literals"` or `None`.
    """
    if strategy.flaw is not None:
        return f"malformed ({strategy.flaw})"
    if control_tokens(strategy.text):
        return "malformed (control tokens)"
    if leak(strategy.text, problem, answer) > 0:
        return "leak"
    return "copied literals" if copied_literals(strategy.text, problem) else None


def lift(tried: Tried) -> float | None:
    """
    Mean outcome of a strategy on siblings, minus that of answers without a strategy on the same problems.

    Args:
        tried ([`Tried`]):
            The strategy with its executions.

    Returns:
        `float` or `None`: In [-1, 1]; `None` if no execution on a sibling could be compared.
    """
    differences = [
        execution.outcome - execution.baseline
        for execution in tried.executions
        if execution.sibling and execution.outcome is not None and execution.baseline is not None
    ]
    return fmean(differences) if differences else None


def rejection(tried: Tried, min_lift: float | None) -> str | None:
    """
    Why a strategy is not kept.

    Args:
        tried ([`Tried`]):
            The strategy with its executions.
        min_lift (`float` or `None`):
            Lift that must be exceeded. If `None`, a right execution is enough.

    Returns:
        `str` or `None`: Its flaw, `"not verified"`, `"no lift"`, `"wrong"` (no right execution), or `None` for one
        that is kept.
    """
    if tried.flaw is not None:
        return tried.flaw
    if min_lift is not None:
        gained = lift(tried)
        if gained is None:
            return "not verified"
        if gained <= min_lift:
            return "no lift"
    return None if any(execution.outcome == 1 for execution in tried.executions) else "wrong"


def pool(tried: Iterable[Tried]) -> list[Tried]:
    """
    Joins strategies of one class and one text, up to white space and case, so that they are judged by all their
    executions: one that was written for two problems, for each without sight of the other, was tried on siblings by
    both. Those with a flaw stay as they are.
    """
    pooled: dict[tuple[str, str], Tried] = {}
    flawed = []
    for one in tried:
        if one.flaw is not None:
            flawed.append(one)
            continue
        key = _identity(one)
        if (known := pooled.get(key)) is not None:
            sources = tuple(dict.fromkeys(known.sources + one.sources))
            one = replace(known, sources=sources, executions=known.executions + one.executions)
        pooled[key] = one
    return [*pooled.values(), *flawed]


def _identity(one: Tried) -> tuple[str, str]:
    return one.problem_class, " ".join(one.strategy.casefold().split())


def kept(tried: Iterable[Tried], min_lift: float | None) -> list[Tried]:
    """The strategies that are kept, pooled."""
    return [one for one in pool(tried) if rejection(one, min_lift) is None]


def to_traces(
    strategies: Iterable[Tried], prompts: Mapping[str, list[dict[str, str]]], answers: Mapping[str, str | None]
) -> list[Trace]:
    """
    Right executions of strategies, without those on problems whose answer the strategy contains.

    Args:
        strategies (`Iterable[Tried]`):
            Strategies that are kept.
        prompts (`Mapping[str, list[dict]]`):
            Problem id → its messages.
        answers (`Mapping[str, str | None]`):
            Problem id → its short answer, if known.

    Returns:
        `list[Trace]`: Without repetitions.
    """
    found: dict[tuple[str, str, str], Trace] = {}
    for one in strategies:
        for execution in one.executions:
            prompt = prompts[execution.problem]
            if execution.outcome == 1 and not leak(one.strategy, prompt[-1]["content"], answers[execution.problem]):
                trace = Trace(prompt, one.strategy, execution.text, one.problem_class)
                found.setdefault((execution.problem, one.strategy, execution.text), trace)
    return list(found.values())


@dataclass(frozen=True)
class Summary:
    """
    What a bootstrap came to.

    Args:
        problems (`int`):
            Problems that were tried.
        written (`int`):
            Strategies written.
        texts (`int`):
            How many of them differ.
        rejected (`dict[str, int]`):
            Reason → how many of them were rejected for it.
        kept (`int`):
            How many were kept.
        distinct (`int`):
            How many of those differ.
        mean_lift (`float` or `None`):
            Mean lift of these, `None` if not measured.
        baseline (`float` or `None`):
            Mean outcome without a strategy where strategies were executed, `None` if not measured.
        tokens (`int`):
            Tokens generated.
    """

    problems: int
    written: int
    texts: int
    rejected: dict[str, int]
    kept: int
    distinct: int
    mean_lift: float | None
    baseline: float | None
    tokens: int


def summarize(tried: Sequence[Tried], problems: int, tokens: int, min_lift: float | None) -> Summary:
    """
    Counts what became of strategies.

    Args:
        tried (`Sequence[Tried]`):
            All strategies, as written.
        problems (`int`):
            Problems that were tried.
        tokens (`int`):
            Tokens generated.
        min_lift (`float` or `None`):
            As in [`rejection`].

    Returns:
        [`Summary`]
    """
    pooled = [one for one in pool(tried) if one.flaw is None]
    verdicts = {_identity(one): rejection(one, min_lift) for one in pooled}
    reasons = Counter(one.flaw or verdicts[_identity(one)] for one in tried)
    count = reasons.pop(None, 0)
    good = kept(pooled, min_lift)
    lifts = [gained for one in good if (gained := lift(one)) is not None]
    known = {e.problem: e.baseline for one in tried for e in one.executions if e.baseline is not None}
    return Summary(
        problems=problems,
        written=len(tried),
        texts=len({one.strategy for one in tried}),
        rejected={str(reason): times for reason, times in reasons.most_common()},
        kept=count,
        distinct=len(good),
        mean_lift=fmean(lifts) if lifts else None,
        baseline=fmean(known.values()) if known else None,
        tokens=tokens,
    )


# Worked solutions

_ANNOTATION = re.compile(r"<<([^<>=]{1,200})=([^<>=]{1,40})>>")
_ANY_ANNOTATION = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(r"=\s*[$€£]?\s*\d")
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")
_FRACTION = re.compile(r"(?<![\d/.])(\d+)/(\d+)(?![\d/])")
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
    Brings a worked solution to the form of an execution.

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
    steps = text.rpartition("####")[0] if "####" in text else text
    return f"{steps.strip()}\n#### {answer.strip()}".strip()


def strategy_from_annotations(worked: str, problem: str) -> str | None:
    """
    Puts the calculations of an annotated solution in words, without a number of the instance.

    Args:
        worked (`str`):
            A worked solution with calculator annotations, like those of GSM8K: `<<48/2=24>>`.
        problem (`str`):
            Text of the problem, which tells numbers that are given from those that are implied (half, a week).

    Returns:
        `str` or `None`: The strategy. `None` if there are no annotations or more than ten, a calculation is not
        annotated, wrong, not of sums, differences, products and quotients or has a number from nowhere, or the last
        result is not the answer.
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
            value = Fraction(result.strip())
            if not math.isclose(_value(tree), value, rel_tol=0.01, abs_tol=0.01) or not isinstance(tree, ast.BinOp):
                return None
            steps.append(_phrase(tree, given, results, imperative=True))
            results.append(value)
        answer = Fraction((final_answer(worked) or "").replace(",", "").replace("$", ""))
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    if results[-1] != answer:
        return None
    if len(steps) == 1:
        return f"To solve a word problem in one step, {steps[0]}."
    order = ["first", *["then"] * (len(steps) - 2), "finally"]
    told = "; ".join(f"{when} {step}" for when, step in zip(order, steps, strict=True))
    return f"To solve a word problem in {_WORDS[len(steps)]} steps, {told}."


def _numbers(problem: str) -> set[Fraction]:
    """Values that a problem names in digits or small number words; a percentage also as a share."""
    found = {Fraction(number.replace(",", "")) for number in _NUMBER.findall(problem)}
    found |= {Fraction(int(top), int(bottom)) for top, bottom in _FRACTION.findall(problem) if int(bottom)}
    if "%" in problem or "percent" in problem.casefold():
        found |= {number / 100 for number in found}
    words = set(re.findall(r"[a-z]+", problem.casefold()))
    return found | {Fraction(value) for value, word in enumerate(_WORDS) if word in words}


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    raise ValueError("not a calculation")


def _phrase(node: ast.expr, given: set[Fraction], results: list[Fraction], imperative: bool = False) -> str:
    """A calculation in words: what to do, or what it gives."""
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
    told = []
    for part, times in counted.items():
        if times == 1:
            told.append(part)
        elif part in (_GIVEN, _IMPLIED):
            told.append(f"{_WORDS[times] if times < len(_WORDS) else 'several'} {part.split(' ', 1)[1]}s")
        else:
            told += [part] * times
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


# Files


def write_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Writes traces as JSON lines with the fields `prompt`, `strategy`, `execution` and `problem_class`."""
    with Path(path).open("w", encoding="utf-8") as file:
        for trace in traces:
            row = {name: vars(trace)[name] for name in ("prompt", "strategy", "execution", "problem_class")}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_traces(path: str | Path) -> list[Trace]:
    """
    Reads traces written by [`write_traces`] or by hand.

    Args:
        path (`str` or `Path`):
            A file of JSON lines. A `prompt` that is a text becomes one user message. Other fields are ignored.

    Returns:
        `list[Trace]`

    Raises:
        [`~trl_sgpo.errors.DataError`]: The file cannot be read, or a line is no trace. The message names line and
            field.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The traces in {path} cannot be read ({error}): name a file of JSON lines.") from error
    traces = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error}): correct or remove the line.") from error
        try:
            traces.append(_to_trace(row))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}: correct or remove the line.") from error
    if not traces:
        raise DataError(f"{path} has no traces: run `trl-sgpo bootstrap`, or lower its `--min_lift`.")
    return traces


def _to_trace(row: Any) -> Trace:
    if not isinstance(row, dict):
        raise DataError("not an object with the fields prompt, strategy, execution and problem_class")
    for name in ("strategy", "execution", "problem_class"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"the field `{name}` must be a text that is not empty")
    if tokens := control_tokens(row["strategy"]):
        raise DataError(f"the field `strategy` has control tokens of chat templates ({', '.join(tokens)})")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise DataError("the field `prompt` must be a text or messages, each with a `role` and a `content`")
    if prompt[-1]["role"] != "user":
        raise DataError("the field `prompt` must end in a message of the user")
    return Trace(prompt, row["strategy"].strip(), row["execution"].strip(), row["problem_class"])


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and message.keys() == {"role", "content"}
    )
