"""Ranges of settings that TRL and transformers check in a training step only, or not at all."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, without `low` itself if it is `open`."""

    low: float
    high: float = math.inf
    open: bool = False

    def has(self, value: float) -> bool:
        return (self.low < value if self.open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        least = f"above {self.low:g}" if self.open else f"at least {self.low:g}"
        return least if self.high == math.inf else f"{least} and at most {self.high:.10g}"


RANGES = {
    "beta": Range(0),
    "data_seed": Range(0, 2**32 - 1),
    "dataloader_num_workers": Range(0),
    "epsilon": Range(0),
    "generation_batch_size": Range(1),
    "gradient_accumulation_steps": Range(1),
    "learning_rate": Range(0),
    "min_p": Range(0, 1),
    "num_generations": Range(1),
    "num_iterations": Range(1),
    "num_train_epochs": Range(0, open=True),
    "per_device_eval_batch_size": Range(1),
    "per_device_train_batch_size": Range(1),
    "repetition_penalty": Range(0, open=True),
    "seed": Range(0, 2**32 - 1),
    "steps_per_generation": Range(1),
    "temperature": Range(0, open=True),
    "top_entropy_quantile": Range(0, 1),
    "top_k": Range(0),
    "top_p": Range(0, 1, open=True),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_mode": ("server", "colocate"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
_NOT_REQUIRED = ("data_seed", "generation_batch_size", "min_p", "steps_per_generation")


def range_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """
    Finds settings that are out of their range.

    Args:
        values (`Mapping`):
            All settings.
    """
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            words = ", ".join(str(choice) for choice in choices if isinstance(choice, str))
            yield f"`{name}` must be one of {words}, got {values[name]!r}."
    for name, allowed in RANGES.items():
        value = values[name]
        if value is None and name in _NOT_REQUIRED:
            continue
        if not isinstance(value, Real) or not allowed.has(float(value)):
            yield f"`{name}` must be {allowed}, got {value!r}."
