"""
Advantages from outcome matrices (pure functions).

Shapes: N blocks, K problems a block, n strategies a problem, S = n * K + b strategies a block. An outcome is NaN where
no reward function applies to the row; such outcomes enter no mean and get no advantage.
"""

import torch
from trl.trainer.utils import nanstd


_EPS = 1e-4  # of TRL's GRPO, so that K = 1 gives its advantages


def center_by_problem(outcomes: torch.Tensor) -> torch.Tensor:
    """
    Removes difficulty: subtracts from each outcome the mean of its problem over all strategies of the block.

    Args:
        outcomes (`torch.Tensor` of shape `(N, S, K)`):
            Outcome matrices.

    Returns:
        `torch.Tensor` of shape `(N, S, K)`
    """
    return outcomes - torch.nanmean(outcomes, dim=1, keepdim=True)


def is_own(outcomes: torch.Tensor, own: int) -> torch.Tensor:
    """Whether a strategy was written for a problem, `(S, K)`. Strategies of the bank were written for none."""
    _, S, K = outcomes.shape
    if own == 0:
        return torch.zeros(S, K, dtype=torch.bool, device=outcomes.device)
    writer = torch.arange(S, device=outcomes.device).div(own, rounding_mode="floor")
    return writer.unsqueeze(1) == torch.arange(K, device=outcomes.device)


