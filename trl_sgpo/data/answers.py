"""
Whether an answer is right, decided rung by rung: the verifier of the problem's family, then text, number, list, and
mathematics only where both sides hold it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .check_process import equal_expressions
from .families import accepted, family_of
from .final_answers import final_answer
from .numbers import plain_text, read_number, same_number


MAX_LENGTH = 1000
MAX_EXPRESSIONS = 16

_SIMPLE = re.compile(r"[+-]?\d{1,15}")
_PLAIN_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_OPERATOR = re.compile(r"[-+*/^=<>|!_\\\d]")
# fmt: off
_FUNCTIONS = frozenset([
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "log", "ln", "exp",
    "sqrt", "pi", "gcd", "lcm", "mod", "max", "min", "lim", "inf",
])
# fmt: on
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class AnswerCheck:
    """
    Whether an answer is right.

    Args:
        right (`bool`):
            Whether it is.
        rung (`str`):
            What decided: `"family"`, `"text"`, `"number"`, `"list"` or `"mathematics"`.
    """

    right: bool
    rung: str


def check_answer(answer: str, gold: str, entry: str | None = None) -> AnswerCheck:
    r"""
    Compares an answer with the right one, and says what decided.

    - `"family"`: the verifier of the row's reasoning-gym family. It has the last word, except that the solution itself
      is always right.
    - `"text"`: the texts are the same without mark-up, case and spaces beside signs. Also the rung of a wrong answer
      that holds words.
    - `"number"`: both are numbers, see [`~trl_sgpo.data.numbers.read_number`]. A unit on one side only does not count,
      different measures, such as `5 dollars` and `5 cents`, do.
    - `"list"`: both are lists or tuples, compared in order, item by item; sets, in braces, in any order.
    - `"mathematics"`: math-verify finds both expressions equal. Words are never read as products of letters, and a
      calculation such as `3*4` is no answer where the right one is a number.

    Args:
        answer (`str`):
            A final answer, as [`~trl_sgpo.data.final_answers.final_answer`] reads it.
        gold (`str`):
            The right answer.
        entry (`str`, *optional*):
            Which problem of a reasoning-gym family it is, as [`~trl_sgpo.data.tasks.load_problems`] writes it.
            Anything else is not read.

    Returns:
        [`AnswerCheck`]

    Raises:
        [`DataError`]: If mathematics is to be compared and math-verify is not installed.
    """
    if entry is not None and family_of(entry) is not None:
        return _check_by_family(answer, gold, entry)
    return _compare(answer, gold, equal_expressions)


def answer_reward(
    completions: list[str | list[dict[str, Any]]],
    solution: list[str | None],
    entry: list[str | None] | None = None,
    problem_class: list[str | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    TRL reward function: 1.0 where the final answer of a completion is right, else 0.0, see [`check_answer`].

    Args:
        completions (`list[str | list[dict[str, Any]]]`):
            Completions, as text or messages, read by [`~trl_sgpo.data.final_answers.final_answer`].
        solution (`list[str | None]`):
            Short answers.
        entry (`list[str | None]`, *optional*):
            Which problems of reasoning-gym families they are, as [`~trl_sgpo.data.tasks.load_problems`] writes it.
        problem_class (`list[str | None]`, *optional*):
            Not used, a column of most datasets.
        **kwargs:
            Not used, the dataset's other columns.

    Returns:
        `list[float | None]`: `None` where the solution is `None`.

    Raises:
        [`DataError`]: If the package that checks the answer is not installed.
    """
    rewards: list[float | None] = []
    for completion, gold, raw in zip(completions, solution, entry or [None] * len(solution), strict=True):
        if gold is None:
            rewards.append(None)
            continue
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        answer = final_answer(text, lines=len(gold.strip().splitlines()))
        rewards.append(float(answer is not None and check_answer(answer, gold, raw).right))
    return rewards


def same_answer(first: str, second: str) -> bool:
    """
    Whether two final answers are the same, see [`check_answer`].

    Args:
        first (`str`):
            A final answer.
        second (`str`):
            Another one.

    Raises:
        [`DataError`]: If math-verify is needed and not installed.
    """
    return _compare(first, second, equal_expressions).right


def same_answer_text(first: str, second: str) -> bool:
    """
    Whether two final answers are the same text, number or list, without comparing mathematics.

    Args:
        first (`str`):
            A final answer.
        second (`str`):
            Another one.
    """
    return _compare(first, second, _never_equal).right


