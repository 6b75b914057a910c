"""Word programs: parts share no composition, worked solutions are right and hold no answer, entries are checked."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.compare.lab.word_programs import (
    FAMILIES,
    PARTS,
    compositions,
    metadata_of,
    problems,
    shown,
    states,
    worked,
)
from trl_sgpo.data.tasks import answer_reward, final_answer, load_problems
from trl_sgpo.data.worked import traces
from trl_sgpo.errors import DataError


KINDS = tuple(FAMILIES)


def question(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_of_other_functions(kind: str) -> None:
    parts = compositions(kind)
    assert {part: len(parts[part]) for part in PARTS} == {"seen": 8, "held_out": 6, "longer": 12, "reworded": 8}
    assert parts["reworded"] == parts["seen"] and all(len(program) == 3 for program in parts["longer"])
    rng = random.Random(1)
    starts = [json.loads(row["entry"])["metadata"]["start"] for row in problems("seen", "train", 40, 5, (kind,))]
    probes = [(start, [rng.randrange(2, 10) for _ in range(2)]) for start in starts]
    functions = {
        part: {str([states(kind, program, *probe)[-1] for probe in probes]) for program in parts[part]}
        for part in ("seen", "held_out")
    }
    assert functions["seen"].isdisjoint(functions["held_out"])


@pytest.mark.parametrize("part", PARTS)
def test_problems_are_of_all_families_in_turn_and_splits_share_none(part: str) -> None:
    train, test = (problems(part, split, 120, 3, KINDS) for split in ("train", "test"))
    assert {question(row) for row in train}.isdisjoint(map(question, test))
    assert [row["problem_class"].split("-")[0] for row in train[:4]] == [*KINDS, KINDS[0]]
    assert len({row["problem_class"] for row in train}) == 3 * len(compositions("lists")[part])


def test_other_words_are_those_of_no_other_part() -> None:
    plain, reworded = (problems(part, "test", 60, 3, KINDS) for part in ("seen", "reworded"))
    for kind in KINDS:
        for operation in FAMILIES[kind].operations.values():
            new = operation.reworded.partition("{n}")[2] or operation.reworded
            own = [row for row in plain if row["problem_class"].startswith(kind)]
            assert not any(new in question(row) for row in own)
            assert not any(phrase.format(n=3) in question(row) for row in reworded for phrase in operation.said)
    assert {row["problem_class"] for row in reworded} == {row["problem_class"] for row in plain}


@given(st.sampled_from(PARTS), st.integers(0, 10**6))
def test_worked_solutions_are_right_and_their_strategies_name_no_instance(part: str, seed: int) -> None:
    for row in problems(part, "train", 3, seed, KINDS):
        metadata = metadata_of(row["entry"])
        assert metadata is not None
        after = states(metadata["kind"], metadata["operations"], metadata["start"], metadata["numbers"])
        strategy, execution = worked(metadata, random.Random(seed))
        assert row["solution"] == shown(after[-1]) == final_answer(execution)
        assert answer_reward([execution], [row["solution"]], [row["entry"]]) == [1.0]
        assert not any(character.isdigit() for character in strategy)
        assert all(value == int(value) >= 0 for state in after for value in state if not isinstance(value, str))


def test_a_third_of_the_solutions_is_without_steps() -> None:
    data = load_problems("word_programs/seen?size=150")
    written = traces(data, 4, seed=0)
    at_once = sum(trace.execution.startswith("####") for trace in written) / len(written)
    named = sum(trace.strategy.count("then") for trace in written) / len(written)
    assert at_once == pytest.approx(1 / 3, abs=0.06) and named == pytest.approx(1 / 3, abs=0.06)
    assert [trace.prompt for trace in written[::4]] == data["prompt"][:]


def test_a_wrong_answer_is_wrong() -> None:
    for row in problems("seen", "train", 9, 0, KINDS):
        assert answer_reward(["#### 1 2 3 4 5", "####"], [row["solution"]] * 2, [row["entry"]] * 2) == [0.0, 0.0]


def test_one_family() -> None:
    data = load_problems("word_programs/longer?size=12&family=words", split="test")
    assert {name.split("-")[0] for name in data["problem_class"]} == {"words"}


@pytest.mark.parametrize(
    "path", ["unknown", "seen?colour=3", "seen?size=0", "seen?size=9999", "seen?family=sums", "seen?seed=x"]
)
def test_bad_paths_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="word_programs"):
        load_problems(f"word_programs/{path}")


GOOD = {"source_dataset": "word_programs", "kind": "lists", "operations": ["swap", "drop"], "start": [3, 1, 2, 4]}
GOOD |= {"numbers": [2, 2]}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "numbers"}, {"kind": ["lists"]}, {"operations": ["swap", "exec"]}, {"operations": ["swap"]},
        {"operations": "swap"}, {"start": [1, 2, 3]}, {"start": [1, 2, 3, 10**9]}, {"start": list("abcd")},
        {"start": [[1], 2, 3, 4]}, {"numbers": [2, True]}, {"numbers": [2, 10**9]}, {"source_dataset": "others"},
        {"kind": "stories"}, {"kind": "words", "start": ["ab", "c", "d", "e"]},
        {"operations": ["swap"] * 10**4, "numbers": [2] * 10**4},
    ],
)  # fmt: skip
def test_entries_of_strangers(change: dict[str, Any]) -> None:
    assert metadata_of(json.dumps({"metadata": GOOD})) == GOOD
    assert metadata_of(json.dumps({"metadata": GOOD | change})) is None
