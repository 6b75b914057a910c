"""Outcome matrices to advantages: invariances, TRL's special case, missing outcomes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from trl_sgpo.method.advantages import (
    center_by_problem,
    execution_advantages,
    own_and_siblings,
    strategy_advantages,
    strategy_credit,
    strategy_outcomes,
    token_advantages,
)
from trl_sgpo.method.credit import assign_credit
from trl_sgpo.method.problem import Problem
from trl_sgpo.method.prompts import ParsedStrategy
from trl_sgpo.method.rollout import Rollout, RolloutBatch
from trl_sgpo.method.transfer import BlockGeometry
from trl_sgpo.sgpo_config import SGPOConfig


properties = settings(max_examples=60, deadline=None, derandomize=True)
BASELINES = ["problem", "strategy", "two_way"]


@st.composite
def blocks(draw, missing=False):
    """Outcome matrices `(N, n * K + b, K)` with the n and K of their geometry."""
    N, K, n, b = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (N, n * K + b, K)
    outcomes = torch.rand(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        outcomes = outcomes.round()
    if missing:
        share = draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
        outcomes[torch.rand(shape, generator=generator) < share] = torch.nan
    return outcomes, n, K


def of_strategies(outcomes, own, **kwargs):
    """Strategy advantages of raw outcomes."""
    return strategy_advantages(strategy_credit(outcomes, own, **kwargs))


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-8, rtol=0.0)


class TestDifficulty:
    """Adding a constant to all outcomes of a problem makes it easier and nothing else."""

    @given(blocks(), st.data(), st.floats(-3, 3))
    @properties
    def test_strategy_advantages_ignore_it(self, drawn, data, constant):
        outcomes, own, K = drawn
        easier = outcomes.clone()
        easier[:, :, data.draw(st.integers(0, K - 1))] += constant
        close(of_strategies(easier, own), of_strategies(outcomes, own))

    @given(blocks(missing=True), st.data(), st.floats(-3, 3))
    @properties
    def test_strategy_advantages_ignore_it_with_missing_outcomes(self, drawn, data, constant):
        outcomes, own, K = drawn
        easier = outcomes.clone()
        easier[:, :, data.draw(st.integers(0, K - 1))] += constant
        close(of_strategies(easier, own), of_strategies(outcomes, own))

    @given(blocks(), st.data(), st.floats(-3, 3), st.sampled_from(["problem", "two_way"]), st.booleans())
    @properties
    def test_execution_advantages_ignore_it(self, drawn, data, constant, baseline, scaled):
        outcomes, _, K = drawn
        easier = outcomes.clone()
        easier[:, :, data.draw(st.integers(0, K - 1))] += constant
        close(execution_advantages(easier, baseline, scaled), execution_advantages(outcomes, baseline, scaled))

    def test_strategy_baseline_does_not(self):
        outcomes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        easier = outcomes + torch.tensor([1.0, 0.0])
        change = execution_advantages(easier, "strategy", False) - execution_advantages(outcomes, "strategy", False)
        close(change, torch.tensor([[[0.5, -0.5], [0.5, -0.5]]]))

    def test_uncentred_outcomes_would_favour_the_easy_problem(self):
        """Both problems solve alike, but one is easy: only centring keeps its strategies from winning."""
        outcomes = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        kwargs = {"correctness_weight": 1.0, "transfer_weight": 0.0}
        assert strategy_advantages(strategy_outcomes(outcomes, 1, **kwargs)).tolist()[0][0] > 0.5
        assert of_strategies(outcomes, 1, **kwargs).tolist() == [[0.0, 0.0]]


class TestPermutations:
    @given(blocks(), st.data())
    @properties
    def test_strategies_within_their_writer(self, drawn, data):
        outcomes, own, K = drawn
        total = outcomes.shape[1]
        order = [
            strategy
            for problem in range(K)
            for strategy in data.draw(st.permutations(range(problem * own, (problem + 1) * own)))
        ] + data.draw(st.permutations(range(own * K, total)))
        permuted = outcomes[:, order]
        close(of_strategies(permuted, own), of_strategies(outcomes, own)[:, order[: own * K]])
        for baseline in BASELINES:
            close(execution_advantages(permuted, baseline), execution_advantages(outcomes, baseline)[:, order])

    @given(blocks(), st.data())
    @properties
    def test_problems_with_their_strategies(self, drawn, data):
        outcomes, own, K = drawn
        problems = data.draw(st.permutations(range(K)))
        written = [problem * own + index for problem in problems for index in range(own)]
        order = [*written, *range(own * K, outcomes.shape[1])]
        permuted = outcomes[:, order][:, :, problems]
        close(of_strategies(permuted, own), of_strategies(outcomes, own)[:, written])
        for baseline in BASELINES:
            expected = execution_advantages(outcomes, baseline)[:, order][:, :, problems]
            close(execution_advantages(permuted, baseline), expected)

    def test_moving_a_strategy_to_another_writer_matters(self):
        outcomes = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
        kwargs = {"correctness_weight": 1.0, "transfer_weight": 0.0}
        moved = outcomes[:, [2, 1, 0, 3]]
        # The only success is on problem 0: it earns nothing once the strategy belongs to problem 1
        assert strategy_outcomes(outcomes, 2, **kwargs).tolist() == [[1.0, 0.0, 0.0, 0.0]]
        assert strategy_outcomes(moved, 2, **kwargs).tolist() == [[0.0, 0.0, 0.0, 0.0]]


class TestSpecialCaseOfGRPO:
    """K = 1, b = 0 gives TRL's advantages."""

    @staticmethod
    def trl(rewards):
        return (rewards - rewards.mean(dim=1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)

    @given(st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**32), st.booleans())
    @properties
    def test_equals_trl(self, groups, generations, seed, binary):
        rewards = torch.rand(groups, generations, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rewards = rewards.round() if binary else rewards
        outcomes = rewards.unsqueeze(2)
        torch.testing.assert_close(of_strategies(outcomes, generations), self.trl(rewards), atol=1e-6, rtol=0.0)
        torch.testing.assert_close(execution_advantages(outcomes).squeeze(2), self.trl(rewards), atol=1e-6, rtol=0.0)

    def test_worked_by_hand(self):
        outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 4, 1)
        expected = 0.5 / (3**-0.5 + 1e-4)
        for advantages in (of_strategies(outcomes, 4), execution_advantages(outcomes).squeeze(2)):
            assert advantages[0].tolist() == pytest.approx([expected, -expected, -expected, expected], abs=1e-5)

    def test_siblings_do_not_exist(self):
        on_own, on_siblings = own_and_siblings(torch.tensor([[[1.0], [0.0]]]), 2)
        assert on_own.tolist() == [[1.0, 0.0]]
        assert on_siblings.isnan().all()

    @pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
    def test_equal_rewards_give_nothing(self, value):
        outcomes = torch.full((2, 4, 1), value)
        assert of_strategies(outcomes, 4).abs().max() < 1e-3
        assert execution_advantages(outcomes).abs().max() < 1e-3


