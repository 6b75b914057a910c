"""Values of a ledger, checked where they are read: SQLite stores any type in any column, and anyone writes a file."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from ..checks.json_text import parse_json
from ..errors import BankError
from ..method.prompts import MAX_STRATEGY
from .rows import MAX_COUNT, MAX_ITEMS, expect_possible
from .strategy import Execution, Strategy


FIELDS = tuple(field.name for field in fields(Strategy))
LISTS = ("source_problems", "parents")
MAX_DIMENSION = 2**16  # of an embedding

_STRATEGY = tuple(int if field.type is int else float if field.type is float else str for field in fields(Strategy))
_EXECUTION = tuple(field.type for field in fields(Execution))
_NAMES_OF_EXECUTIONS = tuple(field.name for field in fields(Execution))


def _expect(row: tuple[Any, ...], types: tuple[Any, ...], names: tuple[str, ...]) -> None:
    if tuple(map(type, row)) == types:
        return
    for name, value, wanted in zip(names, row, types, strict=True):
        if type(value) is not wanted:
            raise ValueError(f"{name} is no {'text' if wanted is str else 'number'}")


def to_strategy(row: tuple[Any, ...]) -> Strategy:
    """The strategy of a row with the columns of `FIELDS`, or a `ValueError`."""
    _expect(row, _STRATEGY, FIELDS)
    values = dict(zip(FIELDS, row, strict=True))
    for name in LISTS:
        values[name] = () if values[name] == "[]" else _texts(values[name], name)
    if max(value for value in row if type(value) is int) > MAX_COUNT or values["shown"] < 0:
        raise ValueError("a count is larger than 2**53, or negative")
    if len(values["text"]) > MAX_STRATEGY:
        raise ValueError(f"a text has more than {MAX_STRATEGY:,} characters")
    try:
        return Strategy(**values)
    except BankError as error:
        raise ValueError(str(error).rstrip(".")) from error


def _texts(text: str, name: str) -> tuple[str, ...]:
    values = parse_json(text)
    if type(values) is not list or len(values) > MAX_ITEMS or not all(type(each) is str for each in values):
        raise ValueError(f"{name} is no list of at most {MAX_ITEMS} texts")
    return tuple(values)


def to_execution(row: tuple[Any, ...]) -> Execution:
    """The execution of a row, or a `ValueError`."""
    _expect(row, _EXECUTION, _NAMES_OF_EXECUTIONS)
    execution = Execution(*row)
    expect_possible(execution)
    return execution


def to_text(value: Any, name: str) -> str:
    """A text, or a `ValueError`."""
    _expect((value,), (str,), (name,))
    return value


def to_embeddings(rows: Iterable[tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """Embeddings by ids, all of one length, or a `ValueError`."""
    stored = dict(rows)
    if not stored:
        return {}
    if {*map(type, stored)} != {str} or {*map(type, stored.values())} != {bytes}:
        raise ValueError("an id is no text, or an embedding no bytes")
    sizes = {*map(len, stored.values())}
    size = max(sizes)
    if len(sizes) > 1 or size % 4 or not 0 < size <= 4 * MAX_DIMENSION:
        raise ValueError(f"embeddings differ in length, or have none or more than {MAX_DIMENSION:,} numbers")
    matrix = np.frombuffer(b"".join(stored.values()), dtype="<f4").reshape(len(stored), -1)
    if not np.isfinite(matrix).all():
        raise ValueError("an embedding has a number that is not finite")
    return dict(zip(stored, matrix, strict=True))


def to_fingerprint(text: str) -> np.ndarray:
    """The embedding of a text of JSON, or a `ValueError`."""
    values = parse_json(text)
    if type(values) is not list or not all(type(x) in (int, float) and abs(x) <= MAX_COUNT for x in values):
        raise ValueError("the fingerprint is no list of numbers")
    return np.array(values, dtype=np.float32)
