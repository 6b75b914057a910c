"""Folders of embedding models of sentence-transformers, which have a folder for each of their modules."""

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .repositories import check_model_folder, check_model_settings, is_within, texts_in


MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
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
        for module in json.loads((directory / "modules.json").read_text(encoding="utf-8")):
            folder = directory / str(module["path"])
            _check_kind(source, str(module["type"]))
            if not is_within(folder, directory):
                raise ModelError(f"The embedding model {source} has a module in {folder}, which is not in its folder.")
            if (folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").is_file():
                raise ModelError(f"The embedding model {source} has pickled weights: save it again as safetensors.")
            if folder != directory and folder.is_dir():
                check_model_folder(folder, source)
                folders.append(folder)
    for path in (path for folder in folders for path in folder.glob("sentence_*_config.json")):
        _check_arguments(source, json.loads(path.read_text(encoding="utf-8")))
    return folders


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
    given = {"tokenizer_name_or_path": settings.get("tokenizer_name_or_path")}
    for name in _ARGUMENTS:
        given |= settings.get(name) or {}
    for key, value in given.items():
        names = value is not None and key.rpartition("_")[2] in _NAMES
        if names or any("/" in text for text in texts_in(value)):
            raise ModelError(
                f"The embedding model {source} is loaded with `{key}`, which may name files or models: leave it out."
            )
