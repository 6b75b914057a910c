"""The solution of a problem: attempts, and the majority vote on their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ..bank import Strategy
from ..data.answers import comparison
from ..evaluation.statistics import agreeing
from ..method.problem import Problem


@dataclass(frozen=True)
class Attempt:
    """
    A strategy and its execution.

    Args:
        strategy (`str`):
            The strategy, empty in a plain answer.
        execution (`str`):
            Its execution on the problem, or the plain answer.
        answer (`str` or `None`):
            Final answer in the execution, see [`~trl_sgpo.data.final_answers.final_answer`].
        flaw (`str`, *optional*):
            Flaw of the strategy's form, such as `"truncated"`.
    """

    strategy: str
    execution: str
    answer: str | None
    flaw: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"answer": self.answer, "strategy": self.strategy, "flaw": self.flaw, "execution": self.execution}


@dataclass(frozen=True)
class Solution:
    """
    The solution of a problem.

    Args:
        problem ([`~trl_sgpo.method.problem.Problem`]):
            The problem, with the strategies `retrieved` from the bank.
        attempts (`tuple[Attempt, ...]`):
            All attempts.
        chosen (`int`):
            Position of the first attempt with the answer that most attempts agree on.
        votes (`tuple[tuple[str | None, int], ...]`):
            Answers and how many attempts gave each, the most frequent first, those without an answer last.
    """

    problem: Problem
    attempts: tuple[Attempt, ...]
    chosen: int
    votes: tuple[tuple[str | None, int], ...]

    @property
    def answer(self) -> str | None:
        return self.attempts[self.chosen].answer

    @property
    def strategy(self) -> str:
        return self.attempts[self.chosen].strategy

    @property
    def execution(self) -> str:
        return self.attempts[self.chosen].execution

    @property
    def retrieved(self) -> tuple[Strategy, ...]:
        return self.problem.retrieved

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with votes and all attempts if there are several."""
        solution = {
            "problem": self.problem.text,
            "problem_class": self.problem.problem_class,
            **self.attempts[self.chosen].to_dict(),
            "retrieved": [
                {
                    "id": each.id,
                    "problem_class": each.problem_class,
                    "trust": each.trust,
                    "similarity": similarity,
                    "text": each.text,
                }
                for each, similarity in zip_longest(self.retrieved, self.problem.similarities)
            ],
        }
        if len(self.attempts) == 1:
            return solution
        votes = [{"answer": answer, "votes": count} for answer, count in self.votes]
        return solution | {"votes": votes, "attempts": [attempt.to_dict() for attempt in self.attempts]}


def vote(problem: Problem, attempts: Sequence[Attempt]) -> Solution:
    """Chooses the answer that most attempts agree on."""
    answers = [attempt.answer for attempt in attempts]
    groups = agreeing(answers, comparison())
    votes = [(answers[group[0]], len(group)) for group in groups]
    if unanswered := answers.count(None):
        votes.append((None, unanswered))
    return Solution(problem, tuple(attempts), groups[0][0] if groups else 0, tuple(votes))
