"""What plain answers learn in training, against an independent computation row by row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import problems, save_tiny_model
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.errors import ConfigError
from trl_sgpo.internalize.contrast import ContrastShape
from trl_sgpo.internalize.divergence import forward_kl, hidden_states, logit_scaling
from trl_sgpo.method.rollout import Rollout


def is_short(completions: list[Any], **kwargs: Any) -> list[float]:
    """Right for about half of what a random model writes."""
    return [float(len(str(completion)) % 2) for completion in completions]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SGPOTrainer]:
    def make(architecture: str = "llama", peft_config: Any = None, data: Any = None, **kwargs: Any) -> SGPOTrainer:
        model = save_tiny_model(tmp_path / architecture, architecture)
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"), "num_generations": 7, "num_plain_rollouts": 3,
            "per_device_train_batch_size": 28, "max_strategy_length": 12, "max_completion_length": 12, "max_steps": 1,
            "learning_rate": 1e-3, "save_strategy": "no", "use_bank": False, "gradient_checkpointing": False,
            "disable_tqdm": True, "report_to": "none", "bf16": False,
        }  # fmt: skip
        return SGPOTrainer(
            model, is_short, SGPOConfig(**(defaults | kwargs)), data or problems(), peft_config=peft_config
        )

    return make


def recorded(trainer: SGPOTrainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `internalize` gets and returns in a run of one step, and the gradients of that step."""
    kept: dict[str, Any] = {}
    internalize, step = type(trainer).internalize, type(trainer).training_step

    def keep(self: Any, output: dict, rollouts: list[Rollout], credit: Any, batch: Any) -> dict[str, Any]:
        result = internalize(self, output, rollouts, credit, batch)
        kept.update(output=dict(output), rollouts=list(rollouts), credit=credit, batch=batch, result=dict(result))
        return result

    def training_step(self: Any, *args: Any) -> torch.Tensor:
        loss = step(self, *args)
        kept["gradients"] = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return loss

    monkeypatch.setattr(SGPOTrainer, "internalize", keep)
    monkeypatch.setattr(SGPOTrainer, "training_step", training_step)
    trainer.train()
    return kept


