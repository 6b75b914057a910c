"""Records of the bank: strategies, outcomes and executions of strategies, search results, import reports."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from ..errors import BankError


DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # of strategies and problems
TRUST_STATES = ("candidate", "trusted", "retired", "quarantine")
UNVERIFIED: dict[str, Any] = {  # trust state and counts of a strategy that was not executed in a bank
    "trust": "quarantine",
    "successes": 0,
    "trials": 0,
    "problems": 0,
    "solved": 0,
    "baseline": 0,
    "plain_problems": 0,
    "plain_solved": 0,
    "plain_baseline": 0,
    "shown": 0,
}


_encode = json.JSONEncoder(sort_keys=True).encode


def _digest(value: Any) -> str:
    return hashlib.sha256(_encode(value).encode()).hexdigest()


def problem_id(prompt: str | list[dict[str, Any]]) -> str:
    """
    Stable identity of a problem.

    Args:
        prompt (`str` or `list[dict]`):
            Text of the problem, or its chat messages.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    if isinstance(prompt, str):
        return hashlib.sha256(prompt.encode()).hexdigest()[:16]
    return _digest(prompt)[:16]


def _check_counts(successes: float, trials: int, baseline: float) -> None:
    if not (0 <= successes <= trials and 0 <= baseline <= max(trials, 1) and math.isfinite(trials)):
        raise BankError(
            f"successes and baseline must be finite and between 0 and the number of executions, got "
            f"successes={successes}, trials={trials}, baseline={baseline}: count each verified execution once, with "
            "an outcome in [0, 1]."
        )


