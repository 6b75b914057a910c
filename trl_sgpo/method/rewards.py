"""
Rewards of a strategy besides its outcomes: coherence and leak, computed from its text.

A strategy is coherent when it is well formed (parses, ended by itself, does not repeat
itself, says when it applies) and general (uses no numbers or quotations of its instance).
"""

import re
from collections.abc import Sequence

from ..data.numbers import numbers_in, read_number
from ..data.plain_text import plain_text
from .disguises import joined, undisguised, visible
from .prompts import MAX_STRATEGY, ParsedStrategy


_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,/:]\d+)*(?![\w])")
_QUOTED = re.compile(r"\"([^\"\n]{3,})\"|'([^'\n]{3,})'(?!\w)")
_STEP_NUMBER = re.compile(
    r"^[ \t]*\(?(?:step\s*)?\d+[ \t]*[.):][ \t]*(?=[^\s\d])|\bsteps?\s+\d+\b", re.IGNORECASE | re.MULTILINE
)
_APPLIES = re.compile(r"\b(?:when|whenever|if|for|to|given|with|in)\b", re.IGNORECASE)
_USUAL_STEPS = 10
_BESIDE_SIGNS = re.compile(r"(?<=[^\w\s])\s+|(?<=\d)\s+(?=[^\w\s])")
_FINAL_ANSWER = re.compile(
    r"(?:\\boxed\s*\{|####)\s*[-$\d]|\\boxed[ \t]+[-$\d]|\b(?:final\s+)?answer\s*(?:is|=|:)\s*[-$\d]"
    r"|<answer>\s*[-$\d]",
    re.IGNORECASE,
)


def repetition(text: str, n: int = 3) -> float:
    """
    Share of a text's word `n`-grams that occurred before in it.

    Args:
        text (`str`):
            Any text.
        n (`int`, *optional*, defaults to `3`):
            Words a gram.

    Returns:
        `float`: 0 for a text that never repeats itself, close to 1 for a loop.
    """
    words = [word.casefold() for word in _WORD.findall(text)]
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def literals(text: str) -> set[str]:
    """
    The parts of a problem that belong to its instance: its numbers and what it quotes.

    Args:
        text (`str`):
            A problem or a strategy. The numbers of numbered steps do not count.

    Returns:
        `set[str]`
    """
    text = _STEP_NUMBER.sub(" ", text)
    quoted = {next(filter(None, groups)).casefold() for groups in _QUOTED.findall(text)}
    return set(_NUMBER.findall(text)) | quoted


def copied_literals(strategy: str, problem: str) -> set[str]:
    """Literals of the problem that occur in the strategy."""
    body = _STEP_NUMBER.sub(" ", strategy).casefold()
    return {
        literal
        for literal in literals(problem)
        if literal in body and re.search(rf"(?<![\w.]){re.escape(literal)}(?![\w]|\.\d)", body) is not None
    }


def coherence(strategy: ParsedStrategy, problem: str) -> float:
    """
    Coherence of a strategy: the mean of its form and its generality.

    Form is 0 for a malformed strategy. Otherwise it is 1, less its [`repetition`] beyond a tenth, less a quarter when
    the first sentence does not say when the strategy applies and a quarter when it has fewer than four words.
    Generality is 1 / (1 + literals of the instance used), and 0 for a malformed strategy.

    Args:
        strategy ([`~trl_sgpo.method.prompts.ParsedStrategy`]):
            The parsed strategy.
        problem (`str`):
            Text of the problem it was written for.

    Returns:
        `float`: In [0, 1].
    """
    if strategy.flaw is not None:
        return 0.0
    words = _WORD.findall(strategy.text)
    opening = re.split(r"[.\n]", strategy.text, maxsplit=1)[0] if not strategy.steps else strategy.text
    form = 1.0 - max(0.0, repetition(strategy.text) - 0.1)
    form -= 0.25 * (_APPLIES.search(opening) is None) + 0.25 * (len(words) < 4)
    general = 1 / (1 + len(copied_literals(strategy.text, problem)))
    return max(0.0, form + general) / 2


def leak(strategy: str, problem: str, answer: str | None) -> float:
    """
    Whether a strategy contains the answer of its problem.

    It does if it contains the answer as a word of its own, or its number, unless the problem contains it too, or if it
    has the mark-up of a final answer followed by a number. Both are compared in the plain form in which answers are,
    without disguises: `1,000` is `1000`, and `9 (apples)` is 9. Numbers of numbered steps are not read, nor are those
    up to twelve in words.

    Args:
        strategy (`str`):
            Text of the strategy. The first 16,384 characters of it, and of the problem, are read.
        problem (`str`):
            Text of the problem it was written for.
        answer (`str` or `None`):
            Its short answer, if known.

    Returns:
        `float`: 1.0 or 0.0.
    """
    strategy, problem = strategy[:MAX_STRATEGY], problem[:MAX_STRATEGY]
    if _FINAL_ANSWER.search(visible(strategy)) is not None:
        return 1.0
    if answer is None or not (wanted := _form(answer)):
        return 0.0
    body = _form(_without_steps(strategy))
    number = read_number(wanted)
    if number is not None and number.value in numbers_in(body) and number.value not in numbers_in(_form(problem)):
        return 1.0
    for change in (str, joined, _closed):
        if _holds(change(body), change(wanted)) and not _holds(change(_form(problem)), change(wanted)):
            return 1.0
    return 0.0


def _holds(text: str, part: str) -> bool:
    return part in text and re.search(rf"(?<![\w.]){re.escape(part)}(?!\w|\.\d)", text) is not None


def _closed(text: str) -> str:
    """The text without spaces beside signs."""
    return _BESIDE_SIGNS.sub("", text)


def _form(text: str) -> str:
    return " ".join(undisguised(plain_text(text)).split())


def _without_steps(text: str) -> str:
    """The text without numbers of steps. One that no step can have is a number like others."""
    steps = max(len(_STEP_NUMBER.findall(text)), _USUAL_STEPS)

    def left(match: re.Match[str]) -> str:
        (number,) = re.findall(r"\d+", match[0])
        return " " if len(number) < 5 and int(number) <= steps else match[0]

    return _STEP_NUMBER.sub(left, text)


def distinct(strategies: Sequence[str]) -> float:
    """Share of distinct texts among strategies, 1 when all differ."""
    return len({" ".join(text.casefold().split()) for text in strategies}) / max(len(strategies), 1)
