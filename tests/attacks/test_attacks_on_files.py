"""What is written goes through no link: neither under a name that can be foreseen, nor under the file's own."""

import ast
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bank_helpers import hashed_words, make
from models import save_tiny_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_sgpo import SGPOPipeline, StrategyBank
from trl_sgpo.bank.exchange import export_bank
from trl_sgpo.bank.lock import BankLock
from trl_sgpo.bank.seal import seal
from trl_sgpo.bank.shared import SharedBank
from trl_sgpo.bench.arms import write as write_benchmark
from trl_sgpo.callbacks import RunRecordCallback
from trl_sgpo.checks.paths import check_directory
from trl_sgpo.cli.main import main
from trl_sgpo.data.bootstrap import open_record
from trl_sgpo.data.trace_files import write_traces
from trl_sgpo.data.worked import Trace
from trl_sgpo.errors import ConfigError
from trl_sgpo.evaluation.chunks import ROWS, SETTINGS, ChunkLog
from trl_sgpo.evaluation.plots import draw_bars, draw_matrix
from trl_sgpo.evaluation.tables import write_results
from trl_sgpo.files import unfinished_directory, unfinished_file, write_file
from trl_sgpo.hub.model_card import TrainingFacts
from trl_sgpo.hub.publication import write_metrics
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.inference.solve_file import solve_file
from trl_sgpo.report.page import write_report
from trl_sgpo.report.records import Run


PACKAGE = Path(__file__).parents[2] / "trl_sgpo"
NOTHING = {"suites": {}, "transfer": {}, "kinds": {}, "settings": {}}


def plant(directory: Path, *names: str) -> Path:
    """A file of the victim, and links to it under names that could be foreseen."""
    directory.mkdir(exist_ok=True)
    victim = directory.parent / "victim"
    victim.write_text("precious")
    for name in names:
        (directory / name).symlink_to(victim)
    return victim


def test_results(tmp_path):
    victim = plant(tmp_path / "out", "results.json.tmp", "results.md.tmp")
    write_results(tmp_path / "out", NOTHING, plots=False)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out" / "results.json").is_symlink()


def test_report(tmp_path):
    victim = plant(tmp_path / "out", "report.html.tmp")
    write_report(Run(tmp_path), tmp_path / "out" / "report.html")
    assert victim.read_text() == "precious"


def test_snapshot_of_a_bank(tmp_path):
    victim = plant(tmp_path / "snapshot", "manifest.json.tmp")
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a")])
        bank.snapshot(tmp_path / "snapshot")
    assert victim.read_text() == "precious"


def test_snapshot_that_is_loaded(tmp_path):
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a")])
        bank.snapshot(tmp_path / "snapshot")
        victim = plant(tmp_path / "bank", "ledger.sqlite.tmp")
        bank.load_snapshot(tmp_path / "snapshot")
        assert len(bank) == 1
    assert victim.read_text() == "precious"


def test_export_and_identity_of_a_bank(tmp_path):
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a")])
        export_bank(bank, tmp_path / "export")
        victim = plant(tmp_path / "bank", "shared.tmp")
        SharedBank(bank, "http://host")
    assert victim.read_text() == "precious"


def test_directories(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("precious")
    (tmp_path / "model.unfinished").symlink_to(tmp_path / "elsewhere")
    with unfinished_directory(tmp_path / "model") as directory:
        (directory / "kept").write_text("new")
        os.replace(directory, tmp_path / "model")
    assert (tmp_path / "elsewhere" / "kept").read_text() == "precious"
    assert (tmp_path / "model" / "kept").read_text() == "new"


def test_names_differ_and_nothing_is_left(tmp_path):
    names = set()
    for _ in range(3):
        with unfinished_file(tmp_path / "a") as path:
            names.add(path.name)
    assert len(names) == 3 and list(tmp_path.iterdir()) == []
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (tmp_path / ".a.0000000000000000.unfinished").write_text("of a killed process")
    (tmp_path / ".a.1111111111111111.unfinished").symlink_to(outside)
    write_file(tmp_path / "a", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outside"] and (outside / "kept").exists()


def test_rights(tmp_path):
    mask = os.umask(0o022)
    try:
        write_file(tmp_path / "a", "text")
        write_file(tmp_path / "b", "text", private=True)
    finally:
        os.umask(mask)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o644, 0o600]


def test_such_names_are_made_in_one_file():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"\.(tmp|unfinished|new|part)", str(node.value)):
                found.add(path.name)
    assert found == {"files.py"}


BAR = {"a": {"value": 0.5, "low": 0.4, "high": 0.6}}
WRITERS: dict[str, Callable[[Path], object]] = {
    "holder.json": lambda directory: BankLock(directory).release(),
    "seal.json": lambda directory: seal(directory, "state"),
    "sgpo.json": lambda directory: TwoPhaseSettings().save(directory),
    "training.json": lambda directory: TrainingFacts("").save(directory),
    "metrics.json": lambda directory: write_metrics(directory, 1, 1.0, []),
    "traces.jsonl": lambda directory: write_traces([Trace([], "a", "b", "c")], directory / "traces.jsonl"),
    "bars.png": lambda directory: draw_bars(directory / "bars.png", "title", BAR),
    "matrix.png": lambda directory: draw_matrix(directory / "matrix.png", "title", ["a"], [[0.5]]),
    "bench.json": lambda directory: write_benchmark({}, str(directory / "bench.json")),
    "trainer_state.json": lambda directory: RunRecordCallback(None).on_train_end(
        TrainingArguments(str(directory)), TrainerState(), TrainerControl()
    ),
}