def _check_by_family(answer: str, gold: str, entry: str) -> AnswerCheck:
    if answer.strip() == gold.strip():
        return AnswerCheck(True, "text")
    if _PLAIN_NUMBER.fullmatch(gold) and _compare(answer, gold, _never_equal).right:
        return AnswerCheck(True, "number")
    return AnswerCheck(accepted(answer, gold, entry), "family")


def _never_equal(gold: str, answer: str) -> bool:
    return False


def _compare(answer: str, gold: str, equal: Callable[[str, str], bool]) -> AnswerCheck:
    if _SIMPLE.fullmatch(answer) and _SIMPLE.fullmatch(gold):
        return AnswerCheck(int(answer) == int(gold), "number")
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return AnswerCheck(" ".join(answer.split()) == " ".join(gold.split()), "text")
    return _compare_plain(plain_text(answer), plain_text(gold), equal)


def _compare_plain(answer: str, gold: str, equal: Callable[[str, str], bool]) -> AnswerCheck:
    if _folded(answer) == _folded(gold):
        return AnswerCheck(True, "text")
    wanted = read_number(gold, spaced=False)
    found = read_number(answer, spaced=wanted is not None)
    if found is not None and wanted is not None:
        return AnswerCheck(same_number(found, wanted), "number")
    lists = _items(answer), _items(gold)
    if lists[0] is not None and lists[1] is not None:
        return AnswerCheck(_same_items(*lists[0], *lists[1], equal), "list")
    if lists[0] is not None or lists[1] is not None:
        return AnswerCheck(False, "list")
    if wanted is None and _is_mathematics(gold) and (found is not None or _is_mathematics(answer)):
        return AnswerCheck(equal(gold, answer), "mathematics")
    return AnswerCheck(False, "number" if wanted is not None else "text")


def _folded(text: str) -> str:
    """Text without case, spaces beside signs, quotation marks, braces of one character and parentheses around all."""
    text = re.sub(r"\{(\w)\}", r"\1", text.casefold().replace("$", "").replace('"', ""))
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text).strip()
    if re.fullmatch(r"\([^(),]*\)", text):
        text = text[1:-1]
    return text


def _items(text: str) -> tuple[str, list[str]] | None:
    """Brackets and items of a list, `None` if the text is not one."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    brackets = ""
    if text[:1] in _PAIRS and text[-1:] in ")]}" and _closes_at_end(text):
        brackets, text = text[0] + text[-1], text[1:-1].strip()
    items = _split(text, ";") or _split(re.sub(r",?\s+and\s+", ", ", text), ",")
    if items is None:
        words = text.split()
        if len(words) > 1 and all(read_number(word) is not None for word in words):
            items = words
    if items is None:
        return (brackets, [text] if text else []) if brackets in ("[]", "{}") else None
    if any(not item for item in items):
        return None
    return brackets, items


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _split(text: str, separator: str) -> list[str] | None:
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if parts else None


def _same_items(
    brackets: str,
    answer: list[str],
    gold_brackets: str,
    gold: list[str],
    equal: Callable[[str, str], bool],
) -> bool:
    if len(answer) != len(gold):
        return False
    if (
        brackets
        and gold_brackets
        and brackets != gold_brackets
        and (len(gold) == 2 or "{}" in (brackets, gold_brackets))
    ):
        return False  # intervals, points and sets
    compare = equal if len(gold) <= MAX_EXPRESSIONS else _never_equal

    def same(first: str, second: str) -> bool:
        return _compare_plain(plain_text(first), plain_text(second), compare).right

    if gold_brackets != "{}":
        return all(same(*pair) for pair in zip(answer, gold, strict=True))
    left = list(gold)
    for item in answer:
        place = next((index for index, other in enumerate(left) if same(item, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _is_mathematics(text: str) -> bool:
    """Whether a text is an expression: no words but names of functions, and an operator, a digit or one letter."""
    letters = _COMMAND.sub(" ", text)
    if _OPERATOR.search(text) is None:
        return len(letters.strip()) == 1 and letters.strip().isalpha()
    words = [word for word in _WORD.findall(letters) if word.lower() not in _FUNCTIONS]
    # Two letters may be a product, such as 2xy, where something else shows that this is mathematics
    return not words or (max(map(len, words)) == 2 and re.search(r"[\d\\^]", text) is not None)
