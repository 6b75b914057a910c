"""The trainers that benchmarks compare, and the measurement of one optimizer step."""

import atexit
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import get_peft_config, get_quantization_config

from ..bank import Strategy, StrategyBank
from ..bank.session import Observation
from ..checks.console import console
from ..compare.lab.model import fetch_model
from ..data.classes import CLASS_COLUMN, with_classes
from ..data.loading import load_data, load_rewards, without_long_problems
from ..files import write_file
from ..inference.pretrained import load_tokenizer
from ..method.conversation_trainer import ConversationGRPOTrainer
from ..recipe import Recipe, model_init_kwargs
from ..sgpo_config import SGPOConfig
from ..sgpo_trainer import SGPOTrainer
from ..speed.lm_head import contiguous_head_input, project_labelled_tokens_only
from ..speed.trainer import SharedPromptGRPOTrainer


ARMS = ("sgpo", "grpo")
STEP_ARMS = ("sgpo", "shared_grpo", "grpo")
"""With GRPO by [`SharedPromptGRPOTrainer`], to separate the cost of the method from the gain by the fast paths."""
UNTAUGHT = "untaught"
"""SGPO without `internalize`, to separate the cost of what plain answers learn."""


class _GRPOTrainer(ConversationGRPOTrainer):
    """TRL's trainer with SGPO's remedies for the LM head on CPUs, which all arms use."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with project_labelled_tokens_only(self.accelerator.device), contiguous_head_input(self.model):
            return super().train(*args, **kwargs)


def build_trainer(
    arm: str,
    recipe: Recipe,
    end_probability: float = 0.0,
    equal_lengths: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: str | None = None,
) -> Any:
    """
    Builds an arm's trainer. All of them generate rows of the same lengths by construction.

    Args:
        arm (`str`):
            `"sgpo"`, `"untaught"` (SGPO without `internalize`), `"shared_grpo"` ([`SharedPromptGRPOTrainer`]) or
            `"grpo"` ([`~trl.GRPOTrainer`]).
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            What all of them train.
        end_probability (`float`, *optional*, defaults to `0.0`):
            Probability that a row ends at a token. By default all are generated to their limit.
        equal_lengths (`bool`, *optional*, defaults to `False`):
            Whether GRPO's completions have the length of strategy and execution together.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Trained instead of the recipe's.
        tokenizer (`str`, *optional*):
            Directory or Hub id of a tokenizer to use instead of the model's.

    Returns:
        [`SGPOTrainer`], [`SharedPromptGRPOTrainer`] or [`~trl.GRPOTrainer`]
    """
    args, script = recipe.training, recipe.script
    name = tokenizer or fetch_model(recipe.model.model_name_or_path)
    problems = without_long_problems(load_data(recipe)[script.dataset_train_split], script.max_problem_tokens, name)
    dataset = with_classes(problems, args)
    shared = {
        "max_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "log_completions": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "model_init_kwargs": model_init_kwargs(recipe) if model is None else None,
        "output_dir": _scratch_directory(),
        "generation_batch_size": None,  # derived, as is the next
        "steps_per_generation": args.steps_per_generation,
    }
    common: dict[str, Any] = {
        "model": name if model is None else model,
        "processing_class": load_tokenizer(name, padding_side="left", truncation_side="left"),
        "reward_funcs": load_rewards(recipe.script) if args.internalize == "none" else _every_second,
        "train_dataset": dataset,
        "quantization_config": get_quantization_config(recipe.model) if model is None else None,
        "peft_config": get_peft_config(recipe.model),
    }
    if arm in ("sgpo", UNTAUGHT):
        shared |= {"internalize": "none"} if arm == UNTAUGHT else {}
        trainer: Any = SGPOTrainer(args=replace(args, **shared), strategy_bank=_filled_bank(args, dataset), **common)
    else:
        if equal_lengths:
            shared["max_completion_length"] = args.max_strategy_length + args.max_completion_length
        kind = _GRPOTrainer if arm == "grpo" else SharedPromptGRPOTrainer
        trainer = kind(args=args.to_grpo(**shared), **common)
    trainer.remove_callback(PrinterCallback)
    _end_at_random(trainer, end_probability)
    if isinstance(trainer, SGPOTrainer) and trainer.strategy_bank is not None:
        trainer.add_callback(_NewStrategies(trainer))
    return trainer


def _every_second(completions: list[Any], **kwargs: Any) -> list[float]:
    """Rows of random tokens are never right, and plain answers learn from right ones only."""
    return [float(row % 2 == 0) for row in range(len(completions))]


def _scratch_directory() -> str:
    """A directory that is deleted when the process ends."""
    directory = tempfile.mkdtemp(prefix="trl-sgpo-bench-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _end_at_random(trainer: Any, probability: float) -> None:
    """Ends generated rows at random, with a probability a token, whatever the model predicts."""
    ends = trainer.eos_token_ids

    def decide(head: torch.nn.Module, args: Any, logits: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            logits[..., ends] = -torch.inf
            logits[torch.rand(logits.shape[:-1], device=logits.device) < probability, ends[0]] = torch.finfo(
                logits.dtype
            ).max

    trainer.model.get_output_embeddings().register_forward_hook(decide)


_SUBJECTS = ("carry", "order", "divide", "split", "count", "compare", "round", "factor", "list", "check", "cancel")


def _strategies(problem_class: str, first: int, count: int) -> list[Strategy]:
    """Strategies of a class in different words, so that none is a near-copy of another."""
    picked = [(_SUBJECTS[i % 11], _SUBJECTS[(3 * i + i // 11) % 11], i) for i in range(first, first + count)]
    return [Strategy(f"For {problem_class}: {a}, then {b}, in way {i}.", problem_class, ("",)) for a, b, i in picked]


def _filled_bank(args: SGPOConfig, dataset: Dataset) -> StrategyBank | None:
    """A bank of 32 strategies a class, so that retrieval is measured too."""
    if not args.use_bank:
        return None
    bank = StrategyBank(_scratch_directory(), embedding_model=args.embedding_model)
    for problem_class in sorted(set(dataset[CLASS_COLUMN])):
        bank.add(_strategies(problem_class, 0, 32))
    return bank


class _NewStrategies(TrainerCallback):
    """Adds a new strategy a block to the bank at each step, so that writing to the bank is measured too."""

    def __init__(self, trainer: SGPOTrainer):
        self.trainer = trainer
        self.step = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step += 1
        rows = self.trainer.args.per_device_train_batch_size * self.trainer.args.steps_per_generation
        blocks = rows // self.trainer.geometry.rows
        self.trainer.bank_session.note(Observation(_strategies("bench", 1000 * self.step, blocks), [], []))


class _StepTimer(TrainerCallback):
    """Seconds of the one optimizer step a call of `train` makes."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()


