"""
The one place that loads models, adapters, tokenizers, configs and embedding models: no code of a repository runs, and
weights are read from safetensors only.

What this file relies on in transformers 5.24: `integrations.deepspeed._hf_deepspeed_config_weak_ref`.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.adapters import check_adapter_patterns
from ..checks.embedding_models import check_embedding_folder
from ..checks.growth import check_loaded
from ..checks.json_text import parse_json
from ..checks.remote_code import remote_code_problems
from ..checks.repositories import AGAIN
from ..errors import ConfigError, ModelError
from ..speed.patches import CountedPatch
from .adapter_size import check_adapter_size
from .checked import checked, checked_folder
from .model_files import ADAPTER_WEIGHTS


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OF_EMBEDDING_MODELS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def _safe(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that run no code of a repository."""
    if problems := remote_code_problems(kwargs):
        raise ConfigError(problems[0])
    return {**kwargs, "trust_remote_code": False}


def _set_question_seconds(seconds: int) -> None:
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _question_seconds() -> int:
    from transformers import dynamic_module_utils

    return dynamic_module_utils.TIME_OUT_REMOTE_CODE


NO_QUESTION = CountedPatch(_question_seconds, _set_question_seconds, 0)
"""Libraries that load a further model do not pass `trust_remote_code`: with 0, transformers refuses and never asks."""


