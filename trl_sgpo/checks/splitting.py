"""Patterns with which a tokenizer splits and replaces: how many ways of matching a text one of them has."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError


LINE = 200  # characters, with which ways are counted
MAX_WAYS = 2_000_000
MAX_LENGTH = 4_000
MAX_DEPTH = 20
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "config")  # the last in `tekken.json`
_FEW = 8  # a repetition of at most as many more multiplies the ways by a number, any other by the length of the line

_PROPERTY = r"\\[pP]\{\^?[\w &=-]{1,40}\}"
_CHARACTER = r"\\x\{[0-9A-Fa-f]{1,6}\}|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}"
_ATOM = re.compile(rf"{_PROPERTY}|{_CHARACTER}|\\[dDsSwWbBAzZrnt]|\\[^\w]|[^\\()\[\]{{}}|*+?]", re.DOTALL)
_IN_SET = re.compile(rf"{_PROPERTY}|{_CHARACTER}|\\[dDsSwWrnt]|\\[^\w]|\[:\^?[a-z]{{1,10}}:\]|[^\\\[\]]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?:[imx]{0,3}:|<?[=!]))?")
_NAMED = re.compile(r"\[:\^?[a-z]{1,10}:\]")
_TIMES = re.compile(r"(?:([*+?])|\{(\d{1,4})\}|\{(\d{1,4})?,(\d{1,4})?\})([?+]?)")


@dataclass
class _Branch:
    """A sequence of parts: `factor * LINE ** degree` ways of matching."""

    degree: int = 0
    factor: int = 1

    @property
    def ways(self) -> float:
        return self.factor * LINE**self.degree / math.factorial(self.degree)

    def repeated(self, least: int, most: float) -> "_Branch":
        if (least, most) == (0, 1):
            return _Branch(self.degree, self.factor + 1)
        if self != _Branch():
            raise ValueError("it repeats a group that matches in several ways")
        return _Branch(0, int(most - least) + 1) if most - least <= _FEW else _Branch(1)


@dataclass
class _Group:
    """Branches of which one matches."""

    branches: list[_Branch] = field(default_factory=lambda: [_Branch()])

    def add(self, part: _Branch) -> None:
        last = self.branches[-1]
        last.degree, last.factor = last.degree + part.degree, last.factor * part.factor

    @property
    def whole(self) -> _Branch:
        degree = max(branch.degree for branch in self.branches)
        return _Branch(degree, sum(branch.factor for branch in self.branches))


def check_splitting(source: str | Path, tokenizer: dict[str, Any]) -> None:
    """
    Checks that the patterns of a tokenizer match any text in a time that grows little with its length. Patterns of
    known tokenizers do; one that does not may keep a process for minutes, in a library that cannot be interrupted.

    Args:
        source (`str` or `Path`):
            How the user named the model, for messages.
        tokenizer (`dict`):
            Content of its `tokenizer.json` or `tekken.json`.

    Raises:
        [`ModelError`]: A pattern has more than two million ways of matching a line of 200 characters, or parts that
            no known tokenizer has.
    """
    for pattern in _patterns(tokenizer):
        try:
            ways = ways_of_matching(pattern)
            problem = None if ways <= MAX_WAYS else "it has too many repetitions one after the other"
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise ModelError(
                f"The tokenizer of {source} has the pattern {pattern[:60]!r}, which may match for ever ({problem}): "
                "use another model."
            )


def ways_of_matching(pattern: str) -> float:
    """
    Counts at most how many ways of matching a pattern has at one place of a line of 200 characters.

    Args:
        pattern (`str`):
            A regular expression of the library `tokenizers`.

    Returns:
        `float`

    Raises:
        `ValueError`: It repeats what matches in several ways, or has parts that are not known here.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it is longer than {MAX_LENGTH:,} characters")
    open_groups, place = [_Group()], 0
    while place < len(pattern):
        if group := _GROUP.match(pattern, place):
            if len(open_groups) > MAX_DEPTH:
                raise ValueError("it is nested too deeply")
            open_groups.append(_Group())
            place = group.end()
            continue
        if pattern[place] == "|":
            open_groups[-1].branches.append(_Branch())
            place += 1
            continue
        if pattern[place] == ")" and len(open_groups) > 1:
            part, place = open_groups.pop().whole, place + 1
        elif pattern[place] == "[":
            part, place = _Branch(), _end_of_set(pattern, place)
        elif atom := _ATOM.match(pattern, place):
            part, place = _Branch(), atom.end()
        else:
            raise ValueError(f"{pattern[place : place + 4]!r} in it is not known here")
        if times := _TIMES.match(pattern, place):
            part, place = part.repeated(*_range(times)), times.end()
            if times[1] is None and times[5]:  # after `{2,3}`, a sign repeats the repetition
                part = part.repeated(*((1, math.inf) if times[5] == "+" else (0, 1)))
        open_groups[-1].add(part)
    if len(open_groups) > 1:
        raise ValueError("a group of it has no end")
    return sum(branch.ways for branch in open_groups[0].branches)


def _range(times: re.Match[str]) -> tuple[int, float]:
    sign, exact, low, high, _ = times.groups()
    if sign is not None:
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[sign]
    if exact is not None:
        return int(exact), int(exact)
    return int(low or 0), math.inf if high is None else int(high)


def _end_of_set(pattern: str, place: int) -> int:
    """Where a set of characters ends, which may hold other sets."""
    depth, first = 0, True
    while place < len(pattern):
        if pattern[place] == "[" and not _NAMED.match(pattern, place):
            depth, place, first = depth + 1, place + 1, True
            place += pattern.startswith("^", place)
        elif pattern[place] == "]" and not first:
            depth, place = depth - 1, place + 1
            if depth == 0:
                return place
        elif pattern[place] == "]":  # the first of a set is a character
            place, first = place + 1, False
        elif part := _IN_SET.match(pattern, place):
            place, first = part.end(), False
        else:
            break
    raise ValueError("a set of characters of it has no end")


def _patterns(tokenizer: dict[str, Any]) -> Iterator[str]:
    parts: list[Any] = [tokenizer.get(name) for name in _STEPS]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            yield from (str(part[key]) for key in ("Regex", "pattern") if isinstance(part.get(key), str))
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part)
