"""`trl-sgpo bench throughput`: time a token, against GRPOTrainer, plain `generate` and the memory's bandwidth."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache
from trl.models import unwrap_model_for_generation

from ..checks.arguments import Parser, path_option
from ..errors import ConfigError
from ..recipe import Recipe, read_recipe
from ..speed.generation import left_padded, limited
from ..speed.lm_head import contiguous_head_input
from ..speed.merging import base_of
from .arms import ARMS, UNTAUGHT, Call, build_trainer, counted_step, measured_step, report, settings, synchronize


def main(argv: list[str]) -> int:
    """Takes steps of both trainers and plain `generate` calls in turn and prints the figures."""
    parser = Parser(
        prog="trl-sgpo bench throughput",
        description="Measure the speed of SGPO on a recipe's model and data: against TRL's GRPOTrainer at equal "
        "num_generations, against the model's own `generate` on the prompts of the rollout, and against what the "
        "memory's bandwidth allows. All take turns in one process.",
        epilog="Further arguments override the recipe, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, required=True, help="recipe")
    parser.add_argument("--output", type=path_option, help="write the figures and the raw rows to this JSON file")
    add_step_options(parser)
    options, overrides = parser.parse_known_args(argv)
    recipe = read_recipe(["--config", options.config, *overrides], "trl-sgpo bench throughput")

    rows = take_turns(recipe, options, with_generate=True)
    result = step_figures(rows) | generation_figures(rows) | {"settings": step_settings(recipe, options), "rows": rows}
    report("Speed of SGPO, medians", result, options.output)
    return 0


def add_step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of each arm, after one whose operations are counted"
    )
    parser.add_argument(
        "--end_probability",
        type=float,
        default=0.0,
        help="probability that a row ends at a token, so that lengths vary; by default all reach their limits",
    )


def check_step_options(options: argparse.Namespace) -> None:
    if options.steps < 1:
        raise ConfigError(f"`--steps` must be at least 1, got {options.steps}.")
    if not 0 <= options.end_probability < 1:
        raise ConfigError(f"`--end_probability` must be at least 0 and below 1, got {options.end_probability}.")


def step_settings(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    return settings(recipe) | {"steps": options.steps, "end_probability": options.end_probability}


def take_turns(
    recipe: Recipe, options: argparse.Namespace, arms: Sequence[str] = ARMS, with_generate: bool = False
) -> list[dict[str, Any]]:
    """
    Takes steps of several trainers in turn, in changing order.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            What all of them train.
        options (`argparse.Namespace`):
            `steps` and `end_probability`.
        arms (`Sequence[str]`, *optional*, defaults to `("sgpo", "grpo")`):
            The trainers, see [`~trl_sgpo.bench.arms.build_trainer`].
        with_generate (`bool`, *optional*, defaults to `False`):
            Whether plain `generate` repeats each rollout, and the memory's bandwidth is measured beside it.

    Returns:
        `list[dict]`: Measurements, one entry a step.

    Raises:
        [`ConfigError`]: Options out of range.
    """
    check_step_options(options)
    trainers = {arm: build_trainer(arm, recipe, options.end_probability) for arm in arms}
    rows: list[dict[str, Any]] = []
    for arm, trainer in trainers.items():
        rows.append({"arm": arm, "step": 0, **counted_step(trainer)})
    for step in range(1, options.steps + 1):
        for arm in arms if step % 2 else reversed(arms):
            row, calls = measured_step(trainers[arm])
            if arm == "sgpo" and with_generate:
                row |= _plain_generate(trainers[arm], calls)
            print(f"{arm} step {step}: {row['seconds']:.2f} s, {row['generated_tokens']} tokens generated", flush=True)
            rows.append({"arm": arm, "step": step, **row})
    return rows


def _plain_generate(trainer: Any, calls: list[Call]) -> dict[str, Any]:
    """Time of the same calls by the model's own `generate`, and the lower bound that the memory's bandwidth sets."""
    model = base_of(trainer.model)
    padding, device, ends = trainer.processing_class.pad_token_id, trainer.accelerator.device, trainer.eos_token_ids
    tokens, seconds = 0, 0.0
    with (
        contiguous_head_input(model),
        trainer.adapters.merged() if trainer.merges_adapters else nullcontext(),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator),
        torch.no_grad(),
    ):
        for call in calls:
            ids, mask = left_padded(call.prompts, padding, device)
            start = time.perf_counter()
            with limited(trainer.generation_config, call.limit):
                output = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config
                )
            synchronize()
            seconds += time.perf_counter() - start
            ended = torch.isin(output[:, ids.size(1) :], torch.tensor(ends, device=device)).cumsum(dim=1)
            tokens += int((ended == 0).sum() + (ended == 1).any(dim=1).sum())
        traffic = bytes_read(model, calls)
    return {
        "plain_seconds_generating": seconds,
        "plain_generated_tokens": tokens,
        "bytes_read": traffic,
        "bytes_per_second": memory_bandwidth(device),
    }


def bytes_read(model: Any, calls: list[Call]) -> float:
    """
    Bytes that generation has to read at least: at every token all weights once, and the keys and values of all rows.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        calls (`list[Call]`):
            What is generated, every row to its limit.
    """
    weights = sum(weight.nbytes for name, weight in model.named_parameters() if "lora_" not in name)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embeddings is not head:
        weights -= embeddings.nbytes  # of the embeddings only the rows of the tokens are read
    cache = DynamicCache(config=model.config.get_text_config())
    model(input_ids=torch.tensor([[0]], device=model.device), past_key_values=cache, use_cache=True)
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    total = 0.0
    for call in calls:
        read = sum(map(len, call.prompts)) * call.limit + len(call.prompts) * call.limit * (call.limit - 1) // 2
        total += weights * call.limit + token * read
    return total


def memory_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that a copy reads and writes, the best of five."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def _median(rows: list[dict[str, Any]], arm: str, key: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(key(row) for row in rows if row["arm"] == arm and row["step"] > 0)


def _cost_of_internalizing(rows: list[dict[str, Any]]) -> float | None:
    """Time of a step relative to one in which plain answers learn nothing from guided ones."""
    if not any(row["arm"] == UNTAUGHT for row in rows):
        return None
    with_it, without = (_median(rows, arm, lambda row: row["seconds"]) for arm in ("sgpo", UNTAUGHT))
    return with_it / without


def step_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios to TRL's trainer, and the parts of the time of an SGPO step."""
    flops = {row["arm"]: row["flops"] / row["generated_tokens"] for row in rows if row["step"] == 0}

    def ratios(arm: str) -> dict[str, float]:
        def ratio(key: Callable[[dict[str, Any]], float]) -> float:
            return _median(rows, arm, key) / _median(rows, "grpo", key)

        return {
            "step_time_ratio": ratio(lambda row: row["seconds"]),
            "generated_tokens_ratio": ratio(lambda row: row["generated_tokens"]),
            "seconds_per_generated_token_ratio": ratio(lambda row: row["seconds"] / row["generated_tokens"]),
            "cpu_seconds_per_generated_token_ratio": ratio(lambda row: row["cpu_seconds"] / row["generated_tokens"]),
            "flops_per_generated_token_ratio": flops[arm] / flops["grpo"],
        }

    others = [arm for arm in flops if arm not in ("sgpo", "grpo")]
    return {
        **ratios("sgpo"),
        **{f"{arm}_{name}": value for arm in others for name, value in ratios(arm).items()},
        **({"internalize_step_ratio": cost} if (cost := _cost_of_internalizing(rows)) is not None else {}),
        "bank_share": _median(rows, "sgpo", lambda row: row["seconds_of_bank"] / row["seconds"]),
        "share_outside_model": _median(rows, "sgpo", lambda row: row["seconds_outside_model"] / row["seconds"]),
        "sgpo_seconds_per_step": _median(rows, "sgpo", lambda row: row["seconds"]),
        "grpo_seconds_per_step": _median(rows, "grpo", lambda row: row["seconds"]),
    }


def generation_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Speed of SGPO's rollout, of GRPO's, of plain `generate`, and the limit by the memory's bandwidth."""

    def speed(row: dict[str, Any]) -> float:
        return row["generated_tokens"] / row["seconds_generating"]

    def plain(row: dict[str, Any]) -> float:
        return row["plain_generated_tokens"] / row["plain_seconds_generating"]

    def limit(row: dict[str, Any]) -> float:
        return row["plain_generated_tokens"] / row["bytes_read"] * row["bytes_per_second"]

    return {
        "fraction_of_generate_throughput": _median(rows, "sgpo", lambda row: speed(row) / plain(row)),
        "fraction_of_bandwidth_limit": _median(rows, "sgpo", lambda row: speed(row) / limit(row)),
        "rollout_tokens_per_second": _median(rows, "sgpo", speed),
        "grpo_rollout_tokens_per_second": _median(rows, "grpo", speed),
        "generate_tokens_per_second": _median(rows, "sgpo", plain),
        "bandwidth_limit_tokens_per_second": _median(rows, "sgpo", limit),
        "memory_bytes_per_second": _median(rows, "sgpo", lambda row: row["bytes_per_second"]),
    }
