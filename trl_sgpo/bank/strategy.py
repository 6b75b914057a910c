"""The records of the bank: a strategy, the outcome of executing it, and a strategy found for a problem."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..errors import BankError


TRUST_STATES = ("candidate", "trusted", "retired", "quarantine")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def _check_counts(successes: float, trials: int, lift: float) -> None:
    if not (0 <= successes <= trials and math.isfinite(trials) and math.isfinite(lift)):
        raise BankError(
            f"successes must be between 0 and trials, and both and lift finite, got successes={successes}, "
            f"trials={trials}, lift={lift}: count each verified execution once, with an outcome in [0, 1]."
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
            `"candidate"`, `"trusted"`, `"retired"` (kept on record only) or `"quarantine"` (never shown to a problem).
        successes (`float`, *optional*, defaults to `0`):
            Sum of the outcomes, each in [0, 1], of its verified executions.
        trials (`int`, *optional*, defaults to `0`):
            Number of its verified executions.
        lift (`float`, *optional*, defaults to `0.0`):
            Mean outcome on sibling problems minus the block's mean on the same problems, at admission.

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
    lift: float = 0.0

    def __post_init__(self) -> None:
        if self.trust not in TRUST_STATES:
            raise BankError(f"trust must be one of {', '.join(TRUST_STATES)}, got {self.trust!r}.")
        _check_counts(self.successes, self.trials, self.lift)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits, the same for texts that differ in white space and case only."""
        return _digest([self.problem_class, " ".join(self.text.casefold().split())])[:16]

    @property
    def checksum(self) -> str:
        """SHA-256 of text, class and provenance, without trust state and counts, which change."""
        record = asdict(self)
        return _digest({key: record[key] for key in record.keys() - {"trust", "successes", "trials", "lift"}})


@dataclass(frozen=True)
class Outcome:
    """
    What verified executions of one strategy achieved.

    Args:
        strategy_id (`str`):
            Id of the strategy.
        successes (`float`):
            Sum of the outcomes, each in [0, 1].
        trials (`int`):
            Number of executions.
        lift (`float`, *optional*):
            New lift of the strategy. If `None`, its lift stays.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the counts contradict each other.
    """

    strategy_id: str
    successes: float
    trials: int
    lift: float | None = None

    def __post_init__(self) -> None:
        _check_counts(self.successes, self.trials, self.lift or 0.0)


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
            Similarity × utility, by which the strategies of a problem are ranked, in [0, 1].
    """

    strategy: Strategy
    similarity: float
    score: float
