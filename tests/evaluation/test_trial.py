"""The trial before training: its problems, its counts, and what it advises."""

from dataclasses import replace

import pytest
from datasets import Dataset
from models import evenness, problems, save_tiny_model

from trl_sgpo.data.tasks import answer_reward
from trl_sgpo.evaluation.trial import Trial, advice, draw, run_trial
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.problem import as_problem


SAMPLED = Decoding(greedy=False, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TwoPhaseModel:
    settings = TwoPhaseSettings(max_strategy_length=64, max_completion_length=128)
    return TwoPhaseModel.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")), settings)


def test_problems_are_different_ones_with_an_answer() -> None:
    rows = Dataset.from_list([{"prompt": str(i), "solution": None if i % 2 else str(i)} for i in range(40)])
    drawn = [row["prompt"] for row in draw(rows, seed=3)]
    assert len(set(drawn)) == 16 and all(int(prompt) % 2 == 0 for prompt in drawn)
    assert drawn == [row["prompt"] for row in draw(rows, seed=3)] != [row["prompt"] for row in draw(rows, seed=4)]
    few = [row["prompt"] for row in draw(rows.select(range(6)), seed=3)]
    assert len(few) == 16 and sorted(set(few)) == ["0", "2", "4"]
    assert len(draw(Dataset.from_list([{"prompt": "a"}]), seed=3)) == 16


def test_counts_are_those_of_the_texts(model: TwoPhaseModel) -> None:
    rows = problems(16).to_list()
    found = run_trial(model, rows, evenness, SAMPLED)
    assert replace(run_trial(model, rows, evenness, SAMPLED), seconds=found.seconds) == found
    assert found.rollouts == 16 and 0 < found.right < 16 and found.seconds > 0
    assert 0 < found.cut_strategies < 16 and 0 < found.cut_executions < 16
    assert found.cut_executions + found.unanswered <= 16
    assert run_trial(model, rows, answer_reward, SAMPLED).right == 0


def test_executions_that_end_by_themselves_are_not_cut_off(model: TwoPhaseModel) -> None:
    asked = [as_problem(row) for row in problems(16).to_list()]
    found = model.execute_to_limit(asked, ["Add."] * 16, SAMPLED)
    assert [text for text, _ in found] == model.execute(asked, ["Add."] * 16, SAMPLED)
    assert {cut for _, cut in found} == {True, False}
    longer = TwoPhaseModel(model.model, model.tokenizer, replace(model.settings, max_completion_length=160))
    for (text, cut), again in zip(found, longer.execute(asked, ["Add."] * 16, SAMPLED), strict=True):
        assert (again == text) != cut


def trial(right: int = 8, **counts: int) -> Trial:
    zeros = {"cut_strategies": 0, "cut_executions": 0, "malformed": 0, "unanswered": 0}
    return Trial(rollouts=16, right=right, seconds=1.0, **(zeros | counts))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (trial(), []),
        (trial(cut_strategies=4), []),
        (trial(cut_strategies=5), ["`max_strategy_length` to 128"]),
        (trial(cut_executions=5), ["`max_completion_length` to 256"]),
        (trial(malformed=5), ["warm start"]),
        (trial(unanswered=5), ["warm start"]),
        (trial(right=1), []),
        (trial(right=0), ["easier set"]),
        (trial(right=14), []),
        (trial(right=15), ["harder set"]),
        (trial(right=0, cut_executions=16), ["`max_completion_length` to 256", "easier set"]),
    ],
)
def test_advice(found: Trial, words: list[str]) -> None:
    changes = advice(found, 64, 128)
    assert len(changes) == len(words)
    assert all(word in change for word, change in zip(words, changes, strict=True))
