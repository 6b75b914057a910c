"""
Whether an answer is right, decided rung by rung: the verifier of the problem's family, then text, number, list, and
mathematics only where both sides hold it.
"""

import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checks.process import compared_expressions
from ..errors import DataError
from ..method.prompts import Prompt, problem_text
from .answer_lists import AnswerList, as_list
from .families import MAX_LENGTH as FAMILY_MAX_LENGTH
from .families import accepted, family_of, has_several_answers
from .final_answers import final_answer
from .numbers import has_several_equations, read_number, read_stated_number, same_number
from .plain_text import plain_text


logger = logging.getLogger(__name__)

MAX_LENGTH = 1000
MAX_EXPRESSIONS = 16
_MAX_UNORDERED = (16, 4)  # items of a set that are compared in pairs, of one within a list or set; deeper: none
_MAX_DEPTH = 4  # of lists in lists
_MAX_SLOW = 16  # expressions, each of which may take seconds
_MOST_LATE = 64  # comparisons that passed a limit, if they are at least half of all
_SLOW: set[str] = set()  # solutions whose comparison passed a limit
_COUNTS: Counter[str] = Counter()  # of comparisons by mathematics: asked, and late

_SIMPLE = re.compile(r"[+-]?\d{1,15}")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:0|[1-9][\d,]*)(?:\.\d+)?(?:[eE][+-]\d+)?(?:/\d+|°)?")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_OPERATOR = re.compile(r"[-+*/^=<>|!_\\\d]")
# fmt: off
_FUNCTIONS = frozenset([
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "log", "ln", "exp",
    "sqrt", "pi", "gcd", "lcm", "mod", "max", "min", "lim", "inf",
])
# fmt: on
_NUMERAL_IN_BASE = re.compile(r"\(?(\d[\dA-Fa-f]*)\)?_\{?\s*\w+\s*\}?")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?")
_NAMED_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?([A-Ja-j])(?:\)[.:]?(?:\s|$)|[.:](?:\s|$)|$)", re.IGNORECASE
)
_YES_OR_NO = re.compile(r"(yes|no|true|false)\s*[,.;:(-]", re.IGNORECASE)
_ANOTHER_CHOICE = re.compile(r"[\s,]*(?:(?:or|and)\s+\(?[A-Ja-j]\b|\(?[A-Ja-j](?:[).:](?:\s|$)|\s*$))")
_ANOTHER_WORD = re.compile(r"\s*(?:(?:or|and)\s+)?(yes|no|true|false)\b", re.IGNORECASE)
_AFFIRMATIVE = ("yes", "true")
_COMPLEX = re.compile(r"[$(]*[+-]?[\d.]*[ij]?(?:[+-][\d.]*[ij]?)?[)$]*")
_UNEVALUATED = re.compile(
    r"\\(?:int|sum|prod|lim|partial)(?![A-Za-z])|\\frac\s*\{\s*d\s*\}\s*\{\s*d\w|\bd/d\w|\w'\s*\("
)
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:([ap])\.?m\.?)?")


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
    family = family_of(entry)
    if entry is not None and family is not None:
        return _check_by_family(answer, gold, entry, family)
    return _compare(answer, gold, _equal)


