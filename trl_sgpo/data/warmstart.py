"""
The warm start: supervised fine-tuning on two-phase traces, in the tokens that a rollout has.

[`warmstart`] fine-tunes a model on traces, [`warmstart_model`] the model of a recipe on the traces that it names.
"""

import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ..checks.sharding import launched_with
from ..errors import ConfigError, DataError, ModelError
from ..evaluation.digest import digest, model_record
from ..files import unfinished_directory
from ..inference.checked import checked
from ..inference.model_files import WARMSTART_DIRECTORY
from ..inference.pretrained import load_config, load_tokenizer, loading, readable_weights
from ..inference.settings import TwoPhaseSettings
from ..method.context_length import check_trace_length
from ..method.conversation import Conversation
from ..method.prompts import plain_answer, problem_text
from ..method.requirements import check_saved
from ..recipe import Recipe, model_init_kwargs
from ..run.directory import holds_adapters
from ..run.step_lines import WARM_START_COLUMNS, print_step_lines
from ..sgpo_config import SGPOConfig
from ..speed.attention_kernels import avoid_cudnn_attention
from ..speed.lm_head import project_labelled_tokens_only
from ..speed.merging import adapter_effect, base_of, fixed_log_probs, merge_is_exact
from . import worked
from .trace_files import read_traces
from .worked import Trace


logger = logging.getLogger(__name__)

_MAX_CHARACTERS = 50_000_000  # of all traces: one long row may be repeated for each of them
_MADE_OF, _MAX_RECORD = "warmstart.sha256", 1024


def _is_made_of(directory: Path, made_of: str, model: str) -> bool:
    """Whether a warm start was made of these traces, settings and model. Earlier versions did not record the model."""
    path = directory / _MADE_OF
    if not path.is_file() or path.stat().st_size > _MAX_RECORD:
        return False
    recorded = path.read_text(errors="replace").splitlines()
    return recorded[:1] == [made_of] and recorded[1:] in ([], [model])


def two_phase_examples(
    traces: list[Trace], tokenizer: Any, config: SGPOConfig, seed: int, plain_share: float = 0.0
) -> list[dict[str, Any]]:
    """
    Writes traces as token sequences: request, strategy, turn, execution. Strategy and execution are trained.

    Half of the requests quote another strategy of the class, as requests do once the bank holds some. Some traces
    may be written as one plain answer instead: the problem, then strategy and execution as one completion. Those
    without a strategy are.

    Args:
        traces (`list[Trace]`):
            Traces.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        config ([`SGPOConfig`]):
            Its prompts and `chat_template_kwargs` are used.
        seed (`int`):
            Seed of the quotations.
        plain_share (`float`, *optional*, defaults to `0.0`):
            Share of traces, among those whose strategy is not given, written as one plain answer.

    Returns:
        `list[dict]`: With `input_ids` and `labels` (-100 where not trained).
    """
    rng = random.Random(seed)
    conversation = TwoPhaseSettings.from_config(config).conversation(tokenizer)
    by_class: dict[str, list[str]] = {}
    for trace in traces:
        by_class.setdefault(trace.problem_class, []).append(trace.strategy)
    examples = []
    for trace in traces:
        if not trace.strategy or (plain_share > 0 and not trace.given and rng.random() < plain_share):
            examples.append(plain_example(trace, conversation))
            continue
        shown = []
        if config.use_bank and config.num_retrieved > 0 and rng.random() < 0.5:
            shown = [(trace.problem_class, rng.choice(by_class[trace.problem_class]))]
        request = conversation.request(trace.prompt, shown)
        strategy = conversation.reply(trace.prompt, trace.strategy)
        turn = conversation.turn(trace.prompt).after(strategy)
        execution = conversation.reply(trace.prompt, trace.execution)
        examples.append(
            {
                "input_ids": request + strategy + turn + execution,
                "labels": [-100] * len(request)
                + ([-100] * len(strategy) if trace.given else strategy)
                + [-100] * len(turn)
                + execution,
            }
        )
    return examples


def plain_example(trace: Trace, conversation: Conversation) -> dict[str, Any]:
    """Writes a trace as one completion of its problem: strategy, empty line, execution."""
    request = conversation.plain_request(trace.prompt)
    answer = conversation.reply(trace.prompt, plain_answer(trace.strategy, trace.execution))
    return {"input_ids": request + answer, "labels": [-100] * len(request) + answer}


