"""Sharded runs: rows that are packed, and what is refused. `tests/with_deepspeed` trains by the command line."""

import os
from pathlib import Path

import pytest
import torch
from models import save_tiny_model
from ranks import FSDP, load
from sharded_runs import recipe
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

from trl_sgpo.bank.embedding import load_embedder
from trl_sgpo.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_rows_are_packed_with_fsdp2(model: str, tmp_path: Path) -> None:
    packed, plain = load(tmp_path, 2, model, module="two_ranks_grpo", **FSDP).values()
    assert packed["shares"] and not plain["shares"]
    assert packed["backend"] == "FSDP" and packed["ranks"] == 2
    assert max(step.abs().max() for step in plain["steps"].values()) > 1e-3
    for name, step in plain["steps"].items():
        torch.testing.assert_close(packed["steps"][name], step, rtol=1e-3, atol=1e-5)


def test_ranks_that_would_use_ddp_instead_are_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a process finds it that `accelerate launch` started on CPUs. `tests/with_deepspeed` has that of DeepSpeed."""
    path = recipe(model, tmp_path, adapter=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "--config", str(path), "--output_dir", str(tmp_path / "run")]) == 2
    assert "FSDP needs GPUs, and there are none" in capsys.readouterr().err


def test_a_warm_start_is_not_sharded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", str(recipe(model, tmp_path, adapter=False)), "--output_dir", str(tmp_path / "run")]
    command += ["--warmstart_traces", "4"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", *command]) == 2
    assert "run `trl-sgpo warmstart` with the same recipe on one process first" in capsys.readouterr().err


class Zero3:
    def is_zero3(self) -> bool:
        return True


def test_the_first_rank_loads_an_embedding_model_alone() -> None:
    """With ZeRO-3, transformers would have it wait for the other ranks, which load none."""
    settings = Zero3()
    set_hf_deepspeed_config(settings)
    assert load_embedder("sentence-transformers/all-MiniLM-L6-v2")(["Add them."]).shape == (1, 384)
    assert is_deepspeed_zero3_enabled()


def test_nothing_is_left_in_the_environment() -> None:
    assert "ACCELERATE_USE_FSDP" not in os.environ and not is_deepspeed_zero3_enabled()
