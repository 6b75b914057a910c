"""Preference pairs and the reward model trained on them."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import evenness, problems, save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo.compare.rlhf import preference_pairs, split_by_problem, train_reward_model
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.files import unfinished_files
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.conversation import answer_ids
from trl_sgpo.sgpo_config import SGPOConfig
from trl_sgpo.speed.lm_head import project_labelled_tokens_only


SAMPLING = Decoding(greedy=False)


def config(tmp_path):
    return SGPOConfig(
        str(tmp_path / "run"), num_generations=4, use_bank=False, bf16=False, disable_tqdm=True, report_to="none"
    )


def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def chat(request):
    return request.param


@pytest.fixture
def policy(tmp_path, chat):
    return save_tiny_model(tmp_path / "policy", chat=chat)


def toy_pairs(chat, size=40):
    """Chosen answers say 3, rejected ones say 4."""
    rows = []
    for row in problems(size, chat=chat):
        chosen, rejected = "add them: 3", "add them: 4"
        if chat:
            chosen, rejected = ([{"role": "assistant", "content": words}] for words in (chosen, rejected))
        rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def test_pairs_are_right_against_wrong_and_keep_the_limit(policy, chat):
    model = TwoPhaseModel.from_pretrained(policy, TwoPhaseSettings(max_completion_length=8), device="cpu")
    model.answer(["Counts of before do not matter."])
    before = model.generated_tokens
    pairs = preference_pairs(model, problems(6, chat=chat).to_list(), evenness, 300, SAMPLING, samples=3)
    assert 300 - 3 * 8 < model.generated_tokens - before <= 300
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    for row in pairs:
        assert evenness([row["chosen"], row["rejected"]]) == [1.0, 0.0]
        assert isinstance(row["prompt"], str) != chat
    of_problem = {}
    for row in pairs:
        of_problem.setdefault(json.dumps(row["prompt"]), []).extend([text(row["chosen"]), text(row["rejected"])])
    for texts in of_problem.values():
        assert len(texts) == len(set(texts)) <= 2 * 3


def test_pairs_stop_when_every_problem_has_enough(policy, chat):
    model = TwoPhaseModel.from_pretrained(policy, TwoPhaseSettings(max_completion_length=8), device="cpu")
    pairs = preference_pairs(model, problems(3, chat=chat).to_list(), evenness, 10**6, SAMPLING, samples=2)
    assert len(pairs) == 6
    assert model.generated_tokens < 10**4


def test_no_contrast_is_reported(tmp_path):
    model = TwoPhaseModel.from_pretrained(
        save_tiny_model(tmp_path / "policy"), TwoPhaseSettings(max_completion_length=8), device="cpu"
    )
    rows = problems(2).to_list()
    with pytest.raises(DataError, match="raise `max_tokens`"):
        preference_pairs(model, rows, lambda completions, **kwargs: [0.0] * len(completions), 200, SAMPLING)
    with pytest.raises(DataError, match="raise `max_tokens`"):
        preference_pairs(model, rows, lambda completions, **kwargs: [None] * len(completions), 200, SAMPLING)
    with pytest.raises(ConfigError, match="greedy=False"):
        preference_pairs(model, rows, evenness, 200, Decoding())


def test_problems_are_not_split():
    rows = [{"prompt": f"problem {index % 20}", "row": index} for index in range(60)]
    trained, held_out = split_by_problem(rows, 0)
    assert len(held_out) == 6
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in held_out}
    assert sorted(row["row"] for row in trained + held_out) == list(range(60))
    assert split_by_problem(rows[:1], 0) == (rows[:1], [])


def test_reward_model_learns_and_rewards_in_grpo(policy, chat, tmp_path):
    pairs = toy_pairs(chat)
    directory = train_reward_model(policy, pairs, config(tmp_path), tmp_path / "reward", 1e-2, 3)
    assert directory == str(tmp_path / "reward")
    held_out = json.loads(Path(directory, "held_out.json").read_text())
    assert held_out["pairs"] == 4 and held_out["accuracy"] == 1.0
    assert unfinished_files(Path(directory)) == []
    before, after = (load_file(Path(path, "model.safetensors")) for path in (policy, directory))
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])

    written = Path(directory, "model.safetensors").stat().st_mtime_ns
    train_reward_model(policy, pairs, config(tmp_path), tmp_path / "reward", 1e-2, 3)
    assert Path(directory, "model.safetensors").stat().st_mtime_ns == written

    args = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 1}
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[directory],
        args=GRPOConfig(str(tmp_path / "grpo"), use_cpu=True, bf16=False, report_to="none", **args),
        train_dataset=problems(4, chat=chat),
    )
    # what GRPO reads a pair as is what the model was trained on
    rewards = [
        trainer._calculate_rewards([dict(pairs[0])], [pairs[0]["prompt"]], [pairs[0][name]], [[]])[0, 0].item()
        for name in ("chosen", "rejected")
    ]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    with torch.no_grad():
        trained_on = [
            model(torch.tensor(answer_ids(tokenizer, [pairs[0]["prompt"]], [pairs[0][name]], None))).logits.item()
            for name in ("chosen", "rejected")
        ]
    assert rewards == pytest.approx(trained_on, abs=1e-5)
    assert rewards[0] > rewards[1]
    with project_labelled_tokens_only(trainer.accelerator.device):
        trainer.train()
    assert any("rewards/reward/mean" in entry for entry in trainer.state.log_history)
