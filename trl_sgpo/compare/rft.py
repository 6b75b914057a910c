"""Rejection sampling: a model's own right plain answers, as worked solutions to imitate (RFT, arXiv 2308.01825)."""

from dataclasses import replace
from typing import Any

from ..data.worked import Trace
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.verifier import Verifier, verify
from .rlhf import check_sampling


def right_answers(
    model: TwoPhaseModel, rows: list[dict[str, Any]], verifier: Verifier, max_tokens: int, decoding: Decoding
) -> list[Trace]:
    """
    Samples plain answers to all problems in turn, and keeps the right ones.

    Args:
        model ([`TwoPhaseModel`]):
            Model that answers.
        rows (`list[dict]`):
            Problems, of equal columns.
        verifier (`Callable`):
            Reward function that checks answers.
        max_tokens (`int`):
            Tokens that may be generated.
        decoding ([`Decoding`]):
            How to sample.

    Returns:
        `list[Trace]`: An answer each, whole in `execution`.
    """
    check_sampling(decoding)
    end, seed = model.generated_tokens + max_tokens, decoding.seed
    found: list[Trace] = []
    position = 0
    while True:
        affordable = max(0, end - model.generated_tokens) // model.settings.max_completion_length
        count = min(affordable, model.batch_size)
        if count == 0:
            return found
        asked = [rows[(position + place) % len(rows)] for place in range(count)]
        position += count
        texts = model.answer([row["prompt"] for row in asked], replace(decoding, seed=seed))
        seed += 1
        outcomes = verify(verifier, asked, texts)
        found += [
            Trace(row["prompt"], "", text.strip(), "")
            for row, text, outcome in zip(asked, texts, outcomes, strict=True)
            if outcome > 0.5
        ]
