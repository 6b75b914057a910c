"""Settings of an adapter make no more than a real one does, and end in one line."""

from typing import Any

import pytest
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
)

from trl_sgpo.checks.adapters import check_adapter_settings
from trl_sgpo.errors import ModelError


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "POLY", "n_tasks": 10**6, "n_skills": 2000},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**6, "token_dim": 4000},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 10**6, "num_ranks": 10**6},
        {"peft_type": "VBLORA", "num_vectors": 10**6, "vector_length": 10**6},
        {"peft_type": "VBLORA", "num_vectors": 10**6, "topk": 10**6},
        {"peft_type": "PREFIX_TUNING", "encoder_hidden_size": 10**6, "token_dim": 3000},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10_000, "token_dim": 10_000, "num_layers": 10_000},
        {"peft_type": "P_TUNING", "encoder_num_layers": 10**6},
        {"peft_type": "P_TUNING", "encoder_hidden_size": 10**5, "encoder_num_layers": 10},
        {"peft_type": "P_TUNING", "encoder_hidden_size": 10_000, "encoder_num_layers": 1000},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_sizes_that_multiply(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"than (that of any adapter|any model has)\.$"):
        check_adapter_settings("adapter", settings)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "layer_replication", "modules_to_save", "more"])
def test_settings_that_are_nested_deeply(key: str) -> None:
    with pytest.raises(ModelError, match=f"`{key}` is nested too deeply"):
        check_adapter_settings("adapter", {key: nested(900)})


PROMPT: dict[str, Any] = {
    "token_dim": 8192,
    "num_layers": 80,
    "num_attention_heads": 64,
    "num_transformer_submodules": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=1024, lora_alpha=2**15, trainable_token_indices=[100_000, 128_000, 128_001]),
        AdaLoraConfig(init_r=64, target_r=32, tinit=50_000, tfinal=900_000, total_step=10**6),
        PolyConfig(r=64, n_tasks=1000, n_skills=64, n_splits=8),
        PromptTuningConfig(num_virtual_tokens=1000, **PROMPT),
        PrefixTuningConfig(num_virtual_tokens=1000, encoder_hidden_size=8192, prefix_projection=True, **PROMPT),
        PromptEncoderConfig(num_virtual_tokens=1000, encoder_hidden_size=8192, encoder_num_layers=4, **PROMPT),
        VBLoRAConfig(num_vectors=4096, vector_length=1024),
        VeraConfig(r=1024),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_large_adapters_of_real_models(config: Any) -> None:
    check_adapter_settings("adapter", config.to_dict())
