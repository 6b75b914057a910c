"""`TwoPhaseModel` reads and writes what `SGPOTrainer` does, and repeats itself."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import evenness, hash_embedder, problems, save_tiny_model, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_sgpo import SGPOConfig, SGPOTrainer, StrategyBank
from trl_sgpo.errors import ConfigError, ModelError
from trl_sgpo.inference.chat_completions import Completion
from trl_sgpo.inference.loading import adapter_base
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.server import ServerModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.inference.verifier import verify
from trl_sgpo.method.problem import as_problem
from trl_sgpo.method.transfer import BlockGeometry


def _trainer(tmp_path: Path, chat: bool, **settings: Any) -> SGPOTrainer:
    args = SGPOConfig(
        str(tmp_path / "run"),
        per_device_train_batch_size=16,
        num_generations=8,
        max_strategy_length=8,
        max_completion_length=8,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        **settings,
    )
    return SGPOTrainer(
        save_tiny_model(tmp_path / "model", chat=chat),
        evenness,
        args,
        train_dataset=problems(chat=chat),
        strategy_bank=StrategyBank(tmp_path / "bank", embedding_model=hash_embedder),
    )


@pytest.mark.parametrize("chat", [True, False])
def test_greedy_texts_and_outcomes_are_the_trainers(tmp_path: Path, chat: bool) -> None:
    trainer = _trainer(tmp_path, chat)
    rows = list(trainer.train_dataset)[:4]
    rollouts, outcomes = trainer.execute_blocks(rows, BlockGeometry(problems=1, own=1))
    model = TwoPhaseModel(trainer.model, trainer.processing_class, TwoPhaseSettings.from_config(trainer.args))
    asked = [as_problem(row, "problem_class") for row in rows]
    written = model.write_strategies(asked)
    assert [strategy.text for strategy in written] == [rollout.strategy.text for rollout in rollouts]
    executions = model.execute(asked, written)
    assert executions == [rollout.execution for rollout in rollouts]
    assert len(verify(evenness, rows, executions)) == len(outcomes)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_texts_have_the_repetition_penalty_of_training(tmp_path: Path, penalty: float) -> None:
    """And not that of the base, as Qwen2.5-Instruct has one."""
    trainer = _trainer(tmp_path, True, repetition_penalty=penalty)
    trainer.model.generation_config.repetition_penalty = 1.3
    trainer.save_model()
    rows = list(trainer.train_dataset)[:4]
    rollouts, _ = trainer.execute_blocks(rows, BlockGeometry(problems=1, own=1))
    model = TwoPhaseModel.from_pretrained(trainer.args.output_dir)
    written = model.write_strategies([as_problem(row, "problem_class") for row in rows])
    assert [strategy.text for strategy in written] == [rollout.strategy.text for rollout in rollouts]


def test_an_adapter_is_put_on_the_base_that_it_names(tmp_path: Path) -> None:
    """And not on another run in a folder of the same name; a warm-started base moves with its run."""
    base = save_tiny_model(tmp_path / "bases" / "tiny")
    adapter = tmp_path / "runs" / "lora"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    save_tiny_model(tmp_path / "runs" / "tiny")
    assert adapter_base(adapter) == base
    for name in ("org/tiny", str(tmp_path / "gone" / "tiny")):
        edit(adapter / "adapter_config.json", base_model_name_or_path=name)
        assert adapter_base(adapter) == name
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone" / "warmstart"))
    assert adapter_base(adapter) == str(tmp_path / "gone" / "warmstart")
    save_tiny_model(adapter / "warmstart")
    assert adapter_base(adapter) == str(adapter / "warmstart")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_saves_its_settings_and_the_model_is_loaded_with_them(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, chat=True)
    trainer.save_model()
    model = TwoPhaseModel.from_pretrained(trainer.args.output_dir)
    assert model.settings == replace(TwoPhaseSettings.from_config(trainer.args), turn_end="<|im_end|>")
    assert model.settings.max_strategy_length == 8


def test_the_system_message_of_the_problems_is_saved_too(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, chat=True)
    system = {"role": "system", "content": "Be short."}
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"prompt": [system, *row["prompt"]]})
    trainer.save_model()
    assert TwoPhaseSettings.load(trainer.args.output_dir).system_prompt == "Be short."


def test_sampling_repeats_with_its_seed_and_does_not_touch_others(tmp_path: Path) -> None:
    import torch

    trainer = _trainer(tmp_path, chat=True)
    model = TwoPhaseModel(trainer.model, trainer.processing_class, TwoPhaseSettings(max_completion_length=8))
    prompts = list(trainer.train_dataset["prompt"])
    state = torch.get_rng_state()
    first = model.answer(prompts, Decoding(greedy=False, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert model.answer(prompts, Decoding(greedy=False, seed=1)) == first
    assert model.answer(prompts, Decoding(greedy=False, seed=2)) != first
    assert 0 < model.generated_tokens <= 3 * 8 * len(prompts)


def test_memory_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoPhaseModel.from_pretrained(save_tiny_model(tmp_path / "model"))
    monkeypatch.setattr(model.model, "generate", lambda **_: torch.empty(2**55))
    with pytest.raises(ModelError, match=r"1 texts of up to \d+ tokens, .* more memory than there is: lower"):
        model.answer([[{"role": "user", "content": "What is 1 + 2?"}]])


def test_texts_are_as_generated_for_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indentation of code is a part of them, here and from a server."""
    text, tok = "    return a + b\n", tokenizer()
    here = TwoPhaseModel(SimpleNamespace(eval=lambda: None), tok, TwoPhaseSettings())
    monkeypatch.setattr(here, "_generate", lambda prompts, *_: [(tok(text)["input_ids"], 0)] * len(prompts))
    served = ServerModel("http://nowhere/v1", "m", TwoPhaseSettings())
    monkeypatch.setattr(served, "_post", lambda body, **_: Completion(text, False, 3))
    asked = [as_problem(problems(1)[0])]
    for model in (here, served):
        assert model.execute(asked, ["Add."]) == [text]
        assert model.answer([asked[0].prompt]) == [text]


def test_unreadable_settings_and_missing_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "sgpo.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sgpo\.json"):
        TwoPhaseSettings.load(tmp_path)
    with pytest.raises(ModelError):
        TwoPhaseModel.from_pretrained(str(tmp_path / "nowhere"))
