"""Patterns for names of modules: a regular expression that a stranger wrote may match for ever."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .json_text import texts_in


_OF_RECIPES = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")


def may_match_for_ever(pattern: str) -> bool:
    """Whether a pattern has more than three repetitions, or one of a group."""
    return sum(map(pattern.count, "*+?{")) > 3 or re.search(r"\)[*+?{]", pattern) is not None


def pattern_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """
    Finds patterns of a recipe that may match for ever.

    Args:
        values (`Mapping`):
            The values of all keys.

    Returns:
        `Iterator[str]`: What is wrong with them.
    """
    for key in _OF_RECIPES:
        if any(map(may_match_for_ever, texts_in(values[key]))):
            yield (
                f"`{key}` has a pattern that may match for ever: use a list of names, or at most three repetitions "
                "and none of a group."
            )
