"""`trl-sgpo bench step`: SGPO against TRL's own GRPOTrainer, step by step in one run."""

import argparse
import gc
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer, get_peft_config, get_quantization_config

from ..bank import Strategy, StrategyBank
from ..cli.recipe import Recipe, load_data, load_rewards, model_init_kwargs, read_recipe
from ..errors import ConfigError
from ..offline import require_model
from ..sgpo_config import SGPOConfig
from ..sgpo_trainer import CLASS_COLUMN, SGPOTrainer, score_trained_positions_only, with_classes


ARMS = ("sgpo", "grpo")


def main(argv: list[str]) -> int:
    """Takes steps of both trainers in turn and prints the figures."""
    parser = argparse.ArgumentParser(
        prog="trl-sgpo bench step",
        description="Measure SGPO against TRL's GRPOTrainer on a recipe's model and data, at equal num_generations "
        "and with every completion generated to its full length, so that both do the same work a row.",
        epilog="Further arguments override the recipe, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", required=True, help="recipe")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each arm, after one to warm up")
    parser.add_argument("--output", help="write the figures and the raw rows to this JSON file")
    options, overrides = parser.parse_known_args(argv)
    if options.steps < 1:
        raise ConfigError(f"`--steps` must be at least 1, got {options.steps}.")
    arguments = ["--config", options.config, *overrides]
    recipe = read_recipe(arguments, "trl-sgpo bench step")

    memory = {arm: _in_new_process(arm, arguments) for arm in ARMS}
    trainers = {arm: _trainer(arm, recipe) for arm in ARMS}
    rows: list[dict[str, Any]] = []
    for step in range(options.steps + 1):
        for arm in ARMS if step % 2 else reversed(ARMS):
            row = {"arm": arm, "step": step, **_measured_step(trainers[arm])}
            print(f"{arm} step {step}: {row['seconds']:.2f} s, {row['generated_tokens']} tokens generated", flush=True)
            if step > 0:
                rows.append(row)
    result = _figures(rows, memory) | {"settings": _settings(recipe, options.steps), "rows": rows}
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=2))
    _print(result)
    return 0


def _trainer(arm: str, recipe: Recipe) -> Any:
    """Builds an arm's trainer. Generation never ends early, so that lengths are equal by construction."""
    args = recipe.training
    model = require_model(recipe.model.model_name_or_path)
    dataset = with_classes(load_data(recipe)[recipe.script.dataset_train_split], args)
    shared = {
        "max_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "log_completions": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "model_init_kwargs": model_init_kwargs(recipe),
        "output_dir": f"{args.output_dir}/bench_{arm}",
        "generation_batch_size": None,  # derived, as is the next
        "steps_per_generation": args.steps_per_generation,
    }
    common: dict[str, Any] = {
        "model": model,
        "reward_funcs": load_rewards(recipe.script),
        "train_dataset": dataset,
        "quantization_config": get_quantization_config(recipe.model),
        "peft_config": get_peft_config(recipe.model),
    }
    if arm == "sgpo":
        trainer: Any = SGPOTrainer(args=replace(args, **shared), strategy_bank=_filled_bank(args, dataset), **common)
    else:
        trainer = GRPOTrainer(args=args.to_grpo(**shared), **common)
        if trainer.accelerator.device.type == "cpu":
            score_trained_positions_only()  # SGPO's remedy for TRL on CPUs is given to both
    trainer.remove_callback(PrinterCallback)
    trainer.generation_config.suppress_tokens = trainer.eos_token_ids
    if arm == "sgpo" and trainer.strategy_bank is not None:
        trainer.add_callback(_NewStrategies(trainer))
    return trainer


_SUBJECTS = ("carry", "order", "divide", "split", "count", "compare", "round", "factor", "list", "check", "cancel")