def row_log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_distilled_answers_have_the_gradient_of_their_likelihood(
    make: Callable[..., SGPOTrainer], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    def well_formed(self: Any, prompt: Any, ids: list[int], truncated: bool = False) -> Any:
        return parse(self, prompt, ids, truncated=False)

    from trl_sgpo.method.conversation import Conversation

    parse = Conversation.parse
    monkeypatch.setattr(Conversation, "parse", well_formed)
    without = recorded(make(architecture), monkeypatch)["gradients"]
    trainer = make(architecture, internalize="distill", internalize_weight=0.7)
    model = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    kept = recorded(trainer, monkeypatch)
    targets, loss = kept["result"], torch.tensor(0.0)
    taught = [row for row, weight in enumerate(targets["target_weight"].tolist()) if weight > 0]
    assert 0 < len(taught) < 8 and all(kept["rollouts"][row].source == "own" for row in taught)
    for row in taught:
        rollout, problem = kept["rollouts"][row], kept["batch"].problems[row // 7]
        prompt = trainer.processing_class.apply_chat_template(problem.prompt, add_generation_prompt=True)["input_ids"]
        text = f"{rollout.strategy.text}\n\n{rollout.execution}<|im_end|>"
        answer = trainer.processing_class(text, add_special_tokens=False)["input_ids"]
        assert targets["target_ids"][row][targets["target_mask"][row].bool()].tolist() == answer
        loss = loss - row_log_probs(model, prompt, answer).mean()
    (0.7 * loss / len(kept["rollouts"])).backward()
    for name, weight in model.named_parameters():
        found = kept["gradients"][name] - without[name]
        assert (found - weight.grad).norm() <= 1e-5 * kept["gradients"][name].norm() + 1e-7, name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_contrast_changes_the_advantages_of_plain_rows_only(
    make: Callable[..., SGPOTrainer], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    from trl_sgpo.internalize import contexts
    from trl_sgpo.method.conversation import Conversation

    parse = Conversation.parse
    monkeypatch.setattr(Conversation, "parse", lambda self, prompt, ids, truncated=False: parse(self, prompt, ids))
    trainer = make(architecture, internalize="contrast", internalize_contrasts=3)
    model = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    kept = recorded(trainer, monkeypatch)
    rollouts, batch = kept["rollouts"], kept["batch"]
    chosen = contexts.contrasts(batch, rollouts, kept["credit"].verified, 3)
    shape, compared = ContrastShape(), 0
    for row, rollout in enumerate(rollouts):
        before, after = kept["output"]["advantages"][row], kept["result"]["advantages"][row]
        contrast = chosen[row // 7]
        if rollout.source != "plain" or not contrast.is_whole:
            assert after.equal(before)
            continue
        prompt, answer = batch.problems[row // 7].prompt, rollout.execution_ids
        assert contrast.right is not None
        with torch.no_grad():
            right, *wrong = (
                row_log_probs(model, trainer.conversation.execution_request(prompt, (), text), answer)
                for text in (contrast.right, *contrast.wrong)
            )
        evidence = right - torch.stack(wrong).exp().mean(dim=0).log()
        reward = shape.scale * torch.tanh(evidence / shape.temperature)
        reward[reward.abs() <= shape.dead_zone] = 0.0
        expected = before[: len(answer)] + reward
        expected[expected.sign() != before[: len(answer)].sign()] = 0.0
        torch.testing.assert_close(after[: len(answer)], expected, rtol=1e-3, atol=1e-3)
        compared += bool((after != before).any())
    assert compared > 0


def test_the_teacher_is_a_snapshot(make: Callable[..., SGPOTrainer]) -> None:
    trainer = make(internalize="contrast", internalize_snapshot_steps=2, max_steps=3)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    teacher = trainer.teacher
    assert teacher.step == 2
    weights = dict(trainer.model.named_parameters())
    held = {name: weight.data_ptr() for name, weight in weights.items()}
    assert any(not teacher.weights[name].equal(weight) for name, weight in weights.items())
    assert any(not teacher.weights[name].equal(weight) for name, weight in before.items())
    with teacher.in_place():
        assert all(weight.data_ptr() != held[name] for name, weight in weights.items())
    assert {name: weight.data_ptr() for name, weight in weights.items()} == held


def test_contrast_is_logged_with_its_step(make: Callable[..., SGPOTrainer]) -> None:
    """It came one generation late, and as a metric of evaluation where there was one."""
    trainer = make(internalize="contrast", max_steps=2, logging_steps=1, per_device_eval_batch_size=28)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all({"sgpo/contrast", "sgpo/contrast_rows"} <= entry.keys() for entry in logs)
    assert not [key for key in trainer.evaluate(problems()) if "contrast" in key]


@pytest.mark.parametrize("method", ["contrast", "kl"])
def test_a_second_training_has_a_new_teacher(method: str, make: Callable[..., SGPOTrainer]) -> None:
    """That of the first one had a later step, and was not taken over again."""
    trainer = make(internalize=method, internalize_snapshot_steps=2, max_steps=3)
    trainer.train()
    first = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    taken: list[int] = []
    internalize = trainer.internalize

    def noting(*args: Any) -> dict[str, Any]:
        found = internalize(*args)
        taken.append(trainer.teacher.step)
        if len(taken) == 1:
            assert all(weight.equal(first[name]) for name, weight in trainer.teacher.weights.items())
        return found

    trainer.internalize = noting  # type: ignore[method-assign]
    trainer.train()
    assert taken == [0, 0, 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi"])
def test_divergence_has_the_gradient_of_its_definition(
    make: Callable[..., SGPOTrainer], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    without = recorded(make(architecture), monkeypatch)["gradients"]
    trainer = make(architecture, internalize="kl", internalize_weight=0.7)
    model = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    kept = recorded(trainer, monkeypatch)
    rollouts, batch, credit = kept["rollouts"], kept["batch"], kept["credit"]
    ends = dict.fromkeys(("own", "borrowed", "plain"), 0)
    loss = torch.tensor(0.0)
    for row, rollout in enumerate(rollouts):
        block, local = divmod(row // 7, 2)
        gap = (credit.verified[block, :, local].mean() - credit.plain[block, :, local].mean()).clamp(min=0)
        place = row % 7
        if rollout.source == "plain" or credit.verified[block, place, local] < 1 or gap == 0:
            continue
        ends[rollout.source] += 1
        problem, answer = batch.problems[row // 7], rollout.execution_ids
        plain = trainer.conversation.plain_request(problem.prompt)
        ids, mask = (
            torch.cat([kept["output"][f"{part}_{kind}"][row] for part in ("prompt", "completion")])
            for kind in ("ids", "mask")
        )
        shown = ids[mask.bool()].tolist()[: -len(answer)]
        logits = [model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for prompt in (shown, plain)]
        teacher, student = (each.float().log_softmax(-1) for each in logits)
        teacher = teacher.detach()
        by_token = (teacher.exp() * (teacher - student)).sum(-1)
        loss = loss + gap * by_token.clamp(max=1.0).mean()
    assert ends["own"] and ends["borrowed"]
    (0.7 * loss / len(rollouts)).backward()
    assert loss.item() > 1e-6
    for name, weight in model.named_parameters():
        found = kept["gradients"][name] - without[name]
        assert (found - weight.grad).norm() <= 1e-5 * kept["gradients"][name].norm() + 1e-7, name


@pytest.mark.parametrize("method", ["distill", "contrast", "kl"])
@pytest.mark.parametrize("lora", [False, True])
def test_resuming_gives_the_same_weights(
    make: Callable[..., SGPOTrainer], tmp_path: Path, method: str, lora: bool
) -> None:
    peft = LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.0) if lora else None
    settings = {
        "internalize": method, "internalize_snapshot_steps": 2, "max_steps": 5, "save_strategy": "steps",
        "save_steps": 3, "peft_config": peft,
    }  # fmt: skip
    whole = make(**settings)
    whole.train()
    expected = {name: weight.clone() for name, weight in whole.model.named_parameters()}
    again = make(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert all(weight.equal(expected[name]) for name, weight in again.model.named_parameters())
    assert (tmp_path / "out" / "checkpoint-3" / "teacher.safetensors").exists() == (method != "distill")


def test_strategies_that_the_data_give(make: Callable[..., SGPOTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's method: no strategy is written, each problem's is executed b times, and m rows are plain."""
    data = problems()
    names = [f"Step {number}" for number in range(len(data))]
    data = data.add_column("strategy", names)
    trainer = make(
        data=data, internalize="kl", strategy_column="strategy", transfer_block_size=1, num_bank_rollouts=4,
        transfer_weight=0,
    )  # fmt: skip
    kept = recorded(trainer, monkeypatch)
    assert [row.source for row in kept["rollouts"][:7]] == ["bank"] * 4 + ["plain"] * 3
    of_problem = dict(zip(map(str, data["prompt"]), names, strict=True))
    for row, rollout in enumerate(kept["rollouts"]):
        expected = of_problem[str(kept["batch"].problems[row // 7].prompt)]
        assert rollout.strategy.text == ("" if rollout.source == "plain" else expected)
    assert (kept["result"]["target_weight"] > 0).any()
    history = trainer.state.log_history[0]
    assert "sgpo/lift" in history and "sgpo/strategy_length" not in history


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_bank": True}, "set `use_bank` to false"),
        ({"transfer_block_size": 2}, "`transfer_block_size` to 1"),
        ({"num_bank_rollouts": 1, "num_generations": 4}, "at least 2"),
    ],
)
def test_settings_beside_given_strategies(change: dict[str, Any], message: str) -> None:
    settings = {
        "strategy_column": "strategy", "transfer_block_size": 1, "num_bank_rollouts": 4, "num_plain_rollouts": 3,
        "num_generations": 7, "per_device_train_batch_size": 28, "use_bank": False,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        SGPOConfig("out", **(settings | change))


@pytest.mark.parametrize(
    "settings", [("llama", {}), ("cohere", {"logit_scale": 0.3}), ("granite", {}), ("gemma2", {})]
)
def test_divergence_of_hidden_states_is_that_of_the_logits(settings: tuple[str, dict[str, Any]]) -> None:
    """TRL's chunked divergence, and how architectures scale and bend their logits."""
    kind, more = settings
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **more, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "granite":
        config.logits_scaling = 4.0
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [torch.arange(3, 8), torch.arange(20, 22)]
    shown = [torch.arange(50, 60), torch.arange(9, 12)]
    answers = [torch.arange(100, 104), torch.arange(200, 207)]
    student = hidden_states(model, model, prompts, answers)
    with torch.no_grad():
        teacher = hidden_states(model, model, shown, answers)
    head = model.get_output_embeddings()
    found = forward_kl(student, teacher, head, head.weight.detach(), logit_scaling(config), temperature=0.7)
    expected = []
    for prompt, guide, answer in zip(prompts, shown, answers, strict=True):
        rows = [
            (model(torch.cat([begin, answer]).unsqueeze(0)).logits[0, len(begin) - 1 : -1] / 0.7).log_softmax(-1)
            for begin in (guide, prompt)
        ]
        expected.append((rows[0].exp() * (rows[0] - rows[1])).sum(-1).clamp(max=1.0))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["contrast", "kl"])
def test_a_copy_of_sharded_weights_is_refused(
    make: Callable[..., SGPOTrainer], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(SGPOTrainer, "_is_sharded", lambda self: True)
    with pytest.raises(ConfigError, match="keeps a copy of the weights, which are sharded here: use `distill`"):
        make(internalize=method)
