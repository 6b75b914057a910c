"""
The one place that loads models, adapters, tokenizers, configs and embedding models: no code of a repository runs, and
weights are read from safetensors only.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.remote_code import remote_code_problems
from ..errors import ConfigError, ModelError
from .model_files import ADAPTER_WEIGHTS


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_OF_EMBEDDING_MODELS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def _safe(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that run no code of a repository."""
    if problems := remote_code_problems(kwargs):
        raise ConfigError(problems[0])
    return {**kwargs, "trust_remote_code": False}


@contextmanager
def _without_code(source: str | Path) -> Iterator[None]:
    """Replaces the advice to set `trust_remote_code`, which is refused here."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{source} can be loaded only with code from its repository, which is never run: name a model whose "
            "architecture and tokenizer are part of transformers."
        ) from error


def load_tokenizer(source: str | Path, **kwargs: Any) -> "PreTrainedTokenizerBase":
    """
    Loads a tokenizer.

    Args:
        source (`str` or `Path`):
            Directory or Hub id.
        **kwargs:
            What `AutoTokenizer.from_pretrained` takes.
    """
    from transformers import AutoTokenizer

    kwargs = _safe(kwargs)
    with _without_code(source):
        return AutoTokenizer.from_pretrained(source, **kwargs)


def load_config(source: str | Path, **kwargs: Any) -> "PretrainedConfig":
    """Loads the config of a model. It takes what `AutoConfig.from_pretrained` takes."""
    from transformers import AutoConfig

    kwargs = _safe(kwargs)
    with _without_code(source):
        return AutoConfig.from_pretrained(source, **kwargs)


def load_model(source: str | Path, kind: Any = None, **kwargs: Any) -> "PreTrainedModel":
    """
    Loads a model.

    Args:
        source (`str` or `Path`):
            Directory or Hub id.
        kind (`type`, *optional*):
            Auto class, `AutoModelForCausalLM` by default.
        **kwargs:
            What its `from_pretrained` takes.
    """
    from transformers import AutoModelForCausalLM

    kwargs = _safe(kwargs) | {"use_safetensors": True}
    with _without_code(source):
        return (kind or AutoModelForCausalLM).from_pretrained(source, **kwargs)


def load_adapter(model: "PreTrainedModel", directory: str | Path, **kwargs: Any) -> "PeftModel":
    """
    Puts a saved adapter on a model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.
        directory (`str` or `Path`):
            Directory of the adapter.
        **kwargs:
            What `PeftModel.from_pretrained` takes.

    Raises:
        [`ModelError`]: The adapter has no `adapter_model.safetensors`.
    """
    from peft import PeftModel

    if not Path(directory, ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"The adapter in {directory} has no {ADAPTER_WEIGHTS}, and other files of weights can run code when they "
            "are read: save it again with `save_pretrained`."
        )
    return PeftModel.from_pretrained(model, directory, **kwargs)


def load_adapter_config(directory: str | Path) -> "PeftConfig":
    """Loads the config of a saved adapter."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(directory)


def load_sentence_transformer(source: str) -> "SentenceTransformer":
    """
    Loads an embedding model on the CPU. Of a Hub repository, neither code nor pickles are downloaded.

    Args:
        source (`str`):
            Directory or Hub id.

    Raises:
        [`ModelError`]: Its modules are not those of sentence-transformers, or their weights are no safetensors.
    """
    from huggingface_hub import snapshot_download
    from sentence_transformers import SentenceTransformer

    if Path(source).is_dir():
        directory = Path(source)
    else:
        repository = source if "/" in source else f"sentence-transformers/{source}"
        directory = Path(snapshot_download(repository, allow_patterns=_OF_EMBEDDING_MODELS))
    if (directory / "modules.json").is_file():
        for module in json.loads((directory / "modules.json").read_text(encoding="utf-8")):
            _check_module(source, directory / str(module["path"]), str(module["type"]))
    with _without_code(source):
        return SentenceTransformer(
            str(directory), device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )


def _check_module(source: str, directory: Path, kind: str) -> None:
    if not kind.startswith("sentence_transformers."):
        raise ModelError(f"The embedding model {source} names code that is not sentence-transformers' own ({kind!r}).")
    if (directory / "pytorch_model.bin").is_file() and not (directory / "model.safetensors").is_file():
        raise ModelError(f"The embedding model {source} has pickled weights: save it again as safetensors.")