def warmstart(
    model: str,
    traces: list[Trace],
    config: SGPOConfig,
    output_dir: str | os.PathLike[str],
    learning_rate: float = 1e-3,
    model_init_kwargs: dict[str, Any] | None = None,
    batch_size: int = 4,
    plain_share: float = 0.0,
    full: bool = False,
) -> str:
    """
    Fine-tunes a model on two-phase traces, once through, and saves it whole.

    A LoRA adapter is trained with TRL's [`~trl.SFTTrainer`] and merged, so that any later training starts from an
    ordinary model directory; or the whole model is. The directory appears only when it is complete.

    Args:
        model (`str`):
            Name or path of the model.
        traces (`list[Trace]`):
            Traces.
        config ([`SGPOConfig`]):
            Its prompts, seed, precision and reporting are used.
        output_dir (`str`):
            Where the model is saved. A model that was made there with the same model, traces and settings is kept.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of the adapter, decayed linearly to 0.
        model_init_kwargs (`dict`, *optional*):
            Passed on to `from_pretrained`.
        batch_size (`int`, *optional*, defaults to `4`):
            Traces an optimizer step.
        plain_share (`float`, *optional*, defaults to `0.0`):
            Share of traces written as one plain answer, see [`two_phase_examples`].
        full (`bool`, *optional*, defaults to `False`):
            Whether to train the whole model instead of an adapter.

    Returns:
        `str`: `output_dir`

    Raises:
        [`DataError`]: There are no traces, they have more than 50,000,000 characters, or one is longer than
            the model's table of positions.
        [`ConfigError`]: Another model is there, on which adapters were trained that are in the folder above, or the
            processes were launched with FSDP or DeepSpeed.
    """
    output_dir = Path(output_dir)
    if not traces:
        raise DataError("There are no traces to warm-start on: raise `warmstart_traces`.")
    characters = sum(len(problem_text(trace.prompt)) + len(trace.strategy + trace.execution) for trace in traces)
    if characters > _MAX_CHARACTERS:
        raise DataError(
            f"The {len(traces)} traces of the warm start have {characters:,} characters, more than "
            f"{_MAX_CHARACTERS:,}: leave out long problems (`max_problem_tokens`) or lower `warmstart_traces`."
        )
    try:
        model_config, tokenizer = load_config(model), load_tokenizer(model)
        model_init_kwargs = checked(model, model_init_kwargs or {}, weights=True)
    except OSError as error:
        raise ModelError(f"The tokenizer of {model} cannot be loaded: {error}") from error
    two_phase = TwoPhaseSettings.from_config(config, traces[0].prompt).of_model(tokenizer)
    settings = [model, learning_rate, config.strategy_prompt, config.execution_prompt, config.use_bank, config.seed]
    settings += [batch_size, plain_share, full]
    # Added only where they matter, so that warm starts made without them are kept
    if config.chat_template_kwargs:
        settings.append(config.chat_template_kwargs)
    if two_phase.turn_end != tokenizer.eos_token:
        settings.append(two_phase.turn_end)
    dtype = str(model_init_kwargs.get("dtype", "bfloat16")).removeprefix("torch.")
    others = {"adam_beta2": config.adam_beta2, "num_retrieved": config.num_retrieved, "dtype": dtype}
    usual = {"adam_beta2": 0.999, "num_retrieved": 1, "dtype": "bfloat16"}
    settings += [[name, value] for name, value in others.items() if value != usual[name]]
    made_of = hashlib.sha256(json.dumps([settings, [asdict(trace) for trace in traces]]).encode()).hexdigest()
    model_digest = digest(model_record(model))
    if _is_made_of(output_dir, made_of, model_digest):
        return str(output_dir)
    if output_dir.is_dir() and holds_adapters(output_dir.parent):
        raise ConfigError(
            f"{output_dir} was made with another model, other traces or settings, and the adapters in "
            f"{output_dir.parent} were trained on it: use the same ones to resume, or name another `--output_dir`."
        )
    if config.deepspeed or launched_with("FSDP") or launched_with("DEEPSPEED"):
        raise ConfigError(
            "A warm start trains and saves whole weights, and FSDP or DeepSpeed shards them: run `trl-sgpo warmstart` "
            "with the same recipe on one process first. `train` goes on from what it saved."
        )
    print(f"Warm start of {model} on {len(traces)} two-phase traces:")
    examples = two_phase_examples(traces, tokenizer, config, config.seed, plain_share)
    check_trace_length(model_config, max(len(example["input_ids"]) for example in examples))
    adapter = None if full else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with loading(model), readable_weights(model):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                str(output_dir),
                model_init_kwargs=model_init_kwargs,
                per_device_train_batch_size=batch_size,
                num_train_epochs=1,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0.1 if full else 5,
                adam_beta2=config.adam_beta2,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=config.seed,
                bf16=config.bf16,
                fp16=config.fp16,
                use_cpu=config.use_cpu,
                gradient_checkpointing=config.gradient_checkpointing,
                disable_tqdm=config.disable_tqdm,
                log_level=config.log_level,
                # Batches of one length are fast, but differ too much from each other for a model trained from scratch
                train_sampling_strategy="random" if full else "group_by_length",
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    avoid_cudnn_attention(trainer.accelerator.device)
    check_saved(base_of(trainer.model))
    print_step_lines(trainer, WARM_START_COLUMNS)
    with project_labelled_tokens_only(trainer.accelerator.device):
        trainer.train()
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    merged = tuned if full else _merged(tuned)
    if trainer.accelerator.is_main_process:
        with unfinished_directory(output_dir) as unfinished:
            merged.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            two_phase.save(unfinished)
            (unfinished / _MADE_OF).write_text(f"{made_of}\n{model_digest}\n")
            shutil.rmtree(output_dir, ignore_errors=True)
            os.replace(unfinished, output_dir)
    trainer.accelerator.wait_for_everyone()
    return str(output_dir)


