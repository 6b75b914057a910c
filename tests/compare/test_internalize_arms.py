"""The controls of a comparison: strategies of other classes, and rejection sampling."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import problems, save_tiny_model

from trl_sgpo.compare.config import Arm
from trl_sgpo.compare.methods import Task, train_arm, with_strategies_of_other_classes
from trl_sgpo.compare.rft import right_answers
from trl_sgpo.data.classes import with_classes
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.method.problem import Problem
from trl_sgpo.method.prompts import ParsedStrategy
from trl_sgpo.method.rollout import Rollout, RolloutBatch
from trl_sgpo.method.transfer import BlockGeometry
from trl_sgpo.recipe import read_recipe


GEOMETRY = BlockGeometry(problems=2, own=2, plain=1)


@given(st.lists(st.sampled_from(["sums", "products", "primes"]), min_size=1, max_size=4), st.data())
def test_strategies_of_other_classes(classes: list[str], data: st.DataObject) -> None:
    problems = [Problem(f"{name} {block} {n}", name) for block, name in enumerate(classes) for n in range(2)]
    flawed = data.draw(st.lists(st.booleans(), min_size=2 * len(problems), max_size=2 * len(problems)))
    rollouts, written = [], []
    for position, problem in enumerate(problems):
        for row in range(GEOMETRY.executions):
            own = row // 2 == position % 2 and row < 4
            source = "plain" if row == 4 else "own" if own else "borrowed"
            flaw = "repetitive" if own and flawed[len(written)] else None
            strategy = ParsedStrategy(f"{problem.problem_class}|{position}|{row}", flaw=flaw)
            rollouts.append(Rollout(source, strategy, f"execution {position} {row}", [1], 0))
            written += [strategy] if own else []
    batch = RolloutBatch.without_bank(problems, GEOMETRY)
    changed = with_strategies_of_other_classes(rollouts, batch)
    for place, (before, after) in enumerate(zip(rollouts, changed, strict=True)):
        name = problems[place // GEOMETRY.executions].problem_class
        assert after.execution == before.execution
        if before.source != "own":
            assert after == before
        elif after.strategy.flaw is None:
            assert after.strategy in written and not after.strategy.text.startswith(f"{name}|")
        else:  # there was none, and nothing is learnt from the row
            assert not any(each.flaw is None and not each.text.startswith(f"{name}|") for each in written)


class Sampler:
    """Answers `right 0`, `wrong 1`, … in turn, 10 tokens each."""

    batch_size = 4
    generated_tokens = 100

    class settings:
        max_completion_length = 12

    def answer(self, prompts: list[Any], decoding: Decoding) -> list[str]:
        self.generated_tokens += 10 * len(prompts)
        return [f"{'right' if place % 2 == 0 else 'wrong'} {prompt} " for place, prompt in enumerate(prompts)]


@pytest.mark.parametrize("budget", [0, 11, 60, 333])
def test_right_answers_within_a_budget(budget: int) -> None:
    sampler: Any = Sampler()
    rows = [{"prompt": str(number), "solution": ""} for number in range(3)]

    def verifier(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float("right" in str(completion)) for completion in completions]

    found = right_answers(sampler, rows, verifier, budget, Decoding(greedy=False))
    spent = sampler.generated_tokens - 100
    assert budget - 12 < spent <= budget
    assert len(found) == -(-spent // 20)
    assert all(trace.strategy == "" and trace.execution == f"right {trace.prompt}" for trace in found)


def test_greedy_answers_are_refused() -> None:
    sampler: Any = Sampler()
    with pytest.raises(ConfigError, match="greedy=False"):
        right_answers(sampler, [], len, 100, Decoding(greedy=True))


def task(tmp_path: Path, method: str, *changes: str) -> Task:
    model = save_tiny_model(tmp_path / "tiny")
    keys = ["--num_generations", "4", "--per_device_train_batch_size", "8", "--max_steps", "1", "--report_to", "none"]
    keys += ["--max_strategy_length", "4", "--max_completion_length", "4", "--bf16", "false", "--use_bank", "false"]
    keys += ["--save_strategy", "no", "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    keys += ["--dtype", "float32", *changes]
    recipe = read_recipe(["--model_name_or_path", model, "--reward_funcs", "answer_reward", *keys], "test")
    data = with_classes(problems(), recipe.training)
    return Task(
        Arm(method, method, {}, {"sft_learning_rate": 1e-4}), recipe, model, data, 1_000, [], lambda trainer: 0.0
    )


def test_an_adapter_of_grpo_is_measured_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    adapter = "--load_in_4bit", "true", "--use_peft", "true", "--lora_target_modules", "q_proj"
    trained = TwoPhaseModel.from_pretrained(train_arm(task(tmp_path, "grpo", *adapter)).model)
    assert trained.model.config.quantization_config.load_in_4bit


def test_no_right_answer_is_no_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="within 1,000 tokens is right: raise `budget`"):
        train_arm(task(tmp_path, "rft"))


def test_a_step_of_one_class_has_no_other_strategies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to two transfer blocks or more"):
        train_arm(task(tmp_path, "internalize_wrong", "--internalize", "distill"))
