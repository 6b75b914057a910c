"""Success rates and lift of strategies on problems they were not written for."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from . import policy
from .strategy import Execution, Strategy


def transfer(pairs: Iterable[tuple[Strategy, Execution]], by: Callable[[Strategy, Execution], Any]) -> dict[Any, Any]:
    """
    Success rate and lift of strategies on problems they were not written for. Every pair of strategy and problem
    counts once.

    Args:
        pairs (`Iterable[tuple[Strategy, Execution]]`):
            Executions, each with its strategy.
        by (`Callable[[Strategy, Execution], Any]`):
            Key of the group that an execution belongs to.

    Returns:
        `dict`: Group → `problems`, `rate`, `baseline`, `lift` and its bounds `lift_low` and `lift_high`.
    """
    groups: dict[Any, list[Execution]] = defaultdict(list)
    for strategy, execution in pairs:
        if execution.problem not in strategy.source_problems:
            groups[by(strategy, execution)].append(execution)
    figures = {}
    for group, executions in sorted(groups.items()):
        rate = fmean(execution.successes / execution.trials for execution in executions)
        baseline = fmean(execution.baseline / execution.trials for execution in executions)
        low, high = policy.wilson(rate * len(executions), len(executions))
        figures[group] = {
            "problems": len(executions),
            "rate": rate,
            "baseline": baseline,
            "lift": rate - baseline,
            "lift_low": low - baseline,
            "lift_high": high - baseline,
        }
    return figures
