"""What a batch of transfer blocks teaches the bank."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.bank import Outcome, Strategy
from trl_sgpo.method.admission import outcomes, proposals


NO_PLAIN = torch.zeros(1, 0, 2)


def written(n):
    return [Strategy(f"strategy {i}", "a", (f"p{i // 2}",)) for i in range(n)]


def test_the_strategy_with_the_highest_lift_on_siblings_is_proposed():
    """Two problems, two strategies each. The second of the first problem solves both."""
    verified = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    clean, fine = torch.zeros(1, 4), [[True] * 4]
    strategies = [written(4)]
    assert proposals(strategies, verified, 2, clean, fine, 0.0) == [strategies[0][1]]
    leaking = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert proposals(strategies, verified, 2, leaking, fine, 0.0) == []
    assert proposals(strategies, verified, 2, clean, [[True, False, True, True]], 0.0) == []
    assert proposals(strategies, verified, 2, clean, fine, 0.5) == []


def test_without_siblings_the_own_problem_decides():
    verified = torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]])
    strategies = [written(2), written(2)]
    found = proposals(strategies, verified, 2, torch.zeros(2, 2), [[True] * 2] * 2, 0.0)
    assert found == [strategies[0][0]]


def test_outcomes_are_compared_with_other_strategies_on_the_same_problem():
    verified = torch.tensor([[[1.0, 0.0], [0.5, torch.nan], [0.0, 2.0]]])
    found = outcomes([["s", "t", "s"]], [["x", "y"]], ["a"], verified, NO_PLAIN)
    assert found == [
        Outcome("s", "x", 1.0, 2, 0.5, "a"),
        Outcome("t", "x", 0.5, 1, 0.5, "a"),
        Outcome("s", "y", 1.0, 2, 0.5, "a"),
    ]


def test_a_strategy_alone_is_compared_with_itself():
    (found,) = outcomes([["s", "s"]], [["x"]], ["a"], torch.tensor([[[1.0], [0.0]]]), NO_PLAIN)
    assert found == Outcome("s", "x", 1.0, 2, 0.5, "a")


def test_outcomes_are_compared_with_plain_answers_to_the_same_problem():
    """A plain answer that could not be verified does not count, and without others there is no comparison."""
    verified = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
    plain = torch.tensor([[[1.0, torch.nan], [0.0, 2.0]], [[torch.nan, 0.0], [torch.nan, 0.0]]])
    found = outcomes([["s", "t"], ["u", "v"]], [["w", "x"], ["y", "z"]], ["a", "b"], verified, plain)
    assert {(each.problem, each.plain) for each in found} == {("w", 0.5), ("x", 1.0), ("y", None), ("z", 0.0)}
    assert len(found) == 8


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, float("nan")]), min_size=6, max_size=6), min_size=1, max_size=3))
def test_every_verified_execution_counts_once(rows):
    verified = torch.tensor(rows).view(-1, 3, 2)
    ids = [["s", "t", "s"]] * len(rows)
    found = outcomes(ids, [["x", "y"]] * len(rows), ["a"] * len(rows), verified, verified[:, :0])
    assert sum(outcome.trials for outcome in found) == int((~verified.isnan()).sum())
    assert sum(outcome.successes for outcome in found) == verified.nansum().item()