@torch.no_grad()
def _merged(tuned: PeftModel) -> PreTrainedModel:
    """The model with its adapter merged, and a line in the log if rounding loses more than a tenth of its effect."""
    tuned.eval()
    apart = fixed_log_probs(tuned)
    effect = adapter_effect(tuned, apart, lambda: fixed_log_probs(tuned))
    merged = tuned.merge_and_unload()
    difference = (fixed_log_probs(merged) - apart).abs().mean().item()
    if not merge_is_exact(difference, effect, exact=False):
        kind = str(merged.dtype).removeprefix("torch.")
        logger.warning(
            f"Rounding to {kind} distorts {min(1.0, difference / effect if effect else 1.0):.0%} of what the warm "
            "start has changed: raise `warmstart_learning_rate` or `warmstart_traces`, or set `dtype: float32`."
        )
    return merged


def warmstart_model(recipe: Recipe, model: str, dataset: Dataset) -> str:
    """
    Fine-tunes the recipe's model on two-phase traces, those of its `warmstart_file` or worked solutions. A model that
    an earlier run of the recipe made is kept.

    Returns:
        `str`: Directory of the fine-tuned model.
    """
    script, training = recipe.script, recipe.training
    if script.warmstart_file is None:
        chosen = _worked_traces(recipe, dataset)
    else:
        chosen = read_traces(script.warmstart_file)
        random.Random(training.seed).shuffle(chosen)
        chosen = chosen[: script.warmstart_traces or len(chosen)]
    return warmstart(
        model,
        chosen,
        training,
        Path(training.output_dir) / WARMSTART_DIRECTORY,
        learning_rate=script.warmstart_learning_rate,
        model_init_kwargs=model_init_kwargs(recipe),
        batch_size=script.warmstart_batch_size,
        plain_share=script.warmstart_plain_share,
        full=not recipe.model.use_peft,
    )


def _worked_traces(recipe: Recipe, dataset: Dataset) -> list[Trace]:
    count, seed = recipe.script.warmstart_traces, recipe.training.seed
    repeats = -(-count // len(dataset)) + 1
    drawn = worked.traces(dataset.shuffle(seed=seed), per_problem=repeats, seed=seed, problems=count)
    # Every problem's first trace, then every problem's second one
    in_rounds = [drawn[i] for start in range(repeats) for i in range(start, len(drawn), repeats)]
    return in_rounds[:count]
