"""Step labels and the process reward model trained on them."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import evenness, problems, save_tiny_model, tokenizer
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo.compare import prm
from trl_sgpo.compare.prm import (
    ProcessReward,
    concordance,
    prompt_ids,
    solution_ids,
    split_steps,
    step_labels,
    step_loss,
    step_probabilities,
    train_process_reward_model,
    training_example,
)
from trl_sgpo.errors import ConfigError, DataError, ModelError
from trl_sgpo.files import unfinished_files
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.sgpo_config import SGPOConfig
from trl_sgpo.speed.lm_head import project_labelled_tokens_only


SAMPLING = Decoding(greedy=False)


def config(tmp_path):
    return SGPOConfig(
        str(tmp_path / "run"), num_generations=4, use_bank=False, bf16=False, disable_tqdm=True, report_to="none"
    )


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def chat(request):
    return request.param


@pytest.fixture
def policy(tmp_path, chat):
    return save_tiny_model(tmp_path / "policy", chat=chat)


@settings(max_examples=500, deadline=None)
@given(st.text("ab \n;"), st.sampled_from(["\n", "\n\n", "; ", ";"]))
def test_steps_make_up_the_text(text, separator):
    steps = split_steps(text, separator)
    assert "".join(steps) == text
    assert all(step.endswith(separator) for step in steps[:-1])
    if len(steps) > 1:
        assert all(step.replace(separator, "").strip() for step in steps)


def test_steps():
    assert split_steps("", "\n") == []
    assert split_steps("a", "\n") == ["a"]
    assert split_steps("a\nb\n", "\n") == ["a\n", "b\n"]
    assert split_steps("\n\na\n \nb", "\n") == ["\n\na\n \n", "b"]
    assert split_steps(";;a;b", ";") == [";;a;", "b"]


@settings(deadline=None)
@given(st.lists(st.text("ab1 é😀", min_size=1), min_size=1, max_size=4))
def test_step_ends_are_token_ends(parts):
    tok = tokenizer()
    steps = split_steps("\n".join(parts), "\n")
    ids, counts = solution_ids(tok, steps)
    assert ids == tok("".join(steps), add_special_tokens=False)["input_ids"]
    for index, count in enumerate(counts):
        assert tok.decode(ids[:count]) == "".join(steps[: index + 1])


def test_a_token_across_two_steps_belongs_to_the_second():
    tok = tokenizer()
    steps = ["To", " add"]  # " add" is a token, and so are " " and "add"
    ids, counts = solution_ids(tok, ["To ", "add"])
    assert (ids, counts[1]) == (solution_ids(tok, steps)[0], len(ids))
    assert tok.decode(ids[: counts[0]]) == "To"


def test_labels_are_at_step_ends(chat):
    tok = tokenizer(chat)
    prompt = problems(1, chat=chat)[0]["prompt"]
    steps = ["1 + 2 = 3\n", "3 + 4 = 7\n", "#### 7"]
    example = training_example(tok, prompt, steps, [0.25, 0.5, 1.0])
    marked = [index for index, label in enumerate(example["labels"]) if label != -100]
    assert [example["labels"][index] for index in marked] == [0.25, 0.5, 1.0]
    before = tok.decode(prompt_ids(tok, prompt))
    for count, index in enumerate(marked, start=1):
        assert tok.decode(example["input_ids"][: index + 1]) == before + "".join(steps[:count])


def test_labels_are_fractions_within_the_limit(policy, chat):
    model = TwoPhaseModel.from_pretrained(policy, TwoPhaseSettings(max_completion_length=12), device="cpu")
    rows = problems(40, chat=chat).to_list()
    before = model.generated_tokens
    dataset = step_labels(model, rows, evenness, 3000, SAMPLING, "e", solutions=2, rollouts=4)
    assert 2000 < model.generated_tokens - before <= 3000
    assert dataset.column_names == ["prompt", "completions", "labels"]
    assert any(len(row["completions"]) > 1 for row in dataset)
    for row in dataset:
        assert row["completions"] == split_steps("".join(row["completions"]), "e")
        assert len(row["labels"]) == len(row["completions"])
        assert row["labels"][-1] == evenness(["".join(row["completions"])])[0]
        assert {label * 4 for label in row["labels"]} <= {0, 1, 2, 3, 4}
    with pytest.raises(DataError, match="raise `max_tokens`"):
        step_labels(model, rows, evenness, 11, SAMPLING, "e")
    with pytest.raises(ConfigError, match="greedy=False"):
        step_labels(model, rows, evenness, 1000, Decoding(), "e")


def test_continuations_start_with_their_prefix(policy, chat):
    model = TwoPhaseModel.from_pretrained(policy, TwoPhaseSettings(max_completion_length=5), device="cpu")
    prompt = problems(1, chat=chat)[0]["prompt"]
    ids, _ = solution_ids(model.tokenizer, ["1 + 2", " = 3"])
    whole, none = model.continue_from([prompt, prompt], [ids, []])
    assert whole.startswith("1 + 2 = 3")
    assert none.strip() == model.answer([prompt])[0]


def test_a_continuation_sees_what_the_model_is_trained_on(policy, chat, monkeypatch):
    model = TwoPhaseModel.from_pretrained(policy, TwoPhaseSettings(max_completion_length=8), device="cpu")
    seen = []
    generate = model._generate
    monkeypatch.setattr(model, "_generate", lambda contexts, *rest: seen.extend(contexts) or generate(contexts, *rest))
    dataset = step_labels(model, problems(4, chat=chat).to_list(), evenness, 1000, SAMPLING, "e", 1, 1)
    expected = []
    for row in dataset:
        example = training_example(model.tokenizer, row["prompt"], row["completions"], row["labels"])
        ends = [index for index, label in enumerate(example["labels"]) if label != -100]
        expected += [example["input_ids"][: end + 1] for end in ends[:-1]]
    assert seen[4:] == expected


def test_loss_and_concordance():
    logits = torch.tensor([[[0.0], [2.0], [-1.0]]])
    labels = torch.tensor([[-100.0, 1.0, 0.5]])
    expected = -(
        torch.tensor(2.0).sigmoid().log() + 0.5 * (torch.tensor(-1.0).sigmoid() * torch.tensor(1.0).sigmoid()).log()
    )
    outputs = type("Outputs", (), {"logits": logits})
    torch.testing.assert_close(step_loss(outputs, labels), expected / 2)
    torch.testing.assert_close(step_loss(outputs, labels, 4), expected / 4)
    assert concordance(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.75
    assert concordance(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])) == 0.5
    assert concordance(torch.tensor([0.1, 0.4]), torch.tensor([1.0, 1.0])) is None


def toy_labels(chat, size=60):
    """Steps lead to a right answer until one says "bad"."""
    rows = []
    for index, row in enumerate(problems(size, chat=chat)):
        first_bad = index % 4
        steps = [f"{'bad' if step == first_bad else 'add'} {step}\n" for step in range(3)]
        rows.append(
            {
                "prompt": row["prompt"],
                "completions": steps,
                "labels": [1.0 if step < first_bad else 0.0 for step in range(3)],
            }
        )
    return Dataset.from_list(rows)


def test_process_reward_model_learns_and_rewards_in_grpo(policy, chat, tmp_path):
    dataset = toy_labels(chat)
    directory = train_process_reward_model(policy, dataset, config(tmp_path), tmp_path / "prm", 1e-2, 15)
    held_out = json.loads(Path(directory, "held_out.json").read_text())
    assert held_out["steps"] == 18 and held_out["accuracy"] > 0.9 and held_out["auc"] > 0.95
    assert unfinished_files(Path(directory)) == []
    before, after = (load_file(Path(path, "model.safetensors")) for path in (policy, directory))
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])

    written = Path(directory, "model.safetensors").stat().st_mtime_ns
    train_process_reward_model(policy, dataset, config(tmp_path), tmp_path / "prm", 1e-2, 15)
    assert Path(directory, "model.safetensors").stat().st_mtime_ns == written

    reward = ProcessReward(directory, "\n", batch_size=2)
    prompt = dataset[0]["prompt"]
    texts = ["add 0\nadd 1\nadd 2\n", "add 0\nbad 1\nadd 2\n", "bad 0\nadd 1\nadd 2\n", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    good, bad, worst, empty = reward(prompts=[prompt] * 4, completions=completions, solution=["1"] * 4)
    assert good > 0.8 and bad < 0.2 and worst < 0.2 and empty == 0.0
    steps = [(prompt, split_steps(text, "\n")) for text in texts]
    scored = step_probabilities(reward.model, reward.tokenizer, steps)
    assert [good, bad] == pytest.approx([min(scored[0]), min(scored[1])], abs=1e-5)
    assert scored[1][0] > 0.8
    mean = ProcessReward(directory, "\n", "mean")(prompts=[prompt] * 4, completions=completions)
    assert mean == pytest.approx([sum(steps) / 3 for steps in scored[:3]] + [0.0], abs=1e-5)

    args = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 1}
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[evenness, reward],
        args=GRPOConfig(str(tmp_path / "grpo"), use_cpu=True, bf16=False, report_to="none", **args),
        train_dataset=problems(4, chat=chat),
    )
    with project_labelled_tokens_only(trainer.accelerator.device):
        trainer.train()
    assert any("rewards/process_reward/mean" in entry for entry in trainer.state.log_history)


def test_policies_and_directories_that_cannot_score_steps(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="cannot be loaded"):
        ProcessReward(str(tmp_path / "nothing"), "\n")
    policy = save_tiny_model(tmp_path / "policy")
    content = json.loads(Path(policy, "config.json").read_text())
    Path(policy, "config.json").write_text(json.dumps(content | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match="use a Llama"):
        train_process_reward_model(policy, toy_labels(True), config(tmp_path), tmp_path / "prm")


def test_an_adapter_of_a_process_reward_model_learns_too(tmp_path):
    policy, dataset = save_tiny_model(tmp_path / "policy"), toy_labels(True)
    given = policy, dataset, config(tmp_path), tmp_path / "prm", 1e-2, 15
    directory = train_process_reward_model(*given, full=False)
    held_out = json.loads(Path(directory, "held_out.json").read_text())
    assert held_out["accuracy"] > 0.9 and held_out["auc"] > 0.95
    before, after = (load_file(Path(path, "model.safetensors")) for path in (policy, directory))
    assert {name for name in before if name not in after or not torch.equal(before[name], after[name])} == {
        *(name for name in before if "_proj." in name),
        "lm_head.weight",
    }
    texts = ["add 0\nadd 1\nadd 2\n", "add 0\nbad 1\nadd 2\n"]
    good, bad = ProcessReward(directory, "\n")(prompts=[dataset[0]["prompt"]] * 2, completions=texts)
    assert good > 0.8 and bad < 0.2


def test_fitting():
    assert prm._fitting([3, 0, 4, 5], 7) == 3
    assert prm._fitting([3, 4], 2) == 0
    assert prm._fitting([0, 0], 0) == 2
