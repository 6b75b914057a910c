"""Trainers in Python read weights of models that are named by text from safetensors only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import evenness, problems, save_tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import GRPOConfig

from trl_sgpo import SGPOConfig, SGPOTrainer, SharedPromptGRPOTrainer


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pickles that are read."""
    names: list[str] = []
    read = torch.load

    def spied(file: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(file))
        return read(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", spied)
    return names


def with_pickle(directory: Path) -> str:
    """Replaces a model's safetensors by a pickle."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return str(directory)


@pytest.mark.parametrize("trainer, config", [(SGPOTrainer, SGPOConfig), (SharedPromptGRPOTrainer, GRPOConfig)])
def test_a_model_with_pickled_weights(trainer: Any, config: Any, tmp_path: Path, opened: list[str]) -> None:
    save_tiny_model(tmp_path / "tiny")
    args = config(str(tmp_path / "out"), report_to="none", bf16=False, use_cpu=True)
    with pytest.raises(OSError, match="safetensors"):
        trainer(with_pickle(tmp_path / "tiny"), evenness, args, problems())
    assert not opened


@pytest.mark.parametrize("loaded", [False, True])
def test_a_reward_model_with_pickled_weights(loaded: bool, tmp_path: Path, opened: list[str]) -> None:
    save_tiny_model(tmp_path / "tiny")
    save_tiny_model(tmp_path / "reward")
    config = AutoConfig.from_pretrained(tmp_path / "reward", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny") if loaded else str(tmp_path / "tiny")
    args = GRPOConfig(str(tmp_path / "out"), report_to="none", bf16=False, use_cpu=True)
    with pytest.raises(OSError, match="safetensors"):
        SharedPromptGRPOTrainer(model, with_pickle(tmp_path / "reward"), args, problems())
    assert not opened
