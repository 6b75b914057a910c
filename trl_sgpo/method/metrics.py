"""Metrics and table columns of the two phases, before any reward."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..sgpo_config import SGPOConfig
from .rewards import distinct
from .rollout import Rollout, RolloutBatch


CREDIT_COLUMNS = ("transfer", "strategy_advantage", "execution_advantage")
"""Columns of the completions table that credit assignment adds, in training only."""
COLUMNS = ("source", "retrieved", "strategy", "execution", "correctness", *CREDIT_COLUMNS)
"""Columns that SGPO adds to TRL's completions table."""


def phase_metrics(rollouts: Sequence[Rollout], args: SGPOConfig, eos_token_ids: list[int]) -> dict[str, float]:
    """Lengths, truncation and form of strategies, executions and plain answers, as means."""
    own = [rollout for rollout in rollouts if rollout.source == "own"]
    guided = [rollout for rollout in rollouts if rollout.source != "plain"]
    plain = [rollout for rollout in rollouts if rollout.source == "plain"]

    def is_truncated(rollout: Rollout) -> bool:
        ids, is_plain = rollout.execution_ids, rollout.source == "plain"
        limit = args.max_plain_length if is_plain else args.max_completion_length
        return ids[-1] not in eos_token_ids and len(ids) >= limit

    values: Mapping[str, Sequence[float]] = {
        "strategy_length": [rollout.strategy_length for rollout in own],
        "strategy_truncated": [rollout.strategy.flaw == "truncated" for rollout in own],
        "malformed": [rollout.strategy.flaw is not None for rollout in own],
        "execution_length": [len(rollout.execution_ids) for rollout in guided],
        "execution_truncated": [is_truncated(rollout) for rollout in guided],
        "plain_length": [len(rollout.execution_ids) for rollout in plain],
        "plain_truncated": [is_truncated(rollout) for rollout in plain],
    }
    means = {name: sum(each) / len(each) for name, each in values.items() if each}
    return means | ({"distinct_strategies": distinct([rollout.strategy.text for rollout in own])} if own else {})


def phase_columns(rollouts: Sequence[Rollout], batch: RolloutBatch, verified: Sequence[float]) -> dict[str, list[Any]]:
    """Columns of the completions table that are known before credit."""
    rows = len(rollouts) // len(batch.problems)
    retrieved = [" ".join(strategy.id for strategy in problem.retrieved) for problem in batch.problems]
    return {
        "source": [rollout.source for rollout in rollouts],
        "retrieved": [ids for ids in retrieved for _ in range(rows)],
        "strategy": [rollout.strategy.text for rollout in rollouts],
        "execution": [rollout.execution.strip() for rollout in rollouts],
        "correctness": list(verified),
    }
