"""`retrieve_when: plain_fails`: strategies are shown with problems that plain answers fail, and with no others."""

from pathlib import Path
from typing import Any

import pytest
from models import hash_embedder, problems, save_tiny_model

from trl_sgpo import SGPOConfig, SGPOTrainer, StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.errors import ConfigError
from trl_sgpo.method import rollout


SETTINGS: dict[str, Any] = {
    "num_generations": 7, "num_plain_rollouts": 3, "per_device_train_batch_size": 28, "max_strategy_length": 8,
    "max_completion_length": 8, "max_steps": 2, "save_strategy": "no", "gradient_checkpointing": False,
    "disable_tqdm": True, "report_to": "none", "bf16": False, "log_completions": True, "logging_steps": 1,
}  # fmt: skip


def solves_some(prompts: list[Any], log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> list[float]:
    """Right for all answers to half of the problems."""
    if log_extra is not None:
        log_extra("own_column", [str(prompt) for prompt in prompts])
        log_metric("own_rows", float(len(prompts)))
    return [float(len(str(prompt)) % 2 == 0 or "1" in str(prompt)) for prompt in prompts]


@pytest.mark.parametrize("when", ["always", "plain_fails"])
def test_solved_problems_are_shown_nothing(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = StrategyBank(tmp_path / "bank", embedding_model=hash_embedder)
    data = problems(16)
    for name in set(data["problem_class"]):
        bank.add([Strategy(f"Add the numbers of {name}.", name, ("other",), trust="trusted", successes=8, trials=8)])
    batches = []
    roll_out = rollout.two_phase_rollout

    def recorded(batch: rollout.RolloutBatch, *others: Any) -> dict[str, Any]:
        rows = roll_out(batch, *others)
        batches.append((batch, rows))
        return rows

    monkeypatch.setattr("trl_sgpo.sgpo_trainer.two_phase_rollout", recorded)
    args = SGPOConfig(str(tmp_path / "out"), retrieve_when=when, num_retrieved=1, **SETTINGS)
    trainer = SGPOTrainer(save_tiny_model(tmp_path / "tiny"), solves_some, args, data, strategy_bank=bank)
    trainer.train()
    shown = {True: 0, False: 0}
    for batch, rows in batches:
        for place, problem in enumerate(batch.problems):
            (solved,) = {bool(value) for value in solves_some([problem.prompt])}
            shown[solved] += len(problem.retrieved)
            plain = rows["rollout"][place * 7 + 4 : place * 7 + 7]
            assert [row.source for row in plain] == ["plain"] * 3
            if when == "plain_fails":
                answers = [answer.ids for answer in batch.answered[place * 3 : place * 3 + 3]]
                assert [row.execution_ids for row in plain] == answers
                assert rows["completion_ids"][place * 7 + 4 : place * 7 + 7] == answers
            assert all(len(row) == len(ids) for row, ids in zip(rows["logprobs"], rows["completion_ids"], strict=True))
    assert shown[False] > 0
    assert (shown[True] > 0) == (when == "always")
    assert all(log["own_rows"] == 28 for log in trainer.state.log_history if "own_rows" in log)
    assert [len(trainer._logs["extra"]["own_column"]), len(trainer._logs["prompt"])] == [28, 28]
    assert all(abs(log["sgpo/sampler_kl"]) < 0.02 for log in trainer.state.log_history if "sgpo/sampler_kl" in log)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_plain_rollouts": 4, "use_bank": False}, {"num_plain_rollouts": 4, "num_retrieved": 0}],
)
def test_it_needs_plain_rows_and_strategies(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs plain rows and strategies to show: set"):
        SGPOConfig("out", retrieve_when="plain_fails", **settings)
