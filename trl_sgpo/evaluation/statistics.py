"""Figures of an evaluation: pass@k, majority votes, and intervals by resampling problems."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


SOLVED = 0.99  # smallest outcome that counts as solved, for pass@k
RESAMPLES = 2000


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


def wilson_interval(rate: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """
    Wilson score interval of a success rate.

    Args:
        rate (`float`):
            Successes divided by trials.
        trials (`int`):
            Number of trials, at least 1.
        z (`float`, *optional*, defaults to `1.96`):
            Normal quantile, 1.96 for 95%.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate_estimate(outcomes: Sequence[float]) -> Estimate | None:
    """Mean of one outcome a problem with its Wilson interval, `None` if there are none."""
    if not outcomes:
        return None
    rate = math.fsum(outcomes) / len(outcomes)
    return Estimate(rate, *wilson_interval(rate, len(outcomes)), len(outcomes))


def class_mean_estimate(values: Sequence[float], classes: Sequence[str], seed: int) -> Estimate | None:
    """
    Mean over classes of the mean over their problems, with a bootstrap interval.

    Problems are resampled within their class; all measurements of a problem stay together.

    Args:
        values (`Sequence[float]`):
            One value a problem, NaN where there is none.
        classes (`Sequence[str]`):
            Class of each problem.
        seed (`int`):
            Seed of the resampling.

    Returns:
        [`Estimate`] or `None`: `None` if there are no values.
    """
    rng = np.random.default_rng(seed)
    means, resampled, problems = [], [], 0
    for name in sorted(set(classes)):
        own = np.array([value for value, its in zip(values, classes, strict=True) if its == name], dtype=float)
        own = own[~np.isnan(own)]
        if len(own):
            means.append(own.mean())
            resampled.append(own[rng.integers(len(own), size=(RESAMPLES, len(own)))].mean(axis=1))
            problems += len(own)
    if not means:
        return None
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    return Estimate(float(np.mean(means)), float(low), float(high), problems)


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


def majority_vote(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """
    Finds the answer that most samples agree on.

    Args:
        answers (`Sequence[str | None]`):
            Final answers. `None` has no vote.
        same (`Callable`):
            Whether two answers are the same.

    Returns:
        `int` or `None`: Position of the first of the most frequent answers, the earliest among equally frequent ones.
        `None` if nothing was answered.
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
    return max(groups, key=len)[0] if groups else None
