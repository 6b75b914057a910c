"""The step at its largest before training: it reaches full length, fails in plain words and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import evenness, hash_embedder, problems, save_tiny_model
from peft import LoraConfig

import trl_sgpo.vram.worst_case
from trl_sgpo import SGPOConfig, SGPOTrainer, StrategyBank
from trl_sgpo.errors import ModelError
from trl_sgpo.speed.trainer import SharedPromptGRPOTrainer


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def make_trainer(directory: Path, worst_case_step: bool, peft_config: Any = None, **settings: Any) -> SGPOTrainer:
    args = SGPOConfig(
        str(directory / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_strategy_length=6,
        max_completion_length=10,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        worst_case_step=worst_case_step,
        **settings,
    )
    return SGPOTrainer(
        save_tiny_model(directory / "model"),
        evenness,
        args,
        train_dataset=problems(),
        peft_config=peft_config,
        strategy_bank=StrategyBank(directory / "bank", embedding_model=hash_embedder),
    )


@pytest.mark.parametrize(
    ("peft_config", "optim"), [(None, "adamw_torch_fused"), (LORA, "paged_adamw_8bit")], ids=["full", "lora"]
)
def test_training_goes_on_as_without_it(peft_config: Any, optim: str, tmp_path: Path) -> None:
    runs = []
    for taken in (False, True):
        trainer = make_trainer(tmp_path / str(taken), taken, peft_config, optim=optim)
        trainer.train()
        logs = [
            {key: value for key, value in log.items() if "time" not in key and "second" not in key}
            for log in trainer.state.log_history
        ]
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        runs.append((logs, weights, sorted(strategy.text for strategy in trainer.strategy_bank.strategies())))
    (logs, weights, strategies), (logs_after, weights_after, strategies_after) = runs
    assert logs_after == logs
    assert strategies_after == strategies
    assert all(torch.equal(weights_after[name], weight) for name, weight in weights.items())


def test_activations_are_checkpointed_as_in_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, True, LORA, gradient_checkpointing=True)
    layers, runs = trainer.model.get_base_model().model.layers, []
    for layer in layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    counts = []
    train = trl_sgpo.vram.worst_case._train_at_full_length

    def counted(*args: Any) -> None:
        runs.clear()
        train(*args)
        counts.append(sum(runs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_sgpo.vram.worst_case, "_train_at_full_length", counted)
        trainer.train()
    assert counts == [2 * len(layers)]  # once more in the backward pass


def test_both_phases_are_generated_at_full_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, True)
    generate, seen = SharedPromptGRPOTrainer.generate, []

    def spy(trainer: Any, contexts: list[list[int]], *args: Any) -> Any:
        result = generate(trainer, contexts, *args)
        seen.append((len(contexts), {len(ids) for ids in result[0]}))
        return result

    monkeypatch.setattr(SharedPromptGRPOTrainer, "generate", spy)
    trainer.train()
    assert seen[:2] == [(4, {6}), (8, {10})]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("_generate_at_full_length", "max_completion_length"),
        ("_train_at_full_length", "`per_device_train_batch_size: 2`"),
    ],
)
def test_lack_of_memory_is_reported_with_what_to_change(
    what: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer = make_trainer(tmp_path, True)
    monkeypatch.setattr(trl_sgpo.vram.worst_case, what, fail)
    with pytest.raises(ModelError, match=change) as raised:
        trainer.train()
    assert "Tried to allocate 2.00 GiB" in str(raised.value)
    assert trainer.state.global_step == 0


def test_it_is_left_out_on_a_cpu_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("taken")

    monkeypatch.setattr(trl_sgpo.vram.worst_case, "_generate_at_full_length", fail)
    make_trainer(tmp_path, None).train()
