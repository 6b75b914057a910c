"""Log-probabilities of sampled tokens, as the model gives them while it generates, and how far training's differ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .merging import base_of


SAMPLER_KL = "sgpo/sampler_kl"
"""Metric of [`sampler_kl`]."""

SAMPLER_KL_LIMIT = 0.01
"""Above the metric of rounding in bfloat16, and below that of adapters that are merged wrongly (docs/design.md)."""


class SampledLogProbs(StoppingCriteria):
    """
    Log-probabilities of the tokens that `generate` chooses, from the logits that it chooses by: with the same cache,
    adapters and positions. Settings of `generate` other than the temperature do not count, nor do they in training.

    Args:
        temperature (`float`):
            Temperature of the sampling.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.rows: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def only(self, rows: torch.Tensor) -> None:
        """Says which of the rows the next calls of `generate` continue."""
        self.rows = rows

    def note_logits(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        self._logits = output.logits[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert self._logits is not None
        rows = torch.arange(len(input_ids), device=input_ids.device) if self.rows is None else self.rows
        logits = self._logits.float() / self.temperature
        chosen = logits.gather(1, input_ids[:, -1:].to(logits.device)) - logits.logsumexp(dim=1, keepdim=True)
        self._steps.append((rows, chosen.squeeze(1)))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def of(self, completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """
        Log-probabilities of all tokens.

        Args:
            completions (`Sequence[Sequence[int]]`):
                What was generated, which may be cut.
        """
        found = torch.full((len(completions), len(self._steps)), torch.nan)
        for step, (rows, values) in enumerate(self._steps):
            found[rows.cpu(), step] = values.cpu()
        return [row[: len(ids)].tolist() for row, ids in zip(found, completions, strict=True)]


@contextmanager
def sampled_log_probs(model: PreTrainedModel | PeftModel, temperature: float) -> Iterator[SampledLogProbs]:
    """
    Records the log-probabilities of one call of `model.generate`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that generates.
        temperature (`float`):
            Temperature of the sampling.
    """
    sampled = SampledLogProbs(temperature)
    before = vars(model).get("generate")
    model.generate = partial(model.generate, stopping_criteria=StoppingCriteriaList([sampled]))
    handle = base_of(model).register_forward_hook(sampled.note_logits)
    try:
        yield sampled
    finally:
        handle.remove()
        del model.generate
        if before is not None:
            model.generate = before


def sampler_kl(sampled: torch.Tensor, trained: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    KL divergence of the policy that sampled from the policy that is trained, by the estimator k3 of
    [Schulman](http://joschu.net/blog/kl-approx.html), which is not negative for any token.

    Args:
        sampled (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens when they were sampled, NaN where they are unknown.
        trained (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities that training gives the same tokens.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for tokens that are trained.

    Returns:
        `torch.Tensor` of shape `(2,)`: Sum over the tokens, and their number.
    """
    known = mask.bool() & ~sampled.isnan()
    ratio = torch.where(known, trained - sampled, 0.0).double()  # in 32 bits, small values would be rounding only
    return torch.stack([(ratio.expm1() - ratio).clamp(min=0).sum(), known.sum()])
