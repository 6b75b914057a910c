"""Loads what a run saved: an adapter with its base as it was in training, 4-bit weights included, or a whole model."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..errors import ModelError
from ..hub.push import adapter_base
from ..speed.quantization import keep_4bit_layout
from .weights import require_model


ADAPTER_FILE = "adapter_config.json"


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter rather than a whole model."""
    return Path(directory, ADAPTER_FILE).is_file()


def how_trained(model: PreTrainedModel) -> dict[str, Any]:
    """
    What has to be known of an adapter's base to load it again as it was: adapters fit the rounded weights they were
    trained on.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.

    Returns:
        `dict`: With `dtype` and, where bitsandbytes quantized the base, `quantization_config`, as JSON.
    """
    known: dict[str, Any] = {"dtype": str(model.config.dtype or torch.float32).removeprefix("torch.")}
    quantization = vars(model.config).get("quantization_config")
    if isinstance(quantization, BitsAndBytesConfig):  # other quantized weights say in their own config what they are
        known["quantization_config"] = quantization.to_diff_dict()
    return known


def base_of(directory: str | Path) -> str:
    """
    Where the base of an adapter is.

    Args:
        directory (`str` or `Path`):
            Directory of the adapter.

    Returns:
        `str`: What to pass to `from_pretrained`.

    Raises:
        [`ModelError`]: There are no such weights.
    """
    base = adapter_base(directory)
    if base is None:
        raise ModelError(f"{directory} holds no adapter: name the folder of one.")
    return require_model(base)


def load_base(name: str, trained_on: dict[str, Any] | None, **model_kwargs: Any) -> PreTrainedModel:
    """
    Loads the base of an adapter as it was in training.

    Args:
        name (`str`):
            A directory or Hub id.
        trained_on (`dict`, *optional*):
            What [`how_trained`] said of it.
        **model_kwargs:
            Passed on to `from_pretrained`, and winning over what `trained_on` says.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        [`ModelError`]: Its weights were in 4 bits in training, and bitsandbytes is not installed.
    """
    if model_kwargs.get("dtype") == "auto" and trained_on is not None:
        del model_kwargs["dtype"]
    kwargs = {**(trained_on or {}), **model_kwargs}
    if isinstance(kwargs.get("quantization_config"), dict):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                f"{name} was quantized in training, and its adapter fits these weights only: run "
                "`pip install 'trl-sgpo[quantization]'`."
            )
        kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(kwargs["quantization_config"])
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    if model.device.type == "cpu":
        keep_4bit_layout(model)
    return model
