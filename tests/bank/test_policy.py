"""Properties of admission, eviction and diversity."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.bank import Outcome, Strategy, problem_id
from trl_sgpo.bank.policy import admissible, diversify, evict, near_copy, utility
from trl_sgpo.errors import BankError


counts = st.integers(0, 50).flatmap(lambda trials: st.tuples(st.floats(0, trials), st.just(trials)))


def unit_rows(seed: int, n: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@st.composite
def populations(draw):
    rows = draw(st.lists(st.tuples(st.sampled_from("abc"), counts, st.integers(0, 9), st.booleans()), max_size=25))
    return [
        Strategy(f"text {i}", name, (), step=step, successes=s, trials=n, trust="quarantine" if q else "candidate")
        for i, (name, (s, n), step, q) in enumerate(rows)
    ]


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


@given(populations(), st.integers(1, 8))
@settings(max_examples=50)
def test_eviction_keeps_the_most_useful_of_each_class(population, capacity):
    evicted = set(evict(population, capacity))
    kept = [s for s in population if s.id not in evicted]
    before, after = Counter(s.problem_class for s in population), Counter(s.problem_class for s in kept)
    assert after == {name: min(n, capacity) for name, n in before.items()}
    for gone in (s for s in population if s.id in evicted):
        for stays in (s for s in kept if s.problem_class == gone.problem_class and s.trust == gone.trust):
            assert (utility(gone.successes, gone.trials), gone.step) <= (
                utility(stays.successes, stays.trials),
                stays.step,
            )


@given(populations(), st.integers(1, 8))
@settings(max_examples=50)
def test_eviction_of_a_class_does_not_depend_on_other_classes(population, capacity):
    alone = [evict([s for s in population if s.problem_class == name], capacity) for name in "abc"]
    assert set(evict(population, capacity)) == {key for keys in alone for key in keys}


def test_quarantine_pushes_nothing_out():
    proven = Strategy("proven", "a", (), successes=1, trials=10)
    imported = Strategy("imported", "a", (), trust="quarantine", successes=9, trials=10)
    assert evict([proven, imported], 1) == [imported.id]


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(0, 6), st.floats(0.1, 0.99))
@settings(max_examples=50)
def test_diversity(seed, n, k, threshold):
    rows, scores = unit_rows(seed, n), np.random.default_rng(seed).random(n).tolist()
    picked = diversify(scores, rows, k, threshold)
    assert len(picked) <= k and len(set(picked)) == len(picked)
    assert [scores[row] for row in picked] == sorted((scores[row] for row in picked), reverse=True)
    if n and k:
        assert picked[0] == int(np.argmax(scores))
    similarities = rows[picked] @ rows[picked].T - 2 * np.eye(len(picked))
    assert (similarities < threshold + 1e-5).all()


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
    assert one.checksum == Strategy(one.text, "a", ("p",)).checksum != Strategy(one.text, "a", ("q",)).checksum


@pytest.mark.parametrize("successes, trials", [(2, 1), (-1, 1), (float("nan"), 1)])
def test_impossible_counts(successes, trials):
    with pytest.raises(BankError, match="between 0 and trials"):
        Outcome("x", successes, trials)
    with pytest.raises(BankError, match="between 0 and trials"):
        Strategy("text", "a", (), successes=successes, trials=trials)


def test_unknown_trust():
    with pytest.raises(BankError, match="candidate, trusted"):
        Strategy("text", "a", (), trust="believed")
