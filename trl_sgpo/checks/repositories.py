"""Folders of models and datasets that someone else wrote: they name no files outside, and no adapter loads others."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError


MAX_LAYERS = 10_000

_LAYERS = re.compile(r"(?:layers?|blocks|stages|experts)(?:_|$)|depth")
_CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".gguf")
_TOKENIZER = "tokenizer_config.json"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OTHER_MODELS = ("shadow_model", "adapters", "prompt_tuning_init_state_dict_path", "megatron_config")
_TEXTS = ("chat_template", "added_tokens_decoder")


def is_within(file: str | Path, directory: str | Path) -> bool:
    """Whether a file, after links, lies in a directory. Files of a Hub snapshot may be links to the cache's blobs."""
    folder = Path(directory).resolve()
    folders = [folder]
    if folder.parent.name == "snapshots":
        folders.append(folder.parent.parent / "blobs")
    return any(Path(file).resolve().is_relative_to(allowed) for allowed in folders)


def check_model_folder(source: str | Path) -> None:
    """
    Checks a model's folder before a library reads it.

    Args:
        source (`str` or `Path`):
            The folder. What is no folder, such as a Hub id, is left to the library.

    Raises:
        [`ModelError`]: A file other than weights is a link out of the folder, the tokenizer's settings name a file of
            this machine, or those of an adapter name other models or have no weights in safetensors.
    """
    directory = Path(source)
    if not directory.is_dir():
        return
    for path in [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]:
        if path.is_file() and path.suffix not in _WEIGHTS and not is_within(path, directory):
            raise ModelError(f"{path} is a link out of the model's folder: replace it by the file.")
    if (directory / _CONFIG).is_file():
        check_model_settings(source, _read(directory / _CONFIG))
    if (directory / _TOKENIZER).is_file():
        check_tokenizer_settings(source, _read(directory / _TOKENIZER))
    if (directory / _ADAPTER).is_file():
        named = [key for key in _OTHER_MODELS if _read(directory / _ADAPTER).get(key)]
        if named:
            raise ModelError(f"The adapter in {directory} names `{named[0]}`, which would load more than its weights.")
        if not (directory / _ADAPTER_WEIGHTS).is_file():
            raise ModelError(
                f"The adapter in {directory} has no {_ADAPTER_WEIGHTS}, and other files of weights can run code when "
                "they are read: save it again with `save_pretrained`."
            )


def check_model_settings(source: str | Path, settings: Any) -> None:
    """
    Checks the number of layers, which a library builds one by one before it looks for their weights.

    Args:
        source (`str` or `Path`):
            Directory or Hub id, for the message.
        settings (`dict`):
            Content of its `config.json`.

    Raises:
        [`ModelError`]: There are more than 10,000.
    """
    if isinstance(settings, list):
        for part in settings:
            check_model_settings(source, part)
    elif isinstance(settings, dict):
        for key, value in settings.items():
            if isinstance(value, int) and value > MAX_LAYERS and _LAYERS.search(str(key)) is not None:
                raise ModelError(f"The config of {source} has `{key}: {value:.0e}`: name a model of real size.")
            check_model_settings(source, value)


def check_tokenizer_settings(source: str | Path, settings: dict[str, Any]) -> None:
    """
    Checks that a tokenizer reads no file but those of its repository.

    Args:
        source (`str` or `Path`):
            Directory or Hub id, for the message.
        settings (`dict`):
            Content of its `tokenizer_config.json`.

    Raises:
        [`ModelError`]: A setting names a file of this machine.
    """
    for key, value in settings.items():
        if key in _TEXTS:
            continue
        is_file_name = key in ("vocab", "merges") and isinstance(value, str)
        if is_file_name or any(map(_is_path_of_a_file, _texts(value))):
            raise ModelError(
                f"The tokenizer of {source} names a file as `{key}` in its {_TOKENIZER}: use one whose vocabulary is "
                "in its own files, such as tokenizer.json."
            )


def _is_path_of_a_file(text: str) -> bool:
    return os.path.basename(text) != text and "\0" not in text and os.path.isfile(text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: save the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: save the model again.")
    return content
