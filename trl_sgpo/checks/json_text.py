"""Reading JSON that others wrote."""

import json
import re
from typing import Any

from .characters import misplaced


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """
    Reads a JSON document.

    Raises:
        `ValueError`: It is none, is nested too deeply, or a text in it holds half of a surrogate pair. The message is
            a clause without a full stop.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    escaped = text if isinstance(text, str) else text.decode("latin-1")
    if _HALF.search(escaped) and (found := misplaced(value, halves_only=True)):
        raise ValueError(f"a text in it holds {found}")
    return value
