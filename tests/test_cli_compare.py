"""`trl-sgpo compare` on a tiny model: every method runs, what is finished is kept, what failed is named."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from models import save_tiny_model

from trl_sgpo.cli import compare as command
from trl_sgpo.cli.main import main


METHODS = ("base", "sft", "rft", "rlhf", "prm", "grpo", "grpo_best", "sgpo", "joint", "internalize_wrong")


def _write(tmp_path: Path, arms: dict[str, Any], budget: int = 300) -> str:
    recipe = {
        "model_name_or_path": save_tiny_model(tmp_path / "model"),
        "dtype": "float32",
        "bf16": False,
        "use_peft": False,
        "dataset_name": "list_functions/seen?size=32&shortcuts=0.5",
        "warmstart_traces": 8,
        "warmstart_plain_share": 0.5,
        "reward_funcs": ["models.evenness"],  # random text is sometimes right
        "num_generations": 4,
        "max_strategy_length": 6,
        "max_completion_length": 6,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "use_bank": False,
    }
    comparison = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "output_dir": str(tmp_path / "runs"),
        "results": str(tmp_path / "results" / "table"),
        "seeds": [1],
        "budget": budget,
        "processes": 2,
        "curve_points": 2,
        "curve_problems": 8,
        "samples": 1,
        "pass_samples": 2,
        "suites": [{"name": "seen", "path": "list_functions/seen?size=64", "split": "test"}],
        "transfer": {"suite": "seen", "problems": 1, "executions": 1, "classes": 2},
        "arms": arms,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    return str(tmp_path / "compare.yaml")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process; every run has one of its own. Exit status, output, errors."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def called(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["compare", *arguments])
        except SystemExit as ended:  # by the parser
            status = int(ended.code or 0)
        return status, *capfd.readouterr()

    return called


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs need not import."""
    run_in_forks(monkeypatch)


def run_in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], environment: dict[str, str], log: Path, running: set[Any]) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        process = processes.start(command[2], *command[3:], output=log, errors=log)
        process.join()
        return process.exitcode

    monkeypatch.setattr("trl_sgpo.cli.compare._run", run)


def test_every_method_runs_within_its_budget_and_finished_runs_are_kept(
    tmp_path: Path, compare: Any, forked: None
) -> None:
    arms: dict[str, Any] = {method: {"method": method} for method in METHODS}
    arms["rlhf"]["label_share"] = arms["prm"]["label_share"] = 0.5
    arms["prm"]["step_separator"] = " "
    arms["internalize_wrong"]["internalize"] = "distill"
    arms["grpo_best"] |= {"validation": "list_functions/seen?size=16&seed=7", "validation_points": 2}
    config = _write(tmp_path, arms)
    status, out, err = compare("--config", config)
    assert status == 0, out + err
    table = json.loads((tmp_path / "results" / "table.json").read_text())
    assert list(table["arms"]) == list(METHODS)
    for name, figures in table["arms"].items():
        tokens = {kind: figures[f"tokens {kind}"]["mean"] for kind in ("generated", "labels", "trained")}
        most = 16 * 12  # rows and tokens of the step that reaches the budget
        if name == "base":
            assert set(tokens.values()) == {0.0}
        elif name == "sft":
            assert tokens["generated"] == 0 and 300 <= tokens["trained"] <= 300 + 200
        elif name == "rft":
            assert 300 - most < tokens["generated"] <= 300
        else:
            assert 300 <= tokens["generated"] <= 300 + most
            assert (tokens["labels"] > 0) == (name in ("rlhf", "prm"))
        assert 0 <= figures["transfer score"]["mean"] <= 1
        plain = [figures[f"seen {kind}"]["mean"] for kind in ("accuracy", "plain accuracy")]
        assert name in ("sgpo", "joint", "internalize_wrong") or plain[0] == plain[1]
        assert "seen pass@2" in figures
        tokens_an_answer = [figures[f"seen {way}tokens an answer"]["mean"] for way in ("", "plain ")]
        assert all(0 < mean <= 12 for mean in tokens_an_answer)
    assert "| seen accuracy | seen plain accuracy |" in (tmp_path / "results" / "table.md").read_text()
    assert all(len(table["curves"][name][0]) == 2 for name in ("grpo", "sgpo", "joint"))
    chosen = json.loads((tmp_path / "runs" / "grpo_best" / "seed-1" / "result.json").read_text())
    assert len(chosen["validation"]) == 2 and not chosen["curve"]
    result = tmp_path / "runs" / "sgpo" / "seed-1" / "result.json"
    before = result.stat().st_mtime_ns

    status, out, _ = compare("--config", config, "--arms", "base", "sgpo")
    assert status == 0 and "2 runs, 2 of them finished" in out
    assert result.stat().st_mtime_ns == before

    status, _, err = compare("--config", config, "--arms", "sgpo", "--coherence_weight", "0.3", "--table_only")
    assert status == 2 and "(coherence_weight)" in err  # a result of other settings is not taken for it


