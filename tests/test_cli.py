"""The command line: messages, resume after real kills, and what a run leaves behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
import yaml
from models import save_tiny_model

from trl_sgpo.bench.speedups import SPEEDUPS
from trl_sgpo.cli.main import COMMANDS, main


ROOT = Path(__file__).parents[1]
COMMAND = "trl_sgpo.cli.main"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tiny: str, tmp_path: Path) -> Path:
    """A recipe that trains a tiny model on reasoning-gym sums with a reward that gives random text a signal."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": tiny,
                "dataset_name": "reasoning_gym/chain_sum+gcd?size=24&max_terms=2&max_digits=1",
                "reward_funcs": ["models.evenness", "answer_reward"],
                "max_strategy_length": 8,
                "max_completion_length": 8,
                "num_generations": 4,
                "per_device_train_batch_size": 8,
                "use_bank": False,
                "bf16": False,
                "report_to": "none",
                "logging_steps": 1,
                "save_steps": 1,
                "max_steps": 6,
                "log_completions": True,
                "num_completions_to_print": 0,
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    return path


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_run_names_the_command_that_resumes_it(recipe, monkeypatch, capsys, saved):
    from trl_sgpo import SGPOTrainer

    step = SGPOTrainer.training_step

    def interrupted(trainer, *arguments):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    options = ["--config", str(recipe), "--max_steps", "3", "--hub_token=hf_123", "--resume_from_checkpoint", "true"]
    options += ["--vllm_server_base_url", "http://me:hf_123@host:1/v1?api_key=hf_123"]
    with monkeypatch.context() as patch:
        patch.setattr(SGPOTrainer, "training_step", interrupted)
        assert main(["train", *options, *([] if saved else ["--save_strategy", "no"])]) == 130
    *_, line = capsys.readouterr().err.strip().splitlines()
    if not saved:
        assert line.startswith("trl-sgpo train: interrupted. ") and line.endswith("the same command starts anew.")
        return
    said, _, command = line.partition("To go on from there: trl-sgpo ")
    assert said.startswith("trl-sgpo train: interrupted. ") and "checkpoint-2 is kept" in said
    assert "hf_123" not in line and command.count("--resume_from_checkpoint") == 1
    assert main([argument for argument in shlex.split(command) if argument != "--hub_token=***"]) == 0
    assert "Resuming from" in capsys.readouterr().out


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run(COMMAND, *arguments)


