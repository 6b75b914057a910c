"""Rollouts in checkpoints: those that are generated and that optimizer steps after it still train on."""

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..checks.json_text import parse_json
from ..errors import ConfigError
from ..sgpo_config import SGPOConfig


logger = logging.get_logger(__name__)

_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
    "num_generations", "transfer_block_size", "num_bank_rollouts", "num_plain_rollouts", "world_size", "beta",
    "temperature", "use_vllm", "internalize",
)  # fmt: skip
"""Settings that say which micro-batches a generation has, which step trains on them, and what they hold."""


def _file(checkpoint: str | Path, args: SGPOConfig) -> Path:
    return Path(checkpoint) / f"rollouts_{args.process_index}.safetensors"


def _settings(args: SGPOConfig) -> dict[str, Any]:
    return dict(zip(_SETTINGS, attrgetter(*_SETTINGS)(args), strict=True))


def save_rollouts(checkpoint: str | Path, args: SGPOConfig, step: int, batches: list[dict[str, Any]] | None) -> None:
    """
    Writes a rank's micro-batches of rollouts into a checkpoint, unless all of them are trained.

    Args:
        checkpoint (`str` or `Path`):
            Directory of the checkpoint.
        args ([`SGPOConfig`]):
            Configuration of the run.
        step (`int`):
            Number of micro-batches trained so far.
        batches (`list[dict]`, *optional*):
            Micro-batches of tensors or `None`.
    """
    all_trained = step % (args.steps_per_generation * args.num_iterations) == 0
    tensors = {
        f"{index}.{key}": value.detach().cpu().clone().contiguous()
        for index, batch in enumerate([] if all_trained or batches is None else batches)
        for key, value in batch.items()
        if value is not None
    }
    metadata = {"step": str(step), "settings": json.dumps(_settings(args))}
    save_file(tensors, _file(checkpoint, args), metadata=metadata)


_ROWS = ("prompt", "completion")


def _check_batch(batch: dict[str, torch.Tensor]) -> None:
    """Raises a `ValueError` if a micro-batch is not one that can be trained on: the file may be of somebody else."""
    kinds = [*_ROWS, *sorted({key.removesuffix("_ids") for key in batch if key.endswith("_ids")} - {*_ROWS})]
    rows = len(batch["prompt_ids"])
    for kind in kinds:
        ids, mask = batch[f"{kind}_ids"], batch.get(f"{kind}_mask")
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"`{kind}_ids` are no rows of tokens")
        if mask is not None and (mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"`{kind}_mask` is no mask of `{kind}_ids`")
    if missing := [f"{kind}_mask" for kind in _ROWS if f"{kind}_mask" not in batch]:
        raise KeyError(missing[0])
    completions = batch["completion_ids"].shape
    if batch["advantages"].shape not in (completions[:1], completions):
        raise ValueError("`advantages` has neither a number for each row nor one for each token")
    if others := [key for key, value in batch.items() if key.endswith("_logps") and value.shape != completions]:
        raise ValueError(f"`{others[0]}` has no number for each token")
    for key, value in batch.items():
        if value.dim() > 0 and len(value) != rows:
            raise ValueError(f"`{key}` has {len(value)} rows, not {rows}")


def load_rollouts(
    checkpoint: str | Path, args: SGPOConfig, device: torch.device
) -> tuple[int, list[dict[str, torch.Tensor]] | None]:
    """
    Reads a rank's rollouts from a checkpoint.

    Args:
        checkpoint (`str` or `Path`):
            Directory of the checkpoint.
        args ([`SGPOConfig`]):
            Configuration of the run that goes on.
        device (`torch.device`):
            Device of the tensors.

    Returns:
        `tuple`: Number of micro-batches trained so far, and the micro-batches, `None` if all were trained. `0` and
        `None` if generation starts anew: there are no rollouts, or they were generated with other settings.

    Raises:
        [`ConfigError`]: The file is damaged.
    """
    path, settings = _file(checkpoint, args), _settings(args)
    if not path.exists():
        return 0, None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            step, saved = int(metadata["step"]), parse_json(metadata.get("settings", "{}"))
            changed = [name for name in saved if saved[name] != settings[name]]
            keys = [] if changed else list(file.keys())
            tensors = {key: file.get_tensor(key).to(device) for key in keys}
        batches: list[dict[str, torch.Tensor]] = [{} for _ in range(args.steps_per_generation)]
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            batches[int(index)][key] = tensor
        for batch in batches if tensors else ():
            _check_batch(batch)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): resume from another checkpoint.") from error
    if not changed:
        return step, batches if tensors else None
    if args.process_index == 0:
        differences = ", ".join(f"`{name}` {saved[name]}, now {settings[name]}" for name in changed)
        logger.warning(f"Rollouts of {checkpoint} are not used, and generation starts anew: {differences}.")
    return 0, None
