"""Configs of models: from a directory, the Hugging Face cache, the Hub, or the table of this package."""

import json
from importlib.resources import files
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..errors import ModelError
from ..inference.pretrained import load_config
from ..inference.weights import LAB_MODEL, lab_seed, require_model


def model_config(name: str, revision: str | None = None) -> tuple[PreTrainedConfig, str]:
    """
    Finds a model's config without its weights.

    Args:
        name (`str`):
            A local directory or a Hub id.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `tuple[PreTrainedConfig, str]`: The config and its source.

    Raises:
        `ModelError`: If no config is found.
    """
    try:
        source = require_model(name)
        return load_config(source, revision=revision), source
    except (ModelError, OSError) as error:
        known, key = architectures(), name if lab_seed(name) is None else LAB_MODEL
        if key not in known:
            raise ModelError(f"The config of '{name}' cannot be read: {' '.join(str(error).split())}") from error
        settings = dict(known[key])
        return AutoConfig.for_model(settings.pop("model_type"), **settings), "the table of this package"


def architectures() -> dict[str, dict[str, Any]]:
    """Configs of the recipes' models by Hub id, reduced to the keys that memory depends on."""
    return json.loads(files("trl_sgpo.vram").joinpath("architectures.json").read_text())
