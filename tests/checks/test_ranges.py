"""Numbers of a recipe: finite, and within their ranges."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from trl import ModelConfig

from trl_sgpo.errors import ConfigError
from trl_sgpo.recipe import SGPOScriptArguments, read_recipe
from trl_sgpo.sgpo_config import SGPOConfig


def read(tmp_path: Path, **keys: Any) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "none", "output_dir": "out", "bf16": False} | keys))
    return read_recipe(["--config", str(path)], "test")


def float_keys() -> list[str]:
    """The keys of a recipe that take a number with a fraction, also in a list."""
    keys = []
    for part in (SGPOScriptArguments, SGPOConfig, ModelConfig):
        hints = get_type_hints(part)
        for item in fields(part):
            kinds = {hints[item.name], *get_args(hints[item.name])}
            if item.init and (float in kinds or list[float] in kinds):
                keys.append(item.name)
    return keys


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("key", float_keys())
def test_every_number_is_finite(tmp_path: Path, key: str, value: float) -> None:
    given = [value] if key == "reward_weights" else value
    with pytest.raises(ConfigError, match=f"`{key}` must be a finite number"):
        read(tmp_path, **{key: given})


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("transfer_weight", -1, "at least 0"),
        ("correctness_weight", -1, "at least 0"),
        ("coherence_weight", -0.1, "at least 0"),
        ("leak_weight", -0.5, "at least 0"),
        ("strategy_weight", -1, "at least 0"),
        ("max_grad_norm", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("adam_beta1", 1.0, "at least 0 and at most 0.999"),
        ("adam_beta2", -0.1, "at least 0 and at most 0.999"),
        ("adam_epsilon", -1e-8, "at least 0"),
        ("epsilon_high", -0.1, "at least 0"),
        ("warmstart_traces", -1, "at least 0"),
        ("warmstart_learning_rate", 0, "above 0"),
        ("warmstart_batch_size", 0, "at least 1"),
        ("warmstart_plain_share", 1.5, "at least 0 and at most 1"),
        ("report_problems", -1, "at least 0"),
        ("max_problem_tokens", 0, "at least 1"),
        ("vram_gb", -1, "above 0"),
        ("lora_dropout", 1.5, "at least 0 and at most 1"),
    ],
)
def test_of_a_recipe(tmp_path: Path, key: str, value: float, least: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be {least}.*, got {value}"):
        read(tmp_path, **{key: value})


def test_of_numbers_in_lists_and_mappings() -> None:
    for keys in ({"reward_weights": [1.0, math.nan]}, {"lr_scheduler_kwargs": {"num_cycles": math.inf}}):
        with pytest.raises(ConfigError, match=f"`{next(iter(keys))}` must be a finite number"):
            SGPOConfig("out", bf16=False, **keys)
    with pytest.raises(ConfigError, match="`learning_rate` must be a finite number"):
        SGPOConfig("out", bf16=False, learning_rate=10**400)
