"""Files of two-phase traces: JSON lines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checks.json_text import parse_json
from ..errors import DataError
from ..files import write_file
from .row_files import text_lines
from .worked import Trace


def write_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Writes traces as JSON lines with the fields `prompt`, `strategy`, `execution` and `problem_class`."""
    fields = ("prompt", "strategy", "execution", "problem_class")
    lines = (json.dumps({name: vars(trace)[name] for name in fields}, ensure_ascii=False) for trace in traces)
    write_file(Path(path), "".join(f"{line}\n" for line in lines))


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
        lines = list(text_lines(path))
    except (OSError, ValueError) as error:
        raise DataError(f"The traces in {path} cannot be read ({error}): name a file of JSON lines.") from error
    traces = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = parse_json(line)
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
