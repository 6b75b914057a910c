"""
Stored results of somebody else: whatever value is replaced, a command says that the file is damaged, in one line with
status 2, or its figures stay as they were.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from models import problems, save_tiny_model

from trl_sgpo import SGPOPipeline
from trl_sgpo.cli.eval import _load_model, read_options
from trl_sgpo.cli.main import main
from trl_sgpo.cli.train import _measure_before
from trl_sgpo.compare.arm_run import run_records
from trl_sgpo.compare.budget import TokenBudget
from trl_sgpo.compare.config import read_comparison
from trl_sgpo.data.bootstrap import run_blocks
from trl_sgpo.errors import ConfigError, DataError


VALUES = [None, "x", [], {}, float("nan"), 1e308, -5, 10**400, True]
SHORT = ["--max_strategy_length", "4", "--max_completion_length", "4"]
Place = tuple[str | int, ...]


def places(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Each value with its place, of lists only the first entry."""
    for key, part in value.items() if isinstance(value, dict) else list(enumerate(value))[:1]:
        yield (*path, key), part
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def replaced(record: dict[str, Any], path: Place, value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(record)
    part: Any = copied
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return copied


def changed(record: dict[str, Any], below: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record with each value replaced by others, and with each list cut."""
    for path, before in places(record):
        cut = [before[:-1]] if isinstance(before, list) else []
        same = isinstance(before, str)  # another text is as good
        unknown = path[-1] == "outcome" or "outcomes" in path or "matrix" in path  # where a verifier cannot tell
        for value in [*VALUES, *cut] if below in (None, path[0]) else []:
            if not (same and isinstance(value, str)) and not (unknown and value is None):
                yield f"{path} = {str(value)[:20]}", replaced(record, path, value)


def expect_damaged_or_same(
    file: Path,
    records: list[dict[str, Any]],
    index: int,
    command: list[str],
    figures: Callable[[], Any],
    capsys: pytest.CaptureFixture[str],
    below: str | None = None,
) -> int:
    """Changes a record of a file in all ways. Returns how many were refused."""
    expected, refused, wrong = figures(), 0, []
    for name, record in changed(records[index], below):
        lines = [*records[:index], record, *records[index + 1 :]]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        capsys.readouterr()
        try:
            status: Any = main(command)
        except Exception as error:
            status = repr(error)
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        if status == 2 and len(errors) == 1 and str(file) in errors[0]:
            refused += 1
        elif status != 0 or figures() != expected:
            wrong.append((name, status, errors))
    assert not wrong, (len(wrong), wrong[:5])
    return refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class TestEvaluation:
    @pytest.fixture
    def command(self, model: str, tmp_path: Path) -> list[str]:
        rows = "".join(json.dumps(row) + "\n" for row in problems(8).to_list())
        (tmp_path / "sums.jsonl").write_text(rows)
        command = ["eval", "--model", model, "--suites", f"ood={tmp_path / 'sums.jsonl'}", "--no_plots", *SHORT]
        command += ["--output_dir", str(tmp_path / "out"), "--samples", "1", "--verifier", "models.evenness"]
        command += ["--transfer", "ood", "--transfer_problems", "2", "--pairs_per_cell", "1", "--transfers", "1"]
        assert main(command) == 0
        return command

    @pytest.mark.parametrize("kind", ["suite/ood/0", "transfer/ood/strategies/0", "transfer/ood/own/0"])
    def test_each_value(
        self,
        kind: str,
        command: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        loaded = _load_model(read_options(command[1:]))
        monkeypatch.setattr("trl_sgpo.cli.eval._load_model", lambda options: loaded)  # once
        rows = tmp_path / "out" / "rows.jsonl"
        records = [json.loads(line) for line in rows.read_text().splitlines()]
        (index,) = [index for index, record in enumerate(records) if record["key"] == kind]

        def figures() -> Any:
            results = json.loads((tmp_path / "out" / "results.json").read_text())
            suite, transfer = results["suites"]["ood"], results["transfer"]["ood"]
            return suite["accuracy"], suite["sampled"]["accuracy"], transfer["conditions"], transfer["matrix"]

        assert expect_damaged_or_same(rows, records, index, command, figures, capsys) > 20

    def test_a_file_of_20_gigabytes(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (tmp_path / "out" / "rows.jsonl").open("r+b") as file:
            file.truncate(20 << 30)
        assert main(command) == 2
        assert "rows.jsonl is damaged (a line is longer than 128 MiB)" in capsys.readouterr().err


class TestAnswers:
    @pytest.fixture
    def command(self, model: str, tmp_path: Path) -> list[str]:
        (tmp_path / "in.jsonl").write_text('{"question": "What is 1 + 2?"}\n{"question": "What is 3 + 4?"}\n')
        command = ["solve", "--model", model, "--no_bank", "--input", str(tmp_path / "in.jsonl"), *SHORT]
        command += ["--output", str(tmp_path / "out.jsonl")]
        assert main(command) == 0
        return command

    def test_each_value(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = SGPOPipeline.from_pretrained(command[2], None)
        monkeypatch.setattr(SGPOPipeline, "from_pretrained", lambda *_, **__: pipeline)  # once
        output = tmp_path / "out.jsonl"
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert expect_damaged_or_same(output, records, 1, command, lambda: None, capsys) > 50

    def test_a_file_of_20_gigabytes(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (tmp_path / "out.jsonl").open("r+b") as file:
            file.truncate(20 << 30)
        assert main(command) == 2
        assert "out.jsonl is damaged (a line is longer than 128 MiB)" in capsys.readouterr().err

    def test_a_pipe(self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "out.jsonl").unlink()
        os.mkfifo(tmp_path / "out.jsonl")
        assert main(command) == 2
        assert "out.jsonl is damaged (it is no file" in capsys.readouterr().err


def result(seed: int) -> dict[str, Any]:
    rate = {"value": 0.5, "low": 0.1, "high": 0.9}
    conditions = ("transfer", "own", "other", "empty", "none")
    return {
        "seed": seed,
        "suites": {"seen": {"sampled": {"accuracy": rate}, "accuracy": rate}},
        "transfer": {
            "conditions": dict.fromkeys(conditions, rate),
            "differences": dict.fromkeys(("transfer - none", "own - other", "own - none"), rate),
            "classes": ["a", "b"],
            "matrix": [[0.5, 0.5], [0.5, 0.5]],
        },
        "curve": [{"accuracy": 0.5, "generated_tokens": 10}, {"accuracy": 0.5, "generated_tokens": 20}],
        "tokens": {"generated": 20, "labels": 0, "trained": 0},
        "training_seconds": 1.0,
        "details": {"steps": 3},
    }


class TestComparison:
    @pytest.fixture
    def command(self, model: str, tmp_path: Path) -> list[str]:
        recipe = {
            "model_name_or_path": model,
            "dataset_name": "list_functions/seen?size=32",
            "warmstart_traces": 0,
            "reward_funcs": ["models.evenness"],
            "bf16": False,
            "use_bank": False,
        }
        comparison = {
            "recipe": str(tmp_path / "recipe.yaml"),
            "output_dir": str(tmp_path / "runs"),
            "seeds": [1, 2],
            "budget": 600,
            "curve_points": 2,
            "suites": [{"name": "seen", "path": "list_functions/seen?size=64", "split": "test"}],
            "transfer": {"suite": "seen", "problems": 1, "executions": 1, "classes": 2},
            "arms": {"sgpo": {}},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(comparison))
        read = read_comparison(str(tmp_path / "compare.yaml"))
        for seed in read.seeds:
            directory = read.run_directory(read.arms[0], seed)
            directory.mkdir(parents=True)
            record = run_records(read, [(read.arms[0], seed)], with_models=False)["sgpo", seed]
            (directory / "depends_on.json").write_text(json.dumps(record, default=str))
            (directory / "result.json").write_text(json.dumps(result(seed)))
        return ["compare", "--config", str(tmp_path / "compare.yaml"), "--table_only"]

    @pytest.mark.parametrize("part", ["seed", "suites", "transfer", "tokens", "training_seconds", "curve", "details"])
    def test_each_value(
        self,
        part: str,
        command: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        read = read_comparison(command[2])
        records = run_records(read, [(read.arms[0], seed) for seed in read.seeds], with_models=False)
        for name, known in (
            ("table.draw_comparison", None),
            ("arm_run.check", None),
            ("arm_run.run_records", records),
        ):
            monkeypatch.setattr(f"trl_sgpo.compare.{name}", lambda *_, known=known, **__: known)  # once
        assert main(command) == 0
        file, every = tmp_path / "runs" / "sgpo" / "seed-1" / "result.json", result(1)

        def figures() -> Any:
            return json.loads((tmp_path / "runs" / "comparison.json").read_text())

        assert expect_damaged_or_same(file, [every], 0, command, figures, capsys, part) > 5

    @pytest.mark.parametrize("content", ["{", "[]", "null", "5", "[1]"])
    @pytest.mark.parametrize("name", ["result.json", "depends_on.json"])
    def test_no_mapping(
        self, name: str, content: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "runs" / "sgpo" / "seed-2" / name).write_text(content)
        assert main(command) == 2
        assert f"seed-2/{name} is damaged" in capsys.readouterr().err


def executed(**changes: Any) -> dict[str, Any]:
    return {"problem": "a", "text": "#### 1", "outcome": 1.0, "baseline": 0.0, "sibling": True} | changes


def tried(execution: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    made = {"strategy": "Add.", "problem_class": "sums", "sources": ["a"], "flaw": None}
    return made | {"executions": [execution or executed()]} | changes


def block(one: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"problems": ["a", "b"], "tried": [one or tried()], "tokens": 3} | changes


@pytest.mark.parametrize(
    "row",
    [
        block(tried(executed(baseline=-1e6))),
        block(tried(executed(baseline=math.nan))),
        block(tried(executed(baseline=10**400))),
        block(tried(executed(outcome="1"))),
        block(tried(executed(text=None))),
        block(tried(executed(problem="other"))),
        block(tried(executed(sibling="yes"))),
        block(tried(strategy=5)),
        block(tried(problem_class=["a"])),
        block(tried(problem_class="a" * 201)),
        block(tried(sources=["other"])),
        block(tried(more=1)),
        block(tokens="many"),
        block(tokens=-(10**30)),
        block(problems=["c", "d"], tried=[]),
        [],
    ],
    ids=lambda row: str(row)[:80],
)
def test_a_record_of_a_bootstrap(row: Any, tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.jsonl"
    lines = [json.dumps(line) + "\n" for line in ({"settings": {}}, block())]
    path.write_text("".join(lines))
    (done,) = run_blocks(path, {}, [[0, 1]], ["a", "b"], lambda *_: pytest.fail("it is done"))
    assert done.to_dict() == block(tried(sources=("a",), executions=(executed(),)))
    path.write_text(lines[0] + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"bootstrap\.jsonl is damaged \(.*\): move it away to start anew"):
        run_blocks(path, {}, [[0, 1]], ["a", "b"], lambda *_: pytest.fail("it is damaged"))


def test_a_pipe_as_the_record_of_a_bootstrap(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bootstrap.jsonl")
    with pytest.raises(DataError, match="it is no file, such as a pipe"):
        run_blocks(tmp_path / "bootstrap.jsonl", {}, [[0]], ["a"], lambda *_: pytest.fail("it is a pipe"))


FIGURES = {"accuracy": 0.5, "transfer": 0.2, "problems": 10, "transfers": 5}


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": -7.5},
        {"accuracy": "0.1"},
        {"accuracy": math.nan},
        {"problems": "x"},
        {"problems": -3},
        {"plain": [1]},
    ],
    ids=str,
)
def test_figures_before_training(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    scores = {"sampled": FIGURES, "greedy": FIGURES}
    (tmp_path / "before.json").write_text(json.dumps({"of": {}, "scores": scores}))
    found = _measure_before(trainer, None, 1, {}, "checkpoint-1")
    assert found is not None and found["greedy"]["accuracy"] == 0.5
    (tmp_path / "before.json").write_text(json.dumps({"of": {}, "scores": scores | {"greedy": FIGURES | changes}}))
    with pytest.raises(ConfigError, match=r"before\.json is damaged \(`scores\.greedy\."):
        _measure_before(trainer, None, 1, {}, "checkpoint-1")


@pytest.mark.parametrize(
    "saved",
    [
        {"spent": -(10**15), "curve": []},
        {"spent": "5", "curve": []},
        {"spent": 5},
        {"spent": 5, "curve": [{"generated_tokens": 5, "accuracy": 7.0}]},
        {"spent": 5, "curve": [{"generated_tokens": 5, "accuracy": 0.5}] * 3},
    ],
    ids=str,
)
def test_the_tokens_that_a_checkpoint_says_were_generated(saved: dict[str, Any]) -> None:
    budget = TokenBudget(100, 0, [50, 100], lambda: 0.5)

    def resumed(attributes: dict[str, Any]) -> None:
        state = SimpleNamespace(global_step=1, stateful_callbacks={"TokenBudget": {"attributes": attributes}})
        budget.on_train_begin(None, state, None)

    resumed({"spent": 60, "curve": [{"generated_tokens": 60, "accuracy": 0.5}]})
    assert budget.spent == 60
    with pytest.raises(ConfigError, match=r"TokenBudget in the checkpoint is damaged .*: remove the checkpoint"):
        resumed(saved)