@dataclass(frozen=True)
class Strategy:
    """
    A strategy, where it comes from and what its executions achieved.

    Args:
        text (`str`):
            The strategy itself.
        problem_class (`str`):
            Class of the problems it is meant for.
        source_problems (`tuple[str, ...]`):
            Ids, by [`problem_id`], of the problems it was written for.
        parents (`tuple[str, ...]`, *optional*, defaults to `()`):
            Ids of the strategies it was adapted or combined from.
        model (`str`, *optional*, defaults to `""`):
            Model that wrote it.
        run (`str`, *optional*, defaults to `""`):
            Training run in which it was written.
        step (`int`, *optional*, defaults to `0`):
            Optimizer step at which it was written.
        origin (`str`, *optional*, defaults to `"rollout"`):
            How it came into the bank.
        trust (`str`, *optional*, defaults to `"candidate"`):
            `"candidate"` (shown in training only), `"trusted"` (not inferior to other strategies, shown everywhere),
            `"retired"` (kept on record only) or `"quarantine"` (executed in bank rows, and shown nowhere until
            executions verified here earn it trust).
        successes (`float`, *optional*, defaults to `0`):
            Sum of the outcomes, each in [0, 1], of its verified executions.
        trials (`int`, *optional*, defaults to `0`):
            Number of its verified executions.
        problems (`int`, *optional*, defaults to `0`):
            Number of distinct problems it was executed on, without those it was written for.
        solved (`float`, *optional*, defaults to `0`):
            Sum over these problems of its mean outcome on them.
        baseline (`float`, *optional*, defaults to `0`):
            Sum over these problems of the mean outcome that other strategies had on them at the same time.
        plain_problems (`int`, *optional*, defaults to `0`):
            Number of these problems on which it was executed beside plain answers, which follow no strategy.
        plain_solved (`float`, *optional*, defaults to `0`):
            Sum over the `plain_problems` of the mean outcome of these executions.
        plain_baseline (`float`, *optional*, defaults to `0`):
            Sum over the `plain_problems` of the mean outcome of the plain answers.
        shown (`int`, *optional*, defaults to `0`):
            How often it was shown with a problem in training.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the trust state is unknown or the counts contradict each other.
    """

    text: str
    problem_class: str
    source_problems: tuple[str, ...]
    parents: tuple[str, ...] = ()
    model: str = ""
    run: str = ""
    step: int = 0
    origin: str = "rollout"
    trust: str = "candidate"
    successes: float = 0
    trials: int = 0
    problems: int = 0
    solved: float = 0
    baseline: float = 0
    plain_problems: int = 0
    plain_solved: float = 0
    plain_baseline: float = 0
    shown: int = 0

    def __post_init__(self) -> None:
        if self.trust not in TRUST_STATES:
            raise BankError(f"trust must be one of {', '.join(TRUST_STATES)}, got {self.trust!r}.")
        _check_counts(self.successes, self.trials, 0)
        _check_counts(self.solved, self.problems, self.baseline)
        _check_counts(self.plain_solved, self.plain_problems, self.plain_baseline)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits, the same for texts that differ in white space and case only."""
        return _digest([self.problem_class, " ".join(self.text.casefold().split())])[:16]

    @cached_property
    def written_for(self) -> frozenset[str]:
        """Its source problems, to look one up among many."""
        return frozenset(self.source_problems)

    @property
    def lift(self) -> float:
        """Mean outcome on problems it was not written for, minus that of other strategies on the same problems."""
        return (self.solved - self.baseline) / self.problems if self.problems else 0.0

    @property
    def plain_lift(self) -> float:
        """Mean outcome on problems it was not written for, minus that of plain answers to the same problems."""
        return (self.plain_solved - self.plain_baseline) / self.plain_problems if self.plain_problems else 0.0

    def updated(self, **changes: Any) -> Self:
        """A copy with other source problems, trust state or counts, which are not checked again."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | {"id": self.id} | changes)  # with the id, which is slow to compute
        return copy

    def quarantined(self, origin: str) -> Self:
        """A copy in quarantine, without counts and with another origin, as imports store it."""
        return replace(self, origin=origin, **UNVERIFIED)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of text, class and provenance, without source problems, trust state and counts, which change."""
        fixed = (self.text, self.problem_class, self.parents, self.model, self.run, self.step, self.origin)
        return _digest(fixed)


@dataclass(frozen=True)
class Outcome:
    """
    Outcomes of verified executions of one strategy on one problem.

    Args:
        strategy_id (`str`):
            Id of the strategy.
        problem (`str`):
            Id of the problem, by [`problem_id`].
        successes (`float`):
            Sum of the outcomes, each in [0, 1].
        trials (`int`, *optional*, defaults to `1`):
            Number of executions.
        baseline (`float`, *optional*, defaults to `0.0`):
            Mean outcome, in [0, 1], of executions of other strategies on the problem at the same time.
        problem_class (`str`, *optional*, defaults to `""`):
            Class of the problem. If empty, that of the strategy.
        text (`str`, *optional*, defaults to `""`):
            Text of the problem. Without it, the outcome is no evidence of harm near the problem.
        plain (`float`, *optional*):
            Mean outcome, in [0, 1], of plain answers to the problem at the same time. If `None`, there were none.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the counts contradict each other.
    """

    strategy_id: str
    problem: str
    successes: float
    trials: int = 1
    baseline: float = 0.0
    problem_class: str = ""
    text: str = ""
    plain: float | None = None

    def __post_init__(self) -> None:
        _check_counts(self.successes, self.trials, 0)
        _check_counts(self.baseline, 1, self.plain or 0)


@dataclass(frozen=True)
class Execution:
    """
    All verified executions of one strategy on one problem.

    Args:
        strategy_id (`str`):
            Id of the strategy.
        problem (`str`):
            Id of the problem.
        problem_class (`str`):
            Class of the problem.
        trials (`int`):
            Number of executions.
        successes (`float`):
            Sum of their outcomes.
        baseline (`float`):
            Sum, an execution each, of the mean outcome of other strategies on the problem.
        plain_trials (`int`, *optional*, defaults to `0`):
            Number of the executions that were beside plain answers to the problem.
        plain_successes (`float`, *optional*, defaults to `0`):
            Sum of the outcomes of these executions.
        plain_baseline (`float`, *optional*, defaults to `0`):
            Sum, one of these executions each, of the mean outcome of the plain answers.
    """

    strategy_id: str
    problem: str
    problem_class: str
    trials: int
    successes: float
    baseline: float
    plain_trials: int = 0
    plain_successes: float = 0.0
    plain_baseline: float = 0.0


@dataclass(frozen=True)
class Retrieved:
    """
    A strategy found for a problem.

    Args:
        strategy ([`Strategy`]):
            The strategy.
        similarity (`float`):
            Cosine similarity of its text and the problem's, in [-1, 1].
        score (`float`):
            Similarity × utility × [`~trl_sgpo.bank.policy.preference`], by which the strategies of a problem are
            ranked, in [0, 2).
    """

    strategy: Strategy
    similarity: float
    score: float


@dataclass(frozen=True)
class ImportReport:
    """
    Counts of what an import did.

    Args:
        added (`int`):
            Strategies that are new in the bank.
        known (`int`):
            Strategies that the bank had on record already.
        near_copies (`int`):
            Strategies left out because the bank has a near-copy of them.
        quarantined (`int`):
            Those of the added ones that are in quarantine.
        retired (`int`, *optional*, defaults to `0`):
            Strategies that are new and kept on record only: their class is full, or they came as retired ones.
    """

    added: int
    known: int
    near_copies: int
    quarantined: int
    retired: int = 0
