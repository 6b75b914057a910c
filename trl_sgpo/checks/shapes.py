"""
Types, ranges and lengths of the values in a record of JSON, which somebody else may have written.

A check raises a `ValueError` that names the place of the value. It is not called for keys that a record does not name.
"""

from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any


Check = Callable[[Any, str], None]

MOST = 2.0**53  # larger floats are not exact


def _refuse(place: str, value: Any, wanted: str) -> None:
    raise ValueError(f"`{place}` must be {wanted}, not {short(value)}")


def text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        _refuse(place, value, "text")


def truth(value: Any, place: str) -> None:
    if not isinstance(value, bool):
        _refuse(place, value, "true or false")


def nothing(value: Any, place: str) -> None:
    if value is not None:
        _refuse(place, value, "null")


def count(value: Any, place: str) -> None:
    if type(value) is not int or not 0 <= value <= MOST:
        _refuse(place, value, "a whole number from 0 on")


def number(least: float = 0.0, most: float = MOST) -> Check:
    """A finite number within a range."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:
            _refuse(place, value, f"a number from {least:g} to {most:g}")

    return check


def exactly(wanted: Any) -> Check:
    def check(value: Any, place: str) -> None:
        if type(value) is not type(wanted) or value != wanted:
            _refuse(place, value, short(wanted))

    return check


def either(*checks: Check) -> Check:
    """What passes one of some checks. The error is that of the last one."""

    def check(value: Any, place: str) -> None:
        for one in checks[:-1]:
            try:
                return one(value, place)
            except ValueError:
                continue
        checks[-1](value, place)

    return check


def listing(each: Check, length: int | None = None) -> Check:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, list):
            _refuse(place, value, "a list")
        if length is not None and len(value) != length:
            raise ValueError(f"`{place}` has {len(value)} entries, not {length}")
        for index, item in enumerate(value):
            each(item, f"{place}[{index}]")

    return check


def mapping(each: Check) -> Check:
    """A mapping of any keys."""

    def check(value: Any, place: str) -> None:
        record({})(value, place)
        for key, item in value.items():
            each(item, f"{place}.{key}")

    return check


def record(parts: Mapping[str, Check], closed: bool = False, optional: Mapping[str, Check] | None = None) -> Check:
    """A mapping that has some keys, and may have the optional ones. If it is not closed it may have more."""
    known = {**parts, **(optional or {})}

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse(place, value, "a mapping")
        if missing := [key for key in parts if key not in value]:
            raise ValueError(f"`{place}` has no `{missing[0]}`")
        for key in known.keys() & value.keys():
            known[key](value[key], f"{place}.{key}")
        if closed and (unknown := value.keys() - known.keys()):
            raise ValueError(f"`{place}` has {short(min(unknown))}, which is unknown")

    return check
