"""Answers that are lists, tuples or sets."""

import re
from dataclasses import dataclass

from .numbers import read_number


_PAIRS = {"(": ")", "[": "]", "{": "}"}
_MEMBER = re.compile(r"[A-Za-z]\s*(?:\\in(?![A-Za-z])|∈)\s*")
_NAMED = re.compile(r"[A-Za-z]\s*=\s*(?=[(\[])")
_LABEL = re.compile(r"\s*[A-Za-z](?:_\{?\w+\}?)?\s*=")
_CONJUNCTION = re.compile(r",?\s+(?:and|or)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class AnswerList:
    """
    An answer that is a list.

    Args:
        brackets (`str`):
            Opening and closing bracket, or nothing.
        items (`list[str]`):
            Its items.
    """

    brackets: str
    items: list[str]

    @property
    def labelled(self) -> bool:
        """Whether its items are values of different letters, such as `x = 1, y = 2`, whose order does not matter."""
        labels = [label[0].strip(" =") for item in self.items if (label := _LABEL.match(item)) is not None]
        return len(labels) == len(self.items) == len(set(labels))

    def may_be(self, other: "AnswerList") -> bool:
        """Whether the brackets of two lists may mean the same: those of intervals, points and sets do not."""
        if not self.brackets or not other.brackets or self.brackets == other.brackets:
            return True
        return len(other.items) != 2 and "{}" not in (self.brackets, other.brackets)


def as_list(text: str) -> AnswerList | None:
    """
    Reads a list: items between commas or semicolons, "and" or "or", or numbers between spaces.

    Args:
        text (`str`):
            A text as [`~trl_sgpo.data.plain_text.plain_text`] leaves it.

    Returns:
        [`AnswerList`] or `None`: `None` if the text is no list.
    """
    text = text.replace("\\{", "{").replace("\\}", "}")
    if (prefix := _MEMBER.match(text) or _NAMED.match(text)) is not None:
        text = text[prefix.end() :]
    brackets = ""
    if text[:1] in _PAIRS and text[-1:] in ")]}" and _closes_at_end(text):
        brackets, text = text[0] + text[-1], text[1:-1].strip()
    items = _split(text, ";") or _split(_CONJUNCTION.sub(", ", text), ",")
    if items is None:
        words = text.split()
        if len(words) > 1 and all(read_number(word) is not None for word in words):
            items = words
    if items is None:
        return AnswerList(brackets, [text] if text else []) if brackets in ("[]", "{}") else None
    return AnswerList(brackets, items) if all(items) else None


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
