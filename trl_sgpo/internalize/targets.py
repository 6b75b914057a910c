"""Plain answers to learn from a step's right guided rollouts, as tensors with a row for each rollout."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from trl.trainer.utils import pad

from ..method.conversation import Conversation
from ..method.prompts import plain_answer
from ..method.rollout import Rollout, RolloutBatch


RIGHT = 1.0  # an outcome of the verifier that is right


@dataclass(frozen=True)
class Target:
    """
    A plain answer to learn.

    Args:
        prompt (`list[int]`):
            Tokens of the bare problem.
        answer (`list[int]`):
            Tokens of the answer, with the end of the turn.
        weight (`float`):
            Weight of the row, 0 if nothing is learnt from it.
        guided (`list[int]`, *optional*):
            Tokens that precede the same answer where a strategy is given.
    """

    prompt: list[int]
    answer: list[int]
    weight: float
    guided: list[int] = field(default_factory=lambda: [0])


def distill_targets(
    rollouts: Sequence[Rollout], verified: Sequence[float], batch: RolloutBatch, conversation: Conversation
) -> list[Target]:
    """
    The right rollouts with an own strategy, written as plain answers that hold strategy and execution.

    Without the strategy a small model loses the method: trained on the executions alone, its plain accuracy in the
    laboratory fell from 0.74 to 0.15.

    Args:
        rollouts (`Sequence[Rollout]` of length B):
            Rows in block order.
        verified (`Sequence[float]` of length B):
            Their outcomes by the verifier.
        batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
            Problems of the rows.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens.

    Returns:
        `list[Target]` of length B. Other rows have weight 0 and the end of a turn as answer.
    """
    rows = batch.geometry.executions
    requests = [conversation.plain_request(problem.prompt) for problem in batch.problems]
    targets = []
    for row, (rollout, outcome) in enumerate(zip(rollouts, verified, strict=True)):
        problem = batch.problems[row // rows]
        if rollout.source == "own" and rollout.strategy.flaw is None and outcome >= RIGHT:
            text = plain_answer(rollout.strategy.text, rollout.execution)
            targets.append(Target(requests[row // rows], conversation.reply(problem.prompt, text), 1.0))
        else:
            targets.append(Target(requests[row // rows], [conversation.turn(problem.prompt).end], 0.0))
    return targets


def divergence_targets(
    rollouts: Sequence[Rollout],
    guided: Sequence[list[int]],
    weights: Sequence[float],
    batch: RolloutBatch,
    conversation: Conversation,
) -> list[Target]:
    """
    The right executions of strategies, as answers to the bare problem.

    Args:
        rollouts (`Sequence[Rollout]` of length B):
            Rows in block order.
        guided (`Sequence[list[int]]` of length B):
            Tokens of each row before its execution.
        weights (`Sequence[float]` of length B):
            What [`divergence_weights`] returns.
        batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
            Problems of the rows.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens.

    Returns:
        `list[Target]` of length B.
    """
    rows = batch.geometry.executions
    requests = [conversation.plain_request(problem.prompt) for problem in batch.problems]
    return [
        Target(requests[row // rows], rollout.execution_ids, weight, guided[row])
        for row, (rollout, weight) in enumerate(zip(rollouts, weights, strict=True))
    ]


def divergence_weights(verified: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """
    How much a problem's right executions teach: as much as its plain answers fall short of its guided ones.

    Args:
        verified (`torch.Tensor` of shape `(N, S, K)`):
            Outcomes of strategies by the verifier.
        plain (`torch.Tensor` of shape `(N, m, K)`):
            Outcomes of plain rows. Without any, each problem has weight 1.

    Returns:
        `torch.Tensor` of shape `(N, S + m, K)`: 0 for plain rows and for executions that are not right.
    """
    gap = torch.ones_like(verified[:, :1])
    if plain.size(1):
        gap = (verified.nanmean(dim=1, keepdim=True) - plain.nanmean(dim=1, keepdim=True)).clamp(min=0).nan_to_num()
    return torch.cat([(verified >= RIGHT) * gap, torch.zeros_like(plain)], dim=1)


def target_tensors(targets: Sequence[Target], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """
    Targets as tensors, which TRL shuffles and splits with the other rows.

    Args:
        targets (`Sequence[Target]` of length B):
            One for each row.
        pad_token_id (`int`):
            Padding.
        device (`torch.device`):
            Device of the tensors.

    Returns:
        `dict`: `target_prompt_ids`, `target_prompt_mask` of shape `(B, P)` and `target_guided_ids`,
        `target_guided_mask` of shape `(B, Q)`, left-padded; `target_ids`, `target_mask` of shape `(B, T)`;
        `target_weight` of shape `(B,)`.
    """
    tensors = {}
    for prefix, side, rows in (
        ("target_prompt", "left", [target.prompt for target in targets]),
        ("target_guided", "left", [target.guided for target in targets]),
        ("target", "right", [target.answer for target in targets]),
    ):
        ids = [torch.tensor(row, device=device) for row in rows]
        tensors[f"{prefix}_ids"] = pad(ids, padding_value=pad_token_id, padding_side=side)
        tensors[f"{prefix}_mask"] = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side)
    tensors["target_weight"] = torch.tensor([target.weight for target in targets], device=device)
    return tensors
