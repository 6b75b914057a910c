"""
Faster generation with transformers, as a context manager around calls of `model.generate`: rows with a common prefix
continue from one KV cache and are read in parts, and finished rows leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .generation_settings import COUNTED, active, needs_whole_prompts
from .merging import base_of
from .row_cache import RowCache
from .sampling import SampledLogProbs
from .shared_prompts import within_window


READ_TOKENS = 2048
"""
Tokens of contexts that are read at a time. In the shipped recipes their activations take less memory than the keys and
values of what is generated afterwards.
"""


def left_padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of different lengths, both of shape `(B, longest)`."""
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _ManyFinished(StoppingCriteria):
    """Stops all rows when a quarter of them have finished since column `start`."""

    def __init__(self, ends: torch.Tensor, start: int):
        self.ends, self.start = ends, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        finished = torch.isin(input_ids[:, self.start :], self.ends).any(dim=1)
        return (finished.float().mean() >= 0.25).expand_as(finished)


@contextmanager
def limited(generation_config: GenerationConfig, max_new_tokens: int) -> Iterator[None]:
    """Sets `max_new_tokens` of a generation configuration."""
    before = generation_config.max_new_tokens
    generation_config.max_new_tokens = max_new_tokens
    try:
        yield
    finally:
        generation_config.max_new_tokens = before


