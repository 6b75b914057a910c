"""Help where it is needed: plain rows are generated first, and strategies retrieved for problems that they fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..speed.trainer import SharedPromptGRPOTrainer
from .conversation import Conversation
from .prompts import ParsedStrategy
from .rollout import Answer, Rollout, RolloutBatch


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
    asked = [request for request in requests for _ in range(geometry.plain)]
    with trainer.fast_generation(requests):
        generated, logprobs = trainer.generate(asked, trainer.args.max_completion_length, "plain answers")
    generated = [ids or [conversation.turn(problems[0].prompt).end] for ids in generated]
    rollouts = [Rollout("plain", ParsedStrategy(""), conversation.text(ids), ids, 0) for ids in generated]
    rows = [row for row in inputs[:: geometry.executions] for _ in range(geometry.plain)]
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
        answered=[Answer(ids, None if logprobs is None else logprobs[place]) for place, ids in enumerate(generated)],
    )
