"""
The largest possible step, taken before the first real one, so that a run that does not fit fails in the first minute.

What this file relies on in TRL 1.16: `_get_per_token_logps_and_entropies`.
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
from ..method.context_length import longest_requests, shown_strategies
from ..method.conversation import Conversation
from ..method.transfer import BlockGeometry
from ..speed.shared_prompts import packed_attention
from ..speed.trainer import SharedPromptGRPOTrainer


logger = transformers.utils.logging.get_logger(__name__)


def take_worst_case_step(
    trainer: SharedPromptGRPOTrainer, conversation: Conversation, geometry: BlockGeometry, peaks: dict[str, int]
) -> None:
    """
    Lets the optimizer allocate its states, generates both phases at full length from the longest problems, and runs
    one forward and backward pass. Weights, optimizer, random state, bank and metrics are restored.

    Args:
        trainer ([`SGPOTrainer`]):
            Trainer, before its first step.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens of its prompts.
        geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
            Shape of its transfer blocks.
        peaks (`dict[str, int]`):
            Receives the peaks of the bytes that PyTorch allocated on a GPU during `"optimizing"`, `"generating"` and
            `"training"`, of the stages that were reached, and of the bytes that it `"reserved"`.

    Raises:
        [`ModelError`]: Memory is not enough. The message names settings to change.
    """
    device = trainer.accelerator.device
    on_gpu = device.type == "cuda"
    stage = ""

    def note_peak() -> None:
        if on_gpu:
            peaks[stage] = torch.cuda.max_memory_allocated(device)
            peaks["reserved"] = max(peaks.get("reserved", 0), torch.cuda.max_memory_reserved(device))
            torch.cuda.reset_peak_memory_stats(device)

    with _restored_state(trainer):
        try:
            trainer.model.train()  # in evaluation mode, as after loading, layers keep all activations
            stage = "optimizing"
            _allocate_optimizer(trainer)
            note_peak()
            stage = "generating"
            requests, completion = _generate_at_full_length(trainer, conversation, geometry)
            note_peak()
            stage = "training"
            _train_at_full_length(trainer, geometry, requests[0], completion)
            note_peak()
        except (torch.OutOfMemoryError, MemoryError) as error:
            note_peak()
            raise ModelError(_advice(stage, trainer.args, error)) from error
    if on_gpu:
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        taken = peaks["reserved"] / 2**30
        logger.warning(f"The worst-case step fits: {taken:.2f} GB of {whole:.2f} GB, without the CUDA context.")


def _generate_at_full_length(
    trainer: SharedPromptGRPOTrainer, conversation: Conversation, geometry: BlockGeometry
) -> tuple[list[list[int]], list[int]]:
    """Returns the requests, longest first, and a completion."""
    args = trainer.args
    rows = args.per_device_train_batch_size * args.steps_per_generation
    problems = rows // geometry.executions
    prompts = trainer.train_dataset["prompt"]
    strategies = args.max_strategy_length, shown_strategies(args)
    requests = longest_requests(prompts, problems, conversation, *strategies)
    turn = conversation.turn(prompts[0]).bridge
    with trainer.fast_generation(requests, calls=2 if geometry.own else 1), _without_end_tokens(trainer):
        begun = [request for request in requests for _ in range(geometry.executions)]
        begins: list[list[int]] = [[]]
        if geometry.own:
            own = [request for request in requests for _ in range(geometry.own)]
            written = trainer.generate(own, args.max_strategy_length, "strategies at their longest")[0]
            begins = [strategy + turn for strategy in written]
        contexts = [request + begins[row % len(begins)] for row, request in enumerate(begun)]
        executed = trainer.generate(contexts, args.max_completion_length, "executions at their longest")[0]
    return requests, begins[0] + executed[0]


def _train_at_full_length(
    trainer: SharedPromptGRPOTrainer, geometry: BlockGeometry, request: list[int], completion: list[int]
) -> None:
    args, device = trainer.args, trainer.accelerator.device
    rows = args.per_device_train_batch_size
    problems = [row // geometry.executions for row in range(rows)]
    # Rotated, so that the problems of a micro-batch differ and are equally long
    ids = torch.tensor([request[by:] + request[:by] + completion for by in problems], device=device)
    mask = torch.ones_like(ids)
    with packed_attention(), trainer.accelerator.no_sync(trainer.model_wrapped):
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, mask, len(completion), compute_entropy=True
        )
        trainer.accelerator.backward(log_probs.mean())


def _allocate_optimizer(trainer: SharedPromptGRPOTrainer) -> None:
    """Takes a step with gradients and a learning rate of 0, which changes no weight."""
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
def _restored_state(trainer: SharedPromptGRPOTrainer) -> Iterator[None]:
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
def _without_end_tokens(trainer: SharedPromptGRPOTrainer) -> Iterator[None]:
    before = trainer.generation_config.suppress_tokens
    trainer.generation_config.suppress_tokens = list(trainer.eos_token_ids)
    try:
        yield
    finally:
        trainer.generation_config.suppress_tokens = before


def _advice(stage: str, args: Any, error: BaseException) -> str:
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
    }[stage]
    reason = ". ".join(str(error).split(". ")[:2]).rstrip(".")  # with how much could not be allocated
    return (
        f"Memory is not enough: {stage} ran out of it in the largest step this run can come to, before any training "
        f"({reason}). To make it fit, set {'; or '.join(changes)}. `trl-sgpo estimate` says what each part takes."
    )
