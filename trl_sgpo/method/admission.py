"""Admission to the bank: the strategies of transfer blocks to store, and the outcomes of all executions."""

import math

import torch

from ..bank.policy import admissible
from ..bank.strategy import Outcome, Strategy
from . import advantages


def proposals(
    written: list[list[Strategy]],
    verified: torch.Tensor,
    own: int,
    leaked: torch.Tensor,
    well_formed: list[list[bool]],
    min_lift: float,
) -> list[Strategy]:
    """
    The best strategy of each block, where one is admissible.

    Args:
        written (`list[list[Strategy]]`):
            The n * K strategies written in each of N blocks.
        verified (`torch.Tensor` of shape `(N, S, K)`):
            Outcomes by the verifier.
        own (`int`):
            n, strategies each problem writes.
        leaked (`torch.Tensor` of shape `(N, n * K)`):
            1 where a strategy contains the answer of its problem.
        well_formed (`list[list[bool]]`):
            Whether each strategy is well formed.
        min_lift (`float`):
            Lift on siblings, or on its own problem where K is 1, that must be exceeded.

    Returns:
        `list[Strategy]`: At most one a block.
    """
    own_lift, sibling_lift = advantages.own_and_siblings(advantages.center_by_problem(verified), own)
    lift = own_lift if verified.size(2) == 1 else sibling_lift
    solved, _ = advantages.own_and_siblings(verified, own)
    best = []
    for block, strategies in enumerate(written):
        good = [
            s
            for s in range(len(strategies))
            if admissible(
                correct=bool(own_lift[block, s] >= 0) and bool(solved[block, s] > 0),
                sibling_lift=lift[block, s].item(),
                leak=leaked[block, s].item(),
                well_formed=well_formed[block][s],
                min_lift=min_lift,
            )
        ]
        if good:
            best.append(strategies[max(good, key=lambda s: lift[block, s].item())])
    return best


def outcomes(
    strategies: list[list[str]],
    problems: list[list[str]],
    classes: list[str],
    verified: torch.Tensor,
    plain: torch.Tensor,
) -> list[Outcome]:
    """
    How each strategy did on each problem of its block, compared with the other strategies, and with plain answers, on
    the same problem.

    Args:
        strategies (`list[list[str]]`):
            Ids of the S strategies of each of N blocks.
        problems (`list[list[str]]`):
            Ids of the K problems of each.
        classes (`list[str]`):
            Class of each block.
        verified (`torch.Tensor` of shape `(N, S, K)`):
            Outcomes by the verifier, NaN where it does not apply.
        plain (`torch.Tensor` of shape `(N, m, K)`):
            Those of plain answers.

    Returns:
        `list[Outcome]`: One for each strategy id and problem. A strategy that is the only one executed on a problem is
        compared with itself.
    """
    found = []
    plain_means = plain.clamp(0, 1).nanmean(dim=1).tolist()
    for block, ids in enumerate(strategies):
        for position, problem in enumerate(problems[block]):
            mean = plain_means[block][position]
            unguided = None if math.isnan(mean) else mean
            column = verified[block, :, position].clamp(0, 1).tolist()
            rows = [(key, outcome) for key, outcome in zip(ids, column, strict=True) if outcome == outcome]
            for key in dict.fromkeys(key for key, _ in rows):
                mine = [outcome for other, outcome in rows if other == key]
                others = [outcome for other, outcome in rows if other != key] or mine
                baseline = sum(others) / len(others)
                found.append(Outcome(key, problem, sum(mine), len(mine), baseline, classes[block], plain=unguided))
    return found
