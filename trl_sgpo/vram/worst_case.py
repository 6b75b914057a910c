"""
One step at its largest, before the first real one, so that a run that will not fit says so in the first minute.

What this file relies on in TRL 1.16: `_tokenize_prompts` and `_get_per_token_logps_and_entropies`.
"""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from ..errors import ModelError
from ..method.prompts import Prompt, problem_text, strategy_prompt
from ..method.transfer import BlockGeometry
from ..speed.shared_prompts import packed_attention
from ..speed.trainer import SharedPromptGRPOTrainer


logger = transformers.utils.logging.get_logger(__name__)

_CANDIDATES = 16  # longest problems by characters, of which the longest by tokens are taken


def longest_requests(prompts: list[Prompt], count: int, tokenize: Any, args: Any, chat: bool) -> list[list[int]]:
    """
    Requests for a strategy at their longest.

    Args:
        prompts (`list`):
            Problems.
        count (`int`):
            Number of requests wanted, of different problems where there are as many.
        tokenize (`Callable`):
            Turns prompts into lists of token ids.
        args ([`SGPOConfig`]):
            Says how a strategy is asked for and how many are shown.
        chat (`bool`):
            Whether the tokenizer has a chat template.

    Returns:
        `list[list[int]]`: Token ids, longest first.
    """
    longest = sorted(prompts, key=lambda prompt: len(problem_text(prompt)), reverse=True)[: max(count, _CANDIDATES)]
    shown = [("", "step " * args.max_strategy_length)] * (args.num_retrieved if args.use_bank else 0)
    requests = tokenize([strategy_prompt(prompt, args.strategy_prompt, shown, chat) for prompt in longest])
    requests = sorted(requests, key=len, reverse=True)
    return [requests[index % len(requests)] for index in range(count)]


def take_worst_case_step(trainer: SharedPromptGRPOTrainer, geometry: BlockGeometry, peaks: dict[str, int]) -> None:
    """
    Lets the optimizer allocate its states, generates both phases at full length from the longest problems, and goes
    forward and backward once. Weights, optimizer, random state, bank and metrics are as before.

    Args:
        trainer ([`SGPOTrainer`]):
            Trainer that is about to start.
        geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
            Shape of its transfer blocks.
        peaks (`dict[str, int]`):
            Gets the most bytes that PyTorch had allocated on a GPU during `"optimizing"`, `"generating"` and
            `"training"`, as far as it came, and `"reserved"`, the most it had taken from the GPU.

    Raises:
        [`ModelError`]: Memory is not enough. Names what to change.
    """
    device = trainer.accelerator.device
    on_gpu = device.type == "cuda"
    doing = ""

    def note_peak() -> None:
        if on_gpu:
            peaks[doing] = torch.cuda.max_memory_allocated(device)
            peaks["reserved"] = max(peaks.get("reserved", 0), torch.cuda.max_memory_reserved(device))
            torch.cuda.reset_peak_memory_stats(device)

    with _nothing_kept(trainer):
        try:
            trainer.model.train()  # as loaded, layers are in evaluation mode, in which they keep all activations
            doing = "optimizing"
            _allocate_optimizer(trainer)
            note_peak()
            doing = "generating"
            requests, completion = _generate_at_full_length(trainer, geometry)
            note_peak()
            doing = "training"
            _train_at_full_length(trainer, geometry, requests[0], completion)
            note_peak()
        except (torch.OutOfMemoryError, MemoryError) as error:
            note_peak()
            raise ModelError(_advice(doing, trainer.args, error)) from error
    if on_gpu:
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        taken = peaks["reserved"] / 2**30
        logger.warning(f"The worst-case step fits: {taken:.2f} GB of {whole:.2f} GB, without the CUDA context.")


