"""Reading JSON that others wrote."""

import json
import re
from typing import Any

from .characters import misplaced


MAX_LEVELS = 100
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """
    Reads a JSON document.

    Raises:
        `ValueError`: It is none, is nested in more than 100 levels, or a text in it holds half of a surrogate pair.
            The message is a clause without a full stop.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _is_deep(value):
        raise ValueError("it is nested too deeply")
    escaped = text if isinstance(text, str) else text.decode("latin-1")
    if _HALF.search(escaped) and (found := misplaced(value, halves_only=True)):
        raise ValueError(f"a text in it holds {found}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value has more levels than functions that call themselves can follow."""
    level = [value]
    for _ in range(MAX_LEVELS):
        parts = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for part in parts for each in part]
        if not level:
            return False
    return True
