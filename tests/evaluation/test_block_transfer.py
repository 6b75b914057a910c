"""What a run measures before and after training: plain answers, own strategies, the bank, and transfer."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from models import evenness, hash_embedder, problems, save_tiny_model

from trl_sgpo import SGPOConfig, SGPOTrainer, StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.evaluation.block_transfer import TransferScore, measure_transfer
from trl_sgpo.evaluation.tables import before_and_after
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.inference.verifier import verify
from trl_sgpo.method.problem import as_problem


@pytest.fixture
def trainer(tmp_path: Path) -> SGPOTrainer:
    args = SGPOConfig(
        str(tmp_path / "run"),
        per_device_train_batch_size=16,
        num_generations=8,
        max_strategy_length=8,
        max_completion_length=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
    )
    bank = StrategyBank(tmp_path / "bank", embedding_model=hash_embedder)
    return SGPOTrainer(
        save_tiny_model(tmp_path / "model"), evenness, args, train_dataset=problems(), strategy_bank=bank
    )


def test_three_figures_of_a_trainer(trainer: SGPOTrainer) -> None:
    rows = problems(8, 1)
    settings = TwoPhaseSettings.from_config(trainer.args)
    model = TwoPhaseModel(trainer.model, trainer.processing_class, settings)
    asked = [as_problem(row, "problem_class") for row in rows]
    plain = fmean(verify(evenness, list(rows), model.answer([row["prompt"] for row in rows], limit=16)))
    own = fmean(verify(evenness, list(rows), model.execute(asked, model.write_strategies(asked))))
    without = measure_transfer(trainer, rows, 8)
    assert (without.plain, without.accuracy, without.own) == (plain, own, None)

    assert trainer.strategy_bank is not None
    candidate = Strategy("Count the vowels, twice.", "kind-0", ("elsewhere",))
    trainer.strategy_bank.add([candidate])
    assert measure_transfer(trainer, rows, 8) == without
    trainer.strategy_bank.add([Strategy("Name a vowel.", "kind-0", ("elsewhere",), trust="trusted")])
    with_bank = measure_transfer(trainer, rows, 8)
    assert (with_bank.plain, with_bank.own) == (plain, own)
    assert (trainer.args.max_completion_length, trainer.args.num_retrieved) == (8, 1)


def test_problems_that_the_verifier_does_not_judge_are_left_out(trainer: SGPOTrainer) -> None:
    def half(completions: list[Any], solution: list[str], **_: Any) -> list[float | None]:
        return [1.0 if int(answer) % 4 == 0 else None for answer in solution]

    rows = problems(8, 1)
    judged = sum(int(answer) % 4 == 0 for answer in rows["solution"])
    trainer.reward_funcs = [half]
    found = measure_transfer(trainer, rows, 8)
    assert 0 < judged < 8 and (found.problems, found.unverified) == (judged, 8 - judged)
    assert (found.accuracy, found.transfer, found.plain) == (1, 1, 1)


def score(**values: Any) -> dict[str, Any]:
    return TransferScore(**{"accuracy": 0.5, "transfer": 0.25, "problems": 4, "transfers": 4} | values).to_dict()


def test_rows_of_what_was_measured() -> None:
    def rows(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
        report = {when: {"sampled": each, "greedy": each} for when, each in (("before", before), ("after", after))}
        return {name: cells for name, *cells in before_and_after(report).rows if name.endswith("greedy")}

    half, quarter = "0.50 [0.15, 0.85]", "0.25 [0.05, 0.70]"
    assert rows(score(plain=0.25), score(plain=0.5, own=0.25)) == {
        "accuracy of plain answers, greedy": [quarter, half],
        "accuracy with own strategy, greedy": [half, quarter],
        "accuracy with the bank in view, greedy": ["–", half],
        "strategy transfer score, greedy": [quarter, quarter],
    }
    earlier = {key: value for key, value in score().items() if key not in ("plain", "own")}
    assert rows(earlier, earlier) == {
        "accuracy with own strategy, greedy": [half, half],
        "strategy transfer score, greedy": [quarter, quarter],
    }
    assert rows(earlier, score(plain=0.5))["accuracy of plain answers, greedy"] == ["–", half]  # of a resumed run
    assert rows(score(problems=0), score(problems=0))["strategy transfer score, greedy"] == ["–", "–"]
