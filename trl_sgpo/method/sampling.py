"""Which generation settings training can work with: rollouts must be samples of the policy that is trained."""

from typing import Any

from transformers import GenerationConfig

from ..errors import ConfigError
from ..speed.generation_settings import active


_LENGTH = "`max_completion_length` limits executions, and `max_strategy_length` strategies"
_OWNED = {
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "max_tokens": _LENGTH,
    "temperature": "log-probabilities are computed with `temperature` of the configuration, so set that",
    "num_return_sequences": "`num_generations` counts the executions of a problem",
    "n": "`num_generations` counts the executions of a problem",
    "eos_token_id": "the `generation_config.json` of the model names the tokens that end a completion",
}
"""Settings that have no effect beside another key, or contradict it."""

_SEARCH = ("constraints", "dola_layers", "force_words_ids", "num_beams")
_ASSISTED = ("assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
_NO_TEXT = ("return_dict_in_generate", "stop_strings", "token_healing")
_NOT_SAMPLED = (*_SEARCH, *_ASSISTED, *_NO_TEXT)
"""Settings that do not sample from the policy, work with one row only, or need what TRL does not pass."""


def check_generation_kwargs(generation_kwargs: dict[str, Any], use_vllm: bool) -> None:
    """
    Checks `generation_kwargs`.

    Raises:
        [`ConfigError`]: A setting that another key owns, that training cannot work with, or that does not exist.
    """
    for name in generation_kwargs:
        if name in _OWNED:
            raise ConfigError(f"`generation_kwargs` cannot set `{name}`: {_OWNED[name]}.")
    if use_vllm:
        return  # its parameters have other names, and it refuses unknown ones
    config = GenerationConfig()
    if unknown := sorted(generation_kwargs.keys() - vars(config).keys()):
        raise ConfigError(
            f"Unknown generation settings in `generation_kwargs`: {_quoted(unknown)}. Correct or remove them."
        )
    vars(config).update(generation_kwargs)
    refused = active((*_NOT_SAMPLED, "penalty_alpha", "num_beam_groups"), config, config)
    if generation_kwargs.get("do_sample") is False:
        refused.append("do_sample")
    if refused:
        raise ConfigError(
            f"Training needs samples of the policy and cannot work with {_quoted(refused)} in `generation_kwargs`: "
            "remove it."
        )


def check_generation_config(config: GenerationConfig, of_model: GenerationConfig) -> None:
    """
    Checks what `generate` takes from the configuration of the model.

    Args:
        config ([`~transformers.GenerationConfig`]):
            Configuration that `generate` is called with.
        of_model ([`~transformers.GenerationConfig`]):
            Configuration of the model.

    Raises:
        [`ConfigError`]: A setting that training cannot work with.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = vars(of_model).get(key)
        tokens = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise ConfigError(f"The `generation_config.json` of the model has `{key}: {value!r}`: it must be a token.")
    if refused := active((*_NOT_SAMPLED, "num_return_sequences"), config, of_model):
        raise ConfigError(
            f"The `generation_config.json` of the model sets {_quoted(refused)}, but training needs one sample of the "
            "policy for each row: remove it there."
        )


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
