"""Settings of an adapter make no more than a real one does, and end in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny_model
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trl_sgpo.checks.adapters import check_adapter_patterns, check_adapter_settings
from trl_sgpo.errors import ModelError
from trl_sgpo.inference.pretrained import load_adapter


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
        PromptTuningConfig(num_virtual_tokens=1000, **PROMPT),
        PrefixTuningConfig(num_virtual_tokens=1000, encoder_hidden_size=8192, prefix_projection=True, **PROMPT),
        PromptEncoderConfig(num_virtual_tokens=1000, encoder_hidden_size=8192, encoder_num_layers=4, **PROMPT),
        VeraConfig(r=1024),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_large_adapters_of_real_models(config: Any) -> None:
    check_adapter_settings("adapter", config.to_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "r": 2**15, "lora_alpha": 1, "target_modules": "all-linear"},
        {"peft_type": "LORA", "r": 2**15, "init_lora_weights": "pissa", "target_modules": "all-linear"},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**6},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**6},
    ],
    ids=lambda settings: settings["peft_type"],
)
def test_an_adapter_of_1_kilobyte_that_asks_for_gigabytes(
    settings: dict[str, Any], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sizes are on their own those of an adapter, and the base multiplies them."""
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    known = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(known | settings))
    save_file({"prompt_embeddings": torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"ask for [\d,]+ weights, of which most are not in its adapter_model"):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights="pissa"),
        PrefixTuningConfig(
            num_virtual_tokens=8, encoder_hidden_size=3000, prefix_projection=True, task_type="CAUSAL_LM"
        ),
        PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=3000, task_type="CAUSAL_LM"),
        VeraConfig(r=4, target_modules=["q_proj"]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj"]),
        LoKrConfig(r=2, target_modules=["q_proj"]),
        LNTuningConfig(target_modules=["input_layernorm"]),
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_that_peft_saved_are_loaded(config: Any, base: str, tmp_path: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": math.nan}, {"lora_dropout": math.inf}, {"alpha_pattern": {"a": math.nan}}]
)
def test_numbers_that_are_none(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="is no finite number"):
        check_adapter_settings("adapter", settings)


@pytest.mark.parametrize(
    "settings",
    [{"peft_type": "SHADOW"}, {"monteclora_config": {"num_samples": 10**6}}, {"layer_replication": 5}],
)
def test_adapters_of_more_than_weights(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="is not loaded"):
        check_adapter_settings("adapter", settings)


def test_an_adapter_without_its_weights_is_not_the_bare_base(base: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    for left in ({"x": torch.zeros(1)}, {name: value for name, value in weights.items() if "v_proj" in name}):
        save_file(left, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="has not all weights that its settings describe"):
            load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path)


@pytest.mark.parametrize("key", ["depth", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter", "loftq_iter"])
def test_steps_that_an_adapter_repeats(key: str) -> None:
    check_adapter_settings("adapter", {key: 100})
    with pytest.raises(ModelError, match=f"`{key}` repeats more"):
        check_adapter_settings("adapter", {"config": {key: 101}} if key == "loftq_iter" else {key: 101})


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_long_names_of_modules(key: str) -> None:
    check_adapter_patterns("adapter", {key: {"a" * 200: 4}}, ["model.layers.0.q_proj"])
    with pytest.raises(ModelError, match="names a module in more than 200 characters"):
        check_adapter_patterns("adapter", {key: {"a" * 201: 4}}, ["model.layers.0.q_proj"])


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "HRA", "r": 2**15, "apply_GS": True},  # r² / 2 steps in each forward pass
        {
            "peft_type": "BOFT",
            "boft_block_size": 2,
            "boft_n_butterfly_factor": 1,
        },  # matrices of a layer's width squared
        {"peft_type": "SHADOW"},
    ],
    ids=lambda settings: settings["peft_type"],
)
def test_adapters_of_other_types(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="`peft_type` is none of LORA, ADALORA"):
        check_adapter_settings("adapter", settings)


@pytest.mark.parametrize("first", ["pissa_niter_9_9_9_9_9_9_9_9_9", "pissa_niter_999", "pissa_niter_1000", 10**9])
def test_first_weights_that_take_many_iterations(first: Any) -> None:
    with pytest.raises(ModelError, match="`init_lora_weights` is unknown, or asks for too many iterations"):
        check_adapter_settings("adapter", {"peft_type": "LORA", "init_lora_weights": first})


@pytest.mark.parametrize("first", [True, False, None, "gaussian", "pissa", "pissa_niter_16", "olora"])
def test_first_weights_of_peft(first: Any) -> None:
    check_adapter_settings("adapter", {"peft_type": "LORA", "init_lora_weights": first})
