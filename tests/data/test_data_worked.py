import math
import random

import pytest
from datasets import Dataset

from trl_sgpo.data.tasks import answer_reward, load_problems, to_problems
from trl_sgpo.data.worked import _STRATEGIES, solutions, traces, worked_traces
from trl_sgpo.errors import DataError


@pytest.fixture(scope="module")
def problems():
    return load_problems("reasoning_gym/lcm+gcd+chain_sum+products?size=80&max_value=60&max_digits=2")


def test_executions_are_right(problems):
    rows = {row["prompt"][0]["content"]: row for row in problems}
    found = traces(problems, 4, seed=0)
    solved = [rows[trace.prompt[0]["content"]] for trace in found]
    rewards = answer_reward(
        [trace.execution for trace in found], [row["solution"] for row in solved], [row["entry"] for row in solved]
    )
    assert set(rewards) == {1.0}
    assert {trace.problem_class for trace in found} == set(_STRATEGIES)
    assert all(len(trace.execution) <= 64 for trace in found)
    phrasings = {phrasing for family in _STRATEGIES.values() for strategy, _ in family for phrasing in strategy}
    assert {trace.strategy for trace in found} == phrasings


def test_worked_solutions_of_the_data_are_plain_answers(problems):
    rows = [
        {"question": "a?", "answer": "Half of 8 is 8/2 = <<8/2=4>>4.\n#### 4"},
        {"question": "b?", "answer": "So it is \\boxed{7}."},
        {"question": "c?", "answer": "9"},
    ]
    found = solutions(to_problems(Dataset.from_list(rows)))
    assert [(trace.strategy, trace.execution) for trace in found] == [
        ("", "Half of 8 is 8/2 = 4.\n#### 4"),
        ("", "So it is \\boxed{7}.\n#### 7"),
    ]
    assert found[0].prompt == [{"role": "user", "content": "a?"}]
    assert solutions(problems) == []


def test_steps_are_right(problems):
    checked = 0
    for trace in traces(problems, 4, seed=1):
        steps = trace.execution.rpartition("#### ")[0].strip().rstrip(".").split(". ")
        for step in steps:
            left, equals, right = step.partition(" = ")
            if equals:
                assert math.isclose(eval(left.replace("mod", "%")), int(right)), trace
                checked += 1
    assert checked > 300


def test_strategies_are_general():
    for family in _STRATEGIES.values():
        for phrasings, _ in family:
            for phrasing in phrasings:
                assert not any(character.isdigit() for character in phrasing)
                assert len(phrasing.split()) <= 25
                assert phrasing.startswith(("To ", "For "))


@pytest.mark.parametrize(
    ("family", "numbers", "executions"),
    [
        ("lcm", [12, 18], ["18, 36. 36 / 12 = 3.", "12 * 18 = 216. GCD 6. 216 / 6 = 36.", ""]),
        ("gcd", [28, 12], ["28 mod 12 = 4. 12 mod 4 = 0.", "12, 6, 4. 28 / 4 = 7.", ""]),
        (
            "chain_sum",
            [34, 12, -7],
            ["34 + 12 = 46. 46 - 7 = 39.", "30 + 10 + 0 = 40. 4 + 2 - 7 = -1. 40 - 1 = 39.", ""],
        ),
        ("products", [7, 14], ["10 * 7 = 70. 4 * 7 = 28. 70 + 28 = 98.", "14, 28, 42, 56, 70, 84, 98.", ""]),
    ],
)
def test_executions(family, numbers, executions):
    assert [execute(numbers) for _, execute in _STRATEGIES[family]] == executions


def test_deterministic(problems):
    assert traces(problems, 1, seed=0) == traces(problems, 1, seed=0) != traces(problems, 1, seed=1)


def test_not_covered(problems):
    other = load_problems("reasoning_gym/spell_backward?size=3")
    with pytest.raises(DataError, match="lcm, gcd, chain_sum, products"):
        traces(other, 1, seed=0)
    with pytest.raises(DataError):
        traces(Dataset.from_list([{"prompt": "Hi", "solution": "1"}]), 1, seed=0)
    wrong = {**problems[0], "solution": "1" + problems[0]["solution"]}
    assert worked_traces(wrong, random.Random(0)) is None
