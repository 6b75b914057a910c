"""Contrast of right with wrong strategies: evidence, token rewards, advantages, and which strategies are compared."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.internalize.contexts import contrasts
from trl_sgpo.internalize.contrast import ContrastShape, evidence, token_rewards, with_contrast
from trl_sgpo.method.problem import Problem
from trl_sgpo.method.prompts import ParsedStrategy
from trl_sgpo.method.rollout import Rollout, RolloutBatch
from trl_sgpo.method.transfer import BlockGeometry


log_probs = st.floats(-20, 0)


@given(st.lists(log_probs, min_size=1, max_size=4), log_probs)
def test_evidence_is_the_log_ratio_to_the_mean_probability(wrong: list[float], right: float) -> None:
    found = evidence(
        torch.tensor([[right]], dtype=torch.float64),
        torch.tensor([*wrong, -1.0], dtype=torch.float64).view(-1, 1, 1),
        torch.tensor([[True]] * len(wrong) + [[False]]),
    )
    mean = sum(map(math.exp, wrong)) / len(wrong)
    assert found.item() == pytest.approx(right - math.log(mean), abs=1e-6)


@given(st.floats(-5, 5), st.floats(0.1, 2))
def test_rewards_of_tokens(value: float, scale: float) -> None:
    shape = ContrastShape(scale=scale)
    reward = token_rewards(torch.tensor([[value]], dtype=torch.float64), shape).item()
    assert abs(reward) <= scale and (reward == 0 or abs(reward) > shape.dead_zone)
    assert reward == 0 or math.copysign(1, reward) == math.copysign(1, value)


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_the_sign_of_the_verifier_is_never_turned(advantage: float, reward: float) -> None:
    moved = with_contrast(torch.tensor([[advantage]]), torch.tensor([[reward]])).item()
    assert moved * advantage >= 0
    assert advantage != 0 or moved == 0
    assert moved == 0 or moved == pytest.approx(advantage + reward, abs=1e-6)


def test_which_strategies_are_compared() -> None:
    """The best on other problems, those that fail there, then those of other classes; never one of the problem."""
    geometry = BlockGeometry(problems=2, own=2, plain=1)
    classes = ["sums", "sums", "products", "products"]
    problems = [Problem(f"problem {n}", name) for n, name in enumerate(classes)]
    names = [[f"{name} {n}" for n in range(4)] for name in ("sums", "products")]
    rollouts = []
    for block in range(2):
        for problem in range(2):
            for number in range(geometry.executions):
                own = number // 2 == problem and number < 4
                source = "plain" if number == 4 else "own" if own else "borrowed"
                text = "" if number == 4 else names[block][number]
                flaw = "repetitive" if text == "products 3" else None
                rollouts.append(Rollout(source, ParsedStrategy(text, flaw=flaw), "", [1], 0))
    # [block, strategy, problem]: strategies 0 and 1 are of the first problem, 2 and 3 of the second
    verified = torch.tensor([[[1, 0], [1, 1], [0, 1], [0, 0]], [[0, 0], [0, 0], [0, 1], [1, 1]]]).float()
    found = contrasts(RolloutBatch.without_bank(problems, geometry), rollouts, verified, most_wrong=3)
    assert [each.right for each in found] == ["sums 2", "sums 0", "products 2", None]
    assert found[0].wrong == ["sums 3", "products 0", "products 1"]
    assert found[1].wrong[0] == "products 1" and "sums" not in " ".join(found[1].wrong)
    assert found[3].wrong[:2] == ["products 0", "products 1"]
    assert [each.is_whole for each in found] == [True, True, True, False]
