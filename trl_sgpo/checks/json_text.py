"""Reading JSON that others wrote."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .characters import misplaced


MAX_BYTES = 128 << 20  # of a file, or of a line of JSON lines
MAX_DEPTH = 100  # of lists and mappings, far below what Python's recursion reaches
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
    if _is_deep(value):
        raise ValueError("it is nested too deeply")
    escaped = text if isinstance(text, str) else text.decode("latin-1")
    if _HALF.search(escaped) and (found := misplaced(value, halves_only=True)):
        raise ValueError(f"a text in it holds {found}")
    return value


def read_json(path: Path) -> Any:
    """
    Reads a JSON file of a run, an evaluation or a bank.

    Raises:
        `ValueError`: As [`parse_json`], or the file is a pipe or a device, or too large.
        `OSError`: It cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file, such as a pipe or a device")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    return parse_json(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[bytes]:
    """
    The lines of a file of JSON lines, one at a time. A last line without an end is left out: a killed process tore it.

    Raises:
        `ValueError`: The file is a pipe or a device, or a line is too long.
    """
    if not path.is_file():
        raise ValueError("it is no file, such as a pipe or a device")
    with path.open("rb") as file:
        while (line := file.readline(MAX_BYTES + 1)).endswith(b"\n"):
            yield line
    if len(line) > MAX_BYTES:
        raise ValueError(f"a line is longer than {MAX_BYTES >> 20} MiB")


def read_object(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file, `None` if the file is missing or holds none that [`read_json`] reads."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        parts = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, list | dict)]
        if not parts:
            return False
        level = [item for part in parts for item in part]
    return True


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value of a JSON file, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_in(part)