def answer_reward(
    completions: list[str | list[dict[str, Any]]],
    solution: list[str | float | None] | None = None,
    entry: list[str | None] | None = None,
    problem_class: list[str | None] | None = None,
    prompts: list[Prompt] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    TRL reward function: 1.0 where the final answer of a completion is right, else 0.0, see [`check_answer`].

    Args:
        completions (`list[str | list[dict[str, Any]]]`):
            Completions, as text or messages, read by [`~trl_sgpo.data.final_answers.final_answer`].
        solution (`list[str | float | None]`):
            Short answers, as texts or numbers.
        entry (`list[str | None]`, *optional*):
            Which problems of reasoning-gym families they are, as [`~trl_sgpo.data.tasks.load_problems`] writes it.
        problem_class (`list[str | None]`, *optional*):
            Not used, a column of most datasets.
        prompts (`list[str | list[dict]]`, *optional*):
            The problems. An expression that stands in one, and is not the solution as it is written, is no answer.
        **kwargs:
            Not used, the dataset's other columns.

    Returns:
        `list[float | None]`: `None` where the solution is `None`.

    Raises:
        [`DataError`]: If there are no solutions, or one is neither text nor number, or the package that checks the
            answer is not installed.
    """
    if solution is None:
        raise DataError("`answer_reward` needs a column `solution`: name the column with the answers `answer_column`.")
    rewards: list[float | None] = []
    nothing = [None] * len(solution)
    for completion, gold, raw, prompt in zip(completions, solution, entry or nothing, prompts or nothing, strict=True):
        if gold is None:
            rewards.append(None)
            continue
        if not isinstance(gold, str):
            if isinstance(gold, bool) or not isinstance(gold, int | float):
                raise DataError(f"A solution is {gold!r}: `answer_reward` needs a short text or a number.")
            gold = str(gold)
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        answer = final_answer(text, lines=len(gold.strip().splitlines()))
        if answer is None:
            rewards.append(0.0)
            continue
        found = check_answer(answer, gold, raw)
        repeats = found.rung == "mathematics" and prompt is not None and _repeats(answer, gold, problem_text(prompt))
        rewards.append(float(found.right and not repeats))
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
    return _compare(first, second, _equal).right


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


def comparison() -> Callable[[str, str], bool]:
    """
    As [`same_answer`], to compare many answers with each other. Expressions whose comparison passes a limit are
    compared as texts from then on, all of them after a few. So they are without math-verify.
    """
    slow: set[str] = set()

    def equal(gold: str, answer: str) -> bool:
        if len(slow) >= _MAX_SLOW or gold in slow or answer in slow:
            return False
        found = compared_expressions(gold, answer)
        if found is None:
            slow.update((gold, answer))
        return found is True

    compare = equal if importlib.util.find_spec("math_verify") else _never_equal
    return lambda first, second: _compare(first, second, compare).right


def _check_by_family(answer: str, gold: str, entry: str, family: str) -> AnswerCheck:
    if len(answer) > max(MAX_LENGTH, min(20 * len(gold), FAMILY_MAX_LENGTH)):
        return AnswerCheck(answer.strip() == gold.strip(), "text")
    lines = [[plain_text(line) for line in text.strip().splitlines()] for text in (answer, gold)]
    if lines[0] == lines[1]:
        return AnswerCheck(True, "text")
    if family == "complex_arithmetic" and _COMPLEX.fullmatch("".join(answer.split())) is None:
        return AnswerCheck(False, "family")
    if has_several_answers(family):
        return AnswerCheck(accepted(answer, gold, entry), "family")
    found = _compare(answer, gold, _equal if family == "complex_arithmetic" else _never_equal)
    if found.rung == "text" or (found.rung == "number" and _PLAIN_NUMBER.fullmatch(gold) is None):
        return AnswerCheck(False, "family")  # letters, and digits of other bases, are compared one by one
    right = found.right and len(lines[0]) == len(lines[1])
    return AnswerCheck(right, found.rung if right else "family")


def _repeats(answer: str, gold: str, problem: str) -> bool:
    """Whether an answer repeats an expression of the problem, which the right answer does not."""
    repeated, right, whole = (
        re.sub(r"[\s$]|\\[,;!: ]|\\(?:left|right)(?![A-Za-z])", "", each) for each in (answer, gold, problem)
    )
    return repeated in whole and repeated != right


def _equal(gold: str, answer: str) -> bool:
    """
    Whether two expressions are equal. A solution that passes a limit is compared as text from then on, and everything
    is after a few such solutions, or if most answers pass a limit.
    """
    if gold in _SLOW or len(_SLOW) >= _MAX_SLOW or _COUNTS["late"] >= max(_MOST_LATE, _COUNTS["asked"] / 2):
        return False
    found = compared_expressions(gold, answer)
    _COUNTS.update(asked=1, late=int(found is None))
    if found is None and compared_expressions(gold, "0") is None:  # it was not the answer
        _SLOW.add(gold)
    if len(_SLOW) >= _MAX_SLOW or _COUNTS["late"] >= max(_MOST_LATE, _COUNTS["asked"] / 2):
        logger.warning(
            f"{len(_SLOW)} solutions and {_COUNTS['late']} of {_COUNTS['asked']} answers took longer to compare than "
            f"is allowed, such as {answer[:80]!r} with {gold[:80]!r}: from now on no expressions are compared, and an "
            "answer is right only if its text, number or list is. Remove such problems."
        )
    return found is True


def _never_equal(gold: str, answer: str) -> bool:
    return False


def _compare(answer: str, gold: str, equal: Callable[[str, str], bool]) -> AnswerCheck:
    if _SIMPLE.fullmatch(answer) and _SIMPLE.fullmatch(gold):
        return AnswerCheck(int(answer) == int(gold), "number")
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return AnswerCheck(" ".join(answer.split()) == " ".join(gold.split()), "text")
    return _compare_plain(plain_text(answer), plain_text(gold), equal)


def _compare_plain(answer: str, gold: str, equal: Callable[[str, str], bool], depth: int = 0) -> AnswerCheck:
    if _folded(answer) == _folded(gold) or _same_choice(answer, gold) or _same_time(answer, gold):
        return AnswerCheck(True, "text")
    wanted = read_number(gold, spaced=False)
    found = read_number(answer, spaced=wanted is not None)
    if wanted is not None and found is None:
        found = read_stated_number(answer)
    if found is not None and wanted is not None:
        return AnswerCheck(same_number(found, wanted), "number")
    bases = _NUMERAL_IN_BASE.fullmatch(answer), _NUMERAL_IN_BASE.fullmatch(gold)
    if bases[0] is not None or bases[1] is not None:
        digits = [text if base is None else base[1] for text, base in zip((answer, gold), bases, strict=True)]
        return AnswerCheck(digits[0] == digits[1] and None in bases, "number")
    lists = as_list(answer), as_list(gold)
    if lists[0] is not None and lists[1] is not None:
        # 1,000 is no list where it is a number
        same = found is None and _same_items(lists[0], lists[1], equal, depth)
        return AnswerCheck(same, "list")
    if lists[0] is not None or lists[1] is not None:
        return AnswerCheck(False, "list")
    if wanted is None and _is_mathematics(gold) and (found is not None or _is_mathematics(answer)):
        several = has_several_equations(answer) and not has_several_equations(gold)
        evaluated = _UNEVALUATED.search(answer) is None or _UNEVALUATED.search(gold) is not None
        return AnswerCheck(evaluated and not several and equal(gold, answer), "mathematics")
    return AnswerCheck(False, "number" if wanted is not None else "text")


def _same_choice(answer: str, gold: str) -> bool:
    """Whether an answer names the choice that a gold answer such as `B` or `yes` is, and says more about it."""
    if (letter := _CHOICE.fullmatch(gold)) is not None:
        named = _NAMED_CHOICE.match(answer)
        if named is None or _ANOTHER_CHOICE.match(answer, named.end()) is not None:
            return False
        return named[1].upper() == letter[1].upper()
    named = _YES_OR_NO.match(answer)
    if named is None:
        return False
    word, another = named[1].casefold(), _ANOTHER_WORD.match(answer, named.end())
    if another is not None and (another[1].casefold() in _AFFIRMATIVE) != (word in _AFFIRMATIVE):
        return False
    return word == gold.casefold()


def _same_time(answer: str, gold: str) -> bool:
    """Whether both are the same time of day. One of them may lack am or pm."""
    times = [_TIME.fullmatch(text.casefold()) for text in (answer, gold)]
    if times[0] is None or times[1] is None or (times[0][2] is None and times[1][2] is None):
        return False
    own, other = ((int(time[1]), int(time[2] or 0), int(time[3] or 0), time[4]) for time in times if time)
    return own[:3] == other[:3] and (own[3] == other[3] or None in (own[3], other[3]))


def _folded(text: str) -> str:
    """Text without case, spaces beside signs, quotation marks, braces of one character and parentheses around all."""
    text = re.sub(r"\{(\w)\}", r"\1", text.casefold().replace("$", "").replace('"', ""))
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text).strip()
    if re.fullmatch(r"\([^(),]*\)", text):
        text = text[1:-1]
    return text


def _same_items(answer: AnswerList, gold: AnswerList, equal: Callable[[str, str], bool], depth: int) -> bool:
    if len(answer.items) != len(gold.items) or not answer.may_be(gold) or depth == _MAX_DEPTH:
        return False
    compare = equal if len(gold.items) <= MAX_EXPRESSIONS else _never_equal

    def same(first: str, second: str) -> bool:
        return _compare_plain(plain_text(first), plain_text(second), compare, depth + 1).right

    if gold.brackets != "{}" and not (answer.labelled and gold.labelled):
        return all(same(*pair) for pair in zip(answer.items, gold.items, strict=True))
    if len(gold.items) > (_MAX_UNORDERED[depth] if depth < len(_MAX_UNORDERED) else 0):
        return Counter(map(_key, answer.items)) == Counter(map(_key, gold.items))
    left = list(gold.items)
    for item in answer.items:
        place = next((index for index, other in enumerate(left) if same(item, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _key(item: str) -> Any:
    """The number that an item of a large set is, or its text."""
    text = plain_text(item)
    number = read_number(text, spaced=False)
    return number.value if number is not None and number.label is None else _folded(text)


def _is_mathematics(text: str) -> bool:
    """Whether a text is an expression, and no words, code, date, time, range or score."""
    letters = _COMMAND.sub(" ", text)
    if re.search(r"[A-Za-z\\^!]", text) is None or (":" in text and "\\" not in text):
        return False
    if _OPERATOR.search(text) is None:
        return len(letters.strip()) == 1 and letters.strip().isalpha()
    if text.isalnum() and re.fullmatch(r"\d+[a-z]+", text) is None:
        return False  # such as B4 or CO2
    words = [word for word in _WORD.findall(letters) if word.lower() not in _FUNCTIONS]
    # Two letters may be a product, such as 2xy, where something else shows that this is mathematics
    return not words or (max(map(len, words)) == 2 and re.search(r"[\d\\^]", text) is not None)
