"""Settings of a saved adapter, before peft reads them: they name models, hold patterns and sizes."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .process import CHECKS


ADAPTER_FILE = "adapter_config.json"
OTHER_MODELS = (
    "shadow_model",
    "monteclora_config",
    "adapters",
    "prompt_tuning_init_state_dict_path",
    "megatron_config",
)
_BY_MODULE, MAX_MODULE = ("rank_pattern", "alpha_pattern"), 200  # peft compiles each name again for each module
MAX_RANK, MAX_NUMBER, MAX_LAYERS, MAX_TEXTS = 2**15, 10**6, 10_000, 2_000
MAX_DEPTH = 20  # of lists and mappings in each other
MAX_PRODUCTS = {2: 2**28, 3: 2**33}  # of that many sizes: those of a prompt on a base of 70 billion weights are less
_PLAIN = re.compile(r"[\w.\-/ ]{0,500}")  # a name: it matches at once
_NO_SIZE = re.compile(r"seed|prng_key|total_step|tinit|tfinal|deltaT")
_NO_FACTOR = re.compile(r"alpha|heads|tinit|tfinal|deltaT|warmup|interval")
_ENCODER = "encoder_hidden_size"
KINDS = (
    "LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING",
)  # fmt: skip
"""Adapters that are trained and loaded. Of others, a few settings take hours or gigabytes in a forward pass."""
_FIRST_WEIGHTS = re.compile(r"gaussian|olora|eva|loftq|orthogonal|pissa(?:_niter_[1-9]\d?)?")
_REPEATS, MAX_REPEATS = re.compile(r"(?:^|_)n?iters?(?:_|$)|depth|terms"), 100


def check_adapter_settings(directory: object, settings: dict[str, Any]) -> None:
    """
    Checks the settings of an adapter.

    Args:
        directory (`str` or `Path`):
            Where it is, for the message.
        settings (`dict`):
            Content of its `adapter_config.json`.

    Raises:
        [`ModelError`]: They name another model, hold numbers of no real adapter, or are nested deeply.
    """

    def refuse(key: str, reason: str) -> None:
        raise ModelError(f"The adapter in {directory} is not loaded: `{key}` {reason}.")

    if key := _nested_deeply(settings):
        refuse(key, "is nested too deeply")
    for key in OTHER_MODELS:
        if settings.get(key):
            refuse(key, "would load more than its weights")
    first = settings.get("init_lora_weights")
    if not isinstance(first, bool | None) and _FIRST_WEIGHTS.fullmatch(str(first)) is None:
        refuse("init_lora_weights", "is unknown, or asks for too many iterations")
    replicated = settings.get("layer_replication")
    if not isinstance(replicated, list | None):
        refuse("layer_replication", "is no list")
    copied = [part for part in replicated or [] if isinstance(part, list) and len(part) == 2]
    if sum(abs(number) for _, number in _numbers(copied)) > MAX_LAYERS:
        refuse("layer_replication", "copies more layers than any model has")
    for key, number in _numbers(settings):
        if not math.isfinite(number):
            refuse(key, "is no finite number")
        if _NO_SIZE.search(key) is None and abs(number) > (MAX_RANK if key in ("r", "rank_pattern") else MAX_NUMBER):
            refuse(key, "is larger than that of any adapter")
        if key.endswith("layers") and abs(number) > MAX_LAYERS:
            refuse(key, "is more than any model has")
    for key in _repeating(settings):
        refuse(key, "repeats more than that of any adapter")
    if large := _large_product(settings):
        refuse(large, "is larger than that of any adapter")
    if settings.get("peft_type", KINDS[0]) not in KINDS:
        refuse("peft_type", f"is none of {', '.join(KINDS)}, or its file is damaged: copy or download it again")


def check_whole(directory: str | Path, source: str | Path | None = None) -> None:
    """
    Checks that a folder is no adapter.

    Args:
        directory (`str` or `Path`):
            The folder.
        source (`str` or `Path`, *optional*):
            How the user named it.

    Raises:
        [`ModelError`]: It is one. transformers would put it on its base, and neither of them would be checked.
    """
    if Path(directory, ADAPTER_FILE).is_file():
        get = "" if source is None or Path(source).is_dir() else f"get it with `trl-sgpo pull {source}`, and "
        raise ModelError(
            f"{source or directory} is an adapter, where a whole model is needed: {get}merge it with "
            "`trl-sgpo export --merge`."
        )


def check_adapter_patterns(directory: object, settings: dict[str, Any], names: Iterable[str]) -> None:
    """
    Matches the patterns of an adapter against the modules of its base as peft does, in a process with limits. peft has
    patterns in several settings, so that every text in them counts as one.

    Args:
        directory (`str` or `Path`):
            Where it is, for the message.
        settings (`dict`):
            Its settings.
        names (`Iterable[str]`):
            Names of the modules.

    Raises:
        [`ModelError`]: It takes more than 5 seconds, or the texts are too many or too long.
    """
    texts = [(key, text) for key, value in settings.items() for text in _texts(value)]
    if len(texts) > MAX_TEXTS:
        raise ModelError(f"The adapter in {directory} is not loaded: it names more than {MAX_TEXTS:,} modules.")
    of_modules = [name for key in _BY_MODULE for name in _texts(settings.get(key))]
    if max(map(len, of_modules), default=0) > MAX_MODULE:
        raise ModelError(
            f"The adapter in {directory} is not loaded: `{'` or `'.join(_BY_MODULE)}` names a module in more than "
            f"{MAX_MODULE} characters."
        )
    patterns = {text: key for key, text in texts if _PLAIN.fullmatch(text) is None}
    if patterns and CHECKS.ask("patterns", list(patterns), list(names)) is None:
        keys = ", ".join(f"`{key}`" for key in dict.fromkeys(patterns.values()))
        raise ModelError(
            f"The adapter in {directory} is not loaded: {keys} may match for ever. Use names of modules there."
        )


def _large_product(settings: dict[str, Any]) -> str | None:
    """The sizes that make more numbers than a real adapter has, if they do."""
    sizes = {
        key: abs(number)
        for key, number in settings.items()
        if isinstance(number, int | float) and not (_NO_SIZE.search(key) or _NO_FACTOR.search(key))
    }
    encoder = sizes.pop(_ENCODER, 0)  # which multiplies with itself, and not with the number of virtual tokens
    layers = max(sizes.get("num_layers", 1), sizes.get("encoder_num_layers", 1))
    products: dict[tuple[str, ...], list[float]] = {
        (_ENCODER,): [encoder, max(encoder, sizes.get("token_dim", 0)), layers]
    }
    for amount in MAX_PRODUCTS:
        largest = tuple(sorted(sizes, key=lambda key: sizes[key], reverse=True)[:amount])
        products[largest] = [sizes[key] for key in largest]
    for keys, factors in products.items():
        if any(math.prod(factors[:amount]) > limit for amount, limit in MAX_PRODUCTS.items()):
            return "` × `".join(keys)
    return None


def _nested_deeply(settings: dict[str, Any]) -> str | None:
    """The first key with lists and mappings in each other that are too deep, if there is one."""
    for key, value in settings.items():
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [
                part
                for each in level
                if isinstance(each, dict | list)
                for part in (each.values() if isinstance(each, dict) else each)
            ]
        if level:
            return key
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(part)


def _repeating(value: Any) -> Iterator[str]:
    """Keys, at any depth, of numbers of steps that no adapter has."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        if isinstance(each, int | float) and _REPEATS.search(str(key)) is not None and abs(each) > MAX_REPEATS:
            yield str(key)
        yield from _repeating(each)


def _numbers(value: Any, key: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for name, each in value.items() for pair in _numbers(each, key or str(name))]
    if isinstance(value, list):
        return [pair for each in value for pair in _numbers(each, key)]
    return [(key, value)] if isinstance(value, int | float) else []