class TestStrategyOutcomes:
    OUTCOMES = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])

    def test_centred_by_problem(self):
        assert center_by_problem(self.OUTCOMES).tolist() == [[[0.0, -0.5], [0.0, 0.5]]]

    @pytest.mark.parametrize(
        ("weights", "expected"),
        [((1.0, 1.0), [-0.5, 0.5]), ((2.0, 0.5), [-0.25, 1.0]), ((1.0, 0.0), [0.0, 0.5]), ((0.0, 1.0), [-0.5, 0.0])],
    )
    def test_weights(self, weights, expected):
        assert strategy_credit(self.OUTCOMES, 1, *weights).tolist() == [expected]

    def test_own_and_mean_of_siblings(self):
        # K = 3, n = 1, b = 1: the last strategy is from the bank and belongs to nobody
        outcomes = torch.tensor([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0], [9.0, 9.0, 9.0]]])
        on_own, on_siblings = own_and_siblings(outcomes, 1)
        assert on_own.tolist() == [[1.0, 16.0, 256.0]]
        assert on_siblings.tolist() == [[3.0, 20.0, 96.0]]

    def test_two_strategies_a_problem(self):
        outcomes = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]])
        on_own, on_siblings = own_and_siblings(outcomes, 2)
        assert on_own.tolist() == [[1.0, 3.0, 6.0, 8.0]]
        assert on_siblings.tolist() == [[2.0, 4.0, 5.0, 7.0]]

    def test_bank_strategies_count_for_difficulty(self):
        with_bank = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        assert center_by_problem(with_bank)[0, 0, 0] == pytest.approx(1 / 3)

    def test_blocks_are_compared_apart(self):
        rewards = torch.tensor([[0.0, 1.0], [10.0, 11.0]])
        advantages = strategy_advantages(rewards)
        torch.testing.assert_close(advantages[0], advantages[1])
        torch.testing.assert_close(advantages[0], torch.tensor([-0.5, 0.5]) / (0.5**0.5 + 1e-4))


