"""Two processes with one transfer block each do what one process does with two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny_model


SCRIPT = Path(__file__).parent / "two_ranks.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run(directory, *command):
    directory.mkdir(parents=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(SCRIPT.parent),
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=directory, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return torch.load(directory / "result.pt", weights_only=True)


@pytest.fixture(scope="module", params=["group", "batch"])
def results(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    model = save_tiny_model(directory / "model")
    one = run(directory / "one", str(SCRIPT), str(directory / "one"), model, request.param)
    # Without `--multi_gpu`, `accelerate launch` starts one process on a CPU, whatever it is asked for
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(free_port())]
    two = run(directory / "two", *launch, str(SCRIPT), str(directory / "two"), model, request.param)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    return one, two


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
