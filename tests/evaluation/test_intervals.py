"""Simulations: how often each interval contains the true mean, of 95% asked for."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.evaluation.statistics import (
    Estimate,
    class_mean_estimate,
    mean_estimate,
    pass_at_k,
    rate_estimate,
    wilson_interval,
)


REPEATS = 400
CLASSES = [2, 3, 4, 8, 16]
Rng = np.random.Generator


def coverage(truth: float, estimate: Callable[[Rng], Estimate | None]) -> float:
    rng = np.random.default_rng(0)
    found = [estimate(rng) for _ in range(REPEATS)]
    return float(np.mean([each.low - 1e-9 <= truth <= each.high + 1e-9 for each in found]))


def rates(rng: Rng, mean: float, correlation: float, size: int) -> np.ndarray:
    """Success rates that vary, with the given correlation between two outcomes of the same rate."""
    if correlation == 0:
        return np.full(size, mean)
    scale = (1 - correlation) / correlation
    return rng.beta(mean * scale, (1 - mean) * scale, size)


def problems_of(count: int) -> list[int]:
    """Unequal numbers of problems for each class, from 4 to 16."""
    return [4 + index * 5 % 13 for index in range(count)]


class TestOverClasses:
    @pytest.mark.parametrize("count", CLASSES)
    @pytest.mark.parametrize(
        ("mean", "correlation"),
        [(0.5, 0.0), (0.5, 0.2), (0.5, 0.5), (0.8, 0.1), (0.03, 0.1), (0.95, 0.1), (0.99, 0.3)],
    )
    def test_rates(self, count, mean, correlation):
        sizes = problems_of(count)
        names = np.repeat(np.arange(count), sizes)

        def estimate(rng):
            return class_mean_estimate(rng.random(len(names)) < rates(rng, mean, correlation, count)[names], names)

        assert coverage(mean, estimate) >= 0.925

    @pytest.mark.parametrize("count", CLASSES)
    @pytest.mark.parametrize(
        ("first", "second", "correlation", "equal"),
        [
            (0.5, 0.5, 0.1, 0.0),
            (0.8, 0.3, 0.3, 0.0),
            (0.7, 0.6, 0.1, 0.9),
            (0.95, 0.9, 0.2, 0.5),
            (0.99, 0.02, 0.05, 0),
        ],
    )
    def test_differences(self, count, first, second, correlation, equal):
        """Two conditions on the same problems, on a part of which they always have the same outcome."""
        sizes = problems_of(count)
        names = np.repeat(np.arange(count), sizes)

        def estimate(rng):
            ours, theirs = (
                rng.random(len(names)) < rates(rng, mean, correlation, count)[names] for mean in (first, second)
            )
            differ = rng.random(len(names)) >= equal
            return class_mean_estimate(np.where(differ, ours * 1.0 - theirs, 0.0), names, least=-1.0)

        assert coverage((1 - equal) * (first - second), estimate) >= 0.925

    def test_is_students_where_class_means_vary(self):
        means = [0.2, 0.3, 0.5, 0.6, 0.7, 0.4, 0.35, 0.65]
        names = np.repeat(np.arange(8), 100)
        found = class_mean_estimate(np.concatenate([np.arange(100) < 100 * mean for mean in means]), names)
        half = 2.364624 * np.std(means, ddof=1) / math.sqrt(8)
        assert found.value == pytest.approx(np.mean(means))
        assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.01)

    def test_one_class_says_nothing_about_others(self):
        one = class_mean_estimate([1.0, 0.0] * 50, ["a"] * 100)
        assert (one.value, one.low, one.high, one.problems) == (0.5, 0.0, 1.0, 100)
        difference = class_mean_estimate([1.0, 0.0] * 50, ["a"] * 100, least=-1.0)
        assert (difference.value, difference.low, difference.high) == (0.5, -1.0, 1.0)

    @pytest.mark.parametrize(("value", "least"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, -1.0), (-1.0, -1.0)])
    def test_equal_values_do_not_make_it_sure(self, value, least):
        widths = []
        for each in (2, 8, 64):
            found = class_mean_estimate([value] * 4 * each, np.repeat(np.arange(4), each), least)
            assert found.value == value and least <= found.low <= value <= found.high <= 1
            widths.append(found.high - found.low)
        assert widths[0] > 0.3 and widths == sorted(widths, reverse=True) and 0 < widths[2] < 0.1

    @given(
        st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abc")), min_size=1, max_size=20),
        st.sampled_from([(0.0, 1.0), (-1.0, 1.0)]),
    )
    def test_holds_its_estimate_within_the_range(self, drawn, bounds):
        least, most = bounds
        values, names = [least + (most - least) * value for value, _ in drawn], [name for _, name in drawn]
        found = class_mean_estimate(values, names, least, most)
        assert least <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= most
        assert found == class_mean_estimate(values[::-1], names[::-1], least, most)


def test_executions_of_a_block_are_no_independent_trials():
    """Blocks of 8 problems and strategies: an interval for the number of executions would be too narrow."""
    K, blocks = 8, 6

    def executions(rng):
        strategy, problem = rng.normal(0, 1.5, (2, blocks, K))
        right = rng.random((blocks, K, K)) < 1 / (1 + np.exp(-strategy[:, :, None] - problem[:, None]))
        return right[:, ~np.eye(K, dtype=bool)].mean()

    def by(trials):
        def estimate(rng):
            rate = executions(rng)
            return Estimate(rate, *wilson_interval(rate, trials), trials)

        return coverage(0.5, estimate)

    assert by(blocks * K) >= 0.95 and by(blocks * K * (K - 1)) < 0.8


class TestOverProblems:
    @pytest.mark.parametrize("size", [3, 8, 24, 100])
    @pytest.mark.parametrize("mean", [0.03, 0.5, 0.9])
    def test_one_attempt(self, size, mean):
        # With few problems, coverage goes up and down with the rate
        assert coverage(mean, lambda rng: rate_estimate(list((rng.random(size) < mean) * 1.0))) >= 0.9

    @pytest.mark.parametrize("size", [3, 8, 24, 100])
    @pytest.mark.parametrize(("mean", "correlation"), [(0.03, 0.3), (0.5, 0.1), (0.5, 0.6), (0.9, 0.3)])
    def test_several_samples(self, size, mean, correlation):
        samples = 4

        def solved(rng):
            return rng.binomial(samples, rates(rng, mean, correlation, size))

        assert coverage(mean, lambda rng: mean_estimate(list(solved(rng) / samples))) >= 0.925
        once = float(np.mean(rates(np.random.default_rng(1), mean, correlation, 400_000) ** 2))
        truth = 2 * mean - once  # pass@2

        def pass_at_2(rng):
            return mean_estimate([pass_at_k(samples, int(count), 2) for count in solved(rng)])

        assert coverage(truth, pass_at_2) >= 0.925

    def test_more_samples_narrow_it(self):
        widths = []
        for samples in (1, 16):
            values = np.random.default_rng(0).binomial(samples, 0.5, 50) / samples
            found = mean_estimate(list(values))
            widths.append(found.high - found.low)
        assert widths[1] < 0.5 * widths[0]

    def test_one_problem_says_nothing_about_others(self):
        found = mean_estimate([0.25])
        assert (found.value, found.low, found.high) == (0.25, 0.0, 1.0)
        assert mean_estimate([]) is None
