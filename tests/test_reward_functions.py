"""What reward functions return, what they are called, and the columns they add to the completions table."""

import asyncio
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import evenness, hash_embedder, problems, save_tiny_model

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.bank import StrategyBank
from trl_sgpo.data.columns import GIVEN
from trl_sgpo.data.tasks import to_problems
from trl_sgpo.errors import ConfigError, DataError, RewardError
from trl_sgpo.inference.verifier import verify
from trl_sgpo.method.metrics import COLUMNS
from trl_sgpo.report.records import read_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path, model):
    def make(reward_funcs, bank=None, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_strategy_length": 12,
            "max_completion_length": 12,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "use_bank": bank is not None,
            "disable_tqdm": True,
            "report_to": "none",
            "bf16": False,
        }
        args = SGPOConfig(**(defaults | kwargs))
        return SGPOTrainer(model, reward_funcs, args, problems(), strategy_bank=bank)

    return make


def returning(value, rows=None, at_step=0):
    """A reward function that returns a value for one row, or for `rows`, in one step."""

    def odd_one(completions, trainer_state, **kwargs):
        rewards = evenness(completions)
        if trainer_state.global_step == at_step:
            for row in range(1) if rows is None else rows:
                rewards[row] = value
        return rewards

    return odd_one


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


# Values


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39, -1e39, 1e30])
def test_a_reward_that_is_not_finite_ends_the_run_before_the_step(make, value):
    trainer = make([evenness, returning(value)])
    before = weights(trainer)
    with pytest.raises(RewardError, match=r"`odd_one` returned -?(inf|1e\+30) for the problem 'Kind \d: what is"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())


def test_a_reward_that_is_not_finite_is_found_in_evaluation_too(make):
    trainer = make(returning(math.inf))
    with pytest.raises(RewardError, match="`odd_one` returned inf"):
        trainer.evaluate(problems(4, 2))


