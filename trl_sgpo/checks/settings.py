"""Settings that TRL and transformers take and fail on later, in the trainer or in a training step."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from torch.utils.checkpoint import checkpoint


FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Mappings that may be the name of a file instead."""

_CHECKPOINT = sorted(
    {"preserve_rng_state", *inspect.signature(checkpoint).parameters} - {"function", "args", "kwargs"}
)


def setting_problems(values: Mapping[str, Any], hints: Mapping[str, Any]) -> Iterator[str]:
    """
    Finds settings that cannot work.

    Args:
        values (`Mapping`):
            All settings.
        hints (`Mapping`):
            Their types, as annotated.
    """
    for name, hint in hints.items():
        if name not in FILES and dict in {get_origin(kind) or kind for kind in get_args(hint)}:
            yield from _mapping_problems(name, values[name])
    checkpointing = values["gradient_checkpointing_kwargs"]
    unknown = [str(key) for key in checkpointing if key not in _CHECKPOINT] if isinstance(checkpointing, dict) else []
    if unknown:
        yield f"`gradient_checkpointing_kwargs` takes {', '.join(_CHECKPOINT)}, not {', '.join(unknown)}."
    if values["remove_unused_columns"]:
        yield "`remove_unused_columns` would remove the columns that rewards are read from: set it to false."
    if values["output_dir"] == "":
        yield "`output_dir` is empty: name a directory."


def _mapping_problems(name: str, value: Any) -> Iterator[str]:
    in_json = isinstance(value, str) and value.startswith("{")
    if value is not None and not isinstance(value, dict) and not in_json:
        yield f"`{name}` must be a mapping of keys to values, got {value!r}."
