"""Properties of admission, eviction and diversity."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.trust import ever, wilson_rule
from benchmarks.trust import trust as default_trust
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.bank import Outcome, Strategy, problem_id
from trl_sgpo.bank.policy import (
    ONE_SIDED_95,
    admissible,
    diversify,
    evict,
    log_mixture_ratio,
    near_copy,
    shown_too_often,
    trust,
    trust_floor,
    utility,
    wilson,
)
from trl_sgpo.bank.strategy import TRUST_STATES
from trl_sgpo.errors import BankError


counts = st.integers(0, 50).flatmap(lambda trials: st.tuples(st.floats(0, trials), st.just(trials)))


def unit_rows(seed: int, n: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(counts)
def test_utility_is_a_rate_that_a_success_raises_and_a_failure_lowers(count):
    successes, trials = count
    assert 0 < utility(successes, trials + 1) < utility(successes, trials) < utility(successes + 1, trials + 1) < 1


def test_utility_of_the_untried_is_one_half():
    assert utility(0, 0) == 0.5


@given(st.booleans(), st.floats(-1, 1), st.sampled_from([0.0, 1.0]), st.booleans(), st.floats(-1, 1))
def test_admission_needs_everything(correct, lift, leak, well_formed, min_lift):
    assert admissible(correct, lift, leak, well_formed, min_lift) == (
        correct and well_formed and leak == 0 and lift > min_lift
    )


def test_a_lift_that_is_not_a_number_is_not_admitted():
    assert not admissible(True, float("nan"), 0.0, True, 0.0)


@given(counts, st.floats(0.1, 4))
def test_wilson_bounds_the_rate_and_a_narrower_confidence_lies_within(count, z):
    successes, trials = count
    low, high = wilson(successes, trials, z)
    assert 0 <= low <= high <= 1
    if trials:
        assert low <= successes / trials + 1e-9 and successes / trials <= high + 1e-9
        wider = wilson(successes, trials, z + 0.5)
        assert wider[0] <= low + 1e-9 and high <= wider[1] + 1e-9
        assert wilson(2 * successes, 2 * trials, z)[0] >= low - 1e-9


def test_wilson_is_that_of_statsmodels():
    assert wilson(8, 10, 1.959964) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 190, 1.959964)[1] == pytest.approx(0.0198178, abs=1e-6)


@given(counts, st.floats(0.01, 0.99))
def test_the_mixture_ratio_is_the_mean_likelihood_ratio(count, rate):
    successes, trials = count
    ratio = log_mixture_ratio(successes, trials, rate)
    uniform = np.linspace(0.0005, 0.9995, 1000)
    likelihood = successes * np.log(uniform / rate) + (trials - successes) * np.log((1 - uniform) / (1 - rate))
    assert ratio == pytest.approx(np.logaddexp.reduce(likelihood) - np.log(1000), abs=0.03)


@st.composite
def tried(draw):
    problems = draw(st.integers(0, 60))
    solved, baseline = draw(st.floats(0, problems)), draw(st.floats(0, problems))
    state, trials = draw(st.sampled_from(TRUST_STATES)), problems + draw(st.integers(0, 3))
    return Strategy("text", "a", (), trust=state, trials=trials, problems=problems, solved=solved, baseline=baseline)


@given(tried(), st.integers(1, 10), st.floats(0, 0.9))
def test_trust_is_what_the_executions_support(strategy, min_problems, tolerance):
    state = trust(strategy, min_problems, tolerance)
    floor = trust_floor(strategy, tolerance)
    above = strategy.solved > floor * strategy.problems
    decided = log_mixture_ratio(strategy.solved, strategy.problems, floor) >= np.log(20)
    if strategy.trust == "retired" or strategy.trials == 0:
        assert state == strategy.trust
    elif strategy.problems < min_problems or not decided:
        assert state == ("candidate" if strategy.trust == "trusted" else strategy.trust)
    else:
        assert state == ("trusted" if above else "retired")


@given(tried(), st.integers(1, 10), st.floats(0, 0.9))
def test_trust_is_settled(strategy, min_problems, tolerance):
    once = replace(strategy, trust=trust(strategy, min_problems, tolerance))
    assert trust(once, min_problems, tolerance) == once.trust


@pytest.mark.parametrize("baseline, others", [(0.05, 7), (0.2, 3), (0.5, 7), (0.8, 7)])
def test_strategies_at_the_floor_are_rarely_ever_trusted_or_retired(baseline, others):
    """300 strategies, with the trust state computed after each of 96 problems."""
    shares = ever(default_trust, 0.8 * baseline, baseline, problems=96, strategies=300, others=others)[:, -1]
    assert shares.max() <= 0.05


def test_a_bound_for_one_look_is_crossed_often_under_repeated_looks():
    shares = ever(wilson_rule(ONE_SIDED_95), 0.4, 0.5, problems=96, strategies=300)[:, -1]
    assert shares.min() > 0.2


@pytest.mark.parametrize("lift, problems, least", [(0.1, 64, 0.6), (0.2, 32, 0.7), (0.3, 16, 0.7)])
def test_better_strategies_are_trusted_after_some_problems(lift, problems, least):
    assert ever(default_trust, 0.5 + lift, 0.5, problems, strategies=300)[0, -1] >= least


@pytest.mark.parametrize("rate, baseline, state", [(0.05, 0.7, 1), (0.1, 0.5, 1), (0.95, 0.6, 0)])
def test_harmful_strategies_are_retired_and_good_ones_are_trusted(rate, baseline, state):
    shares = ever(default_trust, rate, baseline, problems=64, strategies=300)[:, -1]
    assert shares[state] >= 0.99 and shares[1 - state] <= 0.01


def test_a_strategy_that_never_succeeds_is_not_trusted():
    assert not ever(default_trust, 0.0, 0.05, problems=64, strategies=300)[0].any()


STATES = st.sampled_from(["trusted", "candidate", "quarantine"])


@given(st.lists(st.tuples(STATES, st.integers(-5, 5), st.integers(0, 3)), max_size=30), st.integers(1, 12))
def test_eviction_keeps_the_best_and_room_for_candidates(population, capacity):
    trusted, new, quarantined = (
        np.array([row[0] == state for row in population], dtype=bool)
        for state in ("trusted", "candidate", "quarantine")
    )
    scores, step = np.array([row[1] for row in population]), np.array([row[2] for row in population])
    gone = evict(trusted, quarantined, scores, step, capacity)
    kept = sorted(set(range(len(population))) - set(gone.tolist()))
    assert len(set(gone.tolist())) == len(gone) == max(len(population) - capacity, 0)
    for side in (trusted, new, quarantined):
        for lost in (row for row in gone if side[row]):
            for row in (row for row in kept if side[row]):
                assert (scores[lost], step[lost]) <= (scores[row], step[row])
    room = -(-capacity // 4)
    assert sum(new[kept]) >= min(int(new.sum()), room)
    assert sum(trusted[kept]) >= min(int(trusted.sum()), capacity - room)
    assert quarantined[gone].all() or not quarantined[kept].any()


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(0.01, 1))
def test_the_share_of_shows(shown, others, share):
    assert not shown_too_often(min(shown, 15), others, share)
    assert shown_too_often(shown + others + 16, shown + others + 16, share)
    if shown_too_often(shown, shown + others, share):
        assert shown >= share * (shown + others)


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(0, 6), st.floats(0.1, 0.99))
@settings(max_examples=50)
def test_diversity(seed, n, k, threshold):
    rows = unit_rows(seed, n)
    picked = diversify(rows, k, threshold)
    assert picked == sorted(set(picked)) and len(picked) <= k
    if n and k:
        assert picked[0] == 0
    similarities = rows[picked] @ rows[picked].T - 2 * np.eye(len(picked))
    assert (similarities < threshold + 1e-5).all()
    if len(picked) < k:
        for row in set(range(n)) - set(picked):
            assert (rows[picked] @ rows[row]).max() >= threshold - 1e-5


def test_near_copy():
    rows = unit_rows(0, 5)
    assert near_copy(rows[3], rows) == 3
    assert near_copy(-rows[3], rows[3:4]) is None
    assert near_copy(rows[0], rows[:0]) is None


def test_ids():
    assert problem_id("1 + 1") == problem_id("1 + 1") != problem_id("1 + 2")
    messages = [{"role": "user", "content": "1 + 1"}]
    assert problem_id(messages) == problem_id([{"content": "1 + 1", "role": "user"}])
    one = Strategy("Isolate  the\nunknown", "a", ("p",), successes=1, trials=2)
    assert one.id == Strategy("isolate the unknown", "a", ("q",)).id != Strategy(one.text, "b", ("p",)).id
    assert len(one.id) == len(problem_id(messages)) == 16
    assert (
        one.checksum == Strategy(one.text, "a", ("q",)).checksum != Strategy(one.text, "a", ("p",), run="r").checksum
    )


@pytest.mark.parametrize("successes, trials", [(2, 1), (-1, 1), (float("nan"), 1)])
def test_impossible_counts(successes, trials):
    with pytest.raises(BankError, match="between 0 and the number of executions"):
        Outcome("x", "p", successes, trials)
    with pytest.raises(BankError, match="between 0 and the number of executions"):
        Strategy("text", "a", (), successes=successes, trials=trials)
    with pytest.raises(BankError, match="between 0 and the number of executions"):
        Strategy("text", "a", (), solved=successes, problems=trials)


@pytest.mark.parametrize("baseline", [-0.1, 1.1, float("nan")])
def test_impossible_baseline(baseline):
    with pytest.raises(BankError, match="between 0 and the number of executions"):
        Outcome("x", "p", 1, 1, baseline=baseline)


def test_unknown_trust():
    with pytest.raises(BankError, match="candidate, trusted"):
        Strategy("text", "a", (), trust="believed")
