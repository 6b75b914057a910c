"""Estimates the memory of a recipe and refuses one that does not fit."""

import os
from functools import cache
from typing import Any

import torch

from ..errors import ConfigError, ModelError
from ..inference.pretrained import loading
from ..recipe import Recipe
from .advice import cheapest_change, in_words
from .architectures import model_config
from .estimate import GIB, Estimate, Estimator, assumed_lengths


def estimate_recipe(recipe: Recipe, path: str, vram_gb: float | None, device: str) -> dict[str, Any]:
    """
    Estimates the peak memory of a recipe.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]), path (`str`):
            The recipe and its file.
        vram_gb (`float`, *optional*):
            Memory that it has to fit into. If `None`, the verdict is `None`.
        device (`str`):
            `"cuda"` or `"cpu"`.

    Returns:
        `dict`: The [`~trl_sgpo.vram.estimate.Estimate`], whether it fits and, if not, the cheapest change that helps.
    """
    name = recipe.model.model_name_or_path
    # The key of a cache: a relative path names another model in another working directory
    place = os.path.abspath(name) if os.path.isdir(name) else name
    estimator, source = _estimator(place, recipe.model.model_revision, device)

    def estimate(changed: Recipe) -> Estimate:
        return estimator(changed, assumed_lengths(changed))

    try:
        with loading(name):  # which it is built from without weights
            memory = estimate(recipe)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ModelError(
            f"The config of {name} describes no model that can be built ({error}): use another."
        ) from error
    result = {"config": path, "model": name, "model_config": source, "vram_gb": vram_gb, "fits": None, "change": None}
    if vram_gb is not None:
        result["fits"] = memory.fits(vram_gb)
        if not result["fits"] and (change := cheapest_change(recipe, vram_gb, estimate)) is not None:
            result["change"], changed = change
            result["peak_with_change"] = changed.peak
    return {**result, **memory.to_dict()}


@cache
def _estimator(name: str, revision: str, device: str) -> tuple[Estimator, str]:
    """One estimator for all recipes of a model, because it caches its simulations."""
    config, source = model_config(name, revision)
    return Estimator(config, device), source


def check_memory(recipe: Recipe) -> None:
    """
    Raises an error, before weights are loaded, if a recipe needs more memory than it states or the GPU has.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe.

    Raises:
        [`ConfigError`]: It does not fit. The message names the cheapest change that makes it fit.
    """
    script, limits = recipe.script, {}
    if script.vram_gb is not None:
        limits["`vram_gb` of the recipe"] = script.vram_gb
    if torch.cuda.is_available():
        limits["this GPU"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    if not script.check_memory or not limits or recipe.training.use_vllm:
        return
    where = min(limits, key=limits.__getitem__)
    try:
        result = estimate_recipe(recipe, recipe.path or "", limits[where], "cuda")
    except ModelError:
        return  # `fetch_model` reports the missing model
    if result["peak"] <= limits[where] * GIB:
        return
    change = "train a smaller model" if result["change"] is None else f"add `{in_words(result['change'])}`"
    raise ConfigError(
        f"Training needs an estimated {result['peak'] / GIB:.1f} GB, more than {where} allows "
        f"({limits[where]:.1f} GB): {change}. `trl-sgpo estimate` shows the parts; `--check_memory false` starts "
        "anyway."
    )