class TestWeights:
    """What good strategies gain over bad ones, which are worse on siblings alone, or on their own problem alone."""

    @staticmethod
    def push(K, own, worse_on_siblings=True, blocks=20_000, **weights):
        """Mean advantage of good strategies minus that of bad ones."""
        generator = torch.Generator().manual_seed(0)
        good = torch.rand(blocks, own * K, generator=generator) < 0.5
        is_own = torch.arange(own * K).div(own, rounding_mode="floor").unsqueeze(1) == torch.arange(K)
        rate = torch.where((is_own == worse_on_siblings) | good.unsqueeze(2), 0.8, 0.1)
        outcomes = torch.bernoulli(rate, generator=generator)
        advantages = of_strategies(outcomes, own, **weights)
        return float(advantages[good].mean() - advantages[~good].mean())

    @pytest.mark.parametrize(("K", "own"), [(2, 2), (2, 4), (3, 2), (4, 2)])
    def test_rewards_transfer_in_proportion_and_not_at_all_if_0(self, K, own):
        control = self.push(1, own * K)  # no siblings
        pushes = [self.push(K, own, transfer_weight=weight) for weight in (0.0, 0.1, 0.5, 1.0, 2.0)]
        assert abs(control) < 0.02
        assert pushes[0] == pytest.approx(control, abs=0.02)
        assert pushes[1] > 0.2 and pushes == sorted(pushes)

    @pytest.mark.parametrize(("K", "own"), [(2, 2), (2, 4), (3, 1), (4, 2)])
    def test_rewards_correctness_in_proportion_and_not_at_all_if_0(self, K, own):
        weights = (0.0, 0.1, 0.5, 1.0, 2.0)
        pushes = [self.push(K, own, worse_on_siblings=False, correctness_weight=weight) for weight in weights]
        assert pushes[0] == pytest.approx(0.0, abs=0.02)
        assert pushes[1] > 0.1 and pushes == sorted(pushes)

    @given(blocks(missing=True), st.integers(0, 2**32), st.booleans(), st.booleans())
    @properties
    def test_0_ignores_outcomes(self, drawn, seed, missing, transfer):
        outcomes, own, K = drawn
        own = max(own, 2)
        outcomes = torch.cat([outcomes] * 2, dim=1)[:, : own * K + 1]
        others = torch.rand(outcomes.shape, generator=torch.Generator().manual_seed(seed), dtype=outcomes.dtype)
        is_own = torch.arange(outcomes.shape[1]).div(own, rounding_mode="floor").unsqueeze(1) == torch.arange(K)
        changed = torch.where(is_own == transfer, outcomes, torch.nan if missing else others)
        weights = {"transfer_weight" if transfer else "correctness_weight": 0.0}
        close(of_strategies(changed, own, **weights), of_strategies(outcomes, own, **weights))

    def test_worked_by_hand(self):
        outcomes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]])
        # Problem 0: own outcomes 1 and 0, block mean 0.5. Problem 1: own outcomes 1 and 1, block mean 0.75
        for weight, expected in (
            (0.0, [0.5, -0.5, 0.0, 0.0]),
            (1.0, [0.5 - 0.75, -0.5 + 0.25, 0.25 + 0.5, 0.25 - 0.5]),
            (0.5, [0.5 - 0.375, -0.5 + 0.125, 0.125 + 0.25, 0.125 - 0.25]),
            (2.0, [0.5 - 0.75 - 0.5, -0.5 + 0.25 + 0.5, 0.25 + 0.5 + 0.5, 0.25 - 0.5 - 0.5]),
        ):
            assert strategy_credit(outcomes, 2, 1.0, weight).tolist() == [expected]

    @given(blocks(missing=True), st.floats(0, 1))
    @properties
    def test_transfer_is_linear_up_to_the_correctness_weight(self, drawn, weight):
        outcomes, own, _ = drawn
        none, full = (strategy_credit(outcomes, own, 1.0, each) for each in (0.0, 1.0))
        close(strategy_credit(outcomes, own, 1.0, weight), (1 - weight) * none + weight * full)

    @given(blocks(missing=True), st.floats(0, 2))
    @properties
    def test_equal_weights_compare_all_outcomes_with_the_block(self, drawn, weight):
        outcomes, own, _ = drawn
        expected = strategy_outcomes(center_by_problem(outcomes), own, weight, weight)
        assert torch.equal(strategy_credit(outcomes, own, weight, weight), expected)

    @given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 2), st.integers(0, 2**32), st.floats(0, 2))
    @properties
    def test_is_without_effect_on_a_block_of_one_problem(self, groups, own, bank, seed, weight):
        generator = torch.Generator().manual_seed(seed)
        outcomes = torch.rand(groups, own + bank, 1, generator=generator, dtype=torch.float64)
        close(of_strategies(outcomes, own, transfer_weight=weight), of_strategies(outcomes, own))


