"""
The one place that loads models, adapters, tokenizers and configs: no code of a repository runs, and weights are read
from safetensors only.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.remote_code import remote_code_problems
from ..errors import ConfigError, ModelError


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def _safe(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that run no code of a repository."""
    if problems := remote_code_problems(kwargs):
        raise ConfigError(problems[0])
    return {**kwargs, "trust_remote_code": False}


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

    return AutoTokenizer.from_pretrained(source, **_safe(kwargs))


def load_config(source: str | Path, **kwargs: Any) -> "PretrainedConfig":
    """Loads the config of a model. It takes what `AutoConfig.from_pretrained` takes."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, **_safe(kwargs))


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

    return (kind or AutoModelForCausalLM).from_pretrained(source, **(_safe(kwargs) | {"use_safetensors": True}))


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
