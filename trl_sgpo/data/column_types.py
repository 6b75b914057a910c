"""Types of columns that are read from text: one that holds all values, or text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from .columns import as_answer
from .row_files import Constant, Integer, Number, Truth


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

Kind = str | list["Kind"] | dict[str, "Kind"] | None
"""
What values have in common: `"text"`, `"truth"`, `"integer"`, `"real"` or `"mixed"`, lists of a kind, mappings with
kinds by key, or `None` if all are missing.
"""
MIXED = "mixed"
_NUMBERS = ("integer", "real")
_DIGITS = 19  # of the largest 64-bit integer
_DEPTH = 32  # of types; Arrow reads 64 levels


class ColumnType:
    """
    The type of a column, found by looking at one value after another.

    Attributes:
        kinds (`set[str]`):
            Kinds of values that are no lists or mappings. In addition `"rounded"` if floating point rounds a whole
            number, `"huge"` if no type holds a number, and `"respelled"` if a number or truth value is written in
            another way than [`~trl_sgpo.data.columns.as_answer`] writes it.
        nested (`Kind`):
            Kind of the lists and mappings.
    """

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.nested: Kind = None

    def add(self, value: Any) -> None:
        """Takes a value into account."""
        if value is None:
            return
        if isinstance(value, list | dict):
            self.nested = _merged(self.nested, _kind_of(value))
        elif isinstance(value, Number):
            self.kinds |= _kinds_of_number(value)
        elif isinstance(value, bool | Truth):
            self.kinds.add("truth")
            if text_of(value) != as_answer(_truth(value)):
                self.kinds.add("respelled")
        else:
            self.kinds.add("text")

    @property
    def kind(self) -> Kind:
        """The kind that holds all values."""
        found = self.kinds - {"rounded", "huge", "respelled"}
        if self.nested is not None:
            return MIXED if found else self.nested
        if len(found) > 1 and not found <= set(_NUMBERS):
            return "text"
        if "huge" in self.kinds or ("rounded" in self.kinds and "real" in found):
            return "text"
        return "real" if "real" in found else next(iter(found), None)

    @property
    def is_respelled(self) -> bool:
        """Whether the texts that values are written with are not those of the typed values."""
        return "respelled" in self.kinds and self.kind not in ("text", MIXED)


def without_many_keys(kinds: Mapping[str, Kind], most: int) -> dict[str, Kind]:
    """The kinds of columns, of which those with the most keys are mixed where all have more keys than types hold."""
    kept = dict(kinds)
    for name, kind in sorted(kinds.items(), key=lambda item: _keys(item[1])):
        most -= _keys(kind)
        if most < 0:
            kept[name] = MIXED
    return kept


def features_of(kinds: Mapping[str, Kind]) -> "Features":
    """The features of columns by their kinds. A mixed column is one of JSON."""
    import pyarrow as pa
    from datasets import Features, Json

    typed = {name: _arrow_type(kind) for name, kind in kinds.items() if kind != MIXED}
    features = Features.from_arrow_schema(pa.schema(typed.items()))
    return Features({name: Json() if kind == MIXED else features[name] for name, kind in kinds.items()})


def with_times_as_text(features: "Features") -> "Features":
    """Features with texts for dates and times: Python has none for years beyond 9999."""
    from datasets import Features, LargeList, List, Value

    def changed(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: changed(part) for name, part in feature.items()}
        if isinstance(feature, List | LargeList):
            return replace(feature, feature=changed(feature.feature))
        is_time = isinstance(feature, Value) and feature.dtype.startswith(("timestamp", "date", "time", "duration"))
        return Value("string") if is_time else feature

    return Features(changed(features))


def typed_array(values: Sequence[Any], kind: Kind) -> "pa.Array":
    """The values of a column as an array of its type."""
    import pyarrow as pa

    if kind == MIXED:
        texts = [None if value is None else json.dumps(_plain(value)) for value in values]
        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
    if kind != "text":
        values = [_typed(value, kind) for value in values]
    elif not all(type(value) is str for value in values):
        values = [text_of(value) for value in values]
    return pa.array(values, _arrow_type(kind))


def text_of(value: Any) -> str | None:
    """The text that a text, number or truth value is written with, `None` if it is missing or not a number."""
    if value is None or isinstance(value, Constant):
        return None
    return value if isinstance(value, str) else as_answer(value)


def _kinds_of_number(text: Number) -> set[str]:
    if isinstance(text, Constant):
        return {"real"}
    if not isinstance(text, Integer):
        value = float(text)
        respelled = as_answer(value) != text
        return {"real", *(["respelled"] if respelled else []), *(["huge"] if abs(value) == float("inf") else [])}
    if not _fits(text):
        return {"integer", "huge"}
    number = int(text)
    kinds = {"integer"} if str(number) == text else {"integer", "respelled"}
    return kinds if int(float(number)) == number else kinds | {"rounded"}


def _fits(text: Integer) -> bool:
    """Whether 64 bits hold a whole number."""
    return len(text) <= _DIGITS + 1 and -(2**63) <= int(text) < 2**63


def _kind_of(value: Any, depth: int = 0) -> Kind:
    if depth > _DEPTH:
        return MIXED
    if isinstance(value, list):
        items = reduce(_merged, (_kind_of(item, depth + 1) for item in value), None)
        return MIXED if items == MIXED else [items]
    if isinstance(value, dict):
        kinds = {key: _kind_of(item, depth + 1) for key, item in value.items()}
        return kinds if kinds and MIXED not in kinds.values() else MIXED
    if isinstance(value, Number):
        return "integer" if isinstance(value, Integer) and _fits(value) else "real"
    if value is None:
        return None
    return "truth" if isinstance(value, bool) else "text"


def _keys(kind: Kind) -> int:
    """Keys of mappings at any depth of a kind."""
    if isinstance(kind, list):
        return _keys(kind[0])
    return len(kind) + sum(map(_keys, kind.values())) if isinstance(kind, dict) else 0


def _merged(first: Kind, second: Kind) -> Kind:
    """The kind of a list's items or of nested values, given those of two of them."""
    if first is None or first == second:
        return second
    if second is None:
        return first
    if first in _NUMBERS and second in _NUMBERS:
        return "real"
    if isinstance(first, list) and isinstance(second, list):
        items = _merged(first[0], second[0])
        return MIXED if items == MIXED else [items]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        kinds = {key: _merged(kind, second[key]) for key, kind in first.items()}
        return MIXED if MIXED in kinds.values() else kinds
    return MIXED


def _arrow_type(kind: Kind) -> "pa.DataType":
    import pyarrow as pa

    if isinstance(kind, list):
        return pa.list_(_arrow_type(kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(key, _arrow_type(item)) for key, item in kind.items()])
    types = {None: pa.null, "text": pa.string, "truth": pa.bool_, "integer": pa.int64, "real": pa.float64}
    return types[kind]()


def _typed(value: Any, kind: Kind) -> Any:
    if value is None:
        return None
    if isinstance(kind, list):
        return [_typed(item, kind[0]) for item in value]
    if isinstance(kind, dict):
        return {key: _typed(value[key], item) for key, item in kind.items()}
    if kind == "text":
        return text_of(value)
    if kind == "truth":
        return _truth(value)
    return int(value) if kind == "integer" else float(value)


def _truth(value: bool | Truth) -> bool:
    return value if isinstance(value, bool) else value.casefold() == "true"


def _plain(value: Any) -> Any:
    """A value with numbers as numbers."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Integer) and _fits(value):
        return int(value)
    if isinstance(value, Number):
        return float(value)
    return value