class TestCredit:
    @pytest.mark.parametrize("K", [1, 2])
    def test_plain_rows_enter_no_strategys_outcome(self, tmp_path, K):
        geometry = BlockGeometry(problems=K, own=2, plain=2)
        problems = [Problem([{"role": "user", "content": f"{n} + 1?"}], "sums", str(n + 1)) for n in range(K)]
        rows = [
            Rollout("plain", ParsedStrategy(""), "", [], 0)
            if strategy >= 2 * K
            else Rollout("own" if strategy // 2 == problem else "borrowed", ParsedStrategy("Add."), "", [], 0)
            for problem in range(K)
            for strategy in range(geometry.executions)
        ]
        args = SGPOConfig(
            str(tmp_path), num_generations=geometry.executions, num_plain_rollouts=2, transfer_block_size=K,
            per_device_train_batch_size=geometry.rows, report_to="none", bf16=False,
        )  # fmt: skip
        assert args.geometry == geometry

        def credit(plain):
            rewards = torch.rand(geometry.rows, 1, generator=torch.Generator().manual_seed(0))
            is_plain = torch.tensor([row.source == "plain" for row in rows])
            rewards[is_plain, 0] = torch.tensor(plain * K)
            batch = RolloutBatch.without_bank(problems, geometry)
            found = assign_credit(rows, rewards, batch, args, torch.ones(1), spread=nanstd)
            return found, found.execution[is_plain], found.execution[~is_plain]

        (one, plain, guided), (other, equal, same) = credit([0.0, 1.0]), credit([1.0, 1.0])
        assert one.strategy.equal(other.strategy) and guided.equal(same) and one.verified.equal(other.verified)
        assert plain.view(K, 2).sum(dim=1).abs().max() < 1e-6 and plain.abs().min() > 0.5 and not equal.any()
        lift = one.metrics["lift"] - other.metrics["lift"]
        torch.testing.assert_close(lift, torch.full_like(lift, 0.5))

    def test_harm_is_what_plain_answers_solve_and_guided_ones_lose(self, tmp_path):
        """Of problems that half of the plain rows solve, those that less than half of the guided rows do."""
        geometry = BlockGeometry(problems=4, own=1, plain=2)
        problems = [Problem([{"role": "user", "content": f"{n} + 1?"}], "sums", str(n + 1)) for n in range(4)]
        rows = [
            Rollout("plain", ParsedStrategy(""), "", [], 0)
            if strategy >= 4
            else Rollout("own" if strategy == problem else "borrowed", ParsedStrategy("Add."), "", [], 0)
            for problem in range(4)
            for strategy in range(6)
        ]
        args = SGPOConfig(
            str(tmp_path), num_generations=6, num_plain_rollouts=2, transfer_block_size=4,
            per_device_train_batch_size=24, report_to="none", bf16=False,
        )  # fmt: skip
        rewards = torch.tensor(
            [
                *[1.0, 0.0, 0.0, 0.0, 1.0, 0.0],  # lost
                *[1.0, 1.0, 0.0, 0.0, 1.0, 1.0],  # kept
                *[0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # plain does not solve it
                *[torch.nan] * 4, *[1.0, 1.0],  # not known
            ]
        ).unsqueeze(1)  # fmt: skip
        batch = RolloutBatch.without_bank(problems, geometry)
        found = assign_credit(rows, rewards, batch, args, torch.ones(1), spread=nanstd)
        assert found.metrics["harm"].flatten().tolist() == pytest.approx([1.0, 0.0, torch.nan, torch.nan], nan_ok=True)

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    @pytest.mark.parametrize("borrowed", [2, 4])  # strategy 2 on problem 0, strategy 0 on problem 1
    def test_without_transfer_borrowed_executions_do_not_count(self, tmp_path, scale_rewards, borrowed):
        geometry = BlockGeometry(problems=2, own=2)
        problems = [Problem([{"role": "user", "content": f"{n} + 1?"}], "sums", str(n + 1)) for n in (1, 2)]
        rollouts = [
            Rollout("own" if strategy // 2 == problem else "borrowed", ParsedStrategy("Add."), "", [], 0)
            for problem in range(2)
            for strategy in range(4)
        ]

        def advantages(weight, rewards):
            args = SGPOConfig(
                str(tmp_path), num_generations=4, per_device_train_batch_size=8, transfer_weight=weight,
                scale_rewards=scale_rewards, report_to="none", bf16=False,
            )  # fmt: skip
            batch = RolloutBatch.without_bank(problems, geometry)
            return assign_credit(rollouts, rewards, batch, args, torch.ones(1), spread=nanstd).strategy

        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).unsqueeze(1)
        other = rewards.clone()
        other[borrowed] = 1.0 - other[borrowed]
        assert advantages(0.0, rewards).abs().max() > 0.3
        assert torch.equal(advantages(0.0, other), advantages(0.0, rewards))
        assert not torch.equal(advantages(1.0, other), advantages(1.0, rewards))


class TestMissingOutcomes:
    @given(blocks(missing=True), st.sampled_from(BASELINES), st.booleans())
    @properties
    def test_executions_get_zero_and_nothing_is_nan(self, drawn, baseline, scaled):
        outcomes, own, _ = drawn
        advantages = execution_advantages(outcomes, baseline, scaled)
        assert advantages.isfinite().all()
        assert (advantages[outcomes.isnan()] == 0.0).all()
        assert of_strategies(outcomes, own).isfinite().all()

    def test_enter_no_mean(self):
        outcomes = torch.tensor([[[1.0], [0.0], [torch.nan]]])
        assert execution_advantages(outcomes, scaled=False).flatten().tolist() == [0.5, -0.5, 0.0]

    def test_leave_others_as_without_them(self):
        rest = torch.tensor([[[1.0], [0.0], [1.0]]])
        outcomes = torch.cat([rest, torch.tensor([[[torch.nan]]])], dim=1)
        torch.testing.assert_close(execution_advantages(outcomes)[:, :3], execution_advantages(rest))

    def test_sibling_mean_skips_them(self):
        outcomes = torch.tensor([[[1.0, torch.nan, 4.0], [0.0, 1.0, torch.nan], [2.0, 6.0, 0.0]]])
        assert own_and_siblings(outcomes, 1)[1].tolist() == [[4.0, 0.0, 4.0]]

    def test_strategy_without_outcomes_counts_as_average(self):
        outcomes = torch.tensor([[[1.0, 1.0], [torch.nan, torch.nan], [0.0, 0.0], [0.5, 0.5]]])
        rewards = strategy_credit(outcomes, 2)
        assert rewards.tolist() == [[1.0, 0.0, -1.0, 0.0]]

    @pytest.mark.parametrize("baseline", BASELINES)
    def test_lone_outcome_gets_zero(self, baseline):
        outcomes = torch.full((1, 4, 2), torch.nan)
        outcomes[0, 1, 0] = 1.0
        assert execution_advantages(outcomes, baseline).tolist() == torch.zeros(1, 4, 2).tolist()


class TestExecutionBaselines:
    @given(st.integers(2, 4), st.integers(2, 8), st.integers(0, 2**32))
    @properties
    def test_two_way_credits_nothing_additive(self, problems, strategies, seed):
        generator = torch.Generator().manual_seed(seed)
        strategy_effect = torch.randn(2, strategies, 1, generator=generator, dtype=torch.float64)
        problem_effect = torch.randn(2, 1, problems, generator=generator, dtype=torch.float64)
        advantages = execution_advantages(strategy_effect + problem_effect, "two_way", scaled=False)
        close(advantages, torch.zeros(2, strategies, problems, dtype=torch.float64))

    def test_two_way_credits_the_exception(self):
        outcomes = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        expected = [[[0.25, -0.25], [-0.25, 0.25]]]
        assert execution_advantages(outcomes, "two_way", scaled=False).tolist() == expected

    def test_strategy_subtracts_the_mean_of_the_strategy(self):
        outcomes = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]]])
        expected = [[[0.5, -0.5], [0.0, 0.0], [-1.5, 1.5]]]
        assert execution_advantages(outcomes, "strategy", scaled=False).tolist() == expected

    def test_problem_subtracts_the_mean_of_the_problem(self):
        outcomes = torch.tensor([[[1.0, 0.0], [1.0, 3.0], [-2.0, 0.0]]])
        expected = [[[1.0, -1.0], [1.0, 2.0], [-2.0, -1.0]]]
        assert execution_advantages(outcomes, "problem", scaled=False).tolist() == expected

    @given(blocks(), st.sampled_from(BASELINES))
    @properties
    def test_scaling_divides_by_a_standard_deviation(self, drawn, baseline):
        outcomes, _, _ = drawn
        plain = execution_advantages(outcomes, baseline, scaled=False)
        dims = 1 if baseline == "problem" else (1, 2)
        deviation = torch.std(outcomes if baseline == "problem" else plain, dim=dims, keepdim=True)
        torch.testing.assert_close(
            execution_advantages(outcomes, baseline, scaled=True), plain / (deviation + 1e-4), atol=1e-6, rtol=1e-6
        )

    def test_unscaled_strategies_keep_their_differences(self):
        rewards = torch.tensor([[0.0, 0.02, 0.04, 0.02]])
        torch.testing.assert_close(strategy_advantages(rewards, scaled=False), torch.tensor([[-0.02, 0.0, 0.02, 0.0]]))
        assert strategy_advantages(rewards).max() > 1.0


class TestTokenAdvantages:
    def test_strategy_tokens_come_first(self):
        spread = token_advantages(
            torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2, 0, 4]), 4
        )
        assert spread.tolist() == [[1.0, 1.0, -1.0, -1.0], [-2.0, -2.0, -2.0, -2.0], [3.0, 3.0, 3.0, 3.0]]

    def test_shape(self):
        assert token_advantages(torch.ones(5), torch.zeros(5), torch.zeros(5, dtype=torch.long), 7).shape == (5, 7)
