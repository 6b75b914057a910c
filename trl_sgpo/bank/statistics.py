"""Figures of a bank by class, and of transfer between classes (pure functions)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from . import policy
from .strategy import TRUST_STATES, Execution, Strategy


def transfer(pairs: Iterable[tuple[Strategy, Execution]], by: Callable[[Strategy, Execution], Any]) -> dict[Any, Any]:
    """
    Success rates of strategies on problems they were not written for. A problem counts once for each strategy.

    Args:
        pairs (`Iterable[tuple[Strategy, Execution]]`):
            Executions, each with its strategy.
        by (`Callable[[Strategy, Execution], Any]`):
            Group of an execution.

    Returns:
        `dict`: Group → `problems`, `rate`, `baseline`, `lift` and its bounds `lift_low` and `lift_high`.
    """
    groups: dict[Any, list[Execution]] = defaultdict(list)
    for strategy, execution in pairs:
        if execution.problem not in strategy.written_for:
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


def class_figures(name: str, members: Sequence[Strategy]) -> dict[str, Any]:
    """
    Counts and means over the strategies of a class, and their lift over plain answers, in which a problem counts once
    for each strategy.
    """
    counts = Counter(strategy.trust for strategy in members)
    live = [strategy for strategy in members if strategy.trust != "retired"]
    utilities = [policy.utility(strategy.successes, strategy.trials) for strategy in live]
    tried = [strategy.lift for strategy in live if strategy.problems]
    beside_plain = sum(strategy.plain_problems for strategy in live)
    solved, baseline = sum(s.plain_solved for s in live), sum(s.plain_baseline for s in live)
    plain_low, plain_high = policy.difference_bounds(solved, baseline, beside_plain)
    shown = sum(strategy.shown for strategy in members)
    top = max(members, key=lambda strategy: strategy.shown)
    return {
        "problem_class": name,
        **{state: counts[state] for state in TRUST_STATES},
        "useful": sum(map(policy.useful, live)),
        "mean_utility": fmean(utilities) if utilities else None,
        "mean_lift": fmean(tried) if tried else None,
        "plain_lift": (solved - baseline) / beside_plain if beside_plain else None,
        "plain_lift_low": plain_low,
        "plain_lift_high": plain_high,
        "shown": shown,
        "most_shown": top.id if shown else None,
        "most_shown_share": top.shown / shown if shown else None,
    }


def lift_text(strategy: Strategy) -> str:
    """A strategy's lift over others on the same problems with its bounds."""
    return with_bounds(strategy.lift, *policy.lift_bounds(strategy)) if strategy.problems else "unknown"


def plain_lift_text(strategy: Strategy) -> str:
    """A strategy's lift over plain answers to the same problems with its bounds."""
    bounds = policy.plain_lift_bounds(strategy)
    return with_bounds(strategy.plain_lift, *bounds) if strategy.plain_problems else "unknown"


def best_known_lift(strategy: Strategy) -> str:
    """A strategy's lift over plain answers where these were executed beside it, otherwise over other strategies."""
    if strategy.plain_problems:
        return f"lift {plain_lift_text(strategy)} over plain answers"
    return f"lift {lift_text(strategy)} over other strategies" if strategy.problems else "lift unknown"


def with_bounds(difference: float, low: float, high: float) -> str:
    """A difference with its bounds, as tables and pages show it: `+0.11 [-0.06, +0.24]`."""
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"