def _strategies(problem_class: str, first: int, count: int) -> list[Strategy]:
    """Strategies of a class for a bank to work with: different words, so that none counts as a near-copy."""
    picked = [(_SUBJECTS[i % 11], _SUBJECTS[(3 * i + i // 11) % 11], i) for i in range(first, first + count)]
    return [Strategy(f"For {problem_class}: {a}, then {b}, in way {i}.", problem_class, ("",)) for a, b, i in picked]


def _filled_bank(args: SGPOConfig, dataset: Dataset) -> StrategyBank | None:
    """A bank of 32 strategies a class, so that retrieval is part of what is measured."""
    if not args.use_bank:
        return None
    bank = StrategyBank(tempfile.mkdtemp(prefix="trl-sgpo-bench-"), embedding_model=args.embedding_model)
    for problem_class in sorted(set(dataset[CLASS_COLUMN])):
        bank.add(_strategies(problem_class, 0, 32))
    return bank


class _NewStrategies(TrainerCallback):
    """Lets each step find one strategy a block, so that writing them is part of what is measured."""

    def __init__(self, trainer: SGPOTrainer):
        self.trainer = trainer
        self.step = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step += 1
        blocks = len(self.trainer.rollout_batch.problems) // self.trainer.geometry.problems
        self.trainer.note_found(_strategies("bench", 1000 * self.step, max(blocks, 1)))


class _StepTimer(TrainerCallback):
    """Seconds of the one optimizer step a call of `train` makes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        _synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        _synchronize()
        self.seconds = time.perf_counter() - self.start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _timed(
    trainer: Any, name: str, spent: dict[str, float], after: Callable[[Any], None] = lambda result: None
) -> Any:
    """Adds up the seconds spent in a method of the trainer."""
    method = trainer.__getattribute__(name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        _synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        if after is not None:
            after(result)
        return result

    setattr(trainer, name, measured)
    try:
        yield
    finally:
        delattr(trainer, name)


def _measured_step(trainer: Any) -> dict[str, Any]:
    """Takes one optimizer step. Everything in it but generation, forward, backward and update is outside the model."""
    spent: dict[str, float] = {}
    tokens: list[int] = []
    timer = _StepTimer()
    trainer.add_callback(timer)

    def count(result: Any) -> None:
        tokens.append(sum(len(ids) for ids in result[0]))

    with (
        _timed(trainer, "_generate_single_turn", spent, count),
        _timed(trainer, "_generate_and_score_completions", spent),
    ):
        if isinstance(trainer, SGPOTrainer):
            with _timed(trainer, "commit_bank", spent), _timed(trainer, "_plan_rollouts", spent):
                trainer.train()
        else:
            trainer.train()
    trainer.remove_callback(timer)
    # In the recipes' aligned geometry scoring runs no forward pass of its own, so all of it counts as outside
    outside = spent["_generate_and_score_completions"] - spent["_generate_single_turn"] + spent.get("commit_bank", 0.0)
    return {
        "seconds": timer.seconds,
        "generated_tokens": sum(tokens),
        "seconds_generating": spent["_generate_single_turn"],
        "seconds_outside_model": outside,
        "seconds_of_bank": spent.get("commit_bank", 0.0) + spent.get("_plan_rollouts", 0.0),
    }


def _in_new_process(arm: str, arguments: list[str]) -> float:
    """Peak memory of two steps of an arm, in bytes, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(arm, arguments, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise ConfigError(f"The {arm} arm could not take a step with this recipe: see the error above.") from None
    finally:
        process.join()


def _peak_memory(arm: str, arguments: list[str], send: Any) -> None:
    trainer = _trainer(arm, read_recipe(arguments, "trl-sgpo bench step"))
    for _ in range(2):
        trainer.train()
    if torch.cuda.is_available():
        send.send(float(torch.cuda.max_memory_allocated()))
    else:
        kilo = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS
        send.send(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo))
    gc.collect()


def _figures(rows: list[dict[str, Any]], memory: dict[str, float]) -> dict[str, float]:
    def median(arm: str, key: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(key(row) for row in rows if row["arm"] == arm)

    def ratio(key: Callable[[dict[str, Any]], float]) -> float:
        return median("sgpo", key) / median("grpo", key)

    return {
        "step_time_ratio": ratio(lambda row: row["seconds"]),
        "generated_tokens_ratio": ratio(lambda row: row["generated_tokens"]),
        "seconds_per_generated_token_ratio": ratio(lambda row: row["seconds"] / row["generated_tokens"]),
        "peak_memory_ratio": memory["sgpo"] / memory["grpo"],
        "bank_share": median("sgpo", lambda row: row["seconds_of_bank"] / row["seconds"]),
        "share_outside_model": median("sgpo", lambda row: row["seconds_outside_model"] / row["seconds"]),
        "sgpo_seconds_per_step": median("sgpo", lambda row: row["seconds"]),
        "grpo_seconds_per_step": median("grpo", lambda row: row["seconds"]),
        "sgpo_peak_bytes": memory["sgpo"],
        "grpo_peak_bytes": memory["grpo"],
    }


def _settings(recipe: Recipe, steps: int) -> dict[str, Any]:
    args = recipe.training
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "recipe": recipe.path,
        "model": recipe.model.model_name_or_path,
        "device": device,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "num_generations": args.num_generations,
        "transfer_block_size": args.transfer_block_size,
        "num_bank_rollouts": args.num_bank_rollouts,
        "rows": args.per_device_train_batch_size * args.steps_per_generation,
        "max_strategy_length": args.max_strategy_length,
        "max_completion_length": args.max_completion_length,
        "merge_adapters": args.merge_adapters,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(title="SGPO against GRPO, medians")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}" if value < 1e6 else f"{value / 2**20:.0f} MiB")
    Console().print(table)
