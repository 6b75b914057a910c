"""Loads what a run saved: a whole model, or an adapter on its base model in the precision of training."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..checks.json_text import read_json
from ..errors import ModelError
from ..speed.quantization import keep_4bit_layout
from .model_files import ADAPTER_FILE, CONFIG, WARMSTART_DIRECTORY
from .pretrained import load_model
from .weights import check_one_form, require_model


def is_adapter(directory: str | Path) -> bool:
    """
    Whether a directory holds an adapter rather than a whole model.

    Raises:
        [`ModelError`]: It holds both.
    """
    check_one_form(directory)
    return Path(directory, ADAPTER_FILE).is_file()


def adapter_base(directory: str | Path) -> str | None:
    """
    The base model that an adapter was trained on.

    Args:
        directory (`str` or `Path`):
            Directory of a model or an adapter.

    Returns:
        `str` or `None`: A directory, a Hub id, or `None` if this is no adapter. Of a warm-started model, the one in
        the run's own folder, which may have been moved.

    Raises:
        [`ModelError`]: The directory holds an adapter and a whole model, or the adapter's config cannot be read.
    """
    if not is_adapter(directory):
        return None
    try:
        base = read_json(Path(directory, ADAPTER_FILE))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{Path(directory, ADAPTER_FILE)} cannot be read: save the adapter again.") from error
    if not isinstance(base, str):
        raise ModelError(f"{Path(directory, ADAPTER_FILE)} names no base model: set `base_model_name_or_path` in it.")
    if Path(base).name == WARMSTART_DIRECTORY:  # other folders beside it, of the base's name, may be of other runs
        for run in (Path(directory), Path(directory).resolve().parent):
            beside = run / WARMSTART_DIRECTORY
            if (beside / CONFIG).is_file() and not (Path(base).is_dir() and beside.samefile(base)):
                return str(beside)
    return base


def how_trained(model: PreTrainedModel) -> dict[str, Any]:
    """
    Data type and quantization of the base model an adapter was trained on. Valid for these weights only.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.

    Returns:
        `dict`: With `dtype` and, where bitsandbytes quantized the base, `quantization_config`, as JSON.
    """
    known: dict[str, Any] = {"dtype": str(model.config.dtype or torch.float32).removeprefix("torch.")}
    quantization = vars(model.config).get("quantization_config")
    if isinstance(quantization, BitsAndBytesConfig):  # other quantized weights are described by their config
        known["quantization_config"] = quantization.to_diff_dict()
    return known


def base_of(directory: str | Path) -> str:
    """
    Finds the weights of an adapter's base model.

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
    Loads the base model of an adapter in the data type and quantization of training.

    Args:
        name (`str`):
            A directory or Hub id.
        trained_on (`dict`, *optional*):
            Result of [`how_trained`].
        **model_kwargs:
            Passed on to `from_pretrained`, and override `trained_on`.

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
    model = load_model(name, **kwargs)
    if model.device.type == "cpu":
        keep_4bit_layout(model)
    return model
