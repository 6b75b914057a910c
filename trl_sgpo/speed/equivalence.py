"""
Start check of the fast paths: one tiny forward pass of packed rows and one from shared prefixes, against plain ones.

It detects architectures whose attention ignores or refuses the arguments of the fast paths.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .generation import left_padded, prefix_cache
from .row_cache import row_cache


# Prompts and their completions, as positions in a list of tokens
_PROBE = (([0, 1, 2, 3, 4], [[5, 6, 7], [8]]), ([9, 10, 11], [[12, 13, 14, 15], [16, 17]]))

Score = Callable[[torch.Tensor, torch.Tensor, int, bool], torch.Tensor]
"""Maps token ids and mask of rows, the width of their prompts, and whether to pack to log-probabilities `(B, T)`."""


class PathDiffers(Exception):
    """A fast path gives other values than the plain one. The message has the difference or the error."""


def _tokens(vocab_size: int, shift: int) -> list[int]:
    return [(7 + 31 * position + shift) % vocab_size for position in range(18)]


def _expect_equal(fast: torch.Tensor, plain: torch.Tensor, other: torch.Tensor, exact: bool) -> None:
    """
    Raises [`PathDiffers`] if `fast` differs from `plain` by more than rounding. `other` are the values for other
    prompts: their difference from `plain` is the scale.
    """
    difference = (fast - plain).abs().mean().item()
    effect = (other - plain).abs().mean().item()
    allowed = 1e-5 + 1e-3 * effect if exact else 1e-2 + 0.1 * effect
    if not difference <= allowed:  # also where it is NaN
        raise PathDiffers(f"log-probabilities differ by {difference:.2g} on average")


def check_packed_rows(score: Score, vocab_size: int, device: torch.device, exact: bool) -> None:
    """
    Compares the log-probabilities of packed rows with those of separate rows.

    Args:
        score (`Callable`):
            Scores rows, see [`Score`].
        vocab_size (`int`):
            Number of tokens to draw from.
        device (`torch.device`):
            Device of the model.
        exact (`bool`):
            Whether the model computes in float32, with the smaller tolerance.

    Raises:
        [`PathDiffers`]: Log-probabilities differ.
    """

    def rows(shift: int, groups: tuple) -> tuple[torch.Tensor, torch.Tensor, int]:
        tokens = _tokens(vocab_size, 0)
        prompts = [[_tokens(vocab_size, shift)[place] for place in prompt] for prompt, own in groups for _ in own]
        prompt_ids, prompt_mask = left_padded(prompts, 0, device)
        completions = [[tokens[place] for place in completion] for _, own in groups for completion in own]
        ids, mask = left_padded([completion[::-1] for completion in completions], 0, device)
        width = prompt_ids.size(1)
        return torch.cat([prompt_ids, ids.flip(1)], dim=1), torch.cat([prompt_mask, mask.flip(1)], dim=1), width

    def scored(shift: int) -> torch.Tensor:
        # A prompt at a time: without padding on the left, absolute positions are those of packed rows
        log_probs = []
        for group in _PROBE:
            ids, mask, width = rows(shift, (group,))
            log_probs.append(score(ids, mask, width, False)[mask[:, width:].bool()])
        return torch.cat(log_probs)

    ids, mask, width = rows(0, _PROBE)
    packed = score(ids, mask, width, True)[mask[:, width:].bool()]
    _expect_equal(packed, scored(0), scored(1), exact)


def check_shared_prefixes(model: PreTrainedModel, vocab_size: int, exact: bool) -> None:
    """
    Compares the next token's log-probabilities from the KV cache of prefixes with those of whole prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that generates.
        vocab_size (`int`):
            Number of tokens to draw from.
        exact (`bool`):
            Whether the model computes in float32.

    Raises:
        [`PathDiffers`]: Log-probabilities of the next token differ.
    """
    device = model.device
    tokens = _tokens(vocab_size, 0)
    prefixes = [[tokens[place] for place in prompt] for prompt, _ in _PROBE]
    rests = [[tokens[place] for place in own[0]] for _, own in _PROBE]

    def whole(shift: int) -> torch.Tensor:
        logits = []
        for (prompt, _), rest in zip(_PROBE, rests, strict=True):
            ids = [*(_tokens(vocab_size, shift)[place] for place in prompt), *rest]
            logits.append(model(input_ids=torch.tensor([ids], device=device)).logits[0, -1])
        return torch.stack(logits).float().log_softmax(dim=-1)

    prefix_ids, prefix_mask = left_padded(prefixes, 0, device)
    rest_ids, rest_mask = left_padded(rests, 0, device)
    mask = torch.cat([prefix_mask, rest_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = row_cache(
        prefix_cache(model, prefix_ids, prefix_mask),
        torch.arange(len(prefixes), device=device),
        mask.size(1),
        mask.size(1) + 1,
    )
    logits = model(
        input_ids=rest_ids,
        attention_mask=mask,
        position_ids=positions[:, -rest_ids.size(1) :],
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    _expect_equal(logits.float().log_softmax(dim=-1), whole(0), whole(1), exact)
