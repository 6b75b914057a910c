"""An output folder belongs to one run: what an earlier one left is set aside whole, and only its own is resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch
import yaml
from models import evenness, hash_embedder, problems, save_tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_trainer import Script, is_good
from transformers import ProgressCallback

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.bank import Strategy, StrategyBank
from trl_sgpo.cli.main import main
from trl_sgpo.data.warmstart import warmstart
from trl_sgpo.data.worked import Trace
from trl_sgpo.errors import ConfigError
from trl_sgpo.files import append_file
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.recipe import resume_point
from trl_sgpo.report.records import read_run


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def config(out: Path, **kwargs):
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_strategy_length": 8,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_bank": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    return SGPOConfig(str(out), **(defaults | kwargs))


def train(model, out: Path, lora: bool = False, resume=None, **kwargs):
    """Trains and saves, as `trl-sgpo train` does."""
    args = config(out, **kwargs)
    trainer = SGPOTrainer(model, evenness, args, problems(), peft_config=LORA if lora else None)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.strategy_bank is not None:
        trainer.strategy_bank.close()
    return trainer


def earlier(out: Path) -> Path:
    """The only folder of an earlier run."""
    (folder,) = (out / "earlier").iterdir()
    return folder


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TestWeights:
    @pytest.mark.parametrize("lora", [False, True], ids=["full after LoRA", "LoRA after full"])
    def test_are_those_of_the_last_run(self, model: str, tmp_path: Path, lora: bool) -> None:
        out = tmp_path / "out"
        first = train(model, out, lora=not lora, seed=1)
        second = train(model, out, lora=lora, seed=2, learning_rate=5e-2)
        used = TwoPhaseModel.from_pretrained(str(out)).model.state_dict()
        trained = (second.model.merge_and_unload() if lora else second.model).state_dict()
        for name, weight in trained.items():
            torch.testing.assert_close(used[name], weight, msg=f"{name} is not the trained one")
        kept = TwoPhaseModel.from_pretrained(str(earlier(out))).model.state_dict()
        before = (first.model if lora else first.model.merge_and_unload()).state_dict()
        for name, weight in before.items():
            torch.testing.assert_close(kept[name], weight)

    @pytest.mark.parametrize("command", ["eval", "solve", "export", "push", "train"])
    def test_of_both_forms_are_refused(
        self, model: str, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        both = tmp_path / "both"
        shutil.copytree(model, both)
        train(model, tmp_path / "adapter", lora=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(tmp_path / "adapter" / name, both / name)
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in problems().to_list()))
        arguments = {
            "eval": ["--model", str(both), "--suites", f"ood={data}", "--output_dir", str(tmp_path / "out")],
            "solve": ["--model", str(both), "--no_bank", "What is 1 + 2?"],
            "export": ["--model", str(both), "--merge", "--output_dir", str(tmp_path / "out")],
            "push": [str(both), "me/model", "--dry_run", str(tmp_path / "out")],
            "train": ["--config", str(recipe(tmp_path, str(both), data))],
        }[command]
        assert main([command, *arguments]) == 2
        (told,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert f"{both} holds two models" in told and "move the files" in told


def recipe(tmp_path: Path, model: str, data: Path, **more) -> Path:
    keys = {
        "model_name_or_path": model,
        "dataset_name": str(data),
        "reward_funcs": ["models.evenness"],
        "max_strategy_length": 8,
        "max_completion_length": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "use_bank": False,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 1,
        "max_steps": 1,
        "report_problems": 0,
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys | more))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [row | {"worked_solution": f"It is {row['solution']}."} for row in problems(16).to_list()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestResume:
    def test_the_last_checkpoint_is_of_the_last_run(self, model: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        train(model, out, max_steps=3, save_strategy="steps", save_steps=1, seed=1)
        train(model, out, max_steps=1, save_strategy="steps", save_steps=1, seed=2)
        assert resume_point(config(out, resume_from_checkpoint="true")) == str(out / "checkpoint-1")
        shutil.copytree(earlier(out) / "checkpoint-3", out / "checkpoint-3")  # of the other run, also by its id
        assert resume_point(config(out, resume_from_checkpoint="true")) == str(out / "checkpoint-1")
        resumed = train(model, out, resume=True, max_steps=2, seed=2)
        assert resumed.state.global_step == 2
        whole = train(model, tmp_path / "whole", max_steps=2, seed=2)
        for name, weight in whole.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight)

    def test_a_run_that_was_set_aside_continues_in_its_place(self, model: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        train(model, out, max_steps=2, save_strategy="steps", save_steps=1, seed=1)
        train(model, out, max_steps=1, save_strategy="steps", save_steps=1, seed=2)
        first = earlier(out)
        second = json.loads((out / "run.json").read_text())["id"]
        train(model, out, resume=str(first / "checkpoint-2"), max_steps=3, save_strategy="steps", save_steps=1, seed=1)
        assert json.loads((out / "run.json").read_text())["id"] == first.name
        assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3"]
        assert (out / "earlier" / second / "checkpoint-1").is_dir() and (first / "checkpoint-2").is_dir()

    def test_checkpoints_after_the_resumed_one_are_set_aside(self, model: str, tmp_path: Path) -> None:
        """Otherwise the training that was given up would be resumed the next time."""
        out = tmp_path / "out"
        train(model, out, max_steps=3, save_strategy="steps", save_steps=1)
        train(model, out, resume=str(out / "checkpoint-1"), max_steps=2, save_strategy="steps", save_steps=1)
        assert resume_point(config(out, resume_from_checkpoint="true")) == str(out / "checkpoint-2")
        assert sorted(path.name for path in earlier(out).iterdir()) == ["checkpoint-2", "checkpoint-3"]

    def test_rollouts_and_evaluations_after_the_resumed_step_are_set_aside(self, model: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        keys = {"save_strategy": "steps", "save_steps": 1, "log_completions": True, "num_completions_to_print": 0}
        train(model, out, max_steps=4, **keys).save_state()
        for name, evaluated in (("all", out), ("two", out / "checkpoint-2"), ("three", out / "checkpoint-3")):
            (out / name).mkdir()
            (out / name / "results.json").write_text(json.dumps({"settings": {"model": str(evaluated)}}))
        train(model, out, resume=str(out / "checkpoint-2"), max_steps=3, **keys)
        logged = [f"completions_{step:05d}.parquet" for step in (1, 2, 3, 4)]
        assert sorted(path.name for path in (out / "completions").iterdir()) == logged[:3]
        assert sorted(path.name for path in (earlier(out) / "completions").iterdir()) == logged[2:]
        assert (out / "two").is_dir() and not (out / "all").exists() and not (out / "three").exists()
        assert {path.parent.name for path in earlier(out).glob("*/results.json")} == {"all", "three"}
        assert {problem.step for problem in read_run(out).problems} == {1, 2, 3}

    @pytest.mark.parametrize("consistent", [True, False])
    def test_checkpoints_without_ids(self, model: str, tmp_path: Path, consistent: bool) -> None:
        """Of versions without ids: those of one run have logs that go on in each other."""
        out, other = tmp_path / "out", tmp_path / "other"
        train(model, out, max_steps=3, save_strategy="steps", save_steps=1, seed=1)
        train(model, other, max_steps=1, save_strategy="steps", save_steps=1, seed=2)
        if not consistent:
            shutil.rmtree(out / "checkpoint-1")
            shutil.copytree(other / "checkpoint-1", out / "checkpoint-1")
        for path in out.rglob("run.json"):
            path.unlink()
        if not consistent:
            with pytest.raises(ConfigError, match=r"of several runs.*name one, such as `--resume_from_checkpoint"):
                resume_point(config(out, resume_from_checkpoint="true"))
            return
        train(model, out, resume=True, max_steps=4)
        assert resume_point(config(out, resume_from_checkpoint="true")) == str(out / "checkpoint-3")

    def test_without_a_checkpoint_of_the_run(self, model: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no complete checkpoint of its run"):
            train(model, tmp_path / "out", resume=True)

    def test_the_best_checkpoint_of_a_run_that_was_set_aside(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its state names a folder that is not there any more."""

        def score(trainer: SGPOTrainer, *_, **__) -> dict[str, float]:
            return {"eval_score": 0.9 if (trainer.args.seed, trainer.state.global_step) == (1, 1) else 0.1}

        monkeypatch.setattr(SGPOTrainer, "evaluate", score)
        keys = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        keys |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "per_device_eval_batch_size": 8}

        def run(steps: int, seed: int, resume: str | None = None) -> SGPOTrainer:
            args = config(tmp_path / "out", max_steps=steps, seed=seed, **keys)
            trainer = SGPOTrainer(model, evenness, args, problems(), problems())
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        run(2, seed=1)
        run(2, seed=2)
        first = earlier(tmp_path / "out")
        resumed = run(3, seed=1, resume=str(first / "checkpoint-2"))
        best = load_file(first / "checkpoint-1" / "model.safetensors")
        for name, weight in best.items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight)

    def test_earlier_checkpoints_are_no_surplus(self, model: str, tmp_path: Path) -> None:
        """`save_total_limit` deletes checkpoints of its own run only."""
        out = tmp_path / "out"
        keys = {"save_strategy": "steps", "save_steps": 1}
        train(model, out, max_steps=2, **keys)
        train(model, out, max_steps=2, save_total_limit=1, **keys)
        assert len(list(out.glob("checkpoint-*"))) == 1
        assert len(list(earlier(out).glob("checkpoint-*"))) == 2


