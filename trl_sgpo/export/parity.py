"""Differences between the logits of two models, on problems in two phases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..inference.settings import TwoPhaseSettings
from ..method.prompts import Prompt


# Problem, strategy, execution
_PROBES = (
    (
        "What is 17 + 26 - 9?",
        "Work from left to right: take the first two numbers together, then each further one.",
        "17 + 26 = 43. 43 - 9 = 34.\n#### 34",
    ),
    (
        "Tom has 3 bags with 12 apples each and gives 7 apples away. How many apples has he left?",
        "1. Find the total of equal groups by multiplying.\n2. Subtract what is given away.",
        "The bags hold 3 * 12 = 36 apples. After giving 7 away he has 36 - 7 = 29.\n#### 29",
    ),
    (
        "Find the greatest common divisor of 84 and 36.",
        "Divide the larger number by the smaller one and go on with the remainder until it is 0.",
        "84 = 2 * 36 + 12. 36 = 3 * 12 + 0. The last divisor is 12.\n#### 12",
    ),
    (
        "A train travels 150 km in 2.5 hours. What is its average speed in km/h?",
        "Speed is distance divided by time; keep the units of the question.",
        "150 / 2.5 = 60, so the train's speed is 60 km/h.\n#### 60",
    ),
)
_POSITIONS = 48  # of each probe, because the logits of a large vocabulary take memory


@dataclass(frozen=True)
class Parity:
    """
    How far logits are from those of a reference.

    Args:
        error (`float`):
            Root mean square of the difference, relative to that of the reference. Both are centred at each position,
            since a constant changes no probability.
        kl (`float`):
            Mean divergence from the reference's probabilities, in nats a token.
        top1 (`float`):
            Share of positions at which both have the same likeliest token.
    """

    error: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return f"error {self.error:.2g}, KL {max(self.kl, 0.0):.2g} nats a token, same likeliest token {self.top1:.1%}"


def probes(tokenizer: Any, settings: TwoPhaseSettings) -> list[list[int]]:
    """
    A few problems with strategy and execution, as the model reads them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        settings ([`TwoPhaseSettings`]):
            Prompts of the model.

    Returns:
        `list[list[int]]`: Tokens of each.
    """
    conversation = settings.conversation(tokenizer)
    sequences = []
    for problem, strategy, execution in _PROBES:
        prompt: Prompt = [{"role": "user", "content": problem}]
        context = conversation.execution_request(prompt, [], strategy)
        sequences.append([*context, *conversation.content(prompt, execution)])
    return sequences


@torch.inference_mode()
def logits_on(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Logits at evenly spaced positions of each sequence, centred.

    Returns:
        `torch.Tensor`: Of shape (positions, vocabulary), in float32.
    """
    rows = []
    for sequence in sequences:
        kept = torch.linspace(0, len(sequence) - 1, min(_POSITIONS, len(sequence))).round().long()
        ids = torch.tensor([list(sequence)], device=model.device)
        rows.append(model(input_ids=ids, use_cache=False).logits[0, kept].float().cpu())
    logits = torch.cat(rows)
    return logits - logits.mean(dim=-1, keepdim=True)


def compare(reference: torch.Tensor, other: torch.Tensor) -> Parity:
    """
    Compares logits of [`logits_on`].

    Args:
        reference (`torch.Tensor`):
            Logits that are right.
        other (`torch.Tensor`):
            Logits at the same positions. Where one model has padded its vocabulary, only what both have is compared.
    """
    width = min(reference.size(-1), other.size(-1))
    reference, other = reference[:, :width], other[:, :width]
    if not torch.isfinite(other).all():
        return Parity(math.inf, math.inf, 0.0)
    error = (other - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    log_p, log_q = reference.log_softmax(dim=-1), other.log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    top1 = (reference.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()
    return Parity(error.item(), kl.item(), top1.item())
