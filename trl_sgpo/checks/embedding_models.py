"""Folders of embedding models of sentence-transformers, which have a folder for each of their modules."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .json_text import parse_json, texts_in
from .repositories import check_model_folder, check_model_settings, is_within


MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
MAX_LAYER = 10**7  # weights that may be missing
MAX_PROMPT = 2_000  # characters that are put before each text
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_NAMES = ("file", "folder", "path", "vocab", "merges", "kwargs")


def check_embedding_folder(source: str, directory: Path) -> list[Path]:
    """
    Checks the folder of an embedding model before sentence-transformers reads it.

    Args:
        source (`str`):
            Directory or Hub id, for messages.
        directory (`Path`):
            The folder.

    Returns:
        `list[Path]`: The folder and those of its modules.

    Raises:
        [`ModelError`]: A module is none of those that load no others, is in no folder of the model, or has pickled
            weights; a folder is refused by [`check_model_folder`], or settings name files or models.
    """
    check_model_folder(directory, source)
    folders = [directory]
    if (directory / "modules.json").is_file():
        for module in parse_json((directory / "modules.json").read_text(encoding="utf-8")):
            folder = directory / str(module["path"])
            _check_kind(source, str(module["type"]))
            if not is_within(folder, directory):
                raise ModelError(f"The embedding model {source} has a module in {folder}, which is not in its folder.")
            if (folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").is_file():
                raise ModelError(f"The embedding model {source} has pickled weights: save it again as safetensors.")
            if folder != directory and folder.is_dir():
                check_model_folder(folder, source)
                _check_sizes(source, folder)
                folders.append(folder)
    for path in (path for folder in folders for path in folder.glob("sentence_*_config.json")):
        _check_arguments(source, parse_json(path.read_text(encoding="utf-8")))
    path = directory / "config_sentence_transformers.json"
    prompts = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(len(text) > MAX_PROMPT for text in texts_in(prompts)):
        raise ModelError(f"The embedding model {source} has a prompt of more than 2,000 characters: use another one.")
    return folders


def _check_sizes(source: str, folder: Path) -> None:
    """A layer is made at the size that its settings name, before its weights are read."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings = parse_json(config.read_text(encoding="utf-8")) if config.is_file() else {}
    sizes = [settings.get(key, 1) for key in ("in_features", "out_features")] if isinstance(settings, dict) else [1]
    there = weights.stat().st_size if weights.is_file() else 0
    if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) > there + MAX_LAYER:
        raise ModelError(
            f"A module of the embedding model {source} is larger than its weights in {folder}: use another."
        )


def _check_kind(source: str, kind: str) -> None:
    package, _, name = kind.rpartition(".")
    if package.partition(".")[0] != "sentence_transformers" or name not in MODULES:
        raise ModelError(
            f"The embedding model {source} has the module {kind!r}: use one of {', '.join(MODULES)} of "
            "sentence-transformers."
        )


def _check_arguments(source: str, settings: dict[str, Any]) -> None:
    """Arguments with which transformers loads the model must name nothing that it reads or writes."""
    check_model_settings(source, settings)
    methods = {method for _, method in _values("method", settings)} | {settings.get("transformer_task")}
    if not methods <= {None, "forward", "feature-extraction"}:
        raise ModelError(f"The embedding model {source} calls other methods of its model: use one that embeds.")
    given = {"tokenizer_name_or_path": settings.get("tokenizer_name_or_path")}
    for name in _ARGUMENTS:
        given |= settings.get(name) or {}
    for key, value in given.items():
        names = value is not None and key.rpartition("_")[2] in _NAMES
        if names or any("/" in text for text in texts_in(value)):
            raise ModelError(
                f"The embedding model {source} is loaded with `{key}`, which may name files or models: leave it out."
            )


def _values(name: str, settings: Any) -> Iterator[tuple[str, Any]]:
    """All values under a key, at any depth."""
    if isinstance(settings, dict):
        yield from ((key, value) for key, value in settings.items() if key == name)
    for part in settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ():
        yield from _values(name, part)