def metrics(output_dir: Path) -> list[dict[str, float]]:
    """Logged metrics of the last checkpoint, without the times."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in log.items() if key != "step_time"} for log in history]


class TestMessages:
    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["--no_such_key", "1"], ["no_such_key", "--help"]),
            (["--num_generatoins", "8"], ["num_generatoins", "num_generations"]),
            (["--class_column", "topic"], ["topic", "problem_class"]),
            (["--num_generations", "7"], ["num_generations (7)", "set num_generations to 6 or 8"]),
            (["--per_device_train_batch_size", "12"], ["12", "multiple of"]),
            (["--model_name_or_path", "no-such-org/no-such-model"], ["no-such-org/no-such-model"]),
            (["--dataset_name", "reasoning_gym/chain_sums"], ["chain_sums", "chain_sum"]),
            (["--dataset_name", "nowhere.jsonl"], ["nowhere.jsonl"]),
            (["--reward_funcs", "nothing_known"], ["nothing_known", "answer_reward"]),
            (["--reward_funcs", "models.no_such_reward"], ["models.no_such_reward"]),
            (["--trust_remote_code", "true"], ["trust_remote_code"]),
            (["--resume_from_checkpoint", "nowhere/checkpoint-3"], ["checkpoint-3", "true"]),
        ],
    )
    def test_one_line_that_names_the_fix(
        self,
        recipe: Path,
        overrides: list[str],
        words: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")
        assert main(["train", "--config", str(recipe), *overrides]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        message = [line for line in lines if line.startswith("trl-sgpo train: error: ")]
        assert len(message) == 1 and "Traceback" not in "".join(lines)
        assert all(word in message[0] for word in words), message[0]

    def test_fsdp_without_gpus(
        self, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """accelerate would train with DDP instead, and not say so."""
        monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
        config = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
        assert main(["train", "--config", str(recipe), "--accelerate_config", config]) == 2
        assert "ddp.yaml" in capsys.readouterr().err

    @pytest.mark.parametrize("states", ["  fsdp_state_dict_type: SHARDED_STATE_DICT\n", ""])
    def test_sharded_checkpoints(
        self,
        recipe: Path,
        states: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Before anything is launched. accelerate's default for FSDP2 is sharded, too."""
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
        shipped = (ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text()
        config = tmp_path / "fsdp2.yaml"
        config.write_text(shipped.replace("  fsdp_state_dict_type: FULL_STATE_DICT\n", states))
        assert main(["train", "--config", str(recipe), "--accelerate_config", str(config)]) == 2
        assert "`fsdp_state_dict_type: FULL_STATE_DICT`" in capsys.readouterr().err

    @pytest.mark.parametrize(("supported", "bf16"), [(False, "true"), (True, "true"), (False, "false")])
    def test_bfloat16_on_a_cpu_without_it(
        self,
        recipe: Path,
        supported: bool,
        bf16: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        assert main(["train", "--config", str(recipe), "--bf16", bf16, "--model_name_or_path", "no-such-org/x"]) == 2
        advised = [record for record in caplog.records if "--dtype float32 --bf16 false" in record.message]
        assert len(advised) == (not supported and bf16 == "true")

    def test_no_class_with_enough_problems(
        self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"prompt": f"What is {i}?", "solution": str(i), "problem_class": f"class-{i}"} for i in range(6)]
        data = tmp_path / "lonely.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows))
        content = yaml.safe_load(recipe.read_text()) | {"datasets": [{"path": "reasoning_gym/gcd", "split": "train"}]}
        recipe.write_text(yaml.safe_dump(content))
        assert main(["train", "--config", str(recipe), "--dataset_name", str(data)]) == 2
        assert "transfer_block_size" in capsys.readouterr().err

    def test_unreadable_recipes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        broken = tmp_path / "broken.yaml"
        broken.write_text("a: [1")
        nowhere = "There is no file .*none.yaml: check the path, relative to .*`trl-sgpo init` writes a recipe."
        for path, words in ((tmp_path / "none.yaml", nowhere), (broken, "no valid YAML")):
            assert main(["train", "--config", str(path)]) == 2
            assert re.search(words, capsys.readouterr().err)

    def test_recipes_are_read_before_anything_large_is_imported(self, tmp_path: Path) -> None:
        (tmp_path / "broken.yaml").write_text("a: 1\na: 2")
        code = (
            f"import sys\nfrom trl_sgpo.cli.main import main\nbroken = {str(tmp_path / 'broken.yaml')!r}\n"
            "for command in ('train', 'warmstart', 'compare', 'estimate', 'bootstrap', 'eval'):\n"
            "    for path in ('nowhere.yaml', broken, '.'):\n"
            "        assert main([command, f'--config={path}']) == main([command, '--config', path]) == 2\n"
            "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'datasets'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_unknown_command_and_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["trian"]) == 2
        assert "train" in capsys.readouterr().err
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in COMMANDS)

    def test_help_lists_the_keys_of_this_package_and_help_all_those_of_trl(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shown = {}
        for option in ("--help", "--help_all"):
            with pytest.raises(SystemExit) as end:
                main(["train", option])
            assert end.value.code == 0
            shown[option] = capsys.readouterr().out
        for key in ("model_name_or_path", "dataset_name", "datasets", "num_bank_rollouts", "warmstart_traces"):
            assert f"--{key} " in shown["--help"] and f"--{key} " in shown["--help_all"], key
        for key in ("adam_beta1", "lora_r", "vllm_mode"):
            assert f"--{key}" not in shown["--help"] and f"--{key} " in shown["--help_all"], key
        assert shown["--help"].count("\n") < 250 and "--help_all" in shown["--help"]

    def test_recipe_environment_and_imports_are_announced(
        self, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content = yaml.safe_load(recipe.read_text()) | {"env": {"SGPO_TEST_VARIABLE": "7"}}
        recipe.write_text(yaml.safe_dump(content))
        monkeypatch.setenv("SGPO_TEST_VARIABLE", "0")
        monkeypatch.syspath_prepend(str(ROOT / "tests"))
        assert main(["train", "--config", str(recipe), "--model_name_or_path", "no-such-org/x"]) == 2
        out = capsys.readouterr().out
        assert "SGPO_TEST_VARIABLE" in out and "importing models" in out


class TestLightness:
    def test_help_and_import_load_no_heavy_module(self) -> None:
        code = (
            "import sys, trl_sgpo\nfrom trl_sgpo.cli.main import COMMANDS, main\nmain(['--help'])\n"
            "for command in COMMANDS.keys() - {'train', 'warmstart'}:  # their help lists the keys of TRL's parser\n"
            "    try:\n        main([command, '--help'])\n"
            "    except SystemExit:\n        pass\n"
            "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'datasets'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestWarnings:
    def test_those_of_libraries_for_their_developers_are_shown_where_they_are_asked_for(self) -> None:
        code = (
            "import logging, sys, warnings, trl_sgpo\nfrom trl_sgpo.cli import report\n"
            "from trl_sgpo.cli.main import main\n"
            "def warn(argv):\n"
            "    warnings.warn('of a library', FutureWarning)\n"
            "    logging.getLogger('bitsandbytes.x').warning('of a library')\n"
            "    warnings.warn('of ours', UserWarning)\n"
            "    logging.getLogger('trl_sgpo.x').warning('of ours')\n"
            "report.main = warn\n"
            "if sys.argv[1:]:\n    main(['report'])\nelse:\n    warn([])"
        )
        for options, library in ((["command"], 0), ([], 2)):  # importing the package changes nothing
            done = subprocess.run([sys.executable, "-c", code, *options], check=True, capture_output=True, text=True)
            assert (done.stderr.count("of a library\n"), done.stderr.count("of ours\n")) == (library, 2), done.stderr
        asked = [sys.executable, "-W", "default", "-c", code, "command"]
        done = subprocess.run(asked, check=True, capture_output=True, text=True)
        assert done.stderr.count("of a library\n") == done.stderr.count("of ours\n") == 2


class TestRuns:
    def test_killed_run_resumes_to_the_same_metrics(self, recipe: Path, tmp_path: Path) -> None:
        whole = run("train", "--config", str(recipe), "--output_dir", str(tmp_path / "whole"))
        assert whole.returncode == 0, whole.stderr[-2000:]
        command = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "killed")]
        command += ["--resume_from_checkpoint", "true"]
        process = processes.start(COMMAND, *command)
        while not (tmp_path / "killed" / "checkpoint-2").exists():
            assert process.is_alive()
            time.sleep(0.01)  # polls for an event, measures nothing
        process.kill()  # in the middle of writing checkpoint-2, or soon after
        process.join()
        assert not (tmp_path / "killed" / "checkpoint-6").exists()
        resumed = run(*command)
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        assert "Resuming from" in resumed.stdout
        expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
        assert len(expected) >= 6 and found == expected
        assert sorted(path.name for path in (tmp_path / "whole" / "completions").glob("*.parquet"))

    def test_run_leaves_model_card_and_completions(self, recipe: Path, tmp_path: Path) -> None:
        done = run("train", "--config", str(recipe), "--max_steps", "1", "--report_problems", "4")
        assert done.returncode == 0, done.stderr[-2000:]
        output = tmp_path / "run"
        assert (output / "model.safetensors").is_file() and (output / "README.md").is_file()
        assert list((output / "completions").glob("*.parquet"))
        report = json.loads((output / "report.json").read_text())
        assert report["before"]["greedy"]["problems"] == report["after"]["sampled"]["problems"] == 4
        assert "strategy transfer score" in done.stdout
        plain = [report[when][how]["plain"] for when in ("before", "after") for how in ("sampled", "greedy")]
        assert all(0 <= rate <= 1 for rate in plain) and "accuracy of plain answers, sampled" in done.stdout
        settings = json.loads((output / "settings.json").read_text())
        assert settings["dataset_name"].startswith("reasoning_gym/")
        assert settings["reward_funcs"] == ["models.evenness", "answer_reward"]
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 1
        assert main(["report", str(output)]) == 0
        page = (output / "report.html").read_text()
        assert "after, greedy" in page and not (output / "progress.jsonl").exists()
        assert "Correctness and transfer" in page and "own strategy" in page and "use_bank: false" in page

    def test_figures_before_training_are_of_the_same_problems(
        self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "mine"), "--report_problems", "4"]
        resumed = [*command, "--resume_from_checkpoint", "true"]
        path = tmp_path / "mine" / "report.json"
        assert main([*command, "--max_steps", "1"]) == 0
        first = json.loads(path.read_text())
        printed = capsys.readouterr().out
        (longer,) = re.findall(r"train longer +trl-sgpo (.*)", printed)
        assert "--output_dir runs/qwen" in printed and str(tmp_path / "mine") in longer
        before, after = printed.split("Measuring after training …\n")
        assert all("  4 of 4, sampled\n" in told and "  4 of 4, greedy\n" in told for told in (before, after))
        assert main(shlex.split(longer)) == 0
        report = json.loads(path.read_text())
        assert report["before"] == first["before"]
        assert main([*resumed, "--max_steps", "3", "--max_completion_length", "6"]) == 0
        printed = capsys.readouterr().out
        assert json.loads(path.read_text()).keys() == {"after"}
        assert "There are no figures before training" in printed and "max_completion_length was 8, is 6" in printed
        assert main(["report", str(tmp_path / "mine")]) == 0
        page = (tmp_path / "mine" / "report.html").read_text()
        assert "after, greedy" in page and "before, greedy" not in page and "is damaged" not in page

    def test_problems_that_are_trained_on_are_not_unseen(
        self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [
            {"prompt": f"Problem {index}", "problem_class": f"kind {index % 2}", "solution": "1"}
            for index in range(12)
        ]
        for name, part in (("train", rows[:8]), ("test", rows[4:])):
            path = tmp_path / "data" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        command = ["train", "--config", str(recipe), "--max_steps", "1", "--report_problems", "8"]
        command += ["--dataset_name", str(tmp_path / "data")]
        assert main(command) == 0
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["after"]["greedy"]["problems"] == 4
        assert "4 of 8 problems of the split `test` are trained on and left out" in capsys.readouterr().out
        assert main([*command, "--dataset_test_split", "train"]) == 2
        assert "All problems of the split `train` are trained on: name another" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "launch",
        [
            ["--num_processes", "2", "--cpu"],
            ["--accelerate_config", str(ROOT / "recipes" / "accelerate" / "ddp.yaml")],
        ],
    )
    def test_launched_on_two_processes(self, recipe: Path, tmp_path: Path, launch: list[str]) -> None:
        done = run("train", "--config", str(recipe), "--max_steps", "1", *launch)
        assert done.returncode == 0, done.stderr[-2000:]
        assert not re.search("FutureWarning|Failed to load", done.stderr)  # of libraries, also in these processes
        assert (tmp_path / "run" / "model.safetensors").is_file()

    def test_error_on_two_processes_is_one_line(self, recipe: Path) -> None:
        """What only the processes find out ends them with its message, not with the launcher's traceback."""
        done = run("train", "--config", str(recipe), "--per_device_train_batch_size", "6", "--num_processes", "2")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if "error: One device generates" in line]) == 1

    def test_warmstart_writes_a_model_once(self, recipe: Path, tmp_path: Path) -> None:
        done = run("warmstart", "--config", str(recipe), "--warmstart_traces", "8")
        assert done.returncode == 0, done.stderr[-2000:]
        weights = tmp_path / "run" / "warmstart" / "model.safetensors"
        written = weights.stat().st_mtime_ns
        again = run("warmstart", "--config", str(recipe), "--warmstart_traces", "8")
        assert again.returncode == 0 and weights.stat().st_mtime_ns == written

    def test_bench_step_writes_its_figures(self, recipe: Path, tmp_path: Path, forked: None) -> None:
        output = tmp_path / "bench.json"
        assert main(["bench", "step", "--config", str(recipe), "--steps", "1", "--output", str(output)]) == 0
        figures = json.loads(output.read_text())
        assert figures["generated_tokens_ratio"] == pytest.approx(1.5)  # K = 2: half a strategy an execution
        for name in ("step_time", "seconds_per_generated_token", "flops_per_generated_token", "peak_memory"):
            assert figures[f"{name}_ratio"] > 0 and figures[f"shared_grpo_{name}_ratio"] > 0
        assert figures["shared_grpo_generated_tokens_ratio"] == 1  # it generates what TRL's trainer does
        assert figures["shared_grpo_flops_per_generated_token_ratio"] < 1  # with fewer operations
        assert 0 < figures["share_outside_model"] < 1
        assert {row["arm"] for row in figures["rows"]} == {"sgpo", "shared_grpo", "grpo"} and figures["settings"][
            "num_generations"
        ] == 4

    def test_bench_throughput_writes_its_figures(
        self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "throughput.json"
        options = ["--steps", "1", "--end_probability", "0.2", "--output", str(output)]
        assert main(["bench", "throughput", "--config", str(recipe), *options]) == 0
        figures = json.loads(output.read_text())
        for key in (
            "seconds_per_generated_token_ratio",
            "flops_per_generated_token_ratio",
            "fraction_of_generate_throughput",
            "fraction_of_bandwidth_limit",
        ):
            assert 0 < figures[key] < float("inf")
        rows = [(row["arm"], row["step"]) for row in figures["rows"]]
        assert sorted(rows) == [("grpo", 0), ("grpo", 1), ("sgpo", 0), ("sgpo", 1)]
        counts = [row["generated_tokens"] for row in figures["rows"] if row["arm"] == "grpo"]
        assert all(8 <= count < 64 for count in counts)  # of 8 rows with at most 8 tokens
        assert not (tmp_path / "run").exists()  # what steps leave is of no use
        assert "fraction_of_generate_throughput" in capsys.readouterr().out

    def test_bench_memory_compares_equal_lengths(
        self, recipe: Path, tmp_path: Path, forked: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "memory.json"
        assert main(["bench", "memory", "--config", str(recipe), "--output", str(output)]) == 0
        figures = json.loads(output.read_text())
        for name in ("peak", "step"):
            sgpo, grpo = (figures[f"{arm}_{name}_bytes"] for arm in ("sgpo", "grpo"))
            assert figures[f"{name}_memory_ratio"] == sgpo / grpo > 0
        assert figures["sgpo_step_bytes"] < figures["sgpo_peak_bytes"]
        assert figures["settings"]["grpo_max_completion_length"] == 16
        assert "peak_memory_ratio" in capsys.readouterr().out

    def test_bench_speedups_switches_each_off(
        self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        output = tmp_path / "speedups.json"
        options = ["--use_peft", "true", "--steps", "1", "--output", str(output)]
        assert main(["bench", "speedups", "--config", str(recipe), *options]) == 0
        figures = json.loads(output.read_text())
        assert {row["without"] for row in figures["rows"]} == {None, *SPEEDUPS}
        for name in ("merges_adapters", "shares_prefixes"):
            assert figures[name]["flops_ratio"] > 1
        assert figures["drops_finished_rows"]["flops_ratio"] == 1  # no row ended early
        assert SPEEDUPS["shares_prompts"] in capsys.readouterr().out

    def test_bench_fit_needs_no_weights(
        self, recipe: Path, tiny: str, tmp_path: Path, forked: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("*.safetensors"))
        output = tmp_path / "fit.json"
        options = ["--model_name_or_path", str(model), "--vram", "8", "--output", str(output)]
        options += ["--load_in_4bit", "true", "--use_peft", "true"]
        assert main(["bench", "fit", "--config", str(recipe), *options]) == 0
        (result,) = json.loads(output.read_text())["recipes"]
        assert [row["step"] for row in result["sgpo"]["steps"]] == [1]  # after the largest step
        assert [row["step"] for row in result["grpo"]["steps"]] == [0, 1]
        for arm, tokens in (("sgpo", 8 * 8 + 4 * 8), ("grpo", 8 * 16)):
            assert result[arm]["steps"][-1]["generated_tokens"] == tokens
            assert result["figures"][f"{arm}_seconds_per_step"] > 0
        assert result["estimate"]["fits"] and result["estimate"]["peak"] == result["figures"]["estimated_bytes"]
        printed = capsys.readouterr().out
        assert "within 8 GB" in printed and "time a token" in printed

    def test_bench_fit_says_what_went_wrong(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--arms", "grpo", "--reward_funcs", "nowhere"]
        assert main(["bench", "fit", "--config", str(recipe), *options]) == 1
        assert "GRPO: Unknown reward function 'nowhere'" in capsys.readouterr().out

    @pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--end_probability", "1")])
    def test_bench_refuses_options_out_of_range(
        self, recipe: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
    ) -> None:
        assert main(["bench", "throughput", "--config", str(recipe), option, value]) == 2
        assert option in capsys.readouterr().err