def test_nothing_of_the_run_is_lost(make, tmp_path):
    """Checkpoints and bank stay, the bank can be closed, and the mended run resumes."""
    bank = StrategyBank(tmp_path / "bank", embedding_model=hash_embedder)
    kwargs = {"bank_min_lift": -1.0, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with pytest.raises(RewardError):
        make(returning(math.inf, at_step=2), bank, **kwargs).train()
    held = {strategy.id for strategy in bank.strategies()}
    bank.close()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    with StrategyBank(tmp_path / "bank", embedding_model=hash_embedder) as again:
        assert {strategy.id for strategy in again.strategies()} == held
        trainer = make(evenness, again, **kwargs)
        trainer.train(resume_from_checkpoint=True)
    assert [logs["step"] for logs in trainer.state.log_history if "loss" in logs] == [1, 2, 3]
    assert not any(weight.isnan().any() for weight in weights(trainer).values())


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_row_without_a_reward_is_left_out(make, value):
    trainer = make(returning(value))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert not any(weight.isnan().any() for weight in after.values())


@pytest.mark.parametrize(
    "returned",
    [
        None, 1.0, "1.0", ["1.0"] * 8, [1.0] * 7, [1.0] * 9, [[1.0]] * 8, {"reward": 1.0}, [0.0] * 7 + ["right"],
        dict.fromkeys(range(8), 1.0), set(range(8)), dict.fromkeys(range(8)).keys(), [0] * 7 + [10**400],
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_no_list_of_rewards_is_named(make, returned, is_async):
    def careless(completions, **kwargs):
        return returned

    async def careless_async(completions, **kwargs):
        await asyncio.sleep(0)
        return returned

    function = careless_async if is_async else careless
    with pytest.raises(RewardError, match=f"`{function.__name__}` returned .* 8 completions"):
        make(function).train()


def test_an_error_of_a_reward_function_keeps_its_own_type(make):
    def wrong(completions, **kwargs):
        raise KeyError("solution")

    with pytest.raises(KeyError):
        make(wrong).train()


def test_other_forms_of_rewards_are_taken(make):
    def tensor(completions, **kwargs):
        return torch.tensor(evenness(completions))

    class Whole:
        def __call__(self, completions, **kwargs):
            return [bool(value) for value in evenness(completions)]

    trainer = make([tensor, Whole()])
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["rewards/tensor/mean"] == logs["rewards/Whole/mean"]


# Arguments


@pytest.mark.parametrize(("function", "words"), [(math, "is a module"), (5, "is of the type int"), ({}, "type dict")])
def test_what_cannot_be_called_is_refused(make, function, words):
    with pytest.raises(ConfigError, match=f"reward function .*{words}.*name a function"):
        make([evenness, function])


def test_a_function_that_takes_not_all_columns_is_refused(make):
    def narrow(completions, solution):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match=r"`narrow` takes no `\*\*kwargs`.*add `\*\*kwargs`"):
        make(narrow)


def test_a_column_that_a_function_needs_is_named(make):
    def strict(completions, gold, trainer_state, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(DataError, match=r"`strict` needs the column `gold`.*the columns are prompt, "):
        make(strict)


@pytest.mark.parametrize("column", GIVEN)
def test_a_column_that_reward_functions_would_not_get_is_refused(model, tmp_path, column):
    args = SGPOConfig(str(tmp_path), bf16=False, use_bank=False)
    rows = problems().add_column(column, ["x"] * len(problems()))
    with pytest.raises(DataError, match=f"column `{column}`.*rename it"):
        SGPOTrainer(model, evenness, args, rows)
    with pytest.raises(DataError, match=f"column `{column}`.*rename it"):
        to_problems(rows)


@pytest.mark.parametrize("returned", [{0: 1.0}, {1.0}, [10**400], [1.0, 1.0]])
def test_what_is_no_list_of_rewards_is_named_outside_training(returned):
    def careless(completions, **kwargs):
        return returned

    with pytest.raises(RewardError, match=r"`careless` returned .* 1 completions"):
        verify(careless, [{"prompt": "1 + 1?"}], ["2"])


# Names


def named(name, function=evenness):
    def reward(**kwargs):
        return function(**kwargs)

    reward.__name__ = name
    return reward


@pytest.mark.parametrize(
    "name",
    [*COLUMNS, "prompt", "completion", "step", "advantage"],
)
def test_a_name_of_another_column_is_refused(make, name):
    with pytest.raises(ConfigError, match=f"`{name}`.*column.*another name"):
        make([evenness, named(name)])


def test_two_functions_of_one_name_are_refused(make):
    with pytest.raises(ConfigError, match="Two reward functions are named `half`"):
        make([evenness, named("half"), named("half")])


@pytest.mark.parametrize("column", ["strategy", "prompt", "evenness"])
def test_a_logged_column_of_a_taken_name_is_refused(make, column):
    def logging(completions, log_extra, **kwargs):
        log_extra(column, [0.5] * len(completions))
        return evenness(completions)

    with pytest.raises(RewardError, match=f"`logging` logs a column `{column}`"):
        make([evenness, logging]).train()


def test_the_table_has_the_rewards_and_the_logged_columns(make, tmp_path):
    def logging(completions, log_extra, **kwargs):
        log_extra("vowels", [len(completions)] * len(completions))
        return [0.5] * len(completions)

    make([named("solved"), logging], log_completions=True, max_steps=1).train()
    (path,) = (tmp_path / "out" / "completions").glob("*.parquet")
    table = pd.read_parquet(path)
    assert set(table["solved"]) <= {0.0, 1.0} and (table["correctness"] == table["solved"]).all()
    assert set(table["vowels"]) == {8} and set(table["logging"]) == {0.5}


def test_tables_of_earlier_runs_are_still_read(make, tmp_path):
    """Where a column of ours replaced that of a reward function."""
    make(named("solved"), log_completions=True, max_steps=1).train()
    (path,) = Path(tmp_path / "out" / "completions").glob("*.parquet")
    pd.read_parquet(path).drop(columns="solved").to_parquet(path)
    rollout = read_run(tmp_path / "out").problems[0].rollouts[0]
    assert rollout.strategy and "correctness" in rollout.parts
