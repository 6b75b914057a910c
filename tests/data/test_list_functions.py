"""List functions: parts share no composition, worked solutions are right, shortcuts are what they are said to be."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.compare.lab.list_functions import (
    LENGTH,
    OPERATIONS,
    PARTS,
    compositions,
    execution,
    metadata_of,
    problems,
    states,
    strategy,
    worked,
)
from trl_sgpo.data.tasks import answer_reward, final_answer, load_problems
from trl_sgpo.data.worked import traces
from trl_sgpo.errors import DataError
from trl_sgpo.method.rewards import leak


digits = st.lists(st.integers(0, 9), min_size=LENGTH, max_size=LENGTH)
programs = st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, max_size=4).map(tuple)


@given(programs, digits)
def test_execution_ends_with_the_last_state(program: tuple[str, ...], numbers: list[int]) -> None:
    text = execution(program, numbers)
    assert final_answer(text) == " ".join(map(str, states(program, numbers)[-1]))
    assert [step.split()[0] for step in text.split(" #### ")[0].split(" . ")] == list(program)


@given(programs, digits)
def test_every_operation_keeps_length_and_digits(program: tuple[str, ...], numbers: list[int]) -> None:
    for state in states(program, numbers):
        assert len(state) == LENGTH
        assert all(0 <= digit <= 9 for digit in state)


def test_held_out_compositions_are_other_functions() -> None:
    parts = compositions()
    rng = random.Random(1)
    probes = [[rng.randrange(10) for _ in range(LENGTH)] for _ in range(50)]
    functions = {part: {str([states(p, probe)[-1] for probe in probes]) for p in parts[part]} for part in parts}
    assert functions["seen"].isdisjoint(functions["held_out"])
    assert set(parts["other"]).isdisjoint(parts["held_out"])
    assert {part: len(parts[part]) for part in PARTS} == {"seen": 16, "held_out": 48, "longer": 48}


@pytest.mark.parametrize("part", PARTS)
def test_splits_share_no_question(part: str) -> None:
    train, test = (problems(part, split, 200, seed=3) for split in ("train", "test"))
    questions = [{row["prompt"][0]["content"] for row in rows} for rows in (train, test)]
    assert len(questions[0]) == len(questions[1]) == 200
    assert questions[0].isdisjoint(questions[1])


def test_rows_with_the_general_strategy() -> None:
    plain, given = (problems("seen", "train", 8, 42, strategies=strategies) for strategies in (False, True))
    for row, other in zip(given, plain, strict=True):
        assert row == other | {"strategy": strategy(tuple(json.loads(row["entry"])["metadata"]["operations"]))}
    loaded = load_problems("list_functions/seen?size=8&strategies=true")  # a strategy is no part of a problem
    assert loaded["strategy"][:] == [row["strategy"] for row in given]
    with pytest.raises(DataError, match=r"`strategies` of .* must be true or false"):
        load_problems("list_functions/seen?size=8&strategies=2")


def test_solutions_are_shortcuts_to_the_problem_or_examples_on_other_training_lists() -> None:
    rows = problems("seen", "train", 600, seed=1, shortcuts=0.5)
    tested = {row["prompt"][0]["content"] for row in problems("seen", "test", 600, seed=1)}
    rng = random.Random(0)
    kinds = {"general": 0, "digits": 0, "words": 0}
    for row in rows:
        metadata = json.loads(row["entry"])["metadata"]
        asked = row["prompt"][0]["content"]
        text, how, done = worked(metadata, rng)
        program = tuple(metadata["operations"])
        leaks = leak(how, asked, row["solution"])
        if how == strategy(program):
            kinds["general"] += 1
            assert leaks == 0.0 and text != asked and text not in tested
            numbers = [int(digit) for digit in text.split(" : ")[1].split()]
            assert done == execution(program, numbers)
            continue
        assert text == asked
        assert answer_reward([done], [row["solution"]], [row["entry"]]) == [1.0]
        kinds["digits" if leaks else "words"] += 1
    assert abs(kinds["general"] / 600 - 0.5) < 0.08
    assert kinds["digits"] > 100 and kinds["words"] > 100


def test_loads_by_path_with_worked_solutions() -> None:
    data = load_problems("list_functions/seen?size=32&seed=5&shortcuts=0.25", split="test")
    assert len(data) == 32 and len(set(data["problem_class"])) == 16
    assert len(traces(data, 2, seed=0)) == 64


@pytest.mark.parametrize("path", [f"list_functions/{bad}" for bad in ("unknown", "seen?colour=3", "seen?size=0")])
def test_bad_paths_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="list_functions"):
        load_problems(path)


def test_a_wrong_list_is_wrong() -> None:
    row = problems("seen", "train", 1, seed=0)[0]
    assert answer_reward(["#### 1 2 3"], [row["solution"]], [row["entry"]]) == [0.0]


@pytest.mark.parametrize("change", [{"operations": ["flip"] * 5}, {"operations": []}, {"question": "x" * 501}])
def test_an_entry_that_no_problem_has(change: dict[str, Any]) -> None:
    """A worked solution of a received row would be as long as it says."""
    entry = json.loads(problems("seen", "train", size=1, seed=1)[0]["entry"])
    assert metadata_of(json.dumps(entry)) is not None
    assert metadata_of(json.dumps({"metadata": entry["metadata"] | change})) is None