def _check_weights(directory: Path) -> None:
    """Raises [`ModelError`] if a file of weights in a directory is no safetensors file, or a shard is missing."""
    from safetensors import SafetensorError, safe_open

    files, index = [directory / WEIGHTS, directory / ADAPTER_WEIGHTS], directory / INDEX
    if index.is_file() and not files[0].is_file():
        try:
            shards = {str(name) for name in parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of weights: {AGAIN}") from error
        files += [directory / name for name in sorted(shards)]
        if missing := [str(path) for path in files[2:] if not path.is_file()]:
            raise ModelError(f"{missing[0]} is missing, which {INDEX} names: {AGAIN}")
    for path in files:
        try:
            if path.is_file():
                with safe_open(path, framework="pt"):
                    pass
        except SafetensorError as error:
            raise ModelError(f"{path} is no complete safetensors file ({error}): {AGAIN}") from error


@contextmanager
def readable_weights(source: str | Path) -> Iterator[None]:
    """
    Within the context, a library reads weights.

    Args:
        source (`str` or `Path`):
            Directory or Hub id.

    Raises:
        [`ModelError`]: Files of the directory cannot be read, or the weights have other sizes than its configuration.
    """
    _check_weights(Path(source))
    try:
        yield
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ModelError(
            f"The weights in {source} have other sizes than its configuration, or the base model of an adapter, says: "
            f"{AGAIN}"
        ) from error


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """
    Within the context, a library loads a model, or runs it for the first time. Errors name the model, and do not
    advise to set `trust_remote_code`, which is refused here.

    Args:
        source (`str` or `Path`):
            Directory or Hub id.

    Raises:
        [`ModelError`]: A value in its files has the wrong type, or does not fit the others.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    malformed = (
        SafetensorError, StrictDataclassError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
        AssertionError, re.error, FileNotFoundError,
    )  # fmt: skip
    try:
        with NO_QUESTION:
            yield
    except malformed as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source} can be loaded only with code from its repository, which is never run: name a model whose "
                "architecture and tokenizer are part of transformers."
            ) from error
        # Libraries raise ValueError with a message for users, and TypeError for arguments that are not of the files
        told = isinstance(error, ValueError) and not isinstance(error, JSONDecodeError)
        if told or "unexpected keyword argument" in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(f"The files of {source} cannot be loaded ({reason}): {AGAIN}") from error


@contextmanager
def whole_on_this_rank() -> Iterator[None]:
    """
    Within the context, models are loaded by this rank alone. With DeepSpeed ZeRO-3, transformers partitions each model
    that it loads, and the first rank waits until all others have loaded it too.
    """
    from transformers.integrations import deepspeed

    settings = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings


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
    directory, kwargs = checked_folder(source, kwargs)
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(directory, **kwargs)
    place = directory / (kwargs.get("subfolder") or "")
    check_loaded(source, tokenizer, (place / "tokenizer.json").is_file() and not any(place.glob("*.model")))
    tokenizer.name_or_path = str(source)  # instead of a snapshot's folder
    return tokenizer


def load_config(source: str | Path, **kwargs: Any) -> "PretrainedConfig":
    """Loads the config of a model. It takes what `AutoConfig.from_pretrained` takes."""
    from transformers import AutoConfig, PreTrainedConfig

    kwargs = _safe(kwargs)
    kwargs = checked(source, kwargs)
    with loading(source):
        config = AutoConfig.from_pretrained(source, **kwargs)
        text = config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise TypeError(f"the config of its language model is {type(text).__name__}")
        config.return_dict = True
        return config


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
    kwargs = checked(source, kwargs, weights=True)
    with loading(source), readable_weights(source):
        model = (kind or AutoModelForCausalLM).from_pretrained(source, **kwargs)
    model.config.return_dict = True
    if kind is None:
        model.config.is_encoder_decoder = False
    return model


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
        [`ModelError`]: The adapter has no `adapter_model.safetensors`, names other models, has patterns that may
            match for ever, or asks for many more weights than it has.
    """
    from peft import PeftConfig, PeftModel

    folder, kwargs = checked_folder(directory, kwargs)
    with loading(directory), readable_weights(directory):
        place = {key: kwargs[key] for key in ("revision", "local_files_only") if key in kwargs}
        config = PeftConfig.from_pretrained(directory, **place)
        check_adapter_patterns(directory, config.to_dict(), [name for name, _ in model.named_modules()])
        weights = folder / (kwargs.get("subfolder") or "") / ADAPTER_WEIGHTS
        if weights.is_file():
            check_adapter_size(directory, config, model, weights.stat().st_size)
        with warnings.catch_warnings():
            # Of weights that are not in the file, which would be those of an untrained adapter
            warnings.filterwarnings("error", message=".*Found missing adapter keys", category=UserWarning)
            try:
                return PeftModel.from_pretrained(model, directory, config=config, **kwargs)
            except UserWarning as warning:
                raise ModelError(
                    f"{ADAPTER_WEIGHTS} in {directory} has not all weights that its settings describe "
                    f"({str(warning)[:200]}): {AGAIN}"
                ) from warning


def load_adapter_config(directory: str | Path) -> "PeftConfig":
    """Loads the config of a saved adapter."""
    from peft import PeftConfig

    kwargs = checked(directory, {})
    with loading(directory):
        return PeftConfig.from_pretrained(directory, **kwargs)


def load_sentence_transformer(source: str, cached_only: bool = False) -> "SentenceTransformer":
    """
    Loads an embedding model on the CPU, on this rank alone. Of a Hub repository, neither code nor pickles are
    downloaded.

    Args:
        source (`str`):
            Directory or Hub id.
        cached_only (`bool`, *optional*, defaults to `False`):
            Whether to read a Hub repository from the cache alone.

    Raises:
        [`ModelError`]: Its modules are not those of sentence-transformers or not in its folder, or their weights are
            no safetensors.
    """
    from huggingface_hub import snapshot_download
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    if Path(source).is_dir():
        directory = Path(source)
    else:
        repository = source if "/" in source else f"sentence-transformers/{source}"
        directory = Path(
            snapshot_download(repository, allow_patterns=_OF_EMBEDDING_MODELS, local_files_only=cached_only)
        )
    for folder in check_embedding_folder(source, directory):
        _check_weights(folder)
    with loading(source), readable_weights(directory), whole_on_this_rank():
        model = SentenceTransformer(
            str(directory),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    for module in model:
        if isinstance(module, Transformer):
            # Otherwise the library renders the model's chat template for each text
            module.modality_config.pop("message", None)
            module.input_formatter.supported_modalities = list(module.modality_config)
    return model
