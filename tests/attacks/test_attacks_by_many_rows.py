"""Files of at most 50 MB with so many rows, classes or strategies that work in their square would not end."""

import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bank_helpers import hashed_words, make
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from models import save_tiny_model
from pyarrow import parquet

from trl_sgpo import SGPOConfig, StrategyBank
from trl_sgpo.bank import Outcome, neighbourhood
from trl_sgpo.bank.neighbourhood import Neighbourhoods
from trl_sgpo.bank.policy import near_copies
from trl_sgpo.bank.statistics import transfer
from trl_sgpo.bank.strategy import Execution, Strategy
from trl_sgpo.data import answers, families, rows, worked
from trl_sgpo.data.classes import merge_small_classes, problem_classes
from trl_sgpo.data.families import Reference, generated_again, read_reference
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.data.warmstart import warmstart
from trl_sgpo.data.worked import traces, worked_traces
from trl_sgpo.errors import BankError, DataError
from trl_sgpo.evaluation.transfer_plan import plan_transfer


@pytest.fixture
def in_ten_seconds(ten_seconds_each: Callable[[], object]) -> None:
    ten_seconds_each()


def test_a_class_with_a_long_name() -> None:
    data = Dataset.from_list([{"prompt": "p", "problem_class": name} for name in ("a", "b" * 201)])
    with pytest.raises(DataError, match="more than 200 characters"):
        problem_classes(data, None, lambda texts: np.ones((len(texts), 2)), 2, 0, 1)


