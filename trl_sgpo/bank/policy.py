"""Admission, trust, eviction and retrieval rules (pure functions)."""

import math
from collections.abc import Sequence

import numpy as np

from .strategy import Strategy


NEAR_COPY = 0.88
_BLOCK = 256  # new strategies that are compared with all others at a time
ONE_SIDED_95 = 1.645
ERROR_RATE = 0.05  # of trust, over all commits of a run
NEWCOMERS = 0.25
FREE_SHOWS = 16


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


def wilson(successes: float, trials: float, z: float = ONE_SIDED_95) -> tuple[float, float]:
    """
    Score interval of a rate (Wilson, 1927).

    Args:
        successes (`float`):
            Sum of outcomes in [0, 1].
        trials (`float`):
            Number of outcomes.
        z (`float`, *optional*, defaults to `1.645`):
            Quantile of the normal distribution. The default makes each bound hold with 95% confidence.

    Returns:
        `tuple[float, float]`: Lower and upper bound, (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    rate, spread = successes / trials, z * z / trials
    centre = rate + spread / 2
    half = math.sqrt(max(rate * (1 - rate) * spread + spread * spread / 4, 0.0))
    return max((centre - half) / (1 + spread), 0.0), min((centre + half) / (1 + spread), 1.0)


def lift_bounds(strategy: Strategy) -> tuple[float, float]:
    """
    Bounds of a strategy's lift, each with 95% confidence, where a problem counts once however often it was tried.

    Args:
        strategy ([`Strategy`]):
            The strategy.

    Returns:
        `tuple[float, float]`: Lower and upper bound, (-1, 1) before it was executed on another problem than its own.
    """
    if strategy.problems == 0:
        return -1.0, 1.0
    low, high = wilson(strategy.solved, strategy.problems)
    baseline = strategy.baseline / strategy.problems
    return low - baseline, high - baseline


def difference_bounds(successes: float, others: float, trials: float, z: float = ONE_SIDED_95) -> tuple[float, float]:
    """
    Bounds of the difference of two rates, from their score intervals (Newcombe, 1998).

    Neither rate is taken as known. Both samples are taken as independent: where they succeed on the same problems, the
    bounds are wider than they need to be.

    Args:
        successes, others (`float`):
            Sums of outcomes in [0, 1] of either sample.
        trials (`float`):
            Number of outcomes of each.
        z (`float`, *optional*, defaults to `1.645`):
            Quantile of the normal distribution. The default makes each bound hold with 95% confidence.

    Returns:
        `tuple[float, float]`: Lower and upper bound, (-1, 1) without trials.
    """
    if trials == 0:
        return -1.0, 1.0
    rate, other = successes / trials, others / trials
    (low, high), (other_low, other_high) = wilson(successes, trials, z), wilson(others, trials, z)
    return (
        rate - other - math.hypot(rate - low, other_high - other),
        rate - other + math.hypot(high - rate, other - other_low),
    )


def plain_lift_bounds(strategy: Strategy) -> tuple[float, float]:
    """
    Bounds of a strategy's lift over plain answers, each with 95% confidence, where a problem counts once however often
    it was tried, and its plain answers count once however many there were.

    Args:
        strategy ([`Strategy`]):
            The strategy.

    Returns:
        `tuple[float, float]`: Lower and upper bound, (-1, 1) before it was executed beside plain answers on another
        problem than its own.
    """
    return difference_bounds(strategy.plain_solved, strategy.plain_baseline, strategy.plain_problems)


def useful(strategy: Strategy) -> bool:
    """Whether a strategy is trusted and the lower bound of its lift over plain answers is above 0."""
    return strategy.trust == "trusted" and plain_lift_bounds(strategy)[0] > 0


def harmful(strategy: Strategy) -> bool:
    """Whether the upper bound of a strategy's lift over plain answers is below 0. It is then not shown."""
    return plain_lift_bounds(strategy)[1] < 0