def synchronize() -> None:
    """Waits until the GPU has finished, so that a clock includes its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _timed(method: Any, spent: dict[str, float], after: Callable[[Any, Any], None] | None = None) -> Iterator[None]:
    """Adds up the seconds and CPU seconds of a bound method, and calls `after` with its arguments and its result."""
    owner, name = method.__self__, method.__name__

    def measured(*args: Any, **kwargs: Any) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        result = method(*args, **kwargs)
        synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        spent[f"{name} cpu"] = spent.get(f"{name} cpu", 0.0) + time.process_time() - cpu_start
        if after is not None:
            after(args, result)
        return result

    setattr(owner, name, measured)
    try:
        yield
    finally:
        delattr(owner, name)


@dataclass(frozen=True)
class Call:
    """
    A call of generation in a step.

    Args:
        prompts (`list[list[int]]`):
            Tokens to continue.
        limit (`int`):
            Maximum number of new tokens.
    """

    prompts: list[list[int]]
    limit: int


_aten = torch.ops.aten
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *args, **kwargs: sdpa_flop_count(
        query, key, value
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *args, **kwargs: (
        sdpa_backward_flop_count(grad, query, key, value)
    ),
}


def counted_step(trainer: Any) -> dict[str, Any]:
    """
    Takes one optimizer step and counts its floating-point operations in matrix products, which do not depend on the
    load of the machine. Counting slows a step down, so its times are left out.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        row, _ = measured_step(trainer)
    return {"flops": counter.get_total_flops(), "generated_tokens": row["generated_tokens"]}


def measured_step(trainer: Any) -> tuple[dict[str, Any], list[Call]]:
    """Takes one optimizer step. All but generation, forward pass, backward pass and update is outside the model."""
    spent: dict[str, float] = {}
    tokens: list[int] = []
    calls: list[Call] = []
    timer = _StepTimer()
    trainer.add_callback(timer)

    shared = isinstance(trainer, SharedPromptGRPOTrainer)
    generate = trainer.generate if shared else trainer._generate_single_turn

    def note(args: Any, result: Any) -> None:
        tokens.append(sum(len(ids) for ids in result[0]))
        calls.append(Call(args[0], args[1] if shared else trainer.generation_config.max_new_tokens))

    with (
        _timed(trainer._generate, spent),
        _timed(generate, spent, note),
        _timed(trainer._generate_and_score_completions, spent),
    ):
        if isinstance(trainer, SGPOTrainer):
            with _timed(trainer.bank_session.commit, spent), _timed(trainer._plan_rollouts, spent):
                trainer.train()
        else:
            trainer.train()
    trainer.remove_callback(timer)
    # In the recipes' aligned geometry scoring runs no forward pass of its own, so all of it counts as outside
    outside = spent["_generate_and_score_completions"] - spent[generate.__name__] + spent.get("commit", 0.0)
    row = {
        "seconds": timer.seconds,
        "cpu_seconds": timer.cpu_seconds,
        "generated_tokens": sum(tokens),
        "seconds_generating": spent["_generate"],
        "cpu_seconds_generating": spent["_generate cpu"],
        "seconds_outside_model": outside,
        "seconds_of_bank": spent.get("commit", 0.0) + spent.get("_plan_rollouts", 0.0),
    }
    return row, calls


def settings(recipe: Recipe) -> dict[str, Any]:
    """Everything that figures depend on."""
    args = recipe.training
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "recipe": recipe.path,
        "model": recipe.model.model_name_or_path,
        "dtype": recipe.model.dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "num_generations": args.num_generations,
        "transfer_block_size": args.transfer_block_size,
        "num_bank_rollouts": args.num_bank_rollouts,
        "num_plain_rollouts": args.num_plain_rollouts,
        "rows": args.per_device_train_batch_size * args.steps_per_generation,
        "max_strategy_length": args.max_strategy_length,
        "max_completion_length": args.max_completion_length,
        "merge_adapters": args.merge_adapters,
    }


def write(result: dict[str, Any], output: str | None) -> None:
    """Writes a result as JSON, if asked to."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(output), json.dumps(result, indent=2))


def report(title: str, result: dict[str, Any], output: str | None) -> None:
    """Writes a result as JSON, if asked to, and prints its figures."""
    write(result, output)
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}" if value < 1e6 else f"{value / 2**20:.0f} MiB")
    console().print(table)
