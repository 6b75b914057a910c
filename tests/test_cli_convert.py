"""`trl-sgpo convert`: keys and values of GRPO recipes, what is said of each change, and that the results train."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from doc_blocks import read_blocks
from models import hash_embedder, save_tiny_model

from trl_sgpo import SGPOConfig
from trl_sgpo.cli.conversion import Conversion
from trl_sgpo.cli.convert_keys import rename_keys
from trl_sgpo.cli.convert_values import convert_values
from trl_sgpo.cli.main import main


FIXTURES = Path(__file__).parent / "fixtures"
BASE = {"model_name_or_path": "org/model", "dataset_name": "org/data", "reward_funcs": ["accuracy_reward"]}


def converted(values):
    """The values that a recipe of the basic keys and others is converted to, and why, by key."""
    conversion = Conversion({**BASE, **values})
    rename_keys(conversion)
    convert_values(conversion)
    assert conversion.problems == []
    return conversion.values, {change[0]: change for change in conversion.changes}


def problems_of(values):
    conversion = Conversion({**BASE, **values})
    rename_keys(conversion)
    convert_values(conversion)
    return "\n".join(conversion.problems)


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Writes a GRPO recipe, converts it, and returns status, output and the new recipe."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(text, *options):
        path = tmp_path / "grpo.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        status = main(["convert", str(path), *options])
        new = tmp_path / "grpo_sgpo.yaml"
        out, err = capsys.readouterr()
        return status, out + err, yaml.safe_load(new.read_text()) if new.exists() else None

    return run


# What is converted


@pytest.mark.parametrize("generations", [1, 2, 3, 7, 8, 16])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (6, 3), (14, 4), (None, None)])
def test_rows_are_whole_blocks(generations, batch, steps):
    given = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
    values, _ = converted(
        {"num_generations": generations, "eval_strategy": "steps", "per_device_eval_batch_size": 5}
        | {key: value for key, value in given.items() if value is not None}
    )
    keys = ("num_generations", "transfer_block_size", "max_strategy_length", "max_completion_length", *given)
    keys = (*keys, "eval_strategy", "per_device_eval_batch_size")
    config = SGPOConfig("x", bf16=False, report_to="none", eval_steps=5, **{key: values[key] for key in keys})
    assert config.own_strategies >= 1 and config.num_generations in (generations, generations + 1, 2)
    assert config.per_device_train_batch_size == (batch or 8)
    assert config.gradient_accumulation_steps >= (steps or 1)


def test_a_generation_batch_is_whole_blocks_on_each_device():
    values, changes = converted({"generation_batch_size": 40, "per_device_train_batch_size": 4, "num_processes": 2})
    assert values["generation_batch_size"] == 64 and "gradient_accumulation_steps" not in values
    assert "16 rows on each device" in changes["generation_batch_size"][3]


@pytest.mark.parametrize(("whole", "strategy", "execution"), [(None, 128, 384), (2048, 128, 1920), (256, 64, 192)])
def test_both_phases_share_the_tokens_of_a_completion(whole, strategy, execution):
    values, _ = converted({} if whole is None else {"max_completion_length": whole})
    assert (values["max_strategy_length"], values["max_completion_length"]) == (strategy, execution)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"max_prompt_length": None}, {}),
        ({"dataset_configs": ["main"]}, {"dataset_config": "main"}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"token_entropy_percentile_threshold": 0.75}, {"top_entropy_quantile": 0.25}),
        ({"gradient_checkpointing_use_reentrant": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
        ({"wandb_project": "p", "logging_dir": "d"}, {"env": {"WANDB_PROJECT": "p", "TENSORBOARD_LOGGING_DIR": "d"}}),
        ({"use_vllm": True, "load_in_8bit": "yes"}, {"load_in_8bit": "yes"}),
        ({"trust_remote_code": True, "dataset_streaming": "true", "resume_from_checkpoint": "x"}, {}),
        ({"multi_objective_aggregation": "normalize_then_sum"}, {"multi_objective_aggregation": "sum_then_normalize"}),
        ({"r": 8, "full_finetuning": True}, {"lora_r": 8}),
        ({"r": 8}, {"lora_r": 8, "use_peft": True}),
        ({"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": True}),
        ({"vllm_sampling_params": {"top_k": -1, "min_p": 0.1, "n": 2}}, {"top_k": 0, "min_p": 0.1}),
        (
            {"dataset_mixture": {"datasets": [{"id": "a", "config": "c", "columns": ["q"]}], "test_split_size": 0.1}},
            {"datasets": [{"path": "a", "name": "c", "prompt_column": "q"}], "test_split_size": 0.1},
        ),
    ],
)
def test_keys_and_values(given, expected):
    always, _ = converted({})
    values, changes = converted(given)
    assert {key: value for key, value in values.items() if key not in always or key in expected} == expected
    for key in given.keys() - {"load_in_8bit"}:
        assert key in changes and changes[key][3], key  # each change is told, with its reason


def test_the_verifier_comes_first_with_its_weight():
    rewards = {"reward_funcs": ["format", "my.reward", "accuracy"], "reward_weights": [1, 2, 3]}
    values, _ = converted(rewards)
    assert values["reward_funcs"] == ["accuracy_reward", "think_format_reward", "my.reward"]
    assert values["reward_weights"] == [3, 1, 2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reward_funcs": ["tag_count"]}, "'tag_count'"),
        ({"reward_funcs": 5}, "`reward_funcs` must be a list of names, got 5."),
        ({"num_generations": {"a": 1}}, "`num_generations` must be a whole number, at least 1, got {a: 1}."),
        ({"max_completion_length": "many"}, "`max_completion_length` must be a whole number"),
        ({"bias": "all"}, "`bias` is all"),
        ({"dataset_configs": ["a", "b"]}, "`dataset_configs` has 2 names"),
        ({"dataset_mixture": ["a"]}, "`dataset_mixture` needs `datasets`"),
        ({"env": [1], "logging_dir": "x"}, "`env` must be a mapping of names to values, got [1]."),
        ({"token_entropy_percentile_threshold": [1]}, "`token_entropy_percentile_threshold` must be a number"),
    ],
)
def test_what_cannot_be_converted_is_named(given, words):
    assert words in problems_of(given)


# The command


def test_unknown_keys_are_named_and_nothing_is_written(convert, tmp_path):
    status, printed, recipe = convert({**BASE, "num_generation": 8, "frobnicate": 1})
    assert status == 2 and recipe is None
    assert "`num_generation`. Did you mean `num_generations`" in printed and "`frobnicate`" in printed


def test_each_change_is_a_line_with_its_reason(convert):
    printed = convert(
        {**BASE, "bf16": False, "torch_dtype": "float32", "max_completion_length": 256, "vllm_device": 0}
    )[1]
    for line in (
        "torch_dtype: float32 → dtype: float32  (its name in the current versions)",
        "vllm_device: 0 → left out  (vLLM shares the GPUs of training, or is a server with `vllm_mode: server`)",
        "max_strategy_length: set to 64  (the strategy's part of the 256 tokens of a completion)",
        "max_completion_length: 256 → 192  (the execution's part of them)",
        "4 other keys are as they were. Recipe: ",
    ):
        assert line in printed, printed


def test_words_and_numbers_stay_as_they_were_written(convert):
    text = "eval_strategy: no\nsave_strategy: 'no'\nlearning_rate: 1e-5\nuse_peft: on\nbf16: false\nuse_cpu: true\n"
    status, printed, recipe = convert(yaml.safe_dump(BASE) + text)
    assert status == 0, printed
    assert (recipe["eval_strategy"], recipe["save_strategy"], recipe["learning_rate"]) == ("no", "no", "1e-5")
    assert recipe["use_peft"] == "on" and recipe["bf16"] is False


def test_what_this_machine_lacks_is_told_after_the_recipe_is_written(convert):
    status, printed, recipe = convert({**BASE, "use_vllm": True, "bf16": False})
    assert status == 1 and recipe["use_vllm"] is True and "`use_vllm` needs vllm" in printed


def test_a_recipe_that_is_there_is_kept(convert, tmp_path):
    (tmp_path / "grpo_sgpo.yaml").write_text("mine: 1\n")
    status, printed, recipe = convert(BASE)
    assert status == 2 and recipe == {"mine": 1} and "--overwrite" in printed
    assert convert({**BASE, "bf16": False}, "--overwrite")[2]["transfer_block_size"] == 2


def test_outputs_of_grpo_stay(convert):
    recipe = convert({**BASE, "bf16": False, "output_dir": "runs/a/", "hub_model_id": "me/a"})[2]
    assert (recipe["output_dir"], recipe["hub_model_id"]) == ("runs/a-sgpo", "me/a-sgpo")
    assert convert({**BASE, "bf16": False}, "--overwrite")[2]["output_dir"] == "runs/grpo-sgpo"


def test_secrets_and_control_characters_are_not_printed(convert, tmp_path):
    given = {"bf16": False, "push_to_hub_token": "hf_secret", "max_seq_length": "\x1b[2J", "\x1b[2Jx": 1}
    given |= {"logging_dir": "https://user:hf_secret@host/logs"}
    status, printed, _ = convert({**BASE, **given})
    assert status == 2 and "\x1b" not in printed
    given.pop("\x1b[2Jx")
    status, printed, recipe = convert({**BASE, **given})
    assert status == 0 and recipe["hub_token"] == "hf_secret"
    assert "hf_secret" not in printed and "\x1b" not in printed
    assert (tmp_path / "grpo_sgpo.yaml").stat().st_mode & 0o077 == 0


def test_the_recipes_of_the_docs_are_a_conversion(convert):
    page = Path(__file__).parents[1] / "docs" / "coming_from_grpo.md"
    before, after = [block.text for block in read_blocks("page", page.read_text()) if block.language == "yaml"]
    assert convert(before)[2] == yaml.safe_load(after) | {"output_dir": "runs/qwen-sgpo"}


# Three recipes, each of which trains


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny model, and problems with the columns that TRL's rewards read."""
    directory = tmp_path_factory.mktemp("convert")
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} + 1?"}], "solution": str(a + 1), "problem": f"{a}?"}
        for a in range(24)
    ]
    (directory / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(directory / "model")
    return directory


@pytest.mark.parametrize(
    ("style", "rewards", "rows"),
    [
        ("trl", ["accuracy_reward", "think_format_reward"], 16),
        ("open_r1", ["accuracy_reward", "think_format_reward"], 112),
        ("unsloth", ["evenness"], 8),
    ],
)
def test_a_converted_recipe_trains_a_step(here, tmp_path, monkeypatch, capsys, style, rewards, rows):
    for module in ("trl_sgpo.bank.embedding", "trl_sgpo.data.classes", "trl_sgpo.cli.train"):
        monkeypatch.setattr(f"{module}.load_embedder", lambda name: hash_embedder)
    monkeypatch.setenv("WANDB_PROJECT", "")
    shutil.copy(FIXTURES / f"grpo_{style}.yaml", tmp_path / "grpo.yaml")
    assert main(["convert", str(tmp_path / "grpo.yaml")]) in (0, 1)  # 1 where vLLM or a tracker is not installed
    recipe = yaml.safe_load((tmp_path / "grpo_sgpo.yaml").read_text())
    assert "num_generations" in recipe and recipe["max_strategy_length"] == 128
    # What is of the machine and the size: not what was converted
    smaller = {
        "model_name_or_path": here / "model",
        "dataset_name": here / "problems.jsonl",
        "dataset_config": "None",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "max_strategy_length": 4,
        "max_completion_length": 4,
        "dtype": "float32",
        "bf16": "false",
        "load_in_4bit": "false",
        "use_vllm": "false",
        "use_cpu": "true",
        "optim": "adamw_torch",
        "attn_implementation": "sdpa",
        "report_to": "none",
        "push_to_hub": "false",
        "save_strategy": "no",
        "log_level": "warning",
        "lora_target_modules": "all-linear",
    }
    options = [str(part) for key, value in smaller.items() for part in (f"--{key}", value)]
    if style == "open_r1":
        options += ["--prompt_column", "prompt"]  # TRL's rewards read messages
    capsys.readouterr()
    status = main(["train", "--config", str(tmp_path / "grpo_sgpo.yaml"), *options])
    assert status == 0, capsys.readouterr().err[-2000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    step = state["log_history"][0]
    assert state["global_step"] == 1 and "sgpo/transfer" in step
    assert [key.split("/")[1] for key in step if key.startswith("rewards/") and key.endswith("/mean")] == rewards
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == rows
