"""The cheapest change by which a recipe fits into memory."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..recipe import Recipe
from .estimate import Estimate


def cheapest_change(
    recipe: Recipe, vram_gb: float, estimate: Callable[[Recipe], Estimate]
) -> tuple[dict[str, Any], Estimate] | None:
    """
    Searches for the cheapest change: first changes that only cost time, then those that reduce training.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            A recipe that does not fit. It is not changed.
        vram_gb (`float`):
            Available memory.
        estimate (`Callable[[Recipe], Estimate]`):
            Estimates a recipe.

    Returns:
        `tuple[dict, Estimate]` or `None`: Keys with their new values and the estimate with them, or `None` if no
        change is enough.
    """
    steps = list(_steps(recipe))
    for change in steps:
        changed = estimate(with_changes(recipe, change))
        if changed.fits(vram_gb):
            return change, changed
    together: dict[str, Any] = {}
    for change in steps:
        together |= change
        if together != change:
            changed = estimate(with_changes(recipe, together))
            if changed.fits(vram_gb):
                return together, changed
    return None


def _steps(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Changes, cheapest first. Only the last kind, shorter completions, changes what is learnt."""
    args, model = recipe.training, recipe.model
    if not args.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if "8bit" not in str(args.optim).casefold():
        yield {"optim": "paged_adamw_8bit"}
    rows, repeats = args.per_device_train_batch_size, args.gradient_accumulation_steps
    # `steps_per_generation` equals the accumulation unless it was set separately
    if args.steps_per_generation == repeats:
        while rows % 2 == 0:
            rows, repeats = rows // 2, repeats * 2
            yield {"per_device_train_batch_size": rows, "gradient_accumulation_steps": repeats}
    if model.load_in_4bit and not model.use_bnb_nested_quant:
        yield {"use_bnb_nested_quant": True}
    if not model.load_in_4bit:
        quantized = {"load_in_4bit": True, "use_bnb_nested_quant": True}
        lora = {} if model.use_peft else {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
        yield lora | quantized
    block = args.transfer_block_size * args.num_generations
    while rows * (repeats // 2) >= block and repeats % 2 == 0 and (rows * repeats // 2) % block == 0:
        repeats //= 2
        yield {"gradient_accumulation_steps": repeats}
    for part in (0.75, 0.5, 0.25):
        yield {"max_completion_length": max(int(args.max_completion_length * part), 16)}


def with_changes(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """
    Copies a recipe with changes.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe. It is not changed.
        changes (`dict`):
            Keys of `SGPOConfig` and `ModelConfig` with new values.
    """
    training, model = copy.copy(recipe.training), copy.copy(recipe.model)
    for key, value in changes.items():
        setattr(training if key in vars(training) else model, key, value)
    if "gradient_accumulation_steps" in changes:
        training.steps_per_generation = changes["gradient_accumulation_steps"]
    return replace(recipe, training=training, model=model)


def in_words(change: dict[str, Any]) -> str:
    """Writes a change as command-line arguments."""
    return " ".join(
        f"--{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )
