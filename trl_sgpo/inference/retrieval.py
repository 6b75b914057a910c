"""Retrieval of strategies for problems outside training."""

from collections.abc import Sequence
from dataclasses import replace

from ..bank import StrategyBank, problem_id
from ..method.problem import Problem


def with_retrieved(problems: Sequence[Problem], bank: StrategyBank, num_retrieved: int) -> list[Problem]:
    """
    Adds to problems what a bank has for them, as in evaluation during training: trusted strategies of their class,
    none of which was written for the problem itself. The bank is not written.

    Args:
        problems (`Sequence[Problem]`):
            The problems.
        bank ([`~trl_sgpo.bank.StrategyBank`]):
            The bank.
        num_retrieved (`int`):
            Number of strategies a problem.

    Returns:
        `list[Problem]`: In the order of the problems.
    """
    if num_retrieved == 0:
        return list(problems)
    retrieved = bank.retrieve(
        [problem.text for problem in problems],
        k=num_retrieved,
        classes=[problem.problem_class or None for problem in problems],
        exclude=[{problem_id(problem.prompt)} for problem in problems],
    )
    return [
        replace(problem, retrieved=tuple(found.strategy for found in row))
        for problem, row in zip(problems, retrieved, strict=True)
    ]
