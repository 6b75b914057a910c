"""What tests of sharded runs share: a small recipe, and what a run must leave whose ranks share weights or states."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from trl_sgpo.cli.main import main


def recipe(model: str, directory: Path, adapter: bool) -> Path:
    """A recipe of three steps with a bank and its default embedding model, with two blocks of two problems a step."""
    settings: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": "reasoning_gym/chain_sum+gcd?size=24&max_terms=2&max_digits=1",
        "reward_funcs": ["models.evenness", "answer_reward"],
        "max_strategy_length": 8,
        "max_completion_length": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "bank_min_lift": -1.0,
        "learning_rate": 0.01,
        "use_peft": adapter,
        "lora_target_modules": "all-linear",
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 1,
        "max_steps": 3,
        "disable_tqdm": True,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def logged(directory: Path) -> list[dict[str, float]]:
    """Metrics of each step, without the times."""
    history = json.loads((directory / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in log.items() if "time" not in name} for log in history]


def saved(directory: Path, adapter: bool) -> dict[str, torch.Tensor]:
    return load_file(directory / ("adapter_model.safetensors" if adapter else "model.safetensors"))


def check_run(train: Callable[..., None], directory: Path, adapter: bool) -> None:
    """
    Trains, resumes from the first checkpoint, and solves a problem with what was saved.

    Args:
        train (`Callable`):
            Trains on two ranks. It takes an output directory and further options.
        directory (`Path`):
            For the runs.
        adapter (`bool`):
            Whether the recipe trains an adapter.
    """
    whole, resumed = directory / "whole", directory / "resumed"
    train(whole)
    train(resumed, "--resume_from_checkpoint", str(whole / "checkpoint-1"))
    for rank in range(2):
        assert (whole / "checkpoint-1" / f"rollouts_{rank}.safetensors").is_file()
    assert len(logged(whole)) >= 3 and logged(resumed) == logged(whole)
    weights, first = saved(whole, adapter), saved(whole / "checkpoint-1", adapter)
    assert max((weights[name] - first[name]).abs().max() for name in weights) > 1e-3
    for name, weight in saved(resumed, adapter).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    assert (whole / "checkpoint-1" / "strategy_bank" / "ledger.sqlite").is_file()
    assert main(["solve", "--model", str(resumed), "What is 1 + 2?", "--json"]) == 0