class EndlessContext(SGPOPipeline):
    """A pipeline without a model, whose context has room for all problems."""

    def __init__(self) -> None:
        pass

    def check_room(self, *args: Any) -> None:
        pass


APPENDED: dict[str, Callable[[Path], object]] = {
    ROWS: lambda directory: ChunkLog(directory, {}, 1),
    "record.jsonl": lambda directory: open_record(directory / "record.jsonl", {}),
    "answers.jsonl": lambda directory: solve_file(
        EndlessContext(), [], [], directory / "answers.jsonl", "", None, 1, None, 1, overwrite=True
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    victim = plant(tmp_path / "out", name)
    WRITERS[name](tmp_path / "out")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out" / name).is_symlink()


@pytest.mark.parametrize("to", ["a file", "no file"])
@pytest.mark.parametrize("name", APPENDED)
def test_a_link_in_place_of_a_file_that_grows(name: str, to: str, tmp_path: Path) -> None:
    victim = plant(tmp_path / "out", name)
    (tmp_path / "out" / SETTINGS).write_text("{}")
    if to == "no file":
        victim.unlink()
    with pytest.raises(ConfigError, match=rf"{name} is a link"):
        APPENDED[name](tmp_path / "out")
    assert victim.read_text() == "precious" if to == "a file" else not victim.exists()


def test_a_recipe_s_estimate_and_files_of_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = "".join(json.dumps({"prompt": f"What is {n} + 1?", "solution": str(n + 1)}) + "\n" for n in range(40))
    (tmp_path / "sums.jsonl").write_text(data)
    victim = plant(tmp_path / "out", "recipe.yaml", "estimate.json")
    (tmp_path / "rewards_of_mine.py").symlink_to(victim)
    model = save_tiny_model(tmp_path / "model")
    written = ["--output", "out/recipe.yaml", "--reward_file", "rewards_of_mine.py", "--overwrite"]
    assert main(["init", "--model", model, "--data", "sums.jsonl", "--vram", "0", *written]) == 0
    assert main(["estimate", "--config", "out/recipe.yaml", "--output", "out/estimate.json"]) == 0
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("home", [False, True])
def test_a_link_out_of_the_folder_of_a_run(
    home: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL and transformers write through links: cards, weights, configurations and checkpoints."""
    monkeypatch.setenv("HOME", str(tmp_path))
    victim = plant(tmp_path / "victims")
    recipe = tmp_path / "recipe.yaml"
    for name in ("README.md", "checkpoint-1/config.json"):
        run = tmp_path / f"run-{Path(name).name}"
        named = f"~/{run.name}" if home else run
        (run / name).parent.mkdir(parents=True)
        (run / name).symlink_to(victim)
        recipe.write_text(
            f"model_name_or_path: {save_tiny_model(tmp_path / 'model')}\ndataset_name: reasoning_gym/lcm+gcd?size=40\n"
            f"reward_funcs: [answer_reward]\noutput_dir: {named}\nuse_cpu: true\nbf16: false\n"
        )
        assert main(["train", "--config", str(recipe), "--max_steps", "1"]) == 2
        assert f"{run / name} is a link out of it" in capsys.readouterr().err
    assert victim.read_text() == "precious"


def test_a_folder_whose_links_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files can be written all the same: mode 0311. Everything can be listed by root, who runs tests."""
    scandir = os.scandir

    def listed(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "completions":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (tmp_path / "run" / "completions").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(ConfigError, match=r"run/completions cannot be searched for links out of it \(Permission"):
        check_directory("output_dir", tmp_path / "run")
    check_directory("output_dir", tmp_path / "none")


@pytest.mark.parametrize("command", ["compare", "eval", "bootstrap", "export", "push"])
def test_a_link_out_of_a_folder_that_a_command_writes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victims" / "seed-1" / "thesis.txt"
    victim.parent.mkdir(parents=True)
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "base").symlink_to(tmp_path / "victims")
    model = save_tiny_model(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model}\ndataset_name: list_functions/seen?size=8\nreward_funcs: [answer_reward]\n"
    )
    comparison = tmp_path / "comparison.yaml"
    comparison.write_text(
        f"recipe: {recipe}\noutput_dir: {out}\nseeds: [1]\nbudget: 100\narms: {{base: {{method: base}}}}\n"
        "suites: [{name: seen, path: 'list_functions/seen?size=8', kind: in_distribution}]\n"
        "reference: base\ntransfer: {suite: seen}\n"
    )
    argv = {
        "compare": ["--config", str(comparison)],
        "eval": ["--model", model, "--suites", "id_seen=list_functions/seen?size=8", "--output_dir", str(out)],
        "bootstrap": ["--config", str(recipe), "--output_dir", str(out)],
        "export": ["--model", model, "--output_dir", str(out)],
        "push": [model, "user/model", "--dry_run", str(out)],
    }
    assert main([command, *argv[command]]) == 2
    assert "is a link out of it" in capsys.readouterr().err
    assert victim.read_text() == "precious"
