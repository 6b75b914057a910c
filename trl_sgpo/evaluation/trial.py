"""A trial before training: a few rollouts of a recipe's model, and what to change where they give no signal."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..data.tasks import final_answer
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.verifier import Verifier, verify
from ..method.problem import as_problem
from .statistics import SOLVED, derived_seed


if TYPE_CHECKING:
    from datasets import Dataset

ROLLOUTS = 16
MANY = 0.25  # share of rollouts above which a fault is named
EASY = 0.9  # share of right rollouts above which there is little to learn


@dataclass(frozen=True)
class Trial:
    """
    Counts of a trial.

    Args:
        rollouts (`int`):
            Strategies written and executed, one on each problem.
        right (`int`):
            Executions that the verifier accepts.
        cut_strategies (`int`), cut_executions (`int`):
            Strategies and executions that ended at their limit of tokens.
        malformed (`int`):
            Strategies with another flaw.
        unanswered (`int`):
            Executions that ended by themselves without a final answer.
        seconds (`float`):
            Time of all of them.
    """

    rollouts: int
    right: int
    cut_strategies: int
    cut_executions: int
    malformed: int
    unanswered: int
    seconds: float


def draw(problems: "Dataset", seed: int, size: int = ROLLOUTS) -> list[dict[str, Any]]:
    """
    Draws the problems of a trial, without those whose answer is missing.

    Args:
        problems ([`~datasets.Dataset`]):
            Problems.
        seed (`int`):
            Seed of the draw.
        size (`int`, *optional*, defaults to `16`):
            Number of problems. Where there are fewer, they are repeated.

    Returns:
        `list[dict]`
    """
    indices = list(range(len(problems)))
    if "solution" in problems.column_names:
        answers = problems["solution"]
        indices = [index for index, answer in enumerate(answers) if answer is not None] or indices
    random.Random(seed).shuffle(indices)
    return [problems[indices[number % len(indices)]] for number in range(size)]


def run_trial(model: TwoPhaseModel, rows: Sequence[dict[str, Any]], verifier: Verifier, decoding: Decoding) -> Trial:
    """
    Writes a strategy for each problem and executes it, without strategies of a bank.

    Args:
        model ([`~trl_sgpo.inference.model.TwoPhaseModel`]):
            The model.
        rows (`Sequence[dict]`):
            The problems.
        verifier (`Callable`):
            Reward function that checks executions.
        decoding ([`~trl_sgpo.inference.model.Decoding`]):
            How to decode.

    Returns:
        [`Trial`]
    """
    start = time.perf_counter()
    problems = [as_problem(row) for row in rows]
    strategies = model.write_strategies(problems, decoding, progress="strategies")
    executing = replace(decoding, seed=derived_seed(decoding.seed, "execution"))
    executions = model.execute_to_limit(problems, strategies, executing, progress="executions")
    seconds = time.perf_counter() - start
    outcomes = verify(verifier, rows, [text for text, _ in executions])
    flaws = [strategy.flaw for strategy in strategies]
    return Trial(
        rollouts=len(rows),
        right=sum(not math.isnan(outcome) and outcome >= SOLVED for outcome in outcomes),
        cut_strategies=flaws.count("truncated"),
        cut_executions=sum(cut for _, cut in executions),
        malformed=sum(flaw not in (None, "truncated") for flaw in flaws),
        unanswered=sum(not cut and final_answer(text) is None for text, cut in executions),
        seconds=seconds,
    )


def advice(trial: Trial, strategy_length: int, execution_length: int) -> list[str]:
    """
    What to change before training, by fixed thresholds: a quarter of the rollouts for each fault, none right, and nine
    in ten right.

    Args:
        trial ([`Trial`]):
            The counts.
        strategy_length (`int`), execution_length (`int`):
            `max_strategy_length` and `max_completion_length`.

    Returns:
        `list[str]`: A sentence a change, empty if nothing needs one.
    """
    many = MANY * trial.rollouts
    found = []
    if trial.cut_strategies > many:
        found.append(f"Strategies are cut off: set `max_strategy_length` to {2 * strategy_length}.")
    if trial.cut_executions > many:
        found.append(f"Executions are cut off: set `max_completion_length` to {2 * execution_length}.")
    if trial.malformed > many or trial.unanswered > many:
        found.append(
            "The model does not keep to the form: begin with a warm start (docs/bootstrap.md), or take a model that "
            "follows instructions."
        )
    if trial.right == 0 and trial.rollouts > 0:
        found.append(
            "No rollout is right, so there is nothing to reinforce: begin with a warm start, or take an easier set or "
            "a larger model."
        )
    if trial.right > EASY * trial.rollouts:
        found.append("Nearly all rollouts are right, so there is little to learn: take a harder set.")
    return found
