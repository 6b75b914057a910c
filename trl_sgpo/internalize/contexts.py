"""Which strategies a teacher compares on a plain answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..method.advantages import is_own
from ..method.rollout import Rollout, RolloutBatch, written_strategies


@dataclass(frozen=True)
class Contrast:
    """
    Strategies for a problem, none of which was written for it, so that none holds its answer.

    Args:
        right (`str` or `None`):
            The one that solves other problems of the class best, `None` if none solves any.
        wrong (`list[str]`):
            Strategies that solve none of them, then strategies of other classes.
    """

    right: str | None
    wrong: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether there is something to compare."""
        return self.right is not None and len(self.wrong) > 0


def contrasts(
    batch: RolloutBatch, rollouts: Sequence[Rollout], verified: torch.Tensor, most_wrong: int
) -> list[Contrast]:
    """
    Chooses strategies for each problem of a batch.

    Args:
        batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
            The problems.
        rollouts (`Sequence[Rollout]`):
            The rows.
        verified (`torch.Tensor` of shape `(N, S, K)`):
            Outcomes of strategies by the verifier.
        most_wrong (`int`):
            Wrong strategies of a problem at most.

    Returns:
        `list[Contrast]`: One for each problem.
    """
    geometry = batch.geometry
    n, K, written = geometry.own, geometry.problems, geometry.written
    texts = [strategy.text if strategy.flaw is None else None for strategy in written_strategies(rollouts)]
    own = is_own(verified[:, :written], n)
    found = []
    for position, problem in enumerate(batch.problems):
        block, local = divmod(position, K)
        outcomes = verified[block, :written].masked_fill(own[:, local].unsqueeze(1), torch.nan)
        others = [column for column in range(K) if column != local]
        solved = torch.nanmean(outcomes[:, others], dim=1).tolist()
        sound = [(rate, texts[block * written + s]) for s, rate in enumerate(solved) if rate == rate]
        ranked = sorted(((rate, text) for rate, text in sound if text is not None), key=lambda each: -each[0])
        foreign = [
            text
            for number, text in enumerate(texts)
            if text is not None and batch.problems[number // n].problem_class != problem.problem_class
        ]
        right = ranked[0][1] if ranked and ranked[0][0] > 0 else None
        failed = [text for rate, text in ranked if rate <= 0]
        start = position % max(len(foreign), 1)  # so that problems meet different classes
        wrong = [text for text in dict.fromkeys([*failed, *foreign[start:], *foreign[:start]]) if text != right]
        found.append(Contrast(right, wrong[:most_wrong]))
    return found
