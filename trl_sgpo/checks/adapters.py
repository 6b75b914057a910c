"""Settings of a saved adapter, before peft reads them: they name models, hold patterns and sizes."""

import re
from typing import Any

from ..errors import ModelError


OTHER_MODELS = ("shadow_model", "adapters", "prompt_tuning_init_state_dict_path", "megatron_config")
MAX_RANK, MAX_NUMBER, MAX_PATTERN = 2**15, 10**6, 2_000
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save")
_REPEATED_GROUP = re.compile(r"\)\s*(?:[*+]|\{)")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\d*\}")
_MAX_UNBOUNDED = 8  # patterns for the layers of a part of a model have five
_NO_SIZE = re.compile(r"seed|prng_key|total_step")
_ITERATIONS = re.compile(r"\d{4,}")


def check_adapter_settings(directory: object, settings: dict[str, Any]) -> None:
    """
    Checks the settings of an adapter.

    Args:
        directory (`str` or `Path`):
            Where it is, for the message.
        settings (`dict`):
            Content of its `adapter_config.json`.

    Raises:
        [`ModelError`]: They name another model, hold a pattern that may take exponential time, or numbers of no real
            adapter.
    """

    def refuse(key: str, reason: str) -> None:
        raise ModelError(f"The adapter in {directory} is not loaded: `{key}` {reason}.")

    for key in OTHER_MODELS:
        if settings.get(key):
            refuse(key, "would load more than its weights")
    for key, text in _patterns(settings):
        if len(text) > MAX_PATTERN or _REPEATED_GROUP.search(text) or len(_UNBOUNDED.findall(text)) > _MAX_UNBOUNDED:
            refuse(key, "has a pattern that may match for ever: use names of modules")
    if _ITERATIONS.search(str(settings.get("init_lora_weights"))) is not None:
        refuse("init_lora_weights", "asks for too many iterations")
    for key, number in _numbers(settings):
        if _NO_SIZE.search(key) is None and abs(number) > (MAX_RANK if key in ("r", "rank_pattern") else MAX_NUMBER):
            refuse(key, "is larger than that of any adapter")


def _patterns(settings: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key in _PATTERNS:
        value = settings.get(key)
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, dict | list) else []
        found += [(key, text) for text in texts if isinstance(text, str)]
    return found


def _numbers(value: Any, key: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for name, each in value.items() for pair in _numbers(each, key or str(name))]
    if isinstance(value, list):
        return [pair for each in value for pair in _numbers(each, key)]
    return [(key, value)] if isinstance(value, int | float) else []
