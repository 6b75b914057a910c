"""Weights in a checkpoint, which somebody else may have written."""

import torch


def check_weight(name: str, stored: torch.Tensor, weight: torch.Tensor) -> None:
    """
    Checks a weight of a checkpoint.

    Raises:
        `ValueError`: It has another shape, or is no number.
    """
    if stored.shape != weight.shape:
        raise ValueError(f"`{name}` has the shape {tuple(stored.shape)}, not {tuple(weight.shape)}")
    if not torch.isfinite(stored).all():
        raise ValueError(f"`{name}` is not finite")
