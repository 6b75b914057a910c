"""
How often strategies of a known success rate are ever trusted or retired, useful or harmful, when this is computed at
every commit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from trl_sgpo.bank import Strategy, policy


Rule = Callable[[Strategy], str]

MIN_PROBLEMS, TOLERANCE = 4, 0.2
HORIZON = 128  # problems
BASELINES = (0.05, 0.2, 0.5, 0.8)
LIFTS = (0.0, 0.1, 0.2, 0.3)
DOUBLING = {MIN_PROBLEMS * 2**n for n in range(10)}


def trust(strategy: Strategy) -> str:
    """The rule of the bank, with its default settings."""
    return policy.trust(strategy, MIN_PROBLEMS, TOLERANCE)


def wilson_rule(z: float, looks: set[int] | None = None) -> Rule:
    """A rule by Wilson bounds at a quantile `z` of the normal distribution, at these numbers of problems (all)."""

    def rule(strategy: Strategy) -> str:
        n = strategy.problems
        if n < MIN_PROBLEMS or (looks is not None and n not in looks):
            return strategy.trust
        low, high = policy.wilson(strategy.solved, n, z)
        floor = (1 - TOLERANCE) * strategy.baseline / n
        return "trusted" if low > floor else "retired" if high < floor else "candidate"

    return rule


def ever(
    rule: Rule, rate: float, baseline: float, problems: int, strategies: int, others: int = 7, seed: int = 0
) -> np.ndarray:
    """
    Share of strategies that are trusted, and that are retired, at least once until each number of problems.

    Args:
        rule (`Callable`):
            Trust state of a strategy.
        rate (`float`):
            Success rate of the strategies.
        baseline (`float`):
            Success rate of other strategies.
        problems (`int`):
            Number of problems, after each of which the rule is computed.
        strategies (`int`):
            Number of strategies.
        others (`int`, *optional*, defaults to `7`):
            Executions of other strategies on each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the outcomes.

    Returns:
        `np.ndarray` of shape `(2, problems)`: Shares, the trusted ones first.
    """
    draw = np.random.default_rng(seed)
    solved = np.cumsum(draw.random((strategies, problems)) < rate, axis=1)
    compared = np.cumsum(draw.binomial(others, baseline, (strategies, problems)) / others, axis=1)
    reached = np.zeros((2, strategies, problems), dtype=bool)
    for row in range(strategies):
        strategy = Strategy("text", "class", ())
        for n in range(problems):
            strategy = strategy.updated(
                trials=n + 1, problems=n + 1, solved=float(solved[row, n]), baseline=float(compared[row, n])
            )
            state = rule(strategy)
            reached[:, row, n] = state == "trusted", state == "retired"
    return np.maximum.accumulate(reached, axis=2).mean(axis=1)


def ever_over_plain(
    rate: float, plain: float, problems: int, strategies: int, spread: bool, rows: int = 2, seed: int = 0
) -> np.ndarray:
    """
    Share of strategies that are called useful, and harmful, at least once until each number of problems.

    Args:
        rate, plain (`float`):
            Success rates of the strategies and of plain answers.
        problems (`int`):
            Number of problems, after each of which from the fourth on the bounds are computed.
        strategies (`int`):
            Number of strategies.
        spread (`bool`):
            Whether problems differ in difficulty: their plain rates are drawn from a beta distribution of weight 1.
        rows (`int`, *optional*, defaults to `2`):
            Plain answers to each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the outcomes.

    Returns:
        `np.ndarray` of shape `(2, problems)`: Shares, the useful ones first.
    """
    draw = np.random.default_rng(seed)
    shape = (strategies, problems)
    rates = draw.beta(plain, 1 - plain, shape) if spread else np.full(shape, plain)
    solved = np.cumsum(draw.random(shape) < rates * rate / plain, axis=1)
    compared = np.cumsum(draw.binomial(rows, rates) / rows, axis=1)
    reached = np.zeros((2, *shape), dtype=bool)
    for row in range(strategies):
        for n in range(MIN_PROBLEMS - 1, problems):
            low, high = policy.difference_bounds(float(solved[row, n]), float(compared[row, n]), n + 1)
            reached[:, row, n] = low > 0, high < 0
    return np.maximum.accumulate(reached, axis=2).mean(axis=1)


def measure(strategies: int) -> dict[str, Any]:
    """
    Rates of error at the floor and of success above it, by rule.

    Args:
        strategies (`int`):
            Number of strategies for each rate.

    Returns:
        `dict`: For each rule, the shares of strategies at the floor that are ever trusted or retired within 128
        problems, by baseline, and those that are trusted within 16, 32 and 64 problems, by lift over a baseline of
        0.5. Also those of strategies equal to plain answers that are ever called useful or harmful within 64 problems,
        and those called useful within 8, 16 and 32 problems, by lift over a plain rate of 0.3.
    """
    rules = {
        "one look": wilson_rule(policy.ONE_SIDED_95),
        "z 2.6": wilson_rule(2.6),
        "z 2.6, doubling": wilson_rule(2.6, DOUBLING),
        "trust": trust,
    }
    figures: dict[str, Any] = {}
    for name, rule in rules.items():
        at_floor = {b: ever(rule, (1 - TOLERANCE) * b, b, HORIZON, strategies) for b in BASELINES}
        few = {b: ever(rule, (1 - TOLERANCE) * b, b, HORIZON, strategies, others=3) for b in BASELINES}
        lifted = {lift: ever(rule, 0.5 + lift, 0.5, 64, strategies) for lift in LIFTS}
        figures[f"trust {name}: at the floor, ever"] = {
            f"{what} at {b}": float(shares[row, -1])
            for b, shares in at_floor.items()
            for row, what in enumerate(("trusted", "retired"))
        } | {f"trusted at {b}, 3 others": float(shares[0, -1]) for b, shares in few.items()}
        figures[f"trust {name}: trusted"] = {
            f"lift {lift:+.1f}, {n} problems": float(shares[0, n - 1])
            for lift, shares in lifted.items()
            for n in (16, 32, 64)
        }
    return figures | plain_figures(strategies)


def plain_figures(strategies: int) -> dict[str, Any]:
    """The part of [`measure`] on plain answers."""
    equal = {
        (b, spread): ever_over_plain(b, b, 64, strategies, spread) for b in (0.2, 0.5, 0.8) for spread in (True, False)
    }
    lifted = {lift: ever_over_plain(0.3 + lift, 0.3, 32, strategies, spread=False) for lift in (0.2, 0.3, 0.5)}
    return {
        "plain lift: no lift, ever": {
            f"{what} at {b}, {'problems differ' if spread else 'problems alike'}": float(shares[row, -1])
            for (b, spread), shares in equal.items()
            for row, what in enumerate(("useful", "harmful"))
        },
        "plain lift: useful": {
            f"lift {lift:+.1f}, {n} problems": float(shares[0, n - 1])
            for lift, shares in lifted.items()
            for n in (8, 16, 32)
        },
    }
