"""What the reasoning-gym family of a problem accepts as its answer."""

from collections.abc import Callable
from functools import cache
from typing import Any

from ..compare.lab import list_functions
from .arithmetic import calculate
from .generated import gym


# Their solution is their only right answer; reasoning-gym 0.1.25 accepts `True` for `False` in game_of_life_halting
_ONE_ANSWER = frozenset([list_functions.FAMILY, "game_of_life_halting"])
# Calculations that use the given numbers once each; reasoning-gym does not compare them for puzzle24
_TARGETS: dict[str, Callable[[dict[str, Any]], int]] = {
    "puzzle24": lambda metadata: 24,
    "countdown": lambda metadata: metadata["target"],
}


def accepted(answer: str, entry: dict[str, Any]) -> bool:
    """
    Whether a family accepts an answer that is not its solution word for word.

    Args:
        answer (`str`):
            A final answer.
        entry (`dict`):
            reasoning-gym entry of the problem.
    """
    metadata = entry["metadata"]
    family = metadata["source_dataset"]
    if family in _ONE_ANSWER:
        return False
    if family in _TARGETS:
        found = calculate(answer)
        return (
            found is not None
            and found[0] == _TARGETS[family](metadata)
            and sorted(found[1]) == sorted(metadata["numbers"])
        )
    try:
        return _scorer(family)(answer, entry) >= 0.99
    except (ArithmeticError, LookupError, TypeError, ValueError):  # raised by some families for malformed answers
        return False


@cache
def _scorer(family: str) -> Callable[[str, dict[str, Any]], float]:
    return gym().get_score_answer_fn(family)
