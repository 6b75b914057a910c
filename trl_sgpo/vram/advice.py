"""The cheapest change by which a recipe fits into memory."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..method.block_checks import check_block
from ..recipe import Recipe
from .estimate import PROBLEM_TOKENS, Estimate


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
    for kind in _KINDS:
        for change in kind(recipe):
            changed = estimate(with_changes(recipe, change))
            if changed.fits(vram_gb):
                return change, changed
    together: dict[str, Any] = {}
    for kind in _KINDS:
        for change in kind(with_changes(recipe, together)):
            together |= change
            if together != change:
                changed = estimate(with_changes(recipe, together))
                if changed.fits(vram_gb):
                    return together, changed
    return None


def _checkpointing(recipe: Recipe) -> Iterator[dict[str, Any]]:
    if not recipe.training.gradient_checkpointing:
        yield {"gradient_checkpointing": True}


def _optimizer(recipe: Recipe) -> Iterator[dict[str, Any]]:
    if "8bit" not in str(recipe.training.optim).casefold():
        yield {"optim": "paged_adamw_8bit"}


def _smaller_micro_batches(recipe: Recipe) -> Iterator[dict[str, Any]]:
    rows, repeats = _batch(recipe)
    while _accumulates_all(recipe) and rows % 2 == 0:
        rows, repeats = rows // 2, repeats * 2
        yield _of_batch(rows, repeats)


def _quantization(recipe: Recipe) -> Iterator[dict[str, Any]]:
    model = recipe.model
    if model.load_in_4bit and not model.use_bnb_nested_quant:
        yield {"use_bnb_nested_quant": True}
    if not model.load_in_4bit:
        quantized = {"load_in_4bit": True, "use_bnb_nested_quant": True}
        lora = {} if model.use_peft else {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
        yield lora | quantized


def _fewer_problems(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fewer problems in a step, as long as it has a block."""
    rows, repeats = _batch(recipe)
    block = recipe.training.transfer_block_size * recipe.training.num_generations
    while repeats % 2 == 0 and (rows * repeats // 2) % block == 0:
        repeats //= 2
        yield {"gradient_accumulation_steps": repeats}


def _shorter_problems(recipe: Recipe) -> Iterator[dict[str, Any]]:
    tokens = recipe.script.max_problem_tokens or PROBLEM_TOKENS
    for part in (0.75, 0.5):
        yield {"max_problem_tokens": max(int(tokens * part), 1)}


def _fewer_rows(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fewer rows of each problem, and as many problems."""
    group, (rows, repeats) = recipe.training.num_generations, _batch(recipe)
    while _accumulates_all(recipe) and group % 2 == 0 and (rows * repeats) % 2 == 0:
        group //= 2
        rows, repeats = (rows, repeats // 2) if repeats % 2 == 0 else (rows // 2, repeats)
        change = {"num_generations": group, **_of_batch(rows, repeats)}
        changed = with_changes(recipe, change).training
        try:
            check_block(changed)
        except ConfigError:
            return
        if recipe.training.own_strategies > 0 and changed.own_strategies == 0:
            return  # only plain rows, or those of a bank, would be left
        yield change


def _shorter_completions(recipe: Recipe) -> Iterator[dict[str, Any]]:
    for part in (0.75, 0.5, 0.25):
        yield {"max_completion_length": max(int(recipe.training.max_completion_length * part), 16)}


_KINDS = (
    *(_checkpointing, _optimizer, _smaller_micro_batches, _quantization),  # these only cost time
    *(_fewer_problems, _shorter_problems, _fewer_rows, _shorter_completions),
)
"""Changes of each kind, the smallest first. The cheapest kind comes first."""


def _batch(recipe: Recipe) -> tuple[int, int]:
    return recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps


def _of_batch(rows: int, repeats: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": repeats}


def _accumulates_all(recipe: Recipe) -> bool:
    """Whether an optimizer step trains on what is generated at once, unless `steps_per_generation` was set apart."""
    return recipe.training.steps_per_generation == recipe.training.gradient_accumulation_steps


def with_changes(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """
    Copies a recipe with changes.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe. It is not changed.
        changes (`dict`):
            Keys of recipes with new values.
    """
    parts = training, model, script = copy.copy(recipe.training), copy.copy(recipe.model), copy.copy(recipe.script)
    for key, value in changes.items():
        setattr(next(part for part in parts if key in vars(part)), key, value)
    if "gradient_accumulation_steps" in changes:
        training.steps_per_generation = changes["gradient_accumulation_steps"]
    return replace(recipe, training=training, model=model, script=script)


def in_words(change: dict[str, Any]) -> str:
    """Writes a change as command-line arguments."""
    return " ".join(
        f"--{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )
