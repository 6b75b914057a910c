"""Whether files of a run hold what training and evaluation write: the folder may be of somebody else."""

import math
from typing import Any

from ..evaluation.digest import measured_weights
from ..evaluation.tables import tables


MOST = 1e100  # larger numbers are no measurements, and their sums are infinite
MAX_STEPS = 2**53
DAMAGED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What reading a value of an unexpected type raises."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= MOST


def is_count(value: Any) -> bool:
    """Whether a value is a step or a number of problems."""
    return isinstance(value, int) and 0 <= value <= MAX_STEPS


def is_state(content: Any) -> bool:
    """Whether a value is that of `trainer_state.json`: logs with steps, and numbers that can be added."""
    logs = content.get("log_history")
    if not (isinstance(logs, list) and all(isinstance(log, dict) for log in logs)):
        return False
    logged = [value for log in logs for value in log.values() if isinstance(value, int | float)]
    return (
        all(is_count(content.get(name)) for name in ("global_step", "max_steps"))
        and all(is_count(log["step"]) for log in logs if "step" in log)
        and all(_is_number(value) for value in logged if isinstance(value, int) or math.isfinite(value))
    )


def is_measured(content: Any) -> bool:
    """Whether a value is that of `report.json`: figures after training, and before it."""
    try:
        known = ("before", "after") if "before" in content else ("after",)
        scores = [content[when][decoding] for when in known for decoding in ("sampled", "greedy")]
        rates = [score[name] for score in scores for name in ("accuracy", "transfer")]
        rates += [score[name] for score in scores for name in ("plain", "own") if score.get(name) is not None]
        return all(_is_number(rate) and 0 <= rate <= 1 for rate in rates if rate == rate) and all(
            is_count(score["problems"]) and is_count(score.get("unverified", 0)) for score in scores
        )
    except DAMAGED:
        return False


def is_evaluation(content: Any) -> bool:
    """Whether a value is that of `results.json`, which can be shown as tables and matrices."""
    try:
        tables(content)
        measured_weights(content)
        for transfer in content["transfer"].values():
            size = len(transfer["classes"])
            cells = [cell for row in transfer["matrix"] for cell in row if cell is not None]
            if [len(row) for row in transfer["matrix"]] != [size] * size or not all(map(_is_number, cells)):
                return False
    except DAMAGED:
        return False
    return True
