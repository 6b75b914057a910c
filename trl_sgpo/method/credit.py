"""Credit assignment: from the rewards of a batch of transfer blocks to advantages, metrics and table columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..sgpo_config import SGPOConfig
from . import advantages
from .rewards import coherence, leak
from .rollout import Rollout, RolloutBatch, written_strategies
from .transfer import outcome_matrix, rows_of


Spread = Callable[[torch.Tensor], torch.Tensor]
"""Standard deviation of values over all ranks."""


@dataclass(frozen=True)
class Credit:
    """
    Advantages, metrics and outcomes of a rank's B rows.

    Args:
        strategy (`torch.Tensor` of shape `(B,)`):
            Advantage of each row's strategy.
        execution (`torch.Tensor` of shape `(B,)`):
            Advantage of each row's execution.
        metrics (`dict[str, torch.Tensor]`):
            Values whose means are logged, NaN where there is none.
        columns (`dict[str, list]`):
            Columns of the completions table, one value a row.
        verified (`torch.Tensor` of shape `(N, S, K)`):
            Outcomes of strategies by the verifier: `[block, strategy, problem]`.
        plain (`torch.Tensor` of shape `(N, m, K)`):
            Outcomes of plain rows by the verifier: `[block, row, problem]`.
        leaked (`torch.Tensor` of shape `(N, n * K)`):
            1 where a written strategy contains the answer of its problem.
    """

    strategy: torch.Tensor
    execution: torch.Tensor
    metrics: dict[str, torch.Tensor]
    columns: dict[str, list[float]]
    verified: torch.Tensor
    plain: torch.Tensor
    leaked: torch.Tensor


def assign_credit(
    rollouts: Sequence[Rollout],
    rewards: torch.Tensor,
    batch: RolloutBatch,
    args: SGPOConfig,
    reward_weights: torch.Tensor,
    spread: Spread,
) -> Credit:
    """
    Compares the strategies of each block with each other, the executions of strategies with their baseline, and the
    plain rows of a problem with each other.

    Args:
        rollouts (`Sequence[Rollout]` of length B):
            Rows in block order.
        rewards (`torch.Tensor` of shape `(B, number of reward functions)`):
            Their rewards, NaN where a function does not apply. The first function is the verifier.
        batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
            Problems and bank strategies of the rows.
        args ([`SGPOConfig`]):
            Weights, execution baseline and `scale_rewards`.
        reward_weights (`torch.Tensor` of shape `(number of reward functions,)`):
            Weights of the reward functions.
        spread (`Callable`):
            Standard deviation over all ranks, for `scale_rewards="batch"`.
    """
    geometry, device = batch.geometry, rewards.device
    n = geometry.own
    weighted = (rewards * reward_weights.to(device)).nansum(dim=1)
    weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
    outcomes, plain_outcomes = geometry.by_form(outcome_matrix(weighted, geometry))
    verified, plain = geometry.by_form(outcome_matrix(rewards[:, 0], geometry))

    shape = (len(outcomes), geometry.written)
    pairs = list(zip(written_strategies(rollouts), batch.written_for(), strict=True))
    coherent = torch.tensor([coherence(s, p.text) for s, p in pairs], device=device).view(shape)
    leaked = torch.tensor([leak(s.text, p.text, p.answer) for s, p in pairs], device=device).view(shape)

    weights = (args.correctness_weight, args.transfer_weight)
    earned = advantages.strategy_outcomes(outcomes, n, *weights)
    credit = advantages.strategy_credit(outcomes, n, *weights)
    shaping = args.coherence_weight * coherent - args.leak_weight * leaked
    by_group = args.scale_rewards == "group"
    strategy = advantages.strategy_advantages(credit, scaled=by_group)
    guided = advantages.execution_advantages(outcomes, args.execution_baseline, scaled=by_group)
    execution = torch.cat([guided, advantages.execution_advantages(plain_outcomes, scaled=by_group)], dim=1)
    if args.scale_rewards == "batch":
        strategy = strategy / (spread(earned) + 1e-4)
        execution = execution / (spread(weighted) + 1e-4)
    signal = torch.cat([strategy, execution.flatten(1)], dim=1).abs().amax(dim=1)
    strategy = strategy + advantages.strategy_advantages(shaping, scaled=False)

    def by_row(values: torch.Tensor, bank_value: float) -> torch.Tensor:
        """Values of written strategies, shape `(N, n * K)`, for every row that executes them."""
        others = geometry.bank + geometry.plain
        return rows_of(pad(values, (0, others), value=bank_value).unsqueeze(2).expand_as(execution))

    guided_means, plain_means = torch.nanmean(verified, dim=1), torch.nanmean(plain, dim=1)
    lost = torch.where((plain_means >= 0.5) & ~guided_means.isnan(), (guided_means < 0.5).float(), torch.nan)
    on_own, on_siblings = advantages.own_and_siblings(verified, n)
    strategy_rows, execution_rows = by_row(strategy, 0.0), rows_of(execution)
    columns = {
        "transfer": by_row(on_siblings, torch.nan).tolist(),
        "strategy_advantage": strategy_rows.tolist(),
    }
    if args.execution_baseline != "problem":  # otherwise it is TRL's own column `advantage`
        columns["execution_advantage"] = execution_rows.tolist()
    metrics = {
        "correctness": on_own,
        "transfer": on_siblings,
        "coherence": coherent,
        "leak": leaked,
        "strategy_reward": earned + shaping,
        "frac_blocks_no_signal": signal < 1e-2,
        "plain_correctness": plain,
        "lift": guided_means - plain_means,
        "harm": lost,
    }
    return Credit(strategy_rows, execution_rows, metrics, columns, verified, plain, leaked)
