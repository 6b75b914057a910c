"""Generation with transformers that reads shared prefixes once and leaves out finished rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, StoppingCriteria, StoppingCriteriaList

from .lm_head import contiguous_head_input
from .row_cache import row_cache
from .shared_prompts import within_window


if TYPE_CHECKING:
    from ..sgpo_trainer import SGPOTrainer


def generate(
    trainer: "SGPOTrainer", prompt_ids: list[list[int]], limit: int, phase: str
) -> tuple[list[list[int]], list[list[float]] | None]:
    """
    Continues each prompt with the trainer's sampling.

    Args:
        trainer ([`SGPOTrainer`]):
            Trainer that generates.
        prompt_ids (`list[list[int]]`):
            Contexts.
        limit (`int`):
            Tokens of each completion.
        phase (`str`):
            What is shown while it goes on.

    Returns:
        `tuple`: Completions, and the log-probabilities of their tokens where the backend knows them.
    """
    with (
        max_new_tokens(trainer, limit),
        contiguous_head_input(trainer.model),
        _progress(trainer, len(prompt_ids), limit, phase),
    ):
        # One completion a prompt: vLLM's server mode would otherwise sample every num_generations-th prompt only
        return trainer._generate_single_turn(prompt_ids, None, {}, num_generations=1)


@contextmanager
def max_new_tokens(trainer: "SGPOTrainer", limit: int) -> Iterator[None]:
    """Sets the number of tokens that generation ends at."""
    if trainer.use_vllm:
        before = trainer.vllm_generation.max_completion_length
        trainer.vllm_generation.max_completion_length = limit
        try:
            yield
        finally:
            trainer.vllm_generation.max_completion_length = before
    else:
        before = trainer.generation_config.max_new_tokens
        trainer.generation_config.max_new_tokens = limit
        try:
            yield
        finally:
            trainer.generation_config.max_new_tokens = before


def left_padded(rows: list[list[int]], padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _ManyEnded(StoppingCriteria):
    """Stops all rows when a quarter of them have ended since `start`."""

    def __init__(self, ends: torch.Tensor, start: int):
        self.ends, self.start = ends, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = torch.isin(input_ids[:, self.start :], self.ends).any(dim=1)
        return (ended.float().mean() >= 0.25).expand_as(ended)


def _new_tokens(
    trainer: "SGPOTrainer",
    generate: Callable[..., torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """
    Generates in as many calls as it takes to leave out rows that have ended: within a call, each takes as much work
    until the longest ends.
    """
    limit, width = trainer.generation_config.max_new_tokens, ids.size(1)
    ends = torch.tensor(trainer.eos_token_ids, device=ids.device)
    new = torch.full((len(ids), limit), trainer.processing_class.pad_token_id, device=ids.device)
    rows, start = torch.arange(len(ids), device=ids.device), 0
    while len(rows) > 0 and start < limit:
        criteria = [_ManyEnded(ends, width + start)] if trainer.leaves_out_ended_rows else []
        with max_new_tokens(trainer, limit - start):
            output = generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                stopping_criteria=StoppingCriteriaList(criteria),
                **kwargs,
            )
        stop = output.size(1) - width
        new[rows, start:stop] = output[:, width + start :]
        going = (~torch.isin(output[:, width + start :], ends).any(dim=1)).nonzero().squeeze(1)
        cache.batch_select_indices(going)
        ids, rows = output[going], rows[going]
        mask = torch.nn.functional.pad(mask[going], (0, stop - start), value=1)
        start = stop
    return new


@contextmanager
def requests_read_once(trainer: "SGPOTrainer", requests: list[list[int]], times: int = 2) -> Iterator[None]:
    """
    Reads requests once for all that is generated within, and continues from their keys and values.

    Everything but a request's last token is read ahead: generation needs a token to start from.

    Args:
        trainer ([`SGPOTrainer`]):
            Trainer that generates.
        requests (`list[list[int]]`):
            The requests. Whatever is generated has to begin with one of them.
        times (`int`, *optional*, defaults to `2`):
            How often something is generated from them. Their keys and values are let go after that.
    """
    if not trainer.reads_requests_once:
        yield
        return
    model, padding = trainer.model, trainer.processing_class.pad_token_id
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(config.cache_implementation is not None for config in (trainer.generation_config, base.generation_config)):
        yield  # generation insists on making this kind of cache itself
        return
    heads = [list(head) for head in sorted({tuple(request[:-1]) for request in requests}, key=len, reverse=True)]
    read: Cache | None = None
    used = 0
    generate = model.generate

    def generate_after_heads(input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal read, used
        device = input_ids.device
        new_tokens = trainer.generation_config.max_new_tokens
        if not all(heads) or not within_window(base.config, len(heads[0]) + input_ids.size(1) + new_tokens):
            return generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        head_ids, head_mask = left_padded(heads, padding, device)
        if read is None:
            read = DynamicCache()
            base.get_decoder()(
                input_ids=head_ids,
                attention_mask=head_mask,
                position_ids=(head_mask.cumsum(dim=1) - 1).clamp(min=0),
                past_key_values=read,
                use_cache=True,
            )
        contexts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids.cpu(), attention_mask.cpu(), strict=True)]
        begun_by = [
            next(n for n, head in enumerate(heads) if ids[: len(head)] == head and len(ids) > len(head))
            for ids in contexts
        ]
        rests = [ids[len(heads[n]) :] for ids, n in zip(contexts, begun_by, strict=True)]
        rest_ids, rest_mask = left_padded(rests, padding, device)
        rows = torch.tensor(begun_by, device=device)
        ids = torch.cat([head_ids[rows], rest_ids], dim=1)
        mask = torch.cat([head_mask[rows], rest_mask], dim=1)
        cache = row_cache(read, rows, ids.size(1), ids.size(1) + new_tokens)
        used += 1
        if used == times:
            read = None
        new = _new_tokens(trainer, generate, ids, mask, cache, kwargs)
        return torch.cat([input_ids, new], dim=1)

    model.generate = generate_after_heads
    try:
        yield
    finally:
        del model.generate


@contextmanager
def _progress(trainer: "SGPOTrainer", rows: int, limit: int, phase: str) -> Iterator[None]:
    """Shows the tokens generated so far. vLLM has a progress line of its own."""
    if trainer.use_vllm or trainer.args.disable_tqdm or not trainer.is_world_process_zero():
        yield
        return
    when = f"step {trainer.state.global_step + 1}" if trainer.model.training else "measuring"
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    with tqdm(total=limit, desc=f"{when}: {rows} {phase}", unit="token", leave=False, mininterval=1.0) as bar:

        def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            bar.update(1)

        handle = model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def merged_adapters(trainer: "SGPOTrainer") -> Iterator[None]:
    """
    Merges LoRA adapters while generating and restores the base weights exactly.

    Subtracting the adapters again would leave rounding errors that grow with every step, so the base weights are
    copied back from host memory, where they are kept after the first use.
    """
    if not trainer.merges_adapters:
        yield
        return
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    if trainer.base_weights is None:
        trainer.base_weights = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers]
    trainer.model.merge_adapter()
    try:
        yield
    finally:
        trainer.model.unmerge_adapter()
        with torch.no_grad():
            for layer, weight in zip(layers, trainer.base_weights, strict=True):
                layer.get_base_layer().weight.copy_(weight)
