"""
Values of a recipe in YAML, read as the command line reads them.

One rule: a value that is not of the type its key wants is taken as the text that is written. `no` is the word no for
`eval_strategy` and false for `use_bank`, `1e-4` is a number, and a single value is a list of one for a key that takes
several. `None` is the same as an empty value for keys that may be empty.
"""

from collections.abc import Collection
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..data.mixture import ProblemsConfig
from ..errors import ConfigError
from ..yaml_files import check_keys


_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(key: str, hint: Any, choices: Collection[Any] | None, value: Any, text: Any) -> Any:
    """
    Reads a value as the type that its key wants.

    Args:
        key (`str`):
            The key, for messages.
        hint (`Any`):
            Its type, as annotated.
        choices (`Collection`, *optional*):
            The values it may have.
        value (`Any`):
            The value as YAML reads it.
        text (`Any`):
            The same with all scalars as the text that is written.

    Returns:
        `Any`: The value.

    Raises:
        [`ConfigError`]: It is of another type, or none of the choices.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if value is None or (text == "None" and NoneType in kinds):
        if NoneType not in kinds:
            raise ConfigError(f"`{key}` is empty: give it a value, or leave it out.")
        return None
    if isinstance(value, dict):
        if not any((get_origin(kind) or kind) is dict for kind in kinds):
            raise ConfigError(f"`{key}` takes no mapping of keys to values, got {value}.")
        return value
    if isinstance(value, list):
        if not lists:
            raise ConfigError(f"`{key}` takes one value, got a list of {len(value)}.")
        item = get_args(lists[0])[0]
        if item not in (str, int, float):
            return value
        return [_read_scalar(key, (item,), part, its) for part, its in zip(value, text, strict=True)]
    if choices is not None:
        if text not in choices:
            raise ConfigError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {text}.")
        return text
    if lists and str not in kinds:
        return [_read_scalar(key, get_args(lists[0]), value, text)]
    return _read_scalar(key, kinds, value, text)


def _read_scalar(key: str, kinds: tuple[Any, ...], value: Any, text: str) -> Any:
    for kind in kinds:
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
    if bool in kinds and (isinstance(value, bool) or text.casefold() in _WORDS):
        return value if isinstance(value, bool) else _WORDS[text.casefold()]
    if not isinstance(value, bool) and (number := _read_number(kinds, value, text)) is not None:
        return number
    if not {bool, int, float, str} & {*kinds}:
        if dict in {get_origin(kind) or kind for kind in kinds}:
            raise ConfigError(f"`{key}` must be a mapping of keys to values, got {text!r}.")
        return value
    if str in kinds:
        return text
    wanted = " or ".join(name for kind, name in _NAMES.items() if kind in kinds)
    raise ConfigError(f"`{key}` must be {wanted}, got {text!r}.")


def _read_number(kinds: tuple[Any, ...], value: Any, text: str) -> int | float | None:
    for kind in (int, float):
        if kind not in kinds:
            continue
        if isinstance(value, int | float) and (kind is float or float(value).is_integer()):
            return value if kind is float else int(value)
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def check_mixture(datasets: Any) -> None:
    """
    Checks the data sets of a mixture.

    Raises:
        [`ConfigError`]: They are no list of mappings with the keys of [`~trl_sgpo.data.mixture.ProblemsConfig`].
    """
    known = [item.name for item in fields(ProblemsConfig)]
    if not isinstance(datasets, list) or not all(isinstance(entry, dict) and "path" in entry for entry in datasets):
        raise ConfigError("`datasets` must be a list of mappings, each with a `path`, as in `- path: problems.jsonl`.")
    check_keys((key for entry in datasets for key in entry), known, "`datasets`")