def _generate_at_full_length(
    trainer: SharedPromptGRPOTrainer, geometry: BlockGeometry
) -> tuple[list[list[int]], list[int]]:
    """Returns the requests, longest first, and a completion."""
    args, tokenizer = trainer.args, trainer.processing_class
    rows = args.per_device_train_batch_size * args.steps_per_generation
    problems = rows // geometry.executions
    requests = longest_requests(
        trainer.train_dataset["prompt"],
        problems,
        lambda prompts: trainer._tokenize_prompts(prompts)[0],
        args,
        tokenizer.chat_template is not None,
    )
    turn = tokenizer(args.execution_prompt, add_special_tokens=False)["input_ids"]
    turn = turn + turn[-1:] * 16  # the marks of a chat template
    with trainer.fast_generation(requests, calls=2), _never_ending(trainer):
        own = [request for request in requests for _ in range(geometry.own)]
        written = trainer.generate(own, args.max_strategy_length, "strategies at their longest")[0]
        begun = [request for request in requests for _ in range(geometry.executions)]
        contexts = [request + written[row % len(written)] + turn for row, request in enumerate(begun)]
        executed = trainer.generate(contexts, args.max_completion_length, "executions at their longest")[0]
    return requests, written[0] + turn + executed[0]


def _train_at_full_length(
    trainer: SharedPromptGRPOTrainer, geometry: BlockGeometry, request: list[int], completion: list[int]
) -> None:
    args, device = trainer.args, trainer.accelerator.device
    rows = args.per_device_train_batch_size
    problems = [row // geometry.executions for row in range(rows)]
    # Turned, so that the problems of a micro-batch differ and are equally long
    ids = torch.tensor([request[by:] + request[:by] + completion for by in problems], device=device)
    mask = torch.ones_like(ids)
    with packed_attention(), trainer.accelerator.no_sync(trainer.model_wrapped):
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, mask, len(completion), compute_entropy=True
        )
        trainer.accelerator.backward(log_probs.mean())


def _allocate_optimizer(trainer: SharedPromptGRPOTrainer) -> None:
    """Steps with gradients and a learning rate of 0, which changes no weight."""
    optimizer = trainer.optimizer.optimizer
    if optimizer.state:
        return  # a resumed run has them already
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    try:
        type(optimizer).step(optimizer)  # not the scheduler's wrapper, which counts steps
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@contextmanager
def _nothing_kept(trainer: SharedPromptGRPOTrainer) -> Iterator[None]:
    device, optimizer = trainer.accelerator.device, trainer.optimizer.optimizer
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    resumed = bool(optimizer.state)
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        if not resumed:
            optimizer.state.clear()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        gc.collect()
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def _never_ending(trainer: SharedPromptGRPOTrainer) -> Iterator[None]:
    before = trainer.generation_config.suppress_tokens
    trainer.generation_config.suppress_tokens = list(trainer.eos_token_ids)
    try:
        yield
    finally:
        trainer.generation_config.suppress_tokens = before


def _advice(doing: str, args: Any, error: BaseException) -> str:
    rows, repeats = args.per_device_train_batch_size, args.gradient_accumulation_steps
    changes = {
        "generating": [
            "a smaller `gradient_accumulation_steps` or `num_generations`, so that fewer rows are generated at once",
            "a smaller `max_completion_length`",
        ],
        "training": [
            *([] if args.gradient_checkpointing else ["`gradient_checkpointing: true`"]),
            *(
                [
                    f"`per_device_train_batch_size: {rows // 2}` with `gradient_accumulation_steps: {repeats * 2}`, "
                    "which learns the same"
                ]
                if rows % 2 == 0
                else []
            ),
            "a smaller `max_completion_length`",
        ],
        "optimizing": ["`optim: paged_adamw_8bit`", "LoRA instead of full fine-tuning (`use_peft: true`)"],
    }[doing]
    reason = ". ".join(str(error).split(". ")[:2]).rstrip(".")  # with how much could not be allocated
    return (
        f"Memory is not enough: {doing} ran out of it in the largest step this run can come to, before any training "
        f"({reason}). To make it fit, set {'; or '.join(changes)}. `trl-sgpo estimate` says what each part takes."
    )
