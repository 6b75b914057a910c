"""
Forward KL from a model that was shown a strategy to the same model without one, token by token (arXiv 2606.24064).

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): `ChunkedDivergenceFunction`, which reads hidden
states and LM head, so that no logits of a whole vocabulary are in memory.
"""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction


PIECE = 512  # tokens
PIECE_BYTES = PIECE * VOCAB_CHUNK_SIZE * 2 * 4  # TRL's tiles of both models' logits
MAX_TOKEN_DIVERGENCE = 1.0
"""Nats of a token, above which it has no gradient: style tokens would outweigh all others."""


def logit_scaling(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Factor of a model's logits, and the limit that it bends them to, `None` if there is none."""
    settings = vars(config.get_text_config())
    scale = next(
        (settings[key] for key in ("logit_scale", "output_multiplier", "lm_head_multiplier") if settings.get(key)), 1.0
    )
    if divisor := settings.get("logits_scaling"):
        scale = divisor if settings.get("model_type") == "hyperclovax" else 1 / divisor
    return scale, settings.get("final_logit_softcapping")


def hidden_states(
    model: Any, base: PreTrainedModel, prompts: list[torch.Tensor], answers: list[torch.Tensor]
) -> torch.Tensor:
    """
    Hidden states that predict the tokens of answers.

    Args:
        model (`Callable`):
            The model as it is wrapped for training, which shards or counts its gradients.
        base ([`~transformers.PreTrainedModel`]):
            The model within.
        prompts (`list[torch.Tensor]` of length B), answers (`list[torch.Tensor]` of length B):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(tokens of all answers, hidden size)`: Row by row, without padding.
    """
    rows = [torch.cat(row) for row in zip(prompts, answers, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    kept: list[torch.Tensor] = []
    handle = base.get_decoder().register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state))
    try:
        mask = (torch.arange(ids.size(1), device=ids.device) < lengths.unsqueeze(1)).long()
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    hidden = kept[-1][:, -ids.size(1) :]  # without tokens that an adapter has learned
    return torch.cat(
        [
            row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            for row, prompt, answer in zip(hidden, prompts, answers, strict=True)
        ]
    )


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: torch.nn.Module,
    teacher_weight: torch.Tensor,
    scaling: tuple[float, float | None],
    temperature: float,
) -> torch.Tensor:
    """
    KL(teacher ‖ student) of each token, at most [`MAX_TOKEN_DIVERGENCE`], with gradient for the student.

    Args:
        student (`torch.Tensor` of shape `(N, hidden size)`), teacher (`torch.Tensor` of shape `(N, hidden size)`):
            Hidden states.
        head (`nn.Module`):
            LM head of the student.
        teacher_weight (`torch.Tensor` of shape `(vocabulary size, hidden size)`):
            Weights of the teacher's LM head.
        scaling (`tuple`):
            What [`logit_scaling`] returns.
        temperature (`float`):
            Temperature of both distributions.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    weight, bias = head.weight, head.bias
    pieces = [
        ChunkedDivergenceFunction.apply(
            part, weight, bias, shown, teacher_weight, bias, 0.0, temperature, *scaling, *scaling
        )[0]
        for part, shown in zip(student.split(PIECE), teacher.split(PIECE), strict=True)
    ]
    return torch.cat(pieces).clamp(max=MAX_TOKEN_DIVERGENCE)
