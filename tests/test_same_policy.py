"""
The policy that samples is the policy that is trained: on every fast path, for every architecture, with any adapter,
in training, in `eval` and `solve`, and in exports.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks.sampling import ARCHITECTURES, measure
from models import ARCHITECTURES as MODELS
from models import evenness, problems, save_tiny_model, tokenizer
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.callbacks import AdviceCallback
from trl_sgpo.errors import ConfigError, ModelError
from trl_sgpo.export.export import ExportPlan, export
from trl_sgpo.hub.publication import merge_adapter
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.speed.sampling import SAMPLER_KL, sampler_kl


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LEARNED_POSITIONS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        **{"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    },
    "xglm": {
        **{"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        **{"dropout": 0.0, "attention_dropout": 0.0},
    },
}


def make(model, directory: Path, peft_config=None, **kwargs) -> SGPOTrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_strategy_length": 12,
        "max_completion_length": 12,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_bank": False,
        "disable_tqdm": True,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    args = SGPOConfig(str(directory), **(defaults | kwargs))
    return SGPOTrainer(model, evenness, args, problems(), processing_class=tokenizer(), peft_config=peft_config)


def logged(trainer: SGPOTrainer, name: str) -> list[float]:
    return [logs[name] for logs in trainer.state.log_history if "loss" in logs]


def slower(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.message.endswith("This is slower.")]


def random_model(architecture: str, directory: Path, std: float = 0.2, **sizes) -> str:
    """A model whose log-probabilities depend on positions."""
    torch.manual_seed(0)
    tok = tokenizer()
    special = {"vocab_size": len(tok), "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **special, **sizes))
    with torch.no_grad():
        for weight in filter(lambda weight: weight.dim() == 2, model.parameters()):
            torch.nn.init.normal_(weight, std=std)
    model.generation_config = GenerationConfig(eos_token_id=0, bos_token_id=1, pad_token_id=2)
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    return str(directory)


# One table: sampling and training, by each path, before and after a step


@pytest.mark.parametrize("architecture", [*list(ARCHITECTURES)[::2], "biogpt", "gpt2", "gpt_neo"])  # the table has all
def test_sampled_tokens_have_the_same_log_probabilities_in_training(tmp_path, architecture):
    """By the plain path, with shared prompts and with merged adapters, at first and after a step."""
    before, after, logs = measure(architecture, tmp_path)
    for found in (before, after):
        assert max(found.of_path.values()) < 2e-5
        assert found.reading < 2e-5  # rows read alone, without padding
    assert 0 <= logs[SAMPLER_KL] < 1e-9


# Tied embeddings


def embedding_adapter(directory: Path, tied: bool = True, target: str = "embed_tokens") -> str:
    """An adapter with a large effect, saved as training does."""
    base = save_tiny_model(directory / "base", tie_word_embeddings=tied)
    lora = LoraConfig(**(LORA | {"target_modules": ["q_proj", target]}))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.normal_(std=0.3)
    model.save_pretrained(directory / "adapter")
    tokenizer().save_pretrained(directory / "adapter")
    TwoPhaseSettings(max_strategy_length=24, max_completion_length=24).save(directory / "adapter")
    return str(directory / "adapter")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_tied_embeddings_are_used_as_trained(tmp_path, caplog, target):
    """Merged, they would change the LM head, or the embeddings, too."""
    adapter = embedding_adapter(tmp_path, target=target)
    found = TwoPhaseModel.from_pretrained(adapter).answer(["What is 1 + 2?"] * 2, Decoding())
    (line,) = slower(caplog)
    assert "belongs to another layer too" in line
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    from peft import PeftModel

    trained = PeftModel.from_pretrained(base, adapter).eval()
    expected = TwoPhaseModel(trained, tokenizer(), TwoPhaseSettings(max_completion_length=24))
    assert found == expected.answer(["What is 1 + 2?"] * 2, Decoding())


def test_adapters_on_tied_embeddings_are_not_exported(tmp_path):
    """Neither by `export` nor by a push of a warm-started run."""
    adapter = embedding_adapter(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be merged: an adapted weight belongs.*Use it with PEFT"):
        export(ExportPlan(adapter, str(tmp_path / "out"), merge=True))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="cannot be merged: an adapted weight belongs"):
        merge_adapter(Path(adapter), str(tmp_path / "base"), tmp_path / "merged")


def test_adapters_on_weights_of_one_layer_are_merged(tmp_path):
    adapter = embedding_adapter(tmp_path, tied=False)
    assert "peft" not in type(TwoPhaseModel.from_pretrained(adapter).model).__module__


# bfloat16


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    path = save_tiny_model(tmp_path_factory.mktemp("bfloat16"), hidden_size=64, num_hidden_layers=4)
    AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16).save_pretrained(path)
    return path


def test_adapters_are_merged_into_bfloat16_where_it_keeps_their_effect(bfloat16, tmp_path, caplog):
    """A small adapter would be lost in the rounding of the weights, so it stays apart until it has grown."""
    trainer = make(AutoModelForCausalLM.from_pretrained(bfloat16), tmp_path, LoraConfig(**LORA), learning_rate=1e-5)
    assert trainer.merges_adapters  # at first there is no effect to lose
    trainer.train()
    assert not trainer.merges_adapters
    (line,) = slower(caplog)
    assert line.startswith("Adapters are not merged into the base weights for generation: merging them would distort ")
    caplog.clear()
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    trainer._check_paths()
    assert trainer.merges_adapters
    assert "Adapters are merged in generation from now on" in caplog.text


def test_an_adapter_that_bfloat16_would_lose_stays_apart_in_eval(bfloat16, tmp_path, caplog):
    trainer = make(AutoModelForCausalLM.from_pretrained(bfloat16), tmp_path, LoraConfig(**LORA), learning_rate=1e-5)
    trainer.model.config._name_or_path = bfloat16
    trainer.train()
    trainer.model.peft_config["default"].base_model_name_or_path = bfloat16
    trainer.save_model(str(tmp_path / "saved"))
    caplog.clear()
    model = TwoPhaseModel.from_pretrained(str(tmp_path / "saved"))
    assert "peft" in type(model.model).__module__
    assert slower(caplog)[0].startswith(
        "Adapters are not merged into the base weights for generation: merging them would distort "
    )


# Positions


@pytest.mark.parametrize("architecture", LEARNED_POSITIONS)
def test_old_new_and_reference_log_probabilities_use_the_same_positions(tmp_path, architecture):
    """With a learning rate of 0 they are equal, however much padding each pass has."""
    path = random_model(architecture, tmp_path / "model", **LEARNED_POSITIONS[architecture])
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    trainer = make(path, tmp_path / "out", learning_rate=0.0, beta=0.1, share_prompts=False, **settings)
    trainer.train()
    assert max(logged(trainer, "kl")) < 1e-6
    assert max(logged(trainer, "clip_ratio/region_mean")) == 0
    assert 0 <= max(logged(trainer, SAMPLER_KL)) < 1e-9


def test_rows_longer_than_the_table_of_positions_are_refused(tmp_path):
    path = random_model("gpt2", tmp_path / "model", **LEARNED_POSITIONS["gpt2"], n_positions=350)
    with pytest.raises(ConfigError, match=r"model has 350 positions.*`max_strategy_length`.*`max_completion_length`"):
        make(path, tmp_path / "out", max_completion_length=300)
    make(path, tmp_path / "out", max_strategy_length=1, max_completion_length=1)


# Models and settings


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("modernbert-decoder", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}),
        ("recurrent_gemma", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "lru_width": 32}),
    ],
    ids=["modernbert", "recurrent_gemma"],
)
def test_a_head_that_is_more_than_a_matrix_is_refused(tmp_path, architecture, sizes):
    model = random_model(architecture, tmp_path / "model", num_attention_heads=4, **sizes)
    with pytest.raises(ModelError, match=r"`lm_head\.weight` itself: log-probabilities differ by"):
        make(model, tmp_path / "out").train()


def test_modules_that_the_product_with_the_head_cannot_have(tmp_path):
    """A wrapper of tied embeddings, which has no bias."""
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    trained = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="TRL cannot train LlamaForCausalLM with these settings"):
        make(model, tmp_path / "out", trained).train()


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "generation_kwargs"])
def test_models_without_a_cache_are_trained(tmp_path, where):
    path, kwargs = save_tiny_model(tmp_path / "model"), {}
    if where == "config.json":  # which the other file would outweigh
        Path(path, "generation_config.json").unlink()
    if where == "generation_kwargs":
        kwargs["generation_kwargs"] = {"use_cache": False}
    else:
        file = Path(path, where)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_cache": False}))
    trainer = make(path, tmp_path / "out", **kwargs)
    trainer.train()
    assert max(logged(trainer, SAMPLER_KL)) < 1e-9


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_language_models_are_trained_on_text(tmp_path, caplog, architecture):
    tok = tokenizer()
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tok),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 32}
    config = AutoConfig.for_model(architecture, text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=0, bos_token_id=1, pad_token_id=2)
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    trainer = make(str(tmp_path / "model"), tmp_path / "out")
    assert not trainer.shares_prefixes
    (line,) = slower(caplog)
    assert line.startswith("Prompts are read for each row in generation")
    trainer.train()
    assert max(logged(trainer, SAMPLER_KL)) < 1e-9
    assert min(logged(trainer, "grad_norm")) > 0


def test_alora_is_trained_apart(tmp_path, caplog):
    path = save_tiny_model(tmp_path / "model")
    invocation = tokenizer().encode("~~")  # PEFT begins with the last one of a row, so there must be one
    lora = LoraConfig(**(LORA | {"target_modules": ["q_proj", "v_proj"]}), alora_invocation_tokens=invocation)
    strategy_prompt = "{problem}\n{strategies}Write a strategy ~~"
    trainer = make(path, tmp_path / "out", lora, strategy_prompt=strategy_prompt)
    assert not (trainer.merges_adapters or trainer.shares_prompts or trainer.shares_prefixes)
    assert [line.partition(":")[0] for line in slower(caplog)] == [
        "Adapters are not merged into the base weights for generation",
        "Rows of a prompt are trained and generated apart",
    ]
    trainer.train()
    assert min(logged(trainer, "grad_norm")) > 0
    assert max(logged(trainer, SAMPLER_KL)) < 1e-9


# The metric


def test_the_estimate_of_the_divergence_is_not_negative_and_right():
    """Of a large sample it is the divergence itself."""
    torch.manual_seed(0)
    sampling, training = torch.randn(2, 6).log_softmax(dim=-1)
    tokens = torch.multinomial(sampling.exp(), 200_000, replacement=True).unsqueeze(0)
    total, count = sampler_kl(sampling[tokens], training[tokens], torch.ones_like(tokens))
    expected = (sampling.exp() * (sampling - training)).sum()
    assert total / count == pytest.approx(expected.item(), rel=0.02)
    unknown = torch.tensor([[0.0, math.nan, -1.0, -2.0]])
    total, count = sampler_kl(unknown, unknown.nan_to_num(), torch.tensor([[1, 1, 1, 0]]))
    assert (total, count) == (0, 2)


def test_another_policy_that_samples_is_measured_and_named(tmp_path, caplog, monkeypatch):
    """As if merging lost most of a large adapter, unnoticed by the start check."""
    path = random_model("llama", tmp_path / "model", **MODELS["llama"])
    trainer = make(path, tmp_path / "out", LoraConfig(**LORA), max_steps=3, learning_rate=1e-4)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)
    monkeypatch.setattr(trainer, "_check_paths", lambda: None)
    merge = LoraLayer.merge

    def weaker(layer, *args, **kwargs):
        layer.set_scale("default", 0.2)
        merge(layer, *args, **kwargs)
        layer.set_scale("default", 1.0)

    monkeypatch.setattr(LoraLayer, "merge", weaker)
    trainer.train()
    assert min(logged(trainer, SAMPLER_KL)) > 0.1
    assert caplog.text.count("`sgpo/sampler_kl`") == 1


def test_the_metric_is_that_of_the_step_that_sampled(tmp_path):
    """Later steps on the same rollouts compare with the weights that sampled, not with those of now."""
    settings = {"num_iterations": 3, "max_steps": 3, "learning_rate": 3e-2}
    trainer = make(save_tiny_model(tmp_path / "model"), tmp_path / "out", LoraConfig(**LORA), **settings)
    trainer.train()
    assert 0 <= max(logged(trainer, SAMPLER_KL)) < 1e-9


def test_the_advice_is_given_once(caplog):
    advice = AdviceCallback()
    state = type("State", (), {"is_world_process_zero": True})()
    for value in (1e-4, 0.5, 0.5):
        advice.on_log(None, state, None, logs={"loss": 1.0, SAMPLER_KL: value})
    assert caplog.text.count("`sgpo/sampler_kl`") == 1
