"""Retrieval of strategies for problems outside training."""

from collections.abc import Sequence
from dataclasses import replace

from ..bank import StrategyBank, problem_id
from ..method.problem import Problem


def with_retrieved(problems: Sequence[Problem], bank: StrategyBank | None, num_retrieved: int) -> list[Problem]:
    """
    Retrieves strategies from a bank for each problem, as evaluation during training does: trusted strategies of
    the problem's class that were not written for the problem itself. The bank is not changed.

    Args:
        problems (`Sequence[Problem]`):
            The problems.
        bank ([`~trl_sgpo.bank.StrategyBank`], *optional*):
            The bank. If `None`, nothing is retrieved.
        num_retrieved (`int`):
            Number of strategies a problem.

    Returns:
        `list[Problem]`: In the order of the problems.
    """
    if bank is None or num_retrieved == 0:
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
