"""Figures of an evaluation: means with intervals, pass@k and majority votes."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


SOLVED = 0.99  # smallest outcome that counts as solved, for pass@k


def derived_seed(seed: int, *parts: str | int) -> int:
    """A seed for one part of the work, independent of all other parts."""
    return int(hashlib.sha256(json.dumps([seed, *parts]).encode()).hexdigest()[:8], 16)


@dataclass(frozen=True)
class Estimate:
    """
    A mean with its 95% interval.

    Args:
        value (`float`):
            The mean.
        low (`float`):
            Lower bound.
        high (`float`):
            Upper bound.
        problems (`int`):
            Problems behind it.
    """

    value: float
    low: float
    high: float
    problems: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_interval(rate: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """
    Wilson score interval of a success rate.

    Args:
        rate (`float`):
            Successes divided by trials.
        trials (`float`):
            Number of trials, or effective number of them, above 0.
        z (`float`, *optional*, defaults to `1.96`):
            Normal quantile, 1.96 for 95%.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))  # holds the rate despite rounding


def rate_estimate(outcomes: Sequence[float]) -> Estimate | None:
    """Mean of one outcome a problem with its Wilson interval, `None` if there are none."""
    if not outcomes:
        return None
    rate = math.fsum(outcomes) / len(outcomes)
    return Estimate(rate, *wilson_interval(rate, len(outcomes)), len(outcomes))


def mean_estimate(values: Sequence[float]) -> Estimate | None:
    """
    Mean of one value in [0, 1] a problem, such as a share of right samples, with its interval over problems.

    [`class_mean_estimate`] with every problem as a class of its own.
    """
    return class_mean_estimate(values, range(len(values)))


def class_mean_estimate(
    values: Sequence[float], classes: Sequence[Hashable], least: float = 0.0, most: float = 1.0
) -> Estimate | None:
    """
    Mean over classes of the mean over their problems, with an interval over classes.

    The interval is that of Student's t over class means, in the form of Wilson's, which stays within the possible
    range and covers near its ends: Wilson's for the effective number of problems with this variance, with the
    quantile of Student's t. The variance is that of class means, and at least that of as many independent problems. To
    these a problem at each end of the range is added, so that equal values do not give an interval of width 0. With
    one class, the interval is the whole range: nothing is known about other classes.

    Args:
        values (`Sequence[float]`):
            One value a problem, NaN where there is none.
        classes (`Sequence[Hashable]`):
            Class of each problem.
        least (`float`, *optional*, defaults to `0.0`), most (`float`, *optional*, defaults to `1.0`):
            Range of the values.

    Returns:
        [`Estimate`] or `None`: `None` if there are no values.
    """
    from scipy.special import stdtrit

    by_class = defaultdict(list)
    for value, name in zip(values, classes, strict=True):
        if not math.isnan(value):
            by_class[name].append((value - least) / (most - least))
    if not by_class:
        return None
    count = len(by_class)
    means = [math.fsum(own) / len(own) for own in by_class.values()]
    mean = math.fsum(means) / count
    low, high = 0.0, 1.0
    if count > 1:
        # Independent problems that would give the mean over classes the same variance
        problems = count**2 / math.fsum(1 / len(own) for own in by_class.values())
        squares = math.fsum(math.fsum(value**2 for value in own) / len(own) for own in by_class.values()) / count
        centre = (problems * mean + 1) / (problems + 2)
        within = ((problems * squares + 1) / (problems + 2) - centre**2) / problems
        between = math.fsum((each - mean) ** 2 for each in means) / (count - 1) / count
        z = float(stdtrit(count - 1, 0.975))
        low, high = wilson_interval(mean, centre * (1 - centre) / max(within, between), z)
    value, low, high = (least + (most - least) * each for each in (mean, low, high))
    return Estimate(value, low, high, sum(map(len, by_class.values())))


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """
    Probability that one of `k` samples solves a problem, estimated without bias from more of them.

    Args:
        samples (`int`):
            Number of samples.
        solved (`int`):
            How many of them solve it.
        k (`int`):
            At most `samples`.
    """
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def agreeing(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[list[int]]:
    """
    Groups samples by their answers.

    Args:
        answers (`Sequence[str | None]`):
            Final answers. `None` is in no group.
        same (`Callable`):
            Whether two answers are the same.

    Returns:
        `list[list[int]]`: Positions of answers that are the same as the first of their group. Larger groups come
            first, the earliest among equally large ones.
    """
    groups: list[list[int]] = []
    representatives: list[str] = []
    for position, answer in enumerate(answers):
        if answer is None:
            continue
        group = next((i for i, other in enumerate(representatives) if same(answer, other)), None)
        if group is None:
            groups.append([position])
            representatives.append(answer)
        else:
            groups[group].append(position)
    return sorted(groups, key=len, reverse=True)


def majority_vote(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """The position of the first of the most frequent answers, see [`agreeing`], `None` if nothing was answered."""
    return next((group[0] for group in agreeing(answers, same)), None)
