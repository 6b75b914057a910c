"""Two training steps of every supported architecture: full and LoRA, chat and plain text, 4-bit."""

import math

import pytest
import torch
from models import ARCHITECTURES, evenness, problems, save_tiny_model
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback

from trl_sgpo import SGPOConfig, SGPOTrainer


class Gradients(TrainerCallback):
    """Names of the parameters whose gradient was not finite, and of those whose gradient was ever nonzero."""

    def __init__(self):
        self.infinite, self.nonzero = set(), set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                if not torch.isfinite(parameter.grad).all():
                    self.infinite.add(name)
                if parameter.grad.abs().max() > 0:
                    self.nonzero.add(name)


def train(directory, architecture, chat, **kwargs):
    """Trains two steps and returns the trainer, the gradients seen and the names of changed parameters."""
    args = SGPOConfig(
        str(directory / "out"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_strategy_length=12,
        max_completion_length=12,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        use_bank=False,
        disable_tqdm=True,
        report_to="none",
        bf16=False,
    )
    gradients = Gradients()
    trainer = SGPOTrainer(
        model=save_tiny_model(directory / "model", architecture, chat),
        reward_funcs=evenness,
        args=args,
        train_dataset=problems(chat=chat),
        callbacks=[gradients],
        **kwargs,
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    for logs in trainer.state.log_history[:2]:
        assert math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])
        assert logs["grad_norm"] > 0
    assert trainer.state.global_step == 2
    assert gradients.infinite == set()
    return trainer, gradients, changed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_training_with_a_chat_template(tmp_path, architecture):
    """All weights get a gradient and change; biases of keys, which shift all scores alike, may be left out."""
    trainer, gradients, changed = train(tmp_path, architecture, chat=True)
    assert gradients.nonzero <= changed
    without = {name for name, _ in trainer.model.named_parameters()} - gradients.nonzero
    # Doge's attention chooses tokens with these, of which it sees all in so short a context
    chooses = (".self_attn.A", ".dt_proj.weight") if architecture == "doge" else ()
    assert {name for name in without if not name.endswith(("k_proj.bias", *chooses))} == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_without_a_chat_template(tmp_path, architecture):
    """Adapters change, base weights do not."""
    target = ["q_proj", "v_proj"] if architecture in ("mixtral", "doge") else "all-linear"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=target, lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer, _, changed = train(tmp_path, architecture, chat=False, peft_config=lora)
    adapters = {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    assert trainer.merges_adapters
    assert changed == adapters != set()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "mistral", "phi"])
def test_4bit_lora(tmp_path, architecture):
    """Adapters of a model in 4 bits change, and the packed weights stay as they are."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer, gradients, changed = train(
        tmp_path, architecture, chat=True, quantization_config=quantization, peft_config=lora
    )
    packed = [module for module in trainer.model.modules() if type(module).__name__ == "Linear4bit"]
    adapters = {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    assert packed and not trainer.merges_adapters
    assert all(not module.support_avx512bf16_for_cpu for module in packed)
    assert {name for name in adapters if "lora_B" in name} <= changed <= adapters
    assert gradients.nonzero <= adapters


@pytest.mark.parametrize("fp16", [False, True])
def test_4bit_lora_in_float16(tmp_path, fp16):
    """Gradients that are scaled have to be in float32: PyTorch refuses those of TRL's bfloat16 adapters."""
    args = SGPOConfig(str(tmp_path), bf16=False, use_bank=False, num_generations=4, report_to="none")
    object.__setattr__(args, "fp16", fp16)  # which accelerate allows on a GPU only
    trainer = SGPOTrainer(
        save_tiny_model(tmp_path / "model"),
        evenness,
        args,
        train_dataset=problems(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    dtypes = {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad}
    assert dtypes == {torch.float32 if fp16 else torch.bfloat16}