@pytest.mark.parametrize("kind", ["none", "kl"])
def test_strategies_of_other_classes_need_a_way_to_teach_them(kind: str, tmp_path: Path, compare: Any) -> None:
    arms = {"wrong": {"method": "internalize_wrong"} | ({} if kind == "none" else {"internalize": kind})}
    status, _, err = compare("--config", _write(tmp_path, arms))
    assert status == 2 and f"set `internalize` to one of them, not {kind}" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name the problems that choose its weights as `validation`"),
        ({"validation": "list_functions/seen?size=32&shortcuts=0.5"}, "are trained on: name others, or another seed"),
        ({"validation": "nothing.jsonl"}, "The suite validation cannot be loaded"),
        ({"validation": "list_functions/seen?seed=7", "validation_points": 0}, "a whole number of at least 1"),
    ],
)
def test_problems_that_choose_weights(settings: Any, message: str, tmp_path: Path, compare: Any) -> None:
    status, _, err = compare("--config", _write(tmp_path, {"best": {"method": "grpo_best"} | settings}))
    assert status == 2 and message in err
    assert not (tmp_path / "runs").exists()


def test_a_table_of_nothing_says_what_to_run(tmp_path: Path, compare: Any) -> None:
    status, _, err = compare("--config", _write(tmp_path, {"base": {}}), "--table_only")
    assert status == 2 and f"finished in {tmp_path / 'runs'}: run the same command without `--table_only`" in err


def test_a_failing_arm_is_named_and_the_others_are_kept(tmp_path: Path, compare: Any, forked: None) -> None:
    config = _write(tmp_path, {"base": {}, "rlhf": {"label_share": 0.001}})
    status, out, _ = compare("--config", config)
    assert status == 1
    assert "FAILED rlhf, seed 1" in out and "label_share" in out
    assert list(json.loads((tmp_path / "results" / "table.json").read_text())["arms"]) == ["base"]


@pytest.mark.parametrize("method", ["grpo", "sgpo"])
def test_a_killed_run_goes_on_from_its_checkpoint_within_its_budget(tmp_path: Path, method: str) -> None:
    config = _write(tmp_path, {method: {"save_strategy": "steps", "save_steps": 1}}, budget=1200)
    command = ["trl_sgpo.compare.arm_run", config, "{}", "1", method]
    run = tmp_path / "runs" / method / "seed-1"
    second = run / "checkpoint-2" / "trainer_state.json"
    log = tmp_path / "first.txt"
    process = processes.start(*command, output=log, errors=log)
    while not second.exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)  # polls for an event, measures nothing
    process.kill()
    process.join()
    assert not (run / "result.json").exists()
    done = processes.run(*command)
    assert done.returncode == 0, done.stderr
    assert "Resuming from" in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert 1200 <= result["tokens"]["generated"] <= 1200 + 16 * 12
    spent = [entry["generated_tokens"] for entry in result["log"]]
    assert spent == sorted(spent) and spent[-1] == result["tokens"]["generated"]
    assert len(spent) == result["details"]["steps"]
    assert [point["generated_tokens"] for point in result["curve"]] == [
        min(number for number in spent if number >= point) for point in (600, 1200)
    ]
    assert len(result["curve"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": {"suite": "seen", "classes": 1}}, "several"),
        ({"suites": [{"name": "seen", "path": "list_functions/seen?size=32"}]}, "4 different problems"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str, compare: Any
) -> None:
    config = Path(_write(tmp_path, {"base": {}}))
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))
    status, _, err = compare("--config", str(config))
    assert status == 2 and message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"sgpo": {"num_generation": 4}}, "num_generation"),
        ({"sgpo": {"transfer_block_size": 3}}, "num_generations"),
    ],
)
def test_a_bad_arm_is_refused_before_anything_runs(
    tmp_path: Path, arms: dict[str, Any], message: str, compare: Any
) -> None:
    status, _, err = compare("--config", _write(tmp_path, arms))
    assert status == 2 and message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupted_comparison_ends_its_runs_and_starts_no_others(
    tmp_path, monkeypatch, interruptible, sent, raised
):
    fifo, started = tmp_path / "fifo", tmp_path / "started"
    os.mkfifo(fifo)
    script = (
        "import pathlib, signal, sys\n"
        f"pathlib.Path({str(started)!r}).open('a').write(sys.argv[1])\n"
        f"pathlib.Path({str(fifo)!r}).write_text('ready')\n"
        "signal.pause()"
    )

    def interrupted(*given, **options):
        assert fifo.read_text() == "ready"
        signal.raise_signal(sent)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "wait", interrupted)
    missing = [(arm, seed) for seed in (1, 2, 3) for arm in ("a", "b")]
    with pytest.raises(raised):
        command._run_all([sys.executable, "-c", script], missing, tmp_path, 1)
    assert started.read_text() == "1" and signal.getsignal(signal.SIGTERM) == before
