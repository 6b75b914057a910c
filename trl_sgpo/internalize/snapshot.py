"""A teacher that does not move with the student: a copy of the trained weights, swapped in for its forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..checks.weights import check_weight
from ..errors import ConfigError


class WeightSnapshot:
    """
    A copy of the trained weights of a model: adapters, or all weights.

    Args:
        model (`nn.Module`):
            The model. Weights without gradient are not copied.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.step = 0
        self.weights = {name: weight.detach().clone() for name, weight in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Copies the weights of now, at an optimizer step."""
        self.step = step
        for name, weight in self._trained():
            self.weights[name].copy_(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the copied weights and without dropout within the block."""
        trains = self.model.training
        self._swap()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(trains)
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._trained():
            weight.data, self.weights[name] = self.weights[name], weight.data

    def save(self, file: Path) -> None:
        """Writes the copy."""
        tensors = {name: weight.cpu().clone().contiguous() for name, weight in self.weights.items()}
        save_file(tensors, file, metadata={"step": str(self.step)})

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """
        Reads a copy.

        Raises:
            [`ConfigError`]: The file is damaged, or of another model.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                step, tensors = (
                    int(stored.metadata()["step"]),
                    {name: stored.get_tensor(name) for name in self.weights},
                )
            for name, weight in self.weights.items():
                check_weight(name, tensors[name], weight)
                weight.copy_(tensors[name])
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{file} is damaged ({error}): resume from another checkpoint.") from error
        self.step = step