def prefix_cache(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Cache:
    """KV cache of left-padded prefixes of shape `(N, length)`."""
    cache = DynamicCache()
    model.get_decoder()(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def rows_at_a_time(tokens: int) -> int:
    """Number of rows that are read at a time, of which each has this many tokens."""
    return max(1, READ_TOKENS // max(tokens, 1))


def read_contexts(model: PreTrainedModel, cache: RowCache, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """
    Adds all but the last token of left-padded contexts to a KV cache that holds their beginnings. Rows are read in
    parts, because all at once would take gigabytes of activations.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that generates.
        cache ([`~trl_sgpo.speed.row_cache.RowCache`]):
            KV cache of the rows.
        ids (`torch.Tensor` of shape `(B, length)`), mask (`torch.Tensor` of shape `(B, length)`):
            The contexts and their attention mask.
    """
    start, stop = cache.get_seq_length(), ids.size(1) - 1
    if stop == start:
        return
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for rows, part in cache.parts(rows_at_a_time(stop - start), stop - start):
        model.get_decoder()(
            input_ids=ids[rows, start:stop],
            attention_mask=mask[rows, :stop],
            position_ids=positions[rows, start:stop],
            past_key_values=part,
            use_cache=True,
        )


class _PrefixGenerate:
    """Replaces `model.generate`, see [`shared_prefixes`]."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        generation_config: GenerationConfig,
        prompts: Sequence[Sequence[int]],
        calls: int,
        drop_finished: bool,
    ):
        self.base = base_of(model)
        self.generate: Callable[..., torch.Tensor] = model.generate
        self.config = generation_config
        # Everything but a prompt's last token, because generation needs a token to start from
        prefixes = {tuple(prompt[:-1]) for prompt in prompts}
        self.prefixes = [list(prefix) for prefix in sorted(prefixes, key=len, reverse=True)]
        self.calls_left = calls
        self.drop_finished = drop_finished
        self.cache: Cache | None = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        stopping_criteria: Sequence[SampledLogProbs] = (),
        **kwargs: Any,
    ) -> torch.Tensor:
        device, config, prefixes = input_ids.device, self.config, self.prefixes
        longest = len(prefixes[0]) + input_ids.size(1) + config.max_new_tokens
        if not all(prefixes) or not within_window(self.base.config, longest):
            return self.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                stopping_criteria=StoppingCriteriaList(stopping_criteria),
                **kwargs,
            )
        prefix_ids, prefix_mask = left_padded(prefixes, config.pad_token_id, device)
        if self.cache is None:
            self.cache = prefix_cache(self.base, prefix_ids, prefix_mask)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids.cpu(), attention_mask.cpu(), strict=True)]
        prefix_of = [
            next(n for n, prefix in enumerate(prefixes) if ids[: len(prefix)] == prefix and len(ids) > len(prefix))
            for ids in prompts
        ]
        rests = [ids[len(prefixes[n]) :] for ids, n in zip(prompts, prefix_of, strict=True)]
        rest_ids, rest_mask = left_padded(rests, config.pad_token_id, device)
        # A repetition penalty reads padding within a row, where it must be a token that the row has anyway
        rest_ids = torch.where(rest_mask == 0, rest_ids[:, -1:], rest_ids)
        rows = torch.tensor(prefix_of, device=device)
        ids = torch.cat([prefix_ids[rows], rest_ids], dim=1)
        mask = torch.cat([prefix_mask[rows], rest_mask], dim=1)
        cache = RowCache(self.cache, rows, ids.size(1), ids.size(1) + config.max_new_tokens)
        self.calls_left -= 1
        if self.calls_left == 0:
            self.cache = None
        read_contexts(self.base, cache, ids, mask)
        return torch.cat([input_ids, self._new_tokens(ids, mask, cache, stopping_criteria, kwargs)], dim=1)

    def _new_tokens(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
        sampled: Sequence[SampledLogProbs],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """
        Generates in several calls, between which finished rows leave the batch: within a call, every row costs the
        same until the longest one finishes.
        """
        limit, width = self.config.max_new_tokens, ids.size(1)
        ends = torch.tensor(self.config.eos_token_id, device=ids.device)
        new = torch.full((len(ids), limit), self.config.pad_token_id, device=ids.device)
        rows, start = torch.arange(len(ids), device=ids.device), 0
        while len(rows) > 0 and start < limit:
            criteria = [_ManyFinished(ends, width + start)] if self.drop_finished else []
            for criterion in sampled:
                criterion.only(rows)
            with limited(self.config, limit - start):
                output = self.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    stopping_criteria=StoppingCriteriaList([*sampled, *criteria]),
                    **kwargs,
                )
            stop = output.size(1) - width
            new[rows, start:stop] = output[:, width + start :]
            going = (~torch.isin(output[:, width + start :], ends).any(dim=1)).nonzero().squeeze(1)
            cache.batch_select_indices(going)
            ids, rows = output[going], rows[going]
            mask = torch.nn.functional.pad(mask[going], (0, stop - start), value=1)
            start = stop
            if not self.drop_finished:
                break
        return new[:, :start]


@contextmanager
def shared_prefixes(
    model: PreTrainedModel | PeftModel,
    generation_config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    calls: int = 1,
    drop_finished: bool = True,
) -> Iterator[None]:
    """
    Makes `model.generate` compute the KV cache of each prompt once and continue all rows of the prompt from it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that generates.
        generation_config ([`~transformers.GenerationConfig`]):
            Configuration that `generate` is called with.
        prompts (`Sequence[Sequence[int]]`):
            Token ids of the prompts. All rows that are generated within the block begin with one of them.
        calls (`int`, *optional*, defaults to `1`):
            Number of calls of `generate`. The KV cache of the prompts is freed during the last one.
        drop_finished (`bool`, *optional*, defaults to `True`):
            Whether finished rows leave the batch.
    """
    configs = (generation_config, base_of(model).generation_config)
    if needs_whole_prompts(*configs):
        yield
        return
    drop_finished = drop_finished and not active(COUNTED, *configs)
    before = vars(model).get("generate")
    model.generate = _PrefixGenerate(model, generation_config, prompts, calls, drop_finished)
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before


@contextmanager
def token_progress(model: PreTrainedModel | PeftModel, limit: int, description: str) -> Iterator[None]:
    """Shows a progress bar of the tokens generated for each row, at most `limit`."""
    with tqdm(total=limit, desc=description, unit="token", leave=False, mininterval=1.0) as bar:

        def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            bar.update(1)

        handle = base_of(model).register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()
