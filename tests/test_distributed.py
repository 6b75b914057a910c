"""Two processes with one transfer block each, DDP and FSDP2, do what one process does with two."""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from models import save_tiny_model


SCRIPT = Path(__file__).parent / "two_ranks.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run(directory, *command, **environment):
    directory.mkdir(parents=True)
    environment = {
        **os.environ,
        **environment,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(SCRIPT.parent),
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=directory, timeout=300
    )


def load(done):
    """What a run saved in its directory."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    directory = done.args[done.args.index(str(SCRIPT)) + 1]
    return torch.load(Path(directory, "result.pt"), weights_only=True)


def launch(directory, model, scale_rewards, *checkpoint, **environment):
    """Two ranks. Without `--multi_gpu`, `accelerate launch` starts one process on a CPU, whatever it is asked for."""
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port())]
    script = [str(SCRIPT), str(directory), model, scale_rewards, *checkpoint]
    return run(directory, *command, *script, **environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_rank(model, tmp_path_factory):
    """What one rank does, by `scale_rewards`."""
    directory = tmp_path_factory.mktemp("one")
    return cache(lambda scale: load(run(directory / scale, str(SCRIPT), str(directory / scale), model, scale)))


@pytest.fixture(scope="module", params=["group", "batch", "fsdp2"])
def results(request, model, one_rank, tmp_path_factory):
    scale_rewards = "batch" if request.param == "batch" else "group"
    environment = FSDP if request.param == "fsdp2" else {}
    one = one_rank(scale_rewards)
    two = load(launch(tmp_path_factory.mktemp("ranks") / "two", model, scale_rewards, **environment))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    return one, two


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_resuming_goes_on_as_if_nothing_had_happened(model, tmp_path, environment):
    whole = load(launch(tmp_path / "whole", model, "group", ADAM="1", **environment))
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-2")
    resumed = load(launch(tmp_path / "resumed", model, "group", checkpoint, ADAM="1", **environment))
    for name, step in whole["steps"].items():
        torch.testing.assert_close(resumed["steps"][name], step, rtol=1e-4, atol=1e-6)
    assert max(step.abs().max() for step in whole["steps"].values()) > 1e-3
    assert resumed["bank"] == whole["bank"] and resumed["written"] == whole["written"]
    assert {row["step"] for row in resumed["rows"]} == {2}


def test_sharded_checkpoints_are_refused(model, tmp_path):
    """They would hold neither a model that others can load nor the bank."""
    done = launch(tmp_path / "two", model, "group", **{**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
    assert done.returncode == 1
    assert "set `fsdp_state_dict_type: FULL_STATE_DICT`" in done.stderr


def in_order(rows):
    return sorted(rows, key=lambda row: (row["step"], row["prompt"], row["source"], row["strategy"]))


def test_advantages(results):
    """Each row has the same advantages, token by token."""
    one, two = (in_order(result["rows"]) for result in results)
    assert len(one) == len(two) == 48
    for mine, theirs in zip(one, two, strict=True):
        assert {**mine, "advantages": None} == {**theirs, "advantages": None}
        assert mine["advantages"] == pytest.approx(theirs["advantages"], abs=1e-5)
    assert max(max(map(abs, row["advantages"])) for row in one) > 0.1
    assert any(row["retrieved"] for row in one)


def test_gradients(results):
    """After steps of plain gradient descent all parameters have moved alike."""
    one, two = (result["steps"] for result in results)
    assert max(step.abs().max() for step in one.values()) > 1e-3
    for name, step in one.items():
        torch.testing.assert_close(
            two[name], step, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_generation(results):
    """The model writes the same, gathered layer by layer or whole."""
    one, two = (result["written"] for result in results)
    assert one == two
    assert len(set(map(tuple, one))) == 4 and all(one)


def test_bank(results):
    """The bank holds the same strategies with the same counts."""
    one, two = (result["bank"] for result in results)
    assert one == two
    assert len(one) > 1


def test_metrics(results):
    """What is logged is a mean over all ranks."""
    one, two = ([logs for logs in result["logs"] if "loss" in logs] for result in results)
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        names = {name for name in mine if name.startswith(("sgpo/", "reward")) or name == "grad_norm"}
        assert names == {name for name in theirs if name.startswith(("sgpo/", "reward")) or name == "grad_norm"}
        for name in names - {"sgpo/distinct_strategies"}:
            assert theirs[name] == pytest.approx(mine[name], abs=1e-3), name


def test_checkpoint_has_a_file_of_rollouts_for_each_rank(results):
    one, two = (result["checkpoint"] for result in results)
    assert {"rollouts_0.safetensors", "strategy_bank"} <= set(one)
    assert {"rollouts_0.safetensors", "rollouts_1.safetensors", "strategy_bank"} <= set(two)
