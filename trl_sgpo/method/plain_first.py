"""Help where it is needed: plain rows are generated first, and strategies retrieved for problems that they fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..speed.trainer import SharedPromptGRPOTrainer
from .conversation import Conversation
from .measuring import without_records
from .prompts import ParsedStrategy
from .rollout import Rollout, RolloutBatch, answer_plainly


Reward = Callable[[list[dict[str, Any]], list[Any], list[Rollout]], torch.Tensor]


def answered_first(
    batch: RolloutBatch,
    inputs: list[dict[str, Any]],
    trainer: SharedPromptGRPOTrainer,
    conversation: Conversation,
    reward: Reward,
) -> RolloutBatch:
    """
    Answers the problems of a batch plainly, and leaves the retrieved strategies out where most answers are right.

    Args:
        batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
            Problems with the strategies retrieved for them.
        inputs (`list[dict]`):
            Their rows of the dataset, one for each rollout.
        trainer ([`~trl_sgpo.speed.trainer.SharedPromptGRPOTrainer`]):
            Trainer that generates.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens.
        reward (`Callable`):
            Rewards all ranks' executions, shape `(world size * B, number of reward functions)`, given rows of the
            dataset, their prompts and rollouts.

    Returns:
        [`~trl_sgpo.method.rollout.RolloutBatch`]: With the answers, which are not generated again.
    """
    geometry, problems = batch.geometry, batch.problems
    requests = [conversation.plain_request(problem.prompt) for problem in problems]
    with trainer.fast_generation(requests):
        answers = answer_plainly(requests, geometry, trainer)
    end = [conversation.turn(problems[0].prompt).end]
    rollouts = [
        Rollout("plain", ParsedStrategy(""), conversation.text(answer.ids), answer.ids or end, 0) for answer in answers
    ]
    rows = [row for row in inputs[:: geometry.executions] for _ in range(geometry.plain)]
    with without_records(trainer):  # these answers are rewarded again with the other rows
        rewards = reward(
            [row | {"rollout": rollout} for row, rollout in zip(rows, rollouts, strict=True)],
            [row["prompt"] for row in rows],
            rollouts,
        )
    verified = rewards.split(len(rows))[trainer.accelerator.process_index][:, 0].view(len(problems), -1)
    solved = (verified.nanmean(dim=1) > 0.5).tolist()
    return replace(
        batch,
        problems=[
            replace(problem, retrieved=(), similarities=()) if is_solved else problem
            for problem, is_solved in zip(problems, solved, strict=True)
        ],
        answered=answers,
    )
