"""
Contrast of a right with wrong strategies on plain answers (RLCSD, arXiv 2606.11709), as pure functions.

A plain answer's token that a teacher finds likelier with a strategy that solves other problems of the class than with
strategies that do not is what the strategy asks for.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ContrastShape:
    """
    Shape of the contrast's reward.

    Args:
        scale (`float`, *optional*, defaults to `0.5`):
            Largest reward of a token.
        temperature (`float`, *optional*, defaults to `0.02`):
            Difference of log-probabilities, in nats, at which the reward saturates.
        dead_zone (`float`, *optional*, defaults to `0.02`):
            Rewards up to this size are 0.
    """

    scale: float = 0.5
    temperature: float = 0.02
    dead_zone: float = 0.02


def evidence(right: torch.Tensor, wrong: torch.Tensor, has_wrong: torch.Tensor) -> torch.Tensor:
    """
    How much likelier tokens are with the right strategy than with an average wrong one.

    Args:
        right (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities with the right strategy.
        wrong (`torch.Tensor` of shape `(K, B, T)`):
            Log-probabilities with each wrong strategy.
        has_wrong (`torch.Tensor` of shape `(K, B)`):
            Whether a row has a k-th wrong strategy. Each row has one at least.

    Returns:
        `torch.Tensor` of shape `(B, T)`: log pi(y | right) - log mean_k pi(y | wrong_k).
    """
    masked = wrong.masked_fill(~has_wrong.unsqueeze(2), -math.inf)
    return right - (masked.logsumexp(dim=0) - has_wrong.sum(dim=0).log().unsqueeze(1))


def token_rewards(evidence: torch.Tensor, shape: ContrastShape) -> torch.Tensor:
    """Rewards of tokens, in [-scale, scale], from the evidence for the right strategy."""
    rewards = shape.scale * torch.tanh(evidence / shape.temperature)
    return torch.where(rewards.abs() <= shape.dead_zone, 0.0, rewards)


def with_contrast(advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """
    Adds token rewards to advantages, whose sign, given by the verifier, they never turn.

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`):
            Advantages of the tokens.
        rewards (`torch.Tensor` of shape `(B, T)`):
            Rewards of the tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where an advantage is 0.
    """
    moved = advantages + rewards
    return torch.where(moved.sign() == advantages.sign(), moved, 0.0)
