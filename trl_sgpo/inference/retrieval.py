"""Retrieval of strategies for problems, in training and outside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..bank import StrategyBank, problem_id
from ..method.problem import Problem


def with_retrieved(
    problems: Sequence[Problem],
    bank: StrategyBank | None,
    num_retrieved: int,
    cross_class: bool = False,
    trust: Sequence[str] = ("trusted",),
    explore: int | None = None,
    merged: Mapping[str, str] | None = None,
) -> list[Problem]:
    """
    Adds to problems the strategies that a bank retrieves for them, none of which was written for the problem itself.
    The bank is not written.

    Args:
        problems (`Sequence[Problem]`):
            The problems. Strategies are retrieved from the class of each, from any class where it has none.
        bank ([`~trl_sgpo.bank.StrategyBank`], *optional*):
            The bank. If `None`, nothing is retrieved.
        num_retrieved (`int`):
            Number of strategies a problem.
        cross_class (`bool`, *optional*, defaults to `False`):
            Whether strategies of other classes are retrieved too.
        trust (`Sequence[str]`, *optional*, defaults to `("trusted",)`):
            Trust states of the strategies.
        explore (`int`, *optional*):
            Seed with which training explores, see [`~trl_sgpo.bank.StrategyBank.retrieve`].
        merged (`Mapping[str, str]`, *optional*):
            Classes that training merged with others, whose strategies are retrieved for their problems.

    Returns:
        `list[Problem]`: In the order of the problems.
    """
    if bank is None or num_retrieved == 0:
        return list(problems)
    classes = [problem.problem_class for problem in problems]
    retrieved = bank.retrieve(
        [problem.text for problem in problems],
        k=num_retrieved,
        classes=[(merged or {}).get(name, name) or None for name in classes],
        exclude=[{problem_id(problem.prompt)} for problem in problems],
        cross_class=cross_class,
        trust=trust,
        explore=explore,
    )
    return [
        replace(
            problem,
            retrieved=tuple(found.strategy for found in row),
            similarities=tuple(round(found.similarity, 3) for found in row),
        )
        for problem, row in zip(problems, retrieved, strict=True)
    ]
