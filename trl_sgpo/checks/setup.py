"""What a run needs of this machine: packages, directories and files, an account on the Hub."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_token
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from ..errors import ConfigError
from .adapters import ADAPTER_FILE
from .origin import what_to_mend
from .paths import check_directory, problem_file
from .settings import FILES


Problems = list[tuple[str, str]]
"""Keys of a recipe and what is wrong with their values."""

PACKAGES = {
    "deepspeed": ("deepspeed", "deepspeed"),
    "load_in_4bit": ("bitsandbytes", "'trl-sgpo[quantization]'"),
    "load_in_8bit": ("bitsandbytes", "'trl-sgpo[quantization]'"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_vllm": ("vllm", "'trl[vllm]'"),
}
"""Keys, the modules they need and what to install."""


def setup_problems(values: Mapping[str, Any]) -> Problems:
    """
    Finds what this machine lacks for training, before anything is downloaded or loaded.

    Args:
        values (`Mapping`):
            The values of all keys of a recipe.

    Returns:
        `list[tuple[str, str]]`: Keys, and what is missing with the fix.
    """
    return [
        *_package_problems(values),
        *_tracker_problems(values["report_to"]),
        *_attention_problems(values["attn_implementation"]),
        *path_problems(values),
        *_hub_problems(values),
    ]


def path_problems(values: Mapping[str, Any]) -> Problems:
    """
    Finds files that do not exist and directories that cannot be written.

    Args:
        values (`Mapping`):
            The values of all keys of a recipe.

    Returns:
        `list[tuple[str, str]]`: Keys, and what is wrong with the fix.
    """
    return [*_file_problems(values), *_directory_problems(values)]


def _directory_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("output_dir", "bank_path") if values["use_bank"] else ("output_dir",):
        try:
            if values[key] is not None:
                check_directory(key, values[key])
        except ConfigError as error:
            yield key, str(error)


def _package_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, (module, package) in PACKAGES.items():
        if values[key] and find_spec(module) is None:
            yield key, f"`{key}` needs {module}, which is not installed: run `pip install {package}`, or leave it out."


def _tracker_problems(report_to: str | Sequence[str] | None) -> Problems:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in ("all", "none", *get_available_reporting_integrations())]
    problems = []
    for name in names:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()  # one that is not installed says so
        except Exception as error:
            message = what_to_mend(error)
            if message is None:
                raise
            problems.append(("report_to", f"`report_to` is {name}: {message.rstrip('.')}. Or set it to none."))
    return problems


def _attention_problems(implementation: str | None) -> Problems:
    if implementation is None or "/" in implementation:  # a kernel of the Hub
        return []
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation=implementation)
    except Exception as error:
        message = what_to_mend(error)
        if message is None:
            raise
        text = f"`attn_implementation` is {implementation}: {message.rstrip('.')}. Or set it to sdpa."
        return [("attn_implementation", text)]
    return []


def _file_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in (*FILES, "warmstart_file"):
        if isinstance(values[key], str) and not values[key].startswith("{") and not os.path.isfile(values[key]):
            yield key, f"`{key}` is {values[key]}, but there is no such file."
    name = values["dataset_name"]
    file = None if name is None or values["datasets"] else problem_file(name)
    if file is not None and not os.path.isfile(file):
        yield "dataset_name", f"`dataset_name` is {name}, but there is no such file."
    model = values["model_name_or_path"]
    folder = Path(os.path.expanduser(model or ""))
    if model is None:
        yield "model_name_or_path", "Name the model: set `model_name_or_path` to a directory or Hub id."
    elif model.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        yield "model_name_or_path", f"`model_name_or_path` is {model}, but there is no such directory."
    elif (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
        yield (
            "model_name_or_path",
            f"`model_name_or_path` is {model}, an adapter, where a whole model is needed: merge it with `trl-sgpo "
            f"export --model {model} --merge --output_dir MERGED` and name MERGED, or go on training it with its own "
            "recipe and `--resume_from_checkpoint true`.",
        )


def _hub_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not values["push_to_hub"]:
        return
    later = "or leave it out and run `trl-sgpo push` later."
    if constants.is_offline_mode():
        yield "push_to_hub", f"`push_to_hub` needs the network: unset HF_HUB_OFFLINE, {later}"
    elif values["hub_token"] is None and get_token() is None:
        yield "push_to_hub", f"`push_to_hub` needs an account: run `hf auth login`, {later}"
