"""Two speedups of the LM head on CPUs, as context managers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import trl.trainer.utils

from .patches import CountedPatch


def _set_use_triton(function: Any) -> None:
    trl.trainer.utils._use_triton = function


_labelled_only = CountedPatch(lambda: trl.trainer.utils._use_triton, _set_use_triton, lambda device: True)


@contextmanager
def project_labelled_tokens_only(device: torch.device) -> Iterator[None]:
    """
    Leaves tokens without a label out of the vocabulary projection on CPUs.

    Without Triton, TRL 1.16 projects prompt tokens too, which takes most of a training step on a CPU. The TRL path
    without them does not need Triton, but TRL uses it only with Triton, for devices that compile a program a shape.

    Args:
        device (`torch.device`):
            Device of the model. On any other than a CPU nothing changes.
    """
    with _labelled_only if device.type == "cpu" else nullcontext():
        yield


def _contiguous(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """
    Passes contiguous hidden states to the LM head of `model`.

    At the end of a prefill transformers passes a strided slice, for which a CPU's `matmul` copies the whole
    vocabulary projection once a row: 2.7 s and 2.7 GB for 48 rows of SmolLM2-135M.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        handle.remove()
