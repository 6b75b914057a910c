"""Settings that would run code of a model's repository."""

from collections.abc import Mapping, Sequence
from typing import Any


# Keyword arguments of `from_pretrained`, and the values with which it runs or unpickles what a repository holds
REFUSED = {"trust_remote_code": True, "allow_all_kernels": True, "use_safetensors": False, "weights_only": False}


def remote_code_problems(values: Any, place: str = "") -> list[str]:
    """
    Finds settings, at any depth, with which loading a model would run code of its repository.

    Args:
        values (`Any`):
            Settings, such as keyword arguments or the keys of a recipe.
        place (`str`, *optional*):
            Where they are.

    Returns:
        `list[str]`: A message for each.
    """
    if isinstance(values, Mapping):
        problems = []
        for key, value in values.items():
            name = f"{place}.{key}" if place else str(key)
            if key in REFUSED and value is not None and value is not (not REFUSED[key]):
                problems.append(f"`{name}` is refused: it would run code from the model's repository.")
            else:
                problems += remote_code_problems(value, name)
        return problems
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return [problem for value in values for problem in remote_code_problems(value, place)]
    return []
