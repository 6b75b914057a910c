"""Generation with adapters that learn a prompt: rows continue from the KV cache of its virtual tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import Cache, DynamicCache, PreTrainedModel


LEARNED_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING, PeftType.P_TUNING)
"""Adapters that [`learned_prompt`] knows."""


def is_prompt_learning(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model has an adapter that learns a prompt, which cannot be merged: prompt, prefix or P-tuning."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def _prompt_cache(model: PeftModel, rows: int) -> Cache:
    prompt = model.get_prompt(batch_size=rows)
    if isinstance(prompt, Cache):
        return prompt
    base, cache = model.get_base_model(), DynamicCache()
    base.get_decoder()(inputs_embeds=prompt.to(base.dtype), past_key_values=cache, use_cache=True)
    return cache


@contextmanager
def learned_prompt(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Makes `model.generate` put the learned prompt before each row. Other models stay as they are.

    PEFT 0.21 looks for the KV cache under a name that transformers 5.23 does not use: it would generate without a
    learned prefix, and after other learned prompts it would forget all but the last token of a row.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that generates.
    """
    if not is_prompt_learning(model):
        yield
        return

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        virtual = model.active_peft_config.num_virtual_tokens
        with torch.no_grad():
            cache = _prompt_cache(model, len(input_ids))
        # A token of the row stands for the virtual ones, because settings such as a repetition penalty read it
        ids = torch.cat([input_ids[:, -1:].expand(-1, virtual), input_ids], dim=1)
        mask = torch.nn.functional.pad(attention_mask, (virtual, 0), value=1)
        base = model.get_base_model()
        return base.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **kwargs)[:, virtual:]

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
