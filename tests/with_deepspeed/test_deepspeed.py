"""
DeepSpeed ZeRO-2 and ZeRO-3 on two processes, on CPUs.

`make test-deepspeed` runs it in an environment of its own; `make test` does not collect it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from models import save_tiny_model
from ranks import load, run
from sharded_runs import check_run, recipe


ROOT = Path(__file__).parents[2]
STAGES = ["2", "3"]


def deepspeed(stage: str) -> dict[str, str]:
    """The environment of a rank. Where `ACCELERATE_USE_CPU` is set, accelerate does not use DeepSpeed."""
    return {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == "3").lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": str(stage == "3").lower(),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return load(tmp_path_factory.mktemp("one"), 1, model, "group")


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert max(step.abs().max() for step in expected.values()) > 1e-3
    for name, step in expected.items():
        torch.testing.assert_close(found[name], step, rtol=rtol, atol=atol)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_do_what_one_does(model: str, one: dict[str, Any], tmp_path: Path, stage: str) -> None:
    two = load(tmp_path, 2, model, "group", **deepspeed(stage))
    assert (two["ranks"], two["backend"]) == (2, "DEEPSPEED")
    close(two["steps"], one["steps"], rtol=1e-3, atol=1e-5)
    assert two["written"] == one["written"] and two["bank"] == one["bank"] and len(one["bank"]) > 1
    assert len(two["rows"]) == len(one["rows"]) == 48
    assert {"rollouts_0.safetensors", "rollouts_1.safetensors", "strategy_bank"} <= set(two["checkpoint"])


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_goes_on_as_if_nothing_had_happened(model: str, tmp_path: Path, stage: str) -> None:
    whole = load(tmp_path / "whole", 2, model, "group", ADAM="1", **deepspeed(stage))
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-2")
    resumed = load(tmp_path / "resumed", 2, model, "group", checkpoint, ADAM="1", **deepspeed(stage))
    assert whole["backend"] == "DEEPSPEED"
    close(resumed["steps"], whole["steps"], rtol=1e-4, atol=1e-6)
    assert resumed["bank"] == whole["bank"] and resumed["written"] == whole["written"]
    assert {row["step"] for row in resumed["rows"]} == {2}


def trained(stage: str, path: Path, *options: str) -> Callable[..., None]:
    """Trains by the command line, with the launcher file of a stage."""
    file = ROOT / "recipes" / "accelerate" / f"zero{stage}.yaml"
    command = ["train", "--config", str(path), "--accelerate_config", str(file), "--main_process_port", "0", *options]

    def train(output_dir: Path, *further: str) -> None:
        done = processes.run("trl_sgpo.cli.main", *command, "--output_dir", str(output_dir), *further)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (states,) = (output_dir / "checkpoint-3").glob("global_step3")
        assert len([*states.glob("*_optim_states.pt")]) == 2  # a part of each rank

    return train


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_command_line(model: str, tmp_path: Path, stage: str, adapter: bool) -> None:
    """In the precision of the recipe: that of the file is bfloat16, which the CPUs of tests may lack."""
    check_run(trained(stage, recipe(model, tmp_path, adapter), "--mixed_precision", "no"), tmp_path, adapter)


@pytest.mark.parametrize("stage", STAGES)
def test_the_file_as_it_is(model: str, tmp_path: Path, stage: str) -> None:
    """In bfloat16."""
    trained(stage, recipe(model, tmp_path, False), "--bf16", "true")(tmp_path / "run")


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_packed_with_zero_2(model: str, tmp_path: Path, stage: str) -> None:
    packed, plain = load(tmp_path, 2, model, module="two_ranks_grpo", **deepspeed(stage)).values()
    assert (packed["backend"], packed["ranks"]) == ("DEEPSPEED", 2)
    assert packed["shares"] == (stage == "2") and not plain["shares"]
    close(packed["steps"], plain["steps"], rtol=1e-3, atol=1e-5)


def test_a_launcher_that_turns_deepspeed_off_is_refused(model: str, tmp_path: Path) -> None:
    statuses, told = run(tmp_path, 2, model, "group", **deepspeed("2") | {"ACCELERATE_USE_CPU": "true"})
    assert any(statuses) and "accelerate does not use it here" in told
