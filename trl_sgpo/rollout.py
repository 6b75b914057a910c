"""
Two-phase generation through TRL's own: strategies first, then every strategy of a block on every problem of the block.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): the `rollout_func` hook, `_tokenize_prompts`,
`_generate_single_turn`, `generation_config.max_new_tokens` and `vllm_generation.max_completion_length`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, StoppingCriteria, StoppingCriteriaList
from trl.data_utils import is_conversational

from .prompts import (
    ParsedStrategy,
    Prompt,
    chat_bridge,
    parse_strategy,
    plain_bridge,
    problem_text,
    strategy_prompt,
)
from .row_cache import row_cache
from .shared_prompts import within_window
from .transfer import BlockGeometry


if TYPE_CHECKING:
    from .bank import Strategy
    from .sgpo_trainer import SGPOTrainer


@dataclass(frozen=True)
class Problem:
    """
    A problem as the rollout sees it.

    Args:
        prompt (`str` or `list[dict]`):
            The dataset's prompt.
        problem_class (`str`):
            Its class, `""` if unknown.
        answer (`str` or `None`):
            Its short answer, if the dataset has one.
        retrieved (`tuple[Strategy, ...]`):
            Strategies shown with it.
    """

    prompt: Prompt
    problem_class: str = ""
    answer: str | None = None
    retrieved: tuple["Strategy", ...] = ()

    @property
    def text(self) -> str:
        return problem_text(self.prompt)


@dataclass(frozen=True)
class RolloutBatch:
    """
    What one rank generates at a time.

    Args:
        problems (`list[Problem]`):
            Problems in block order.
        geometry ([`~trl_sgpo.transfer.BlockGeometry`]):
            Shape of the blocks.
        bank (`list[list[Strategy]]`):
            Strategies each block executes as they are, at most b.
    """

    problems: list[Problem]
    geometry: BlockGeometry
    bank: list[list["Strategy"]] = field(default_factory=list)


@dataclass(frozen=True)
class Rollout:
    """
    One row: a strategy and its execution on a problem. Reward functions receive it as `rollout`.

    Args:
        source (`str`):
            `"own"` (written for this problem), `"borrowed"` (for another problem of the block) or `"bank"`.
        strategy ([`~trl_sgpo.prompts.ParsedStrategy`]):
            The strategy.
        execution (`str`):
            Text of the execution.
        execution_ids (`list[int]`):
            Its tokens.
        strategy_length (`int`):
            Trained strategy tokens at the start of the row's completion: 0 unless `source` is `"own"`.
        strategy_id (`str` or `None`):
            Bank id of the strategy, if it comes from the bank.
    """

    source: str
    strategy: ParsedStrategy
    execution: str
    execution_ids: list[int]
    strategy_length: int
    strategy_id: str | None = None


@dataclass(frozen=True)
class _Written:
    """A strategy as generated: its tokens (end token included), their log-probabilities and its parsed text."""

    ids: list[int]
    logprobs: list[float] | None
    parsed: ParsedStrategy


def two_phase_rollout(prompts: list[Prompt], trainer: "SGPOTrainer") -> dict[str, Any]:
    """
    TRL `rollout_func`: writes the strategies of `trainer.rollout_batch`, executes them and returns one row each.

    A row is the request, then strategy + turn + execution. `env_mask` leaves out the turn and, unless the strategy is
    the problem's own, the strategy, so that no token is trained twice. Counting a borrowed strategy to the prompt
    would do the same, but own and borrowed rows would then pad each other on both sides.

    Args:
        prompts (`list`):
            The rows' prompts, each problem repeated for its executions.
        trainer ([`SGPOTrainer`]):
            Trainer that generates.

    Returns:
        `dict` with `prompt_ids`, `completion_ids`, `logprobs`, `env_mask` and `rollout`, one entry a row.
    """
    batch = trainer.rollout_batch
    geometry = batch.geometry
    tokenizer = trainer.processing_class
    chat = tokenizer.chat_template is not None
    args = trainer.args

    requests = [
        strategy_prompt(
            problem.prompt,
            args.strategy_prompt,
            [(strategy.problem_class, strategy.text) for strategy in problem.retrieved],
            chat,
        )
        for problem in batch.problems
    ]
    request_ids = trainer._tokenize_prompts(requests)[0]
    is_chat = is_conversational({"prompt": requests[0]})
    bridge = (
        chat_bridge(tokenizer, args.execution_prompt, **trainer.chat_template_kwargs)
        if is_chat
        else plain_bridge(args.execution_prompt)
    )
    bridge_ids = tokenizer(bridge, add_special_tokens=False)["input_ids"]

    with merged_adapters(trainer), requests_read_once(trainer, request_ids):
        phase_one = [ids for ids in request_ids for _ in range(geometry.own)]
        generated, logprobs = generate(trainer, phase_one, args.max_strategy_length, "strategies")
        written = _read_strategies(generated, logprobs, trainer)

        # Row order is problem by problem, strategy by strategy: `transfer.outcome_matrix` relies on it
        plan = [
            (position, strategy)
            for block in range(len(batch.problems) // geometry.problems)
            for position in range(block * geometry.problems, (block + 1) * geometry.problems)
            for strategy in range(geometry.executions)
        ]
        sources = [_strategy_for(batch, written, position, strategy, tokenizer) for position, strategy in plan]
        contexts = [
            request_ids[position] + ids + _turn(ids, bridge_ids)
            for (position, _), (_, ids, _, _, _) in zip(plan, sources, strict=True)
        ]
        executions, execution_logprobs = generate(trainer, contexts, args.max_completion_length, "executions")

    executions = [ids or [tokenizer.eos_token_id] for ids in executions]
    texts = tokenizer.batch_decode(executions, skip_special_tokens=True)
    rows: dict[str, list[Any]] = {
        key: [] for key in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "rollout")
    }
    for row, ((position, _), (source, ids, strategy_logprobs, parsed, strategy_id)) in enumerate(
        zip(plan, sources, strict=True)
    ):
        execution, turn = executions[row], _turn(ids, bridge_ids)
        trained = source == "own"
        rows["prompt_ids"].append(request_ids[position])
        rows["completion_ids"].append(ids + turn + execution)
        rows["env_mask"].append([int(trained)] * len(ids) + [0] * len(turn) + [1] * len(execution))
        if execution_logprobs is not None:
            before = strategy_logprobs if trained and strategy_logprobs else [0.0] * len(ids)
            after = execution_logprobs[row] or [0.0] * len(execution)
            rows["logprobs"].append([*before, *[0.0] * len(turn), *after])
        rows["rollout"].append(
            Rollout(source, parsed, texts[row].strip(), execution, len(ids) if trained else 0, strategy_id)
        )
    return {**rows, "logprobs": None if execution_logprobs is None else rows["logprobs"]}


def _read_strategies(
    generated: list[list[int]], logprobs: list[list[float]] | None, trainer: "SGPOTrainer"
) -> list[_Written]:
    texts = trainer.processing_class.batch_decode(generated, skip_special_tokens=True)
    written = []
    for index, (ids, text) in enumerate(zip(generated, texts, strict=True)):
        truncated = not ids or ids[-1] not in trainer.eos_token_ids
        parsed = parse_strategy(text, trainer.args.strategy_format, truncated and len(ids) > 0)
        written.append(_Written(ids, None if logprobs is None else logprobs[index], parsed))
    return written


def _strategy_for(
    batch: RolloutBatch, written: list[_Written], position: int, strategy: int, tokenizer: Any
) -> tuple[str, list[int], list[float] | None, ParsedStrategy, str | None]:
    """Returns source, tokens, log-probabilities, text and bank id of a block's strategy, as seen by one problem."""
    geometry = batch.geometry
    block, local = divmod(position, geometry.problems)
    writer = geometry.writer(strategy)
    if writer is None:
        slot = strategy - geometry.written
        if slot < len(batch.bank[block]):
            entry = batch.bank[block][slot]
            ids = [*tokenizer(entry.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            return "bank", ids, None, parse_strategy(entry.text), entry.id
        strategy = slot % geometry.written
    text = written[block * geometry.written + strategy]
    return "own" if writer == local else "borrowed", text.ids, text.logprobs, text.parsed, None


def _turn(strategy_ids: list[int], bridge_ids: list[int]) -> list[int]:
    """The bridge without its first token where the strategy already ended with it."""
    return bridge_ids[1:] if strategy_ids and strategy_ids[-1] == bridge_ids[0] else bridge_ids


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
        _contiguous_head_input(trainer),
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


def contiguous_input(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """
    A forward pre-hook for LM heads. At the end of a prefill transformers hands them a strided slice of the hidden
    states, for which a CPU's `matmul` copies the whole vocabulary projection once a row: 2.7 s and 2.7 GB for 48 rows
    of SmolLM2-135M.
    """
    return (args[0].contiguous(), *args[1:])


@contextmanager
def _contiguous_head_input(trainer: "SGPOTrainer") -> Iterator[None]:
    handle = trainer.model.get_output_embeddings().register_forward_pre_hook(contiguous_input)
    try:
        yield
    finally:
        handle.remove()


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
