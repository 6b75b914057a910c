"""Ranges of settings that TRL and transformers check in a training step only, or not at all."""

import math
import sys
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


MAX_TOKENS = 131_072  # to generate: without an upper limit, a model's settings could let it generate for ever
RANGES = {
    "adam_beta1": Range(0, 1 - 1e-9),
    "adam_beta2": Range(0, 1 - 1e-9),
    "adam_epsilon": Range(0),
    "beta": Range(0),
    "coherence_weight": Range(0),
    "correctness_weight": Range(0),
    "data_seed": Range(0, 2**32 - 1),
    "dataloader_num_workers": Range(0),
    "delta": Range(0, open=True),
    "epsilon": Range(0),
    "epsilon_high": Range(0),
    "generation_batch_size": Range(1),
    "gradient_accumulation_steps": Range(1),
    "internalize_contrasts": Range(1),
    "internalize_snapshot_steps": Range(1),
    "internalize_weight": Range(0, open=True),
    "leak_weight": Range(0),
    "learning_rate": Range(0),
    "max_completion_length": Range(1, MAX_TOKENS),
    "max_grad_norm": Range(0),
    "max_strategy_length": Range(1, MAX_TOKENS),
    "min_p": Range(0, 1),
    "num_generations": Range(1),
    "num_iterations": Range(1),
    "num_retrieved": Range(0, 1000),
    "num_train_epochs": Range(0, open=True),
    "per_device_eval_batch_size": Range(1),
    "per_device_train_batch_size": Range(1),
    "repetition_penalty": Range(0, open=True),
    "seed": Range(0, 2**32 - 1),
    "steps_per_generation": Range(1),
    "strategy_weight": Range(0),
    "temperature": Range(0, open=True),
    "top_entropy_quantile": Range(0, 1),
    "top_k": Range(0),
    "top_p": Range(0, 1, open=True),
    "transfer_weight": Range(0),
    "weight_decay": Range(0),
}
RECIPE_RANGES = {
    "lora_dropout": Range(0, 1),
    "max_problem_tokens": Range(1),
    "report_problems": Range(0),
    "vram_gb": Range(0, open=True),
    "warmstart_batch_size": Range(1),
    "warmstart_learning_rate": Range(0, open=True),
    "warmstart_plain_share": Range(0, 1),
    "warmstart_traces": Range(0),
}
"""Ranges of the keys of a recipe that are no settings of the trainer."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_mode": ("server", "colocate"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
_NOT_REQUIRED = (
    "data_seed", "delta", "epsilon_high", "generation_batch_size", "internalize_weight", "max_problem_tokens",
    "min_p", "steps_per_generation", "vram_gb",
)  # fmt: skip


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
    yield from out_of_range(values, RANGES)


def out_of_range(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> Iterator[str]:
    """Finds numbers that are out of their range. Those that are not finite are left to [`not_finite`]."""
    for name, allowed in ranges.items():
        value = values[name]
        if (value is None and name in _NOT_REQUIRED) or not _is_finite(value):
            continue
        if not isinstance(value, Real) or not allowed.has(float(value)):
            yield f"`{name}` must be {allowed}, got {value!r}."


def not_finite(values: Mapping[str, Any]) -> Iterator[str]:
    """Finds numbers that are not finite, which make NaN of the weights, also in lists and mappings."""
    for name, value in values.items():
        if not _is_finite(value):
            got = "one that is too large for a float" if isinstance(value, int) else repr(value)
            yield f"`{name}` must be a finite number, got {got}."


def _is_finite(value: Any) -> bool:
    """Whether all numbers in a setting are finite. A whole number may be too large for a float."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max
