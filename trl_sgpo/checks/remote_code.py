"""Settings that would run code of a model's repository."""

from collections.abc import Mapping, Sequence
from typing import Any


def remote_code_problems(values: Any, place: str = "") -> list[str]:
    """
    Finds `trust_remote_code` at any depth of settings.

    Args:
        values (`Any`):
            Settings, such as keyword arguments or the keys of a recipe.
        place (`str`, *optional*):
            Where they are.

    Returns:
        `list[str]`: A message for each place where it is true.
    """
    if isinstance(values, Mapping):
        problems = []
        for key, value in values.items():
            name = f"{place}.{key}" if place else str(key)
            if key == "trust_remote_code" and value not in (False, None):
                problems.append(f"`{name}` is refused: it would run code from the model's repository.")
            else:
                problems += remote_code_problems(value, name)
        return problems
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return [problem for value in values for problem in remote_code_problems(value, place)]
    return []