@pytest.mark.usefixtures("in_ten_seconds")
def test_many_small_classes_are_merged() -> None:
    classes = [str(row // 2) for row in range(40_000)] + ["alone"]
    vectors = np.random.default_rng(0).normal(size=(len(classes), 8))
    merged = merge_small_classes(classes, 2, "merge", lambda: vectors)
    directions = {name: vectors[2 * int(name)] + vectors[2 * int(name) + 1] for name in merged[:-1]}
    best = max(directions, key=lambda name: directions[name] @ vectors[-1] / np.linalg.norm(directions[name]))
    assert merged[:-1] == classes[:-1] and merged[-1] == best


@pytest.mark.usefixtures("in_ten_seconds")
def test_many_small_classes_are_merged_into_many_large_ones() -> None:
    classes = [str(row // 2) for row in range(40_000)] + [f"alone {row}" for row in range(20_000)]
    vectors = np.random.default_rng(0).normal(size=(len(classes), 8)).astype(np.float32)
    merged = merge_small_classes(classes, 2, "merge", lambda: vectors)
    own = merge_small_classes([*classes[:40_000], classes[-1]], 2, "merge", lambda: vectors[[*range(40_000), -1]])
    assert merged[:40_000] == classes[:40_000] and set(merged[40_000:]) <= set(classes) and merged[-1] == own[-1]


@pytest.mark.usefixtures("in_ten_seconds")
def test_many_classes_of_a_transfer_report() -> None:
    data = [{"prompt": f"p{row}", "problem_class": str(row // 4), "solution": str(row)} for row in range(40_000)]
    plan = plan_transfer(data, "problem_class", 2, 2, seed=0, pairs_per_cell=0)
    others = [(each.writer // 4, each.problem // 4) for each in plan.executions if each.condition == "other"]
    assert len(plan.classes) == 10_000 and len(others) == 40_000 and all(a != b for a, b in others)


@pytest.mark.usefixtures("in_ten_seconds")
def test_many_new_strategies_of_a_class() -> None:
    vectors = np.random.default_rng(0).normal(size=(50_000, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert not any(near_copies(np.zeros(50_000, bool), vectors, np.full(50_000, -1.0)))
    copied = near_copies(np.ones(4_000, bool), vectors[:2_000].repeat(2, axis=0), np.full(4_000, -1.0))
    assert copied[1::2] == [True] * 2_000


@given(st.integers(0, 10**6), st.integers(0, 600), st.floats(0, 1))
def test_near_copies_are_those_of_a_plain_loop(seed: int, count: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 2))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    counts, stored, copied = rng.random(count) < share, rng.uniform(-1, 0.9, count), []
    for row in range(count):
        earlier = [other for other in range(row) if counts[other] and not copied[other]]
        copied.append(bool(max([stored[row], *(vectors[earlier] @ vectors[row])]) >= 0.88))
    assert near_copies(counts, vectors, stored) == copied


@pytest.mark.usefixtures("in_ten_seconds")
def test_a_strategy_that_was_written_for_many_problems() -> None:
    strategy = Strategy("text", "class", tuple(f"w{number}" for number in range(100_000)))
    pairs = [(strategy, Execution(strategy.id, f"q{number}", "class", 1, 1.0, 0.5)) for number in range(100_000)]
    assert transfer(pairs, lambda *_: "all")["all"]["problems"] == 100_000


def test_a_ledger_with_a_long_text(tmp_path: Path) -> None:
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add([make("a")])
        with pytest.raises(BankError, match="more than 16,384 characters"):
            bank.add([make("a" * 2**15)])
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
        ledger.execute("UPDATE strategies SET text = ?", ("a" * 2**15,))
        ledger.commit()
    with pytest.raises(BankError, match="a text has more than 16,384 characters"):
        StrategyBank(tmp_path, hashed_words)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gcd", "size=10&seed=1&min_value=1000000000000&max_value=10000000000000"),
        ("lcm", "size=10&seed=1&min_value=3000000000&max_value=4000000000"),
        ("chain_sum", "size=10&seed=1&min_terms=2&max_terms=2&min_digits=5000&max_digits=5000"),
        ("products", "size=10&seed=1&min_terms=2&max_terms=2&min_digits=5000&max_digits=5000"),
    ],
)
@pytest.mark.usefixtures("in_ten_seconds")
def test_a_worked_solution_of_huge_numbers(family: str, settings: str) -> None:
    entry = f"reasoning_gym/{family}?{settings}#0"
    problem = generated_again(read_reference(entry))
    row = {"prompt": "p", "solution": problem["answer"] if problem else "1", "problem_class": "a", "entry": entry}
    assert worked_traces(row, random.Random(0)) is None


def test_problems_that_take_long_each_and_have_no_worked_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems after the last trace that is needed are not generated, and those in vain only for some minutes."""
    asked: list[str] = []

    def generated(reference: Reference) -> dict[str, object]:
        asked.append(str(reference))
        return {"answer": "4", "metadata": {"numbers": [8, 12]}} if reference.index % 2 else {"answer": "not this"}

    monkeypatch.setattr(worked, "generated_again", generated)
    entries = [f"reasoning_gym/gcd?size=100&seed=1#{number}" for number in range(100)]
    row = {"prompt": [{"role": "user", "content": "p"}], "solution": "4", "problem_class": "a"}
    problems = Dataset.from_list([{**row, "entry": entry} for entry in entries])
    every = traces(problems, 2, seed=0)
    asked.clear()
    assert traces(problems, 2, seed=0, problems=3) == every[:6] and len(every) == 100
    assert set(asked) == set(entries[:6])
    monkeypatch.setattr(worked, "_LONGEST_IN_VAIN", 0)
    with pytest.raises(DataError, match="took 0 seconds to generate and have no worked solution: leave these rows"):
        traces(problems, 1, seed=0)


@pytest.mark.usefixtures("in_ten_seconds")
def test_a_long_problem_that_is_repeated_for_each_trace(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    entry = {"source_dataset": "word_programs", "kind": "lists", "operations": ["reverse", "rotate"]}
    entry |= {"start": [1, 2, 3, 4], "numbers": [1, 1]}
    row = {"prompt": [{"role": "user", "content": "a long problem " * 70_000}], "solution": "1", "problem_class": "a"}
    problems = Dataset.from_list([{**row, "entry": json.dumps({"metadata": entry})}])
    repeated = traces(problems, 481, seed=0, problems=480)
    config = SGPOConfig(str(tmp_path / "run"), bf16=False)
    with pytest.raises(
        DataError,
        match=r"481 traces of the warm start have 505,\d{3},\d{3} characters, more than 50,000,000: leave out long",
    ):
        warmstart(model, repeated, config, tmp_path / "warm")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "nothing.parquet"])
def test_a_file_of_many_rows_without_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of nothing take no room in a file, and each takes memory once it is read."""
    monkeypatch.setattr(rows, "MAX_ROWS", 1000)
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text("question,answer\n" + "a\n" * 1001)
    elif name.endswith(".jsonl"):
        path.write_text('{"question": "a", "answer": "1"}\n' * 1001)
    else:
        texts = pa.nulls(1001, pa.string()) if name.startswith("nothing") else pa.array(["a"] * 1001)
        parquet.write_table(pa.table({"question": texts, "answer": texts}), path)
    with pytest.raises(DataError, match="more than 1,000 rows or 100,000,000 cells: keep the rows"):
        load_problems(str(path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_file_of_many_cells(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_CELLS", 10_000)
    columns = ["question", "answer", *(f"c{number}" for number in range(100))]
    first = ",".join(columns) + "\n" if name.endswith(".csv") else json.dumps(dict.fromkeys(columns, "1")) + "\n"
    (tmp_path / name).write_text(first + ("a\n" if name.endswith(".csv") else "{}\n") * 200)
    with pytest.raises(DataError, match="or 10,000 cells: keep the rows and columns"):
        load_problems(str(tmp_path / name))


def test_rows_whose_problems_take_long_each(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = []
    monkeypatch.setattr(families.CHECKS, "ask", lambda *request: asked.append(request))
    monkeypatch.setattr(families, "_REFUSED", set())
    for seed in range(100):
        assert generated_again(Reference("gcd", json.dumps({"size": 1, "seed": seed}), 0)) is None
    assert len(asked) == 16 and caplog.text.count("no further problem is generated again") == 1


def test_solutions_that_take_long_each(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They are compared as text from the second answer on, all solutions after a few. A slow answer is no reason."""
    asked = []

    def compared(gold: str, answer: str) -> bool | None:
        asked.append((gold, answer))
        return None if "^{9^{9}}" in gold + answer else gold == "x+1" and answer == "1+x"

    monkeypatch.setattr(answers, "compared_expressions", compared)
    assert not answers.same_answer("9^{9^{9}}", "x+1") and answers.same_answer("1+x", "x+1")
    for number in range(100):
        slow = f"{number}^{{9^{{9}}}}"
        assert [answers.same_answer(answer, slow) for answer in ("5", "x", slow)] == [False, False, True]
    assert len(asked) == 3 + 2 * 16 and caplog.text.count("16 solutions and 17 of 18 answers took longer") == 1
    assert not answers.same_answer("1+x", "x+1") and len(asked) == 3 + 2 * 16


def test_answers_that_take_long_each(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Mathematics ends if most comparisons pass the limit, and not if a few of many do."""
    monkeypatch.setattr(answers, "compared_expressions", lambda gold, answer: None if "!" in answer else True)
    for number in range(1_000):
        answers.same_answer(f"{number}!+x", "x") if number % 4 == 0 else answers.same_answer("1+x-1", "x")
    assert answers._COUNTS == {"asked": 1_000, "late": 250} and not caplog.text
    for number in range(2_000):
        answers.same_answer(f"{number}!+x", "x")
    assert answers._COUNTS == {"asked": 1_500, "late": 750} and caplog.text.count("no expressions are compared") == 1


@pytest.mark.usefixtures("in_ten_seconds")
def test_many_executions_on_a_problem_of_many_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(neighbourhood, "_MAX_PAIRS", 100_000)
    words = " ".join(f"word{chr(65 + number % 26)}{chr(65 + number // 26)}" for number in range(600))
    old = [(Execution(f"old{number}", "p", "c", 1, 0.0, 0.9), words) for number in range(1_000)]
    new = [
        (Execution("new", f"q{number}", "c", 1, float(number > 3), 0.9), "Maria" * (number < 4))
        for number in range(60)
    ]
    assert Neighbourhoods([*old, *new]).near("Maria")[0]["new"] == (4, 4)
    assert "executions of a class are no evidence of harm" in caplog.text


def test_a_long_text_of_a_problem_in_a_ledger(tmp_path: Path) -> None:
    strategy = make("a")
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add([strategy])
        bank.update([Outcome(strategy.id, "p", 1.0, 1, 0.5, text="word")])
        bank._store.ledger._connection.execute("UPDATE problems SET text = ?", ("word " * 10_000,))
        ((_, text),) = bank._store.ledger.executions_with_texts(strategy.problem_class)
    assert len(text) == 2_000
