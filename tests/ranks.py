"""Runs a module on several ranks on CPUs, as a launcher does."""

import os
import socket
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import processes
import torch


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run(
    directory: Path, ranks: int, *arguments: str, module: str = "two_ranks", **environment: str
) -> tuple[list[int | None], str]:
    """
    Runs `main` of a module on ranks, in a directory for its files, its first argument.

    Returns:
        `tuple`: Exit statuses of the ranks, and what all of them printed. As a launcher does, one that fails ends the
        others.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    log = directory / "log.txt"
    running = []
    for rank in range(ranks):
        ours = {"ACCELERATE_USE_CPU": "true"}
        if ranks > 1:
            ours |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            ours |= {"LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with patch.dict(os.environ, ours | environment):
            running.append(processes.start(module, str(directory), *arguments, output=log, errors=log))
    ended = []
    while len(ended) < ranks:
        wait([process.sentinel for process in running if process not in ended])
        ended = [process for process in running if not process.is_alive()]
        if any(process.exitcode for process in ended):
            for process in running:
                process.kill()
    return [process.exitcode for process in running], log.read_text()


def load(directory: Path, ranks: int, *arguments: str, **options: str) -> dict[str, Any]:
    """What a run saves in its directory."""
    statuses, told = run(directory, ranks, *arguments, **options)
    assert not any(statuses), told[-6000:]
    return torch.load(directory / "result.pt", weights_only=True)