def preference(strategy: Strategy) -> float:
    """
    Weight of a strategy among others that are as similar to a problem and succeed as often: 1, plus the lower bound of
    its lift over plain answers where this is above 0.

    A success rate does not tell a strategy that helps from one that met easy problems, and the lift does. The lower
    bound is the part of it that the executions prove, so that only proven lift changes the rank.

    Returns:
        `float`: A weight in [1, 2).
    """
    return 1 + max(plain_lift_bounds(strategy)[0], 0.0)


def log_mixture_ratio(successes: float, trials: float, rate: float) -> float:
    """
    Logarithm of the likelihood of outcomes under rates drawn uniformly, relative to their likelihood under one rate
    (Robbins, 1970).

    If `rate` is the true success rate, the probability that this value ever reaches `log(1 / a)` is at most `a`,
    however often it is computed while outcomes are added.

    Args:
        successes (`float`):
            Sum of outcomes in [0, 1].
        trials (`float`):
            Number of outcomes.
        rate (`float`):
            The rate, in (0, 1).

    Returns:
        `float`: 0 without trials.
    """
    failures = trials - successes
    mixture = math.lgamma(successes + 1) + math.lgamma(failures + 1) - math.lgamma(trials + 2)
    return mixture - successes * math.log(rate) - failures * math.log1p(-rate)


def trust_floor(strategy: Strategy, tolerance: float) -> float:
    """
    Success rate above which a strategy is trusted: that of other strategies on the same problems, less a tolerance.

    One more problem with a success rate of 0.5 is added to the baseline, because a baseline of 0 on a few problems
    does not mean that other strategies never succeed.

    Args:
        strategy ([`Strategy`]):
            The strategy and its counts.
        tolerance (`float`):
            Part of the baseline, in [0, 1), that a strategy may fall short of it.

    Returns:
        `float`: A rate in (0, 1).
    """
    return (1 - tolerance) * (strategy.baseline + 0.5) / (strategy.problems + 1)


def trust(strategy: Strategy, min_problems: int, tolerance: float) -> str:
    """
    Trust state that follows from the executions verified here.

    A strategy is trusted if its success rate is above the floor with enough evidence, and retired if it is below the
    floor with enough evidence. Otherwise a trusted strategy becomes a candidate. Trusted therefore means that a
    strategy is not worse than others by more than the tolerance, not that it is better.

    The probability that a strategy exactly at the floor is ever trusted or retired is at most 0.05, although this is
    computed at every commit.

    Args:
        strategy ([`Strategy`]):
            The strategy and its counts. One without any execution keeps its state.
        min_problems (`int`):
            Number of distinct problems, without those it was written for, below which a strategy is neither trusted
            nor retired.
        tolerance (`float`):
            Part of the baseline, in [0, 1), that a strategy may fall short of it.

    Returns:
        `str`: The trust state.
    """
    if strategy.trust == "retired" or strategy.trials == 0:
        return strategy.trust
    floor = trust_floor(strategy, tolerance)
    ratio = log_mixture_ratio(strategy.solved, strategy.problems, floor)
    if strategy.problems >= min_problems and ratio >= -math.log(ERROR_RATE):
        return "trusted" if strategy.solved > floor * strategy.problems else "retired"
    return "candidate" if strategy.trust == "trusted" else strategy.trust


def shown_too_often(shown: int, all_shown: int, max_share: float) -> bool:
    """
    Whether a strategy was shown more often than its share of what its class was shown.

    Args:
        shown (`int`):
            How often it was shown.
        all_shown (`int`):
            How often any strategy of its class was.
        max_share (`float`):
            The share, in (0, 1]. The first 16 times do not count.
    """
    return shown >= max(FREE_SHOWS, max_share * all_shown)


