"""A recipe while it is converted, with what was changed and why."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from ..checks.secrets import HIDDEN, is_secret, redacted


LONGEST = 40  # characters of a value that are shown
NONE = "–"


def in_short(key: str, value: Any) -> str:
    """A value in one line, as YAML writes it. That of a secret key is not shown, nor users in addresses."""
    if value is None:
        return NONE
    if is_secret(key):
        return HIDDEN
    text = yaml.safe_dump(redacted(value), default_flow_style=True, width=10_000, allow_unicode=True)
    text = " ".join(text.removesuffix("\n...\n").split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 + 1 :]}"


@dataclass
class Conversion:
    """
    A recipe while it is converted.

    Args:
        values (`dict[str, Any]`):
            Its keys and values.
        changes (`list[tuple[str, str, str, str]]`):
            Key, old value, new one and reason of each change.
        problems (`list[str]`):
            What cannot be converted, with the fix.
    """

    values: dict[str, Any]
    changes: list[tuple[str, str, str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def said(self, key: str, before: Any, after: Any, why: str) -> None:
        """Records a change that was made."""
        self.changes.append((key, in_short(key, before), in_short(key, after), why))

    def set(self, key: str, value: Any, why: str) -> None:
        """Sets a key, if it has another value."""
        before = self.values.get(key)
        self.values[key] = value
        if before != value:
            self.said(key, before, value, why)

    def drop(self, key: str, why: str) -> None:
        """Takes a key out."""
        self.said(key, self.values.pop(key), None, why)

    def rename(self, key: str, new: str, value: Any, why: str) -> None:
        """Gives a key its new name and value, unless that is there, too."""
        before = self.values.pop(key)
        if new in self.values:
            self.said(key, before, None, f"`{new}` is there, too")
        elif before is None:
            self.said(key, None, None, "it has no value")
        else:
            self.values[new] = value
            shown = HIDDEN if is_secret(new) else in_short(new, value)
            self.changes.append((key, in_short(key, before), f"{new}: {shown}", why))

    def number(self, key: str, default: int) -> int:
        """The value of a key that counts something, at least 1. One that is no whole number is a problem."""
        value = self.values.get(key)
        if value is None:
            return default
        try:
            if not isinstance(value, bool) and float(value) >= 1 and float(value).is_integer():
                return int(float(value))
        except (TypeError, ValueError):
            pass
        self.problems.append(f"`{key}` must be a whole number, at least 1, got {in_short(key, value)}.")
        return default

    def is_on(self, key: str) -> bool:
        """Whether a key is true."""
        return str(self.values.get(key)).casefold() in ("true", "yes", "on", "1")
