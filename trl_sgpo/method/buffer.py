"""Rollouts in checkpoints: those that are generated and that optimizer steps after it still train on."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConfigError


def rollouts_file(checkpoint: str | Path, rank: int) -> Path:
    """Path of a rank's rollouts in a checkpoint."""
    return Path(checkpoint) / f"rollouts_{rank}.safetensors"


def save_rollouts(path: Path, step: int, batches: list[dict[str, Any]]) -> None:
    """
    Writes micro-batches of rollouts.

    Args:
        path (`Path`):
            The file.
        step (`int`):
            Number of micro-batches trained so far.
        batches (`list[dict]`):
            Micro-batches of tensors or `None`. Empty if all of them are trained.
    """
    tensors = {
        f"{index}.{key}": value.detach().cpu().clone().contiguous()
        for index, batch in enumerate(batches)
        for key, value in batch.items()
        if value is not None
    }
    save_file(tensors, path, metadata={"step": str(step)})


def load_rollouts(path: Path, count: int, device: torch.device) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """
    Reads a file of [`save_rollouts`].

    Args:
        path (`Path`):
            The file.
        count (`int`):
            Micro-batches of a generation batch.
        device (`torch.device`):
            Device of the tensors.

    Returns:
        `tuple`: Number of micro-batches trained so far, and the micro-batches, none if all were trained.

    Raises:
        [`ConfigError`]: It is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
        batches: list[dict[str, torch.Tensor]] = [{} for _ in range(count)] if tensors else []
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            batches[int(index)][key] = tensor
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): resume from another checkpoint.") from error
    return step, batches
