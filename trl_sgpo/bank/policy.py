"""What is admitted, kept and shown: pure functions."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from .strategy import Strategy


NEAR_COPY = 0.88


def utility(successes: float, trials: int, prior_successes: float = 1.0, prior_trials: float = 2.0) -> float:
    """
    Posterior mean of a strategy's success rate.

    Args:
        successes (`float`):
            Sum of outcomes in [0, 1].
        trials (`int`):
            Number of executions.
        prior_successes, prior_trials (`float`, *optional*, defaults to `1.0` and `2.0`):
            Executions assumed before the first one. The default is a uniform prior.

    Returns:
        `float`: A rate in (0, 1).
    """
    return (successes + prior_successes) / (trials + prior_trials)


def admissible(correct: bool, sibling_lift: float, leak: float, well_formed: bool, min_lift: float) -> bool:
    """
    Whether a strategy may enter the bank.

    Args:
        correct (`bool`):
            Whether it solved the problem it was written for.
        sibling_lift (`float`):
            Its mean outcome on the sibling problems minus the block's mean on them.
        leak (`float`):
            How much of its problem's answer it gives away. Anything above 0 is too much.
        well_formed (`bool`):
            Whether it parses.
        min_lift (`float`):
            Lift that must be exceeded.
    """
    return correct and well_formed and leak <= 0 and sibling_lift > min_lift


def near_copy(embedding: np.ndarray, others: np.ndarray, threshold: float = NEAR_COPY) -> int | None:
    """
    Row of the embedding nearest to a given one, if it is near enough to count as the same strategy.

    Args:
        embedding (`np.ndarray` of shape `(d,)`):
            Embedding of norm 1.
        others (`np.ndarray` of shape `(n, d)`):
            Embeddings of norm 1.
        threshold (`float`, *optional*, defaults to `0.88`):
            Cosine similarity from which on two strategies are near-copies.
    """
    if len(others) == 0:
        return None
    similarities = others @ embedding
    nearest = int(similarities.argmax())
    return nearest if similarities[nearest] >= threshold else None


def evict(strategies: Iterable[Strategy], capacity_per_class: int) -> list[str]:
    """
    Ids of the strategies beyond the capacity of their class.

    Quarantined strategies go first, then those of the least utility, the older one of two equals. A class within its
    capacity loses nothing, whatever the others hold.

    Args:
        strategies (`Iterable[Strategy]`):
            The strategies of one or more classes.
        capacity_per_class (`int`):
            How many of each class stay.
    """
    classes: dict[str, list[Strategy]] = defaultdict(list)
    for strategy in strategies:
        classes[strategy.problem_class].append(strategy)
    evicted = []
    for members in classes.values():
        members.sort(key=lambda s: (s.trust != "quarantine", utility(s.successes, s.trials), s.step, s.id))
        evicted += [s.id for s in members[: max(len(members) - capacity_per_class, 0)]]
    return evicted


def diversify(scores: Sequence[float], embeddings: np.ndarray, k: int, threshold: float = NEAR_COPY) -> list[int]:
    """
    The best candidates that are no near-copies of each other, picked greedily.

    Args:
        scores (`Sequence[float]` of length `n`):
            What to pick by. Of equals the first wins.
        embeddings (`np.ndarray` of shape `(n, d)`):
            Embeddings of norm 1.
        k (`int`):
            How many to pick at most.
        threshold (`float`, *optional*, defaults to `0.88`):
            Cosine similarity from which on two candidates are near-copies.

    Returns:
        `list[int]`: Rows, the best first.
    """
    picked: list[int] = []
    for row in sorted(range(len(scores)), key=lambda row: -scores[row]):
        if len(picked) >= k:
            break
        if near_copy(embeddings[row], embeddings[picked], threshold) is None:
            picked.append(row)
    return picked
