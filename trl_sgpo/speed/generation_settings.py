"""Which settings of `generate` allow prompts to be read once, and finished rows to leave the batch."""

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig


COUNTED = ("begin_suppress_tokens", "exponential_decay_length_penalty", "guidance_scale", "max_time", "min_new_tokens")
"""Settings that count, or keep a state, from the start of a call, so that a row must stay in one call."""

OTHER_WAYS = (
    *("assistant_early_exit", "cache_implementation", "constraints", "dola_layers", "force_words_ids", "num_beams"),
    *("num_return_sequences", "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens"),
    *("return_dict_in_generate", "stop_strings", "token_healing", "use_mtp"),
)
"""Settings that generate in another way, with another cache or another result."""

WHOLE_PROMPTS = (
    # They compare tokens of the prompt, or count its padding
    *("bad_words_ids", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "min_length"),
    *("no_repeat_ngram_size", "sequence_bias", "watermarking_config"),
    *OTHER_WAYS,
)
"""Settings that need a call with whole prompts."""

_OFF_AT_1 = ("encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams", "num_return_sequences")


def effective_value(name: str, config: GenerationConfig, of_model: GenerationConfig) -> Any:
    """
    The value of a setting in `generate`, which takes from the model's configuration what the given one leaves out.

    Args:
        name (`str`):
            Name of the setting.
        config ([`~transformers.GenerationConfig`]):
            Configuration that `generate` is called with.
        of_model ([`~transformers.GenerationConfig`]):
            Configuration of the model.
    """
    value = vars(config).get(name)
    return vars(of_model).get(name) if value is None else value


def active(names: Iterable[str], config: GenerationConfig, of_model: GenerationConfig) -> list[str]:
    """Returns those of the settings whose values have an effect."""
    values = {name: effective_value(name, config, of_model) for name in names}
    return [name for name, value in values.items() if value and not (name in _OFF_AT_1 and value == 1)]


def needs_whole_prompts(config: GenerationConfig, of_model: GenerationConfig) -> list[str]:
    """Returns the settings with which prompts cannot be read once."""
    without_cache = effective_value("use_cache", config, of_model) is False
    return [*active(WHOLE_PROMPTS, config, of_model), *(["use_cache"] if without_cache else [])]


def one_pass_per_token(config: GenerationConfig, of_model: GenerationConfig) -> bool:
    """Whether a token of each row is chosen by the logits of one forward pass."""
    return not active([*OTHER_WAYS, "guidance_scale"], config, of_model)
