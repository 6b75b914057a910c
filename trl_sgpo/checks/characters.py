"""Characters that no path, variable or file in UTF-8 can hold: U+0000 and halves of surrogate pairs."""

import re
from collections.abc import Mapping
from typing import Any


_NONE = re.compile("[\0\ud800-\udfff]")


def misplaced(value: Any, halves_only: bool = False) -> str | None:
    """
    Finds such a character in a value, at any depth.

    Args:
        value (`Any`):
            Texts, and mappings and lists of them. Others hold none.
        halves_only (`bool`, *optional*, defaults to `False`):
            Whether U+0000 may be there, as in a text that is no path.

    Returns:
        `str` or `None`: What it is, as in "holds U+0000, ...".
    """
    if isinstance(value, str):
        character = _NONE.search(value.replace("\0", "") if halves_only else value)
        if character is None:
            return None
        return f"U+{ord(character[0]):04X}, {'half of a character, ' if ord(character[0]) else ''}which is no text"
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return next((found for each in value if (found := misplaced(each, halves_only))), None)
    return None
