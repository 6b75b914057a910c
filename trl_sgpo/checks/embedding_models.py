"""Folders of embedding models of sentence-transformers, which have a folder for each of their modules."""

import math
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .adapters import ADAPTER_FILE
from .json_text import parse_json, texts_in
from .repositories import check_model_folder, check_model_settings, is_within


MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
MAX_MODULES = 10
MAX_LAYER = 10**7  # weights that may be missing
MAX_PROMPT = 2_000  # characters that are put before each text
# What settings may say of how the library loads a model. Others choose files, classes and how weights are read
_SETTINGS = (
    "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs",
    "query_length", "document_length",
)  # fmt: skip
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_OF_ARGUMENTS = (
    "dtype", "torch_dtype", "attn_implementation", "add_pooling_layer", "padding_side", "model_max_length",
)  # fmt: skip
_OF_OTHER_INPUTS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(?:activation|linear)\.\w+")


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
        modules = parse_json((directory / "modules.json").read_text(encoding="utf-8"))
        if len(modules) > MAX_MODULES:
            raise ModelError(f"The embedding model {source} has more than {MAX_MODULES} modules: use another one.")
        for module in modules:
            folder = directory / str(module["path"])
            _check_kind(source, str(module["type"]))
            if not is_within(folder, directory):
                raise ModelError(f"The embedding model {source} has a module in {folder}, which is not in its folder.")
            if any(folder.glob("pytorch_model*")) and not (folder / "model.safetensors").is_file():
                raise ModelError(f"The embedding model {source} has pickled weights: save it again as safetensors.")
            if folder.is_dir() and str(module["type"]).endswith(("Dense", "LayerNorm")):
                _check_sizes(source, folder)
            if folder.is_dir() and folder not in folders:
                check_model_folder(folder, source)
                folders.append(folder)
    for folder in folders:
        if (folder / ADAPTER_FILE).is_file():  # which transformers would put on its base, unchecked
            raise ModelError(f"The embedding model {source} is an adapter: merge it into its base, and save that.")
        _check_one_input(source, folder)
    for path in (path for folder in folders for path in folder.glob("sentence_*_config.json")):
        _check_arguments(source, parse_json(path.read_text(encoding="utf-8")))
    path = directory / "config_sentence_transformers.json"
    prompts = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if isinstance(prompts, dict) and prompts.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ModelError(f"{source} is no embedding model but a {prompts['model_type']}: use a SentenceTransformer.")
    if any(len(text) > MAX_PROMPT for text in texts_in(prompts)):
        raise ModelError(f"The embedding model {source} has a prompt of more than 2,000 characters: use another one.")
    return folders


def _check_sizes(source: str, folder: Path) -> None:
    """A layer is made at the size that its settings name, before its weights are read."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings = parse_json(config.read_text(encoding="utf-8")) if config.is_file() else {}
    activation = settings.get("activation_function") if isinstance(settings, dict) else None
    if activation is not None and _ACTIVATION.fullmatch(str(activation)) is None:
        raise ModelError(f"A module of {source} has the activation {activation!r}: use one of torch.nn.")
    sizes = (
        [settings.get(key, 1) for key in ("in_features", "out_features", "dimension")]
        if isinstance(settings, dict)
        else [1]
    )
    there = weights.stat().st_size if weights.is_file() else 0
    if not all(isinstance(size, int) and size >= 1 for size in sizes) or math.prod(sizes) > there + MAX_LAYER:
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
    check_model_settings(source, settings)
    forms, task = settings.get("modality_config"), settings.get("transformer_task")
    if not (forms is None or _is_of_texts(forms)) or task not in (None, "feature-extraction"):
        raise ModelError(f"The embedding model {source} calls other methods of its model: use one that embeds texts.")
    given = {key: value for key, value in settings.items() if key not in (*_SETTINGS, *_ARGUMENTS)}
    for name in _ARGUMENTS:
        arguments = settings.get(name) or {}
        given |= {key: value for key, value in arguments.items() if key not in _OF_ARGUMENTS}
        given |= {key: value for key, value in arguments.items() if not isinstance(value, str | int)}
    if others := [key for key, value in given.items() if value not in (None, {}, [])]:
        raise ModelError(
            f"The embedding model {source} is loaded with `{others[0]}`, which may name files, models or code: leave "
            "it out."
        )


def _is_of_texts(forms: Any) -> bool:
    """Whether a `modality_config` has texts as they are. As messages alone they would go through a template."""
    return (
        isinstance(forms, dict)
        and "text" in forms
        and forms.keys() <= {"text", "message"}
        and all(isinstance(form, dict) and form.get("method") == "forward" for form in forms.values())
    )


def _check_one_input(source: str, folder: Path) -> None:
    """A model of texts has a tokenizer alone. As a processor, a library takes any of its classes."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in _OF_OTHER_INPUTS:
        if (folder / name).exists():
            raise ModelError(f"The embedding model {source} has the file {name}: use a model that embeds texts.")
    for name in ("config.json", "tokenizer_config.json"):
        settings = parse_json((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        if not isinstance(settings, dict):
            continue
        if settings.get("processor_class") is not None:
            raise ModelError(f"The embedding model {source} names a `processor_class` in {name}: leave it out.")
        if settings.get("model_type") in PROCESSOR_MAPPING_NAMES:
            raise ModelError(
                f"The embedding model {source} is of the type `{settings['model_type']}`, which has a processor: use "
                "one that embeds texts."
            )