class TestSettingAside:
    def test_all_that_a_run_left(self, model: str, tmp_path: Path, data: Path) -> None:
        out = tmp_path / "run"
        assert main(["train", "--config", str(recipe(tmp_path, model, data, log_completions=True))]) == 0
        (out / "notes.txt").write_text("mine")
        suites = [
            "--suites",
            f"ood={data}",
            "--verifier",
            "models.evenness",
            "--no_plots",
            "--max_strategy_length",
            "4",
        ]
        evaluation = ["--model", str(out), "--output_dir", str(out / "eval"), "--max_completion_length", "4"]
        assert main(["eval", *suites, *evaluation]) == 0
        assert main(["report", str(out)]) == 0
        left = content(out)
        assert main(["train", "--config", str(recipe(tmp_path, model, data, max_steps=2))]) == 0
        assert (out / "notes.txt").is_file()
        del left["notes.txt"]
        assert content(earlier(out)) == left
        assert {"eval/results.json", "report.html", "settings.json", "checkpoint-1/run.json"} <= left.keys()
        assert read_run(out).evaluations == {} and read_run(earlier(out)).evaluations.keys() == {"eval"}
        assert main(["train", "--config", str(recipe(tmp_path, model, data))]) == 0
        assert len(list((out / "earlier").iterdir())) == 2

    def test_completions_of_trainers_that_are_made_in_python(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TRL makes their folder, and the bank is opened, before training begins."""
        monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)
        out = tmp_path / "out"
        keys = {"log_completions": True, "num_completions_to_print": 0, "use_bank": True, "embedding_model": "any"}
        train(model, out, **keys)
        assert not (out / "earlier").exists() and len(list((out / "completions").iterdir())) == 1
        train(model, out, max_steps=2, **keys)
        assert len(list((earlier(out) / "completions").iterdir())) == 1
        assert len(list((out / "completions").iterdir())) == 2

    def test_a_folder_without_a_run_stays(self, model: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        mine = {"README.md": b"mine", "settings.json": b"{}", "src/config.json": b"{}"}
        for name, text in mine.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(text)
        SGPOTrainer(model, evenness, config(out), problems()).train()
        assert not (out / "earlier").exists() and (out / "src" / "config.json").is_file()

    @pytest.mark.parametrize("stop", range(8))
    def test_a_kill_loses_nothing(self, model: str, tmp_path: Path, stop: int) -> None:
        """The process is killed before each of the moves in turn; the next run moves the rest to the same place."""
        out = tmp_path / "out"
        train(model, out, max_steps=2, save_strategy="steps", save_steps=1, lora=True)
        left = content(out)
        process = processes.CONTEXT.Process(target=_begin_and_die, args=(str(out), stop))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = content(out)
        assert sorted(
            Path(*Path(name).parts[2:] if name.startswith("earlier") else (name,)) for name in now
        ) == sorted(map(Path, left))
        train(model, out)
        assert content(earlier(out)) == left

    def test_the_bank_of_an_earlier_run(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that the new trainer has open already is emptied after a copy was set aside."""
        Script(monkeypatch)
        monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)
        out = tmp_path / "out"
        train(model, out)
        with StrategyBank(out / "strategy_bank", "any") as bank:
            bank.add([Strategy(text="qqq of yesterday", problem_class="kind-0", source_problems=("elsewhere",))])
        trainer = SGPOTrainer(model, is_good, config(out, use_bank=True, embedding_model="any"), problems())
        trainer.train()
        first = {strategy.text for strategy in trainer.strategy_bank.strategies()}
        assert first and "qqq of yesterday" not in first
        with StrategyBank.restore(earlier(out) / "strategy_bank", "any") as kept:
            assert [strategy.text for strategy in kept.strategies()] == ["qqq of yesterday"]
        assert {"model.safetensors", "run.json"} <= content(earlier(out)).keys()
        trainer.train()  # again in the same process: it is the same run
        assert first <= {strategy.text for strategy in trainer.strategy_bank.strategies()}
        trainer.strategy_bank.close()
        assert len(list((out / "earlier").iterdir())) == 1

    def test_a_model_that_would_be_set_aside_is_not_trained(
        self, model: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "run"
        train(model, out)
        left = content(out)
        assert main(["train", "--config", str(recipe(tmp_path, str(out), data))]) == 2
        told = capsys.readouterr().err
        assert f"reads {out}" in told and "name another `--output_dir`" in told
        assert content(out) == left


def _begin_and_die(out: str, moves: int) -> None:
    from trl_sgpo.run.directory import begin_run

    rename, left = os.rename, [moves]

    def dying(*paths: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        rename(*paths)

    os.rename = dying
    begin_run(out)


class TestWarmStart:
    def test_a_warm_start_made_before_is_used(self, model: str, tmp_path: Path, data: Path) -> None:
        path = str(recipe(tmp_path, model, data, warmstart_file=str(traces(tmp_path, "first")), use_peft=True))
        assert main(["warmstart", "--config", path]) == 0
        made = (tmp_path / "run" / "warmstart" / "model.safetensors").stat().st_mtime_ns
        assert main(["train", "--config", path]) == 0
        assert (tmp_path / "run" / "warmstart" / "model.safetensors").stat().st_mtime_ns == made

    def test_a_warm_start_of_another_model_of_that_name_is_made_again(self, model: str, tmp_path: Path) -> None:
        base, out = tmp_path / "base", tmp_path / "warmstart"
        shutil.copytree(model, base)
        one = [Trace(row["prompt"], "Add them.", "#### 1", "kind-0") for row in problems(2).to_list()]
        warmstart(str(base), one, config(tmp_path), out)
        first = (out / "model.safetensors").read_bytes()
        weights = load_file(base / "model.safetensors")
        save_file(
            {name: weight + 0.1 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"}
        )
        warmstart(str(base), one, config(tmp_path), out)
        assert (out / "model.safetensors").read_bytes() != first
        record = out / "warmstart.sha256"
        record.write_text(record.read_text().splitlines()[0])  # as an earlier version wrote it
        made = (out / "model.safetensors").stat().st_mtime_ns
        warmstart(str(base), one, config(tmp_path), out)
        assert (out / "model.safetensors").stat().st_mtime_ns == made

    def test_a_warm_start_with_other_settings_is_made_again(self, model: str, tmp_path: Path) -> None:
        one = [Trace(row["prompt"], "Add them.", "#### 1", "kind-0") for row in problems(2).to_list()]
        out, made = tmp_path / "warmstart", set()
        for keys, kwargs in (
            ({}, {}), ({"adam_beta2": 0.9}, {}), ({"num_retrieved": 0}, {}), ({}, {"dtype": "float32"}), ({}, {})
        ):  # fmt: skip
            warmstart(model, one, config(tmp_path, **keys), out, model_init_kwargs=kwargs)
            made.add((out / "model.safetensors").stat().st_mtime_ns)
        assert len(made) == 5

    def test_what_rounding_loses_of_a_warm_start_is_named(
        self, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        one = [Trace(row["prompt"], "Add them.", "#### 1", "kind-0") for row in problems(8).to_list()]
        for dtype in ("float32", "bfloat16"):
            warmstart(model, one, config(tmp_path), tmp_path / dtype, 1e-5, model_init_kwargs={"dtype": dtype})
        (line,) = [line for line in caplog.messages if "of what the warm start has changed" in line]
        assert line.startswith("Rounding to bfloat16 distorts") and "warmstart_learning_rate" in line

    def test_an_earlier_adapter_keeps_its_base(self, model: str, tmp_path: Path, data: Path) -> None:
        out = tmp_path / "run"
        for name in ("first", "second"):
            chosen = traces(tmp_path, name)
            path = recipe(tmp_path, model, data, warmstart_file=str(chosen), use_peft=True)
            assert main(["train", "--config", str(path)]) == 0
            if name == "first":
                first = TwoPhaseModel.from_pretrained(str(out)).model.state_dict()
        again = TwoPhaseModel.from_pretrained(str(earlier(out))).model.state_dict()
        for name, weight in first.items():
            torch.testing.assert_close(again[name], weight, msg=f"{name} is that of another warm start")

    def test_the_base_of_adapters_is_not_replaced(self, model: str, tmp_path: Path, data: Path) -> None:
        chosen = traces(tmp_path, "first")
        path = recipe(tmp_path, model, data, warmstart_file=str(chosen), use_peft=True)
        assert main(["train", "--config", str(path)]) == 0
        made = content(tmp_path / "run" / "warmstart")
        other = [Trace([{"role": "user", "content": "What?"}], "List them.", "1 #### 1", "kind-0")]
        with pytest.raises(ConfigError, match=r"other traces or settings, and the adapters.*another `--output_dir`"):
            warmstart(model, other, config(tmp_path / "run"), tmp_path / "run" / "warmstart")
        assert content(tmp_path / "run" / "warmstart") == made


def traces(tmp_path: Path, word: str) -> Path:
    from trl_sgpo.data.trace_files import write_traces

    rows = problems(8).to_list()
    path = tmp_path / f"{word}.jsonl"
    write_traces([Trace(row["prompt"], f"{word} add.", "#### 1", row["problem_class"]) for row in rows], path)
    return path


def test_an_interruption_leaves_no_bar_that_is_drawn_again(model, tmp_path, capsys):
    """When the trainer is freed, which is after the line that says what is kept."""

    def interrupt(completions, **kwargs):
        raise KeyboardInterrupt

    args = config(tmp_path, disable_tqdm=False)
    trainer = SGPOTrainer(model, interrupt, args, problems())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "0/1" in capsys.readouterr().err
    (bars,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    bars.training_bar.close()
    assert capsys.readouterr().err == ""


_HOLDER = """
import sys
from pathlib import Path
from trl_sgpo.files import append_file
from trl_sgpo.run.output_lock import held
with held(sys.argv[1], True), append_file(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in the folder `run` and appends to the file `answers.jsonl`."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "run"), str(tmp_path / "answers.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


class TestTwoProcesses:
    """Two in one folder would mix their runs, and two that append to one file their lines."""

    def test_train(
        self, model: str, data: Path, tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["train", "--config", str(recipe(tmp_path, model, data))]
        assert main(command) == 2
        assert f"Another process trains in {tmp_path / 'run'}: wait until" in capsys.readouterr().err
        assert not list((tmp_path / "run").iterdir())
        holder.kill()
        holder.wait()
        assert main(command) == 0

    def test_append(self, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
        path = tmp_path / "answers.jsonl"
        with pytest.raises(ConfigError, match=r"Another process writes .*answers\.jsonl: wait until it has ended"):
            append_file(path, 0)
        holder.kill()
        holder.wait()
        append_file(path).close()