def own_and_siblings(outcomes: torch.Tensor, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Splits a matrix into each written strategy's outcome on its own problem and its mean outcome on the siblings.

    Args:
        outcomes (`torch.Tensor` of shape `(N, S, K)`):
            Outcome matrices, centred or not.
        own (`int`):
            n, strategies each problem writes.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(N, n * K)`. Siblings are NaN where K is 1.
    """
    N, _, K = outcomes.shape
    written = outcomes[:, : own * K]
    mine = is_own(written, own)
    on_own = written[mine.expand(N, -1, -1)].view(N, own * K)
    on_siblings = torch.nanmean(written.masked_fill(mine, torch.nan), dim=2)
    return on_own, on_siblings


def strategy_outcomes(
    outcomes: torch.Tensor, own: int, correctness_weight: float = 1.0, transfer_weight: float = 1.0
) -> torch.Tensor:
    """
    Outcome of a strategy: w_c * O[s, own] + w_t * mean O[s, siblings].

    Args:
        outcomes (`torch.Tensor` of shape `(N, S, K)`):
            Outcome matrices, centred or not.
        own (`int`):
            n, strategies each problem writes.
        correctness_weight, transfer_weight (`float`, *optional*, defaults to `1.0`):
            w_c and w_t.

    Returns:
        `torch.Tensor` of shape `(N, n * K)`. A missing outcome counts as 0.
    """
    on_own, on_siblings = own_and_siblings(outcomes, own)
    return correctness_weight * on_own.nan_to_num(0.0) + transfer_weight * on_siblings.nan_to_num(0.0)


def strategy_credit(
    outcomes: torch.Tensor, own: int, correctness_weight: float = 1.0, transfer_weight: float = 1.0
) -> torch.Tensor:
    """
    Credit of a strategy: its outcomes without the difficulty of the problems.

    With equal weights, an outcome is compared with the mean over all strategies of the block. This mean holds own and
    borrowed executions, so that an own outcome compared with it rewards transfer too, and a borrowed one correctness.
    What a weight exceeds the other by therefore compares own executions of a problem with each other, or borrowed ones
    with each other. A single one has nothing to be compared with, and is compared with the block.

    Args:
        outcomes (`torch.Tensor` of shape `(N, S, K)`):
            Outcome matrices, not centred.
        own (`int`):
            n, strategies each problem writes.
        correctness_weight, transfer_weight (`float`, *optional*, defaults to `1.0`):
            w_c and w_t.

    Returns:
        `torch.Tensor` of shape `(N, n * K)`. A missing outcome counts as the mean that it is compared with.
    """
    mine, borrowed = is_own(outcomes, own), outcomes.shape[1] - own
    shared = min(correctness_weight, transfer_weight)
    correctness = shared if own > 1 else correctness_weight
    transfer = shared if borrowed > 1 else transfer_weight
    with_block = strategy_outcomes(center_by_problem(outcomes), own, correctness, transfer)
    apart = torch.where(
        mine,
        center_by_problem(outcomes.masked_fill(~mine, torch.nan)),
        center_by_problem(outcomes.masked_fill(mine, torch.nan)),
    )
    return with_block + strategy_outcomes(apart, own, correctness_weight - correctness, transfer_weight - transfer)


def scale(centred: torch.Tensor, values: torch.Tensor, dim: int | tuple[int, ...] | None) -> torch.Tensor:
    """Divides centred values by the standard deviation of `values` over `dim` (`None`: leaves them as they are)."""
    if dim is None:
        return centred
    return centred / (nanstd(values, dim=dim, keepdim=True) + _EPS)


def strategy_advantages(rewards: torch.Tensor, scaled: bool = True) -> torch.Tensor:
    """
    Compares each strategy with the others of its block.

    The advantage of a strategy is that of its outcomes, scaled, plus that of w_k * coherence - w_l * leak, not scaled:
    if all executions of a block have the same outcome, scaling would magnify a small difference in coherence.

    Args:
        rewards (`torch.Tensor` of shape `(N, n * K)`):
            Reward of each strategy.
        scaled (`bool`, *optional*, defaults to `True`):
            Whether to divide by the block's standard deviation.

    Returns:
        `torch.Tensor` of shape `(N, n * K)`
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return scale(centred, rewards, dim=1 if scaled else None)


def execution_advantages(outcomes: torch.Tensor, baseline: str = "problem", scaled: bool = True) -> torch.Tensor:
    """
    Compares each execution with a baseline.

    With O[s, x] the outcome of strategy s on problem x: `"problem"` subtracts mean_s O[s, x], which is GRPO;
    `"strategy"` subtracts mean_x O[s, x]; `"two_way"` leaves the residual of
    O = mean + strategy effect + problem effect + residual, so that neither a faithful execution of a bad strategy nor
    a lucky one of an easy problem is credited.

    Args:
        outcomes (`torch.Tensor` of shape `(N, S, K)`):
            Outcome matrices, not centred.
        baseline (`str`, *optional*, defaults to `"problem"`):
            `"problem"`, `"strategy"` or `"two_way"`.
        scaled (`bool`, *optional*, defaults to `True`):
            Whether to divide by a standard deviation: of the problem's outcomes for `"problem"`, of the block's
            remaining differences for the others.

    Returns:
        `torch.Tensor` of shape `(N, S, K)`, 0 where the outcome is missing.
    """
    problem_mean = torch.nanmean(outcomes, dim=1, keepdim=True)
    strategy_mean = torch.nanmean(outcomes, dim=2, keepdim=True)
    if baseline == "problem":
        advantages = scale(outcomes - problem_mean, outcomes, dim=1 if scaled else None)
    elif baseline == "strategy":
        residual = outcomes - strategy_mean
        advantages = scale(residual, residual, dim=(1, 2) if scaled else None)
    else:
        residual = outcomes - strategy_mean - problem_mean + torch.nanmean(outcomes, dim=(1, 2), keepdim=True)
        advantages = scale(residual, residual, dim=(1, 2) if scaled else None)
    return advantages.nan_to_num(0.0)


def token_advantages(
    strategy: torch.Tensor, execution: torch.Tensor, strategy_lengths: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """
    Spreads a row's two advantages over its completion.

    Args:
        strategy (`torch.Tensor` of shape `(B,)`):
            Advantage of the row's strategy.
        execution (`torch.Tensor` of shape `(B,)`):
            Advantage of the row's execution.
        strategy_lengths (`torch.Tensor` of shape `(B,)`):
            Number of leading completion tokens that belong to the strategy, 0 where it is not trained.
        num_tokens (`int`):
            T, length of the padded completions.

    Returns:
        `torch.Tensor` of shape `(B, T)`
    """
    in_strategy = torch.arange(num_tokens, device=strategy.device) < strategy_lengths.unsqueeze(1)
    return torch.where(in_strategy, strategy.unsqueeze(1), execution.unsqueeze(1))