def admissible(correct: bool, sibling_lift: float, leak: float, well_formed: bool, min_lift: float) -> bool:
    """
    Whether a strategy may enter the bank.

    Args:
        correct (`bool`):
            Whether it solved the problem it was written for.
        sibling_lift (`float`):
            Its mean outcome on the sibling problems minus the block's mean on them.
        leak (`float`):
            How much of its problem's answer it contains. Anything above 0 is too much.
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


def near_copies(
    counts: np.ndarray, embeddings: np.ndarray, to_stored: np.ndarray, threshold: float = NEAR_COPY
) -> list[bool]:
    """
    Which of several new strategies of a class are near-copies of a stored one, or of an earlier new one that is not
    a near-copy itself.

    Args:
        counts (`np.ndarray` of shape `(m,)`):
            Whether later ones are compared with it.
        embeddings (`np.ndarray` of shape `(m, d)`):
            Embeddings of the new strategies, of norm 1.
        to_stored (`np.ndarray` of shape `(m,)`):
            Cosine similarity of each to the nearest stored one.
        threshold (`float`, *optional*, defaults to `0.88`):
            Cosine similarity from which on two strategies are near-copies.
    """
    copied = to_stored >= threshold
    for start in range(0, len(embeddings), _BLOCK):
        block = embeddings[start : start + _BLOCK]
        earlier = embeddings[:start][counts[:start] & ~copied[:start]]
        copied[start : start + _BLOCK] |= (block @ earlier.T).max(axis=1, initial=-1.0) >= threshold
        within = block @ block.T
        for row in range(len(block)):
            before = counts[start : start + row] & ~copied[start : start + row]
            copied[start + row] |= within[row, :row][before].max(initial=-1.0) >= threshold
    found: list[bool] = copied.tolist()
    return found


def retention_score(strategy: Strategy) -> float:
    """
    Score by which eviction ranks strategies: the lower bound of the success rate if the strategy is trusted, otherwise
    its utility. Strategies are compared with others of their trust state only.
    """
    if strategy.trust == "trusted":
        return wilson(strategy.successes, strategy.trials)[0]
    return utility(strategy.successes, strategy.trials)


def evict(
    trusted: np.ndarray, quarantined: np.ndarray, scores: np.ndarray, step: np.ndarray, capacity: int
) -> np.ndarray:
    """
    The strategies of a class that exceed its capacity.

    Those in quarantine are evicted first: others wrote them, so they only use places that candidates and trusted
    strategies leave free. A quarter of the capacity is for candidates, so that new ones get executed; they may also
    use places that trusted ones leave free. In each group the lowest [`retention_score`] is evicted first, among
    equals the older one.

    Args:
        trusted, quarantined (`np.ndarray` of shape `(n,)`):
            Whether each strategy is trusted, and whether it is in quarantine.
        scores (`np.ndarray` of shape `(n,)`):
            The [`retention_score`] of each.
        step (`np.ndarray` of shape `(n,)`):
            When each was written.
        capacity (`int`):
            How many stay.

    Returns:
        `np.ndarray`: Rows of those to evict.
    """
    excess = len(trusted) - capacity
    if excess <= 0:
        return np.zeros(0, dtype=int)
    order = np.lexsort((step, scores, ~quarantined))
    new, proven = order[~trusted[order]], order[trusted[order]]
    from_new = min(excess, max(len(new) - math.ceil(NEWCOMERS * capacity), int(quarantined.sum())))
    return np.concatenate([new[:from_new], proven[: excess - from_new]])


def diversify(embeddings: Sequence[np.ndarray], k: int, threshold: float = NEAR_COPY) -> list[int]:
    """
    The first candidates that are no near-copies of earlier ones.

    Args:
        embeddings (`Sequence[np.ndarray]` of length `n`):
            Embeddings of norm 1 and shape `(d,)`, the best first.
        k (`int`):
            How many to pick at most.
        threshold (`float`, *optional*, defaults to `0.88`):
            Cosine similarity from which on two candidates are near-copies.

    Returns:
        `list[int]`: Rows, the best first.
    """
    picked: list[int] = []
    for row in range(len(embeddings)):
        if len(picked) >= k:
            break
        if near_copy(embeddings[row], np.array([embeddings[i] for i in picked]), threshold) is None:
            picked.append(row)
    return picked
