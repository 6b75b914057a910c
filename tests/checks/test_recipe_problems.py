"""Recipes with mistakes: every command names all of them in one answer, before a model is loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import save_tiny_model
from test_origin import function
from trl import TrlParser

import trl_sgpo.cli.train
from trl_sgpo.checks.old_names import NOTES, REMOVED, RENAMED, unknown_key
from trl_sgpo.checks.ranges import CHOICES
from trl_sgpo.cli.main import main
from trl_sgpo.recipe import SGPOScriptArguments, read_recipe
from trl_sgpo.sgpo_config import SGPOConfig


FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def content(tiny: str, tmp_path: Path) -> dict[str, Any]:
    """A recipe that trains."""
    return {
        "model_name_or_path": tiny,
        "dataset_name": "reasoning_gym/chain_sum+gcd?size=24&max_terms=2&max_digits=1",
        "reward_funcs": ["models.evenness", "answer_reward"],
        "max_strategy_length": 8,
        "max_completion_length": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "use_bank": False,
        "bf16": False,
        "logging_steps": 1,
        "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }


Answer = tuple[int, list[str]]


@pytest.fixture
def run(
    content: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Answer]:
    monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")

    def run(changes: dict[str, Any], *options: str, command: str = "train", written: str = "") -> Answer:
        """Exit status, and the lines of the error message: one, or a heading and one for each problem."""
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | changes) + written)
        status = main([command, "--config", str(path), *options])
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if "error: " in line or line.startswith("  - ")]

    return run


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> str:
        pytest.fail("a model is looked for before the recipe is checked")

    monkeypatch.setattr(trl_sgpo.cli.train, "fetch_model", load)


class TestOneLine:
    @pytest.mark.usefixtures("without_model")
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"attn_implementation": "flash_attention_2"}, "`attn_implementation` is flash_attention_2.* sdpa"),
            ({"attn_implementation": "flashy"}, "`attn_implementation` is flashy.*not supported"),
            ({"report_to": "comet_ml"}, "`report_to` is comet_ml.*pip install comet-ml.*none"),
            ({"report_to": ["wanb"]}, "`report_to` is wanb.*wandb"),
            ({"reward_weights": [1.0]}, "`reward_weights` has 1 weights for 2"),
            ({"loss_type": "grrpo"}, "`loss_type` must be one of grpo, .*got 'grrpo'"),
            ({"importance_sampling_level": "x"}, "`importance_sampling_level` must be one of token"),
            ({"scale_rewards": "x"}, "`scale_rewards` must be one of group"),
            ({"lora_task_type": "x", "use_peft": True}, "Invalid task type"),
            ({"temperature": 0}, "`temperature` must be above 0, got 0"),
            ({"temperature": -1.0}, "`temperature` must be above 0"),
            ({"top_k": -1}, "`top_k` must be at least 0"),
            ({"top_p": 2}, "`top_p` must be above 0 and at most 1, got 2"),
            ({"seed": -1}, "`seed` must be at least 0 and at most 4294967295, got -1"),
            ({"seed": "abc"}, "`seed` must be a whole number, got 'abc'"),
            ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must be at least 0"),
            ({"optim": "adamm"}, "`optim` must be one of .*got adamm"),
            ({"lr_scheduler_type": "cosin"}, "`lr_scheduler_type` must be one of .*got cosin"),
            ({"deepspeed": {"zero_optimization": {}}}, "`deepspeed` needs deepspeed"),
            ({"accelerator_config": "none.json"}, "`accelerator_config` is none.json, but there is no such file"),
            ({"warmstart_file": "none.jsonl"}, "`warmstart_file` is none.jsonl, but there is no such file"),
            ({"dataset_name": "none.jsonl"}, "`dataset_name` is none.jsonl, but there is no such file"),
            ({"model_name_or_path": "./none"}, "`model_name_or_path` is ./none, but there is no such directory"),
            ({"use_vllm": True}, r"`use_vllm` needs vllm.*pip install 'trl\[vllm\]'"),
            ({"use_liger_kernel": True}, "`use_liger_kernel` needs liger_kernel"),
            ({"chat_template_kwargs": "{bad"}, "`chat_template_kwargs` is no valid JSON"),
            ({"chat_template_kwargs": "x"}, "`chat_template_kwargs` must be a mapping of keys to values, got 'x'"),
            ({"generation_kwargs": "x"}, "`generation_kwargs` must be a mapping of keys to values, got 'x'"),
            ({"lr_scheduler_kwargs": "x"}, "`lr_scheduler_kwargs` must be a mapping of keys to values, got 'x'"),
            ({"model_init_kwargs": "[1]"}, "`model_init_kwargs` must be a mapping of keys to values, got"),
            (
                {"gradient_checkpointing_kwargs": "x"},
                "`gradient_checkpointing_kwargs` must be a mapping of keys to values, got 'x'",
            ),
            (
                {"gradient_checkpointing_kwargs": {"nope": 1}, "gradient_checkpointing": True},
                "`gradient_checkpointing_kwargs` takes .*use_reentrant.*, not nope",
            ),
            ({"remove_unused_columns": True}, "`remove_unused_columns` would remove the columns .*set it to false"),
            ({"output_dir": ""}, "`output_dir` is empty: name a directory"),
            ({"bank_path": "", "use_bank": True}, "`bank_path` is empty: name a directory"),
            ({"reward_funcs": ["."]}, "Unknown reward function '.': use one of"),
            ({"reward_funcs": ["models."]}, "Unknown reward function 'models.': use one of"),
            ({"push_to_hub": True}, "`push_to_hub` needs the network"),
            ({"dtype": "float33"}, "`dtype` must be one of auto"),
            ({"datasets": [{"pth": "x"}]}, "`datasets` must be a list of mappings, each with a `path`"),
            ({"env": ["x"]}, "`env` must be a mapping"),
            ({"trust_remote_code": True}, "`trust_remote_code` is refused"),
            ({"warmup_steps": None}, "`warmup_steps` is empty: give it a value"),
            ({"num_generations": None}, "`num_generations` must be at least 1, got None"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_of_a_recipe(self, run: Callable[..., Answer], changes: dict[str, Any], words: str) -> None:
        status, lines = run(changes)
        assert status == 2 and len(lines) == 1 and re.search(words, lines[0]), lines

    @pytest.mark.usefixtures("without_model")
    def test_of_an_adapter_as_the_model(self, run: Callable[..., Answer], tmp_path: Path) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        status, lines = run({"model_name_or_path": str(tmp_path / "adapter")})
        assert status == 2 and len(lines) == 1 and "an adapter, where a whole model is needed: merge it" in lines[0]

    @pytest.mark.usefixtures("without_model")
    @pytest.mark.parametrize("key", ["output_dir", "bank_path"])
    @pytest.mark.parametrize("path", ["file", "file/run", "/proc/run"])
    def test_of_places_that_cannot_be_written(
        self, run: Callable[..., Answer], key: str, path: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        status, lines = run({key: str(tmp_path / path), "use_bank": True})
        assert status == 2 and len(lines) == 1 and f"`{key}` is " in lines[0]
        assert ("is a file: name a directory" in lines[0]) or ("name another directory" in lines[0])
        assert [item.name for item in tmp_path.iterdir()] == ["file", "recipe.yaml"] or path == "/proc/run"

    def test_of_libraries_while_the_trainer_is_made(self, run: Callable[..., Answer]) -> None:
        for changes, words in (
            ({"use_peft": True, "lora_target_modules": ["nothing", "nowhere"]}, "Target modules .*not found"),
            ({"use_peft": True, "lora_r": 0}, "`r` should be a positive integer"),
            ({"model_init_kwargs": {"nonsense": 1}}, "unexpected keyword argument 'nonsense'"),
            ({"torch_compile_backend": "nope"}, "not a valid DynamoBackend"),
        ):
            status, lines = run(changes)
            assert status == 2 and len(lines) == 1 and re.search(words, lines[0]), lines

    def test_of_reward_functions(self, run: Callable[..., Answer], tmp_path: Path) -> None:
        for name, words in (
            ("os.path", "reward function posixpath is a module: name a function"),
            ("sys.maxsize", "reward function [0-9]+ is of the type int: name a function"),
            ("math.gcd", r"`gcd` takes no `\*\*kwargs`"),
        ):
            status, lines = run({"reward_funcs": [name]})
            assert status == 2 and len(lines) == 1 and re.search(words, lines[0]), lines

    def test_of_a_metric_that_no_evaluation_has(self, run: Callable[..., Answer]) -> None:
        evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
        status, lines = run(
            evaluated
            | {"metric_for_best_model": "eval_nothing"}
            | {"dataset_train_split": "train[:4]", "dataset_test_split": "train[4:]"}
        )
        assert status == 2 and len(lines) == 1
        assert (
            "`metric_for_best_model` training argument is set to 'eval_nothing'" in lines[0]
            and "eval_reward" in lines[0]
        )

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            (
                "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}",
                "refuses .*none",
            ),
            ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "leaves .* out"),
        ],
    )
    def test_of_a_template_without_system_role(
        self, run: Callable[..., Answer], tmp_path: Path, template: str, words: str
    ) -> None:
        model = Path(save_tiny_model(tmp_path / "model"))
        (model / "chat_template.jinja").write_text(template)
        status, lines = run({"model_name_or_path": str(model), "system_prompt": "Be brief."})
        assert status == 2 and len(lines) == 1 and re.search(f"chat template {words}.*`system_prompt`", lines[0])

    @pytest.mark.parametrize("command", ["warmstart", "bootstrap", "estimate"])
    def test_of_other_commands(self, run: Callable[..., Answer], command: str, tmp_path: Path) -> None:
        options = ["--output_dir", str(tmp_path / "out")] if command == "bootstrap" else []
        status, lines = run({"temperature": -1, "torch_dtype": "x", "optim": "y"}, *options, command=command)
        assert status == 2 and len(lines) == 4, lines

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("eval", ["--model", "m", "--suites", "gsm8k", "--output_dir", "file"]),
            ("export", ["--model", "m", "--merge", "--output_dir", "file/x"]),
            ("estimate", ["--config", "recipe.yaml", "--output", "file/x.json"]),
            ("bootstrap", ["--config", "recipe.yaml", "--output_dir", "file"]),
            ("init", ["--output", "file/x.yaml"]),
            ("report", [".", "--output", "file/x.html"]),
        ],
    )
    def test_of_outputs(
        self,
        command: str,
        options: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "recipe.yaml").write_text("{}")
        monkeypatch.chdir(tmp_path)
        if command == "report":
            (tmp_path / "settings.json").write_text("{}")
        assert main([command, *options]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and re.search("`--output(_dir)?` is .*file: name a directory|holds no", lines[0]), lines

    @pytest.mark.parametrize(
        ("command", "options", "words"),
        [
            ("eval", ["--samples", "many"], "--samples: invalid int value: 'many'"),
            ("export", [], "required: --model, --output_dir"),
            ("eval", ["--dtype", "float33"], "invalid choice: 'float33'"),
            ("solve", ["--n", "x"], "--n: invalid int value"),
            ("solve", ["--model", "m", "--dtype", "float33", "1 + 1?"], "invalid choice: 'float33'"),
            ("solve", ["--model", "m", "--device", "gpux", "1 + 1?"], "`--device gpux` cannot be used"),
            ("compare", [], "required: --config"),
            ("train", ["--seed", "x"], "--seed: invalid int value: 'x'"),
        ],
    )
    def test_of_command_lines(
        self, command: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([command, *options]) == 2
        assert words in capsys.readouterr().err

    def test_options_with_hyphens(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["solve", "--model", "m", "--no-bank", "--bank", "b", "1 + 1?"]) == 2
        assert "`--no_bank`" in capsys.readouterr().err

    def test_of_broken_weights(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        weights = Path(save_tiny_model(tmp_path / "model"), "model.safetensors")
        weights.write_bytes(weights.read_bytes()[:200])
        assert main(["solve", "--model", str(tmp_path / "model"), "--no_bank", "1 + 1?"]) == 2
        assert "deserializing header" in capsys.readouterr().err.splitlines()[-1]

    def test_of_other_files_with_several_unknown_keys(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("seedz: [1]\nxyzzy: 2\n")
        for command in ("eval", "compare"):
            assert main([command, "--config", str(config)]) == 2
            heading, *problems = capsys.readouterr().err.splitlines()
            assert f"{config}, whose keys are " in heading and len(problems) == 2
            assert re.search("`seedz`.*did you mean `seeds?`", problems[0]) and "`xyzzy`" in problems[1]


class TestBugs:
    def test_a_bug_of_ours_keeps_its_traceback(
        self, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planted = function("trl_sgpo.planted", "f", "raise ValueError('planted')")
        monkeypatch.setattr(trl_sgpo.cli.train, "with_classes", lambda *args: planted())
        with pytest.raises(ValueError, match="planted"):
            run({})

    def test_an_error_of_a_library_in_a_training_step_keeps_its_traceback(
        self, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planted = function("transformers.planted", "f", "raise ValueError('planted')")
        monkeypatch.setattr("torch.optim.AdamW.step", lambda *args, **kwargs: planted())
        with pytest.raises(ValueError, match="planted"):
            run({"optim": "adamw_torch"})


class TestAllAtOnce:
    @pytest.mark.usefixtures("without_model")
    def test_keys_values_geometry_paths_and_packages(self, run: Callable[..., Answer], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        changes = {
            "torch_dtype": "bfloat16",
            "num_generatoins": 8,
            "temperature": "hot",
            "learning_rate": -1,
            "num_generations": 7,
            "output_dir": str(tmp_path / "file"),
            "report_to": "comet_ml",
            "warmstart_file": "none.jsonl",
            "reward_funcs": ["accuracy", "answer_reward"],
        }
        status, lines = run(changes, "--seed", "x", "--optim", "y")
        assert status == 2 and lines[0].endswith("recipe.yaml has 11 problems:")
        bullets = "\n".join(lines[1:])
        for words in (
            "`torch_dtype` is now `dtype`",
            "Unknown key `num_generatoins`. Did you mean `num_generations`",
            "`temperature` must be a number",
            "`learning_rate` must be at least 0",
            "num_generations (7)",
            "is a file",
            "comet_ml",
            "none.jsonl",
            "'accuracy'",
            "--seed",
            "--optim",
        ):
            assert words in bullets
        assert len(lines) == 12

    def test_the_command_line_wins(self, run: Callable[..., Answer]) -> None:
        status, lines = run(
            {"temperature": "hot", "report_to": "comet_ml"}, "--temperature", "0", "--report-to", "none"
        )
        assert status == 2 and len(lines) == 1 and "`temperature` must be above 0, got 0.0" in lines[0]

    def test_geometry_names_the_batches_it_needs(self, run: Callable[..., Answer]) -> None:
        status, lines = run({"num_generations": 7, "eval_strategy": "steps"})
        assert status == 2 and len(lines) == 1
        assert "set num_generations to 6 or 8" in lines[0]
        assert "With 6, per_device_train_batch_size * gradient_accumulation_steps (8) must be a multiple" in lines[0]
        assert "With 6, per_device_eval_batch_size (8) must be a multiple of 6." in lines[0]
        assert "With 8, per_device_eval_batch_size" not in lines[0]

    @pytest.mark.parametrize(
        ("written", "key", "value"),
        [
            ("eval_strategy: no", "eval_strategy", "no"),
            ("save_strategy: no", "save_strategy", "no"),
            ("learning_rate: 1e-4", "learning_rate", 1e-4),
            ("report_to: none", "report_to", []),
            ("report_to:", "report_to", []),
            ("bank_path: None", "bank_path", None),
        ],
    )
    def test_unquoted_words(self, content: dict[str, Any], tmp_path: Path, written: str, key: str, value: Any) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content) + written + "\n")
        assert vars(read_recipe(["--config", str(path)], "x").training)[key] == value

    @pytest.mark.parametrize(
        ("written", "targets"),
        [("[q_proj]", ["q_proj"]), ("q_proj", ["q_proj"]), ("all-linear", "all-linear"), ("[.*q_proj]", ".*q_proj")],
    )
    def test_one_target_of_lora_is_a_name(
        self, content: dict[str, Any], tmp_path: Path, written: str, targets: Any
    ) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content) + f"lora_target_modules: {written}\n")
        assert read_recipe(["--config", str(path)], "x").model.lora_target_modules == targets

    def test_a_recipe_of_open_r1(self, run: Callable[..., Answer], content: dict[str, Any], tmp_path: Path) -> None:
        """All problems in the first answer; with these mended, the second run trains."""
        recipe = yaml.safe_load((FIXTURES / "open_r1_grpo_demo.yaml").read_text())
        here = {key: content[key] for key in ("model_name_or_path", "dataset_name", "output_dir")}
        content.clear()
        assert recipe["report_to"] == ["wandb"]
        content.update(recipe | here | {"report_to": ["comet_ml"]})  # the tests have wandb
        status, lines = run({})
        assert status == 2
        named = (
            "`torch_dtype` is now `dtype`",
            "`attn_implementation` is flash_attention_2",
            "`dataset_configs` is now `dataset_config`",
            "`use_vllm` needs vllm",
            "`vllm_device` does not exist any more",
            "`max_prompt_length` is now `max_problem_tokens`",
            "num_generations (7)",
            "`overwrite_output_dir` does not exist any more",
            "`push_to_hub` needs the network",
            "`report_to` is comet_ml",
            "'accuracy'",
            "'format'",
            "`warmup_ratio` is now `warmup_steps`",
        )
        for words in named:
            assert len([line for line in lines if words in line]) == 1, words
        assert len(lines) == 1 + len(named)

        for key in ("dataset_configs", "vllm_device", "overwrite_output_dir"):
            del content[key]
        for old in ("torch_dtype", "max_prompt_length", "warmup_ratio"):
            content[RENAMED[old]] = content.pop(old)
        mended = {"attn_implementation": "sdpa", "use_vllm": False, "num_generations": 8, "push_to_hub": False}
        mended |= {"report_to": "none", "reward_funcs": ["accuracy_reward", "think_format_reward"]}
        smaller = ["--max_steps", "1", "--gradient_accumulation_steps", "1", "--max_completion_length", "8"]
        smaller += ["--max_strategy_length", "8", "--use_bank", "false"]
        assert run(mended, *smaller) == (0, [])
        assert (tmp_path / "run" / "model.safetensors").is_file()


class TestTables:
    def test_old_names(self) -> None:
        from accelerate.commands.launch import launch_command_parser
        from trl import DatasetMixtureConfig, ModelConfig

        parser = TrlParser((SGPOScriptArguments, SGPOConfig, ModelConfig, DatasetMixtureConfig))
        known = {action.dest for action in parser._actions}
        launch = {
            option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings
        }
        assert not (RENAMED.keys() | REMOVED.keys()) & (known | launch)
        assert (
            set(RENAMED.values()) <= known and NOTES.keys() <= RENAMED.keys() and not RENAMED.keys() & REMOVED.keys()
        )
        for words in REMOVED.values():  # keys that they name
            assert set(re.findall(r"`(\w+)", words)) - {"accelerate", "trl", "SGPOTrainer", "use_reentrant"} <= known

    def test_a_key_is_suggested_once(self) -> None:
        assert unknown_key("use_banks", ["use_bank"] * 2) == "Unknown key `use_banks`. Did you mean `use_bank`?"

    def test_unknown_key(self) -> None:
        assert unknown_key("warmup_ratio", ["warmup_steps"]).startswith(
            "`warmup_ratio` is now `warmup_steps` (a number"
        )
        assert unknown_key("sed", ["seed"]) == "Unknown key `sed`. Did you mean `seed`?"
        assert unknown_key("xyzzy", ["seed"]) == "Unknown key `xyzzy`."

    @pytest.mark.parametrize("name", [name for name in CHOICES if name != "scale_rewards"])
    def test_choices_are_those_of_trl(self, name: str) -> None:
        """TRL's documentation of a setting names its values in quotation marks."""
        from trl import GRPOConfig

        documented = re.search(rf"\n\s+{name} \(.*?(?=\n\s+[a-z_0-9]+ \(`|\n\s+> )", GRPOConfig.__doc__ or "", re.S)
        assert documented is not None
        assert set(CHOICES[name]) <= set(re.findall(r'`"(\w+)"`', documented[0]))
        if name == "loss_type":
            assert set(re.findall(r'- `"(\w+)"`', documented[0])) == set(CHOICES[name])
