"""Acceptance of synthetic strategies, and the traces made from them (pure functions)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from ..bank.rows import MAX_NAME
from ..checks.shapes import either, listing, nothing, number, record, text, truth
from ..method.prompts import ParsedStrategy
from ..method.rewards import copied_literals, leak
from .worked import Trace


def _class_name(value: Any, place: str) -> None:
    text(value, place)
    if len(value) > MAX_NAME:
        raise ValueError(f"{place} has more than {MAX_NAME} characters")


_MAYBE_TEXT, _OUTCOME = either(nothing, text), either(nothing, number(0, 1))
_EXECUTED = record(
    {"problem": text, "text": text, "outcome": _OUTCOME},
    closed=True,
    optional={"baseline": _OUTCOME, "sibling": truth},
)
_TRIED = record(
    {"strategy": text, "problem_class": _class_name, "sources": listing(text), "executions": listing(_EXECUTED)},
    closed=True,
    optional={"flaw": _MAYBE_TEXT},
)


@dataclass(frozen=True)
class Executed:
    """
    A strategy executed on a problem.

    Args:
        problem (`str`):
            Id of the problem.
        text (`str`):
            The execution.
        outcome (`float` or `None`):
            Its outcome in [0, 1], `None` without a verdict of the verifier.
        baseline (`float`, *optional*):
            Mean outcome of answers to the problem without a strategy, `None` if not measured.
        sibling (`bool`, *optional*, defaults to `False`):
            Whether the strategy was written for another problem.
    """

    problem: str
    text: str
    outcome: float | None
    baseline: float | None = None
    sibling: bool = False


@dataclass(frozen=True)
class Tried:
    """
    A strategy that was written, with its executions.

    Args:
        strategy (`str`):
            Its text.
        problem_class (`str`):
            Class of the problems it was written for.
        sources (`tuple[str, ...]`):
            Ids of these problems.
        flaw (`str`, *optional*):
            Why it was not executed: see [`find_flaw`].
        executions (`tuple[Executed, ...]`, *optional*, defaults to `()`):
            Its executions, on the problems it was written for and on siblings.
    """

    strategy: str
    problem_class: str
    sources: tuple[str, ...]
    flaw: str | None = None
    executions: tuple[Executed, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Tried":
        """Reads a record, which somebody else may have written. Raises a `ValueError` at values that none has."""
        _TRIED(row, "tried")
        executions = tuple(Executed(**execution) for execution in row["executions"])
        return cls(**row | {"sources": tuple(row["sources"]), "executions": executions})


def find_flaw(strategy: ParsedStrategy, problem: str, answer: str | None) -> str | None:
    """
    Finds the reason not to execute a strategy.

    Args:
        strategy ([`~trl_sgpo.method.prompts.ParsedStrategy`]):
            The strategy.
        problem (`str`):
            Text of the problem it was written for.
        answer (`str` or `None`):
            Its short answer, if known.

    Returns:
        `str` or `None`: `"malformed (...)"`, `"leak"`, `"copied literals"` or `None`.
    """
    if strategy.flaw is not None:
        return f"malformed ({strategy.flaw})"
    if leak(strategy.text, problem, answer) > 0:
        return "leak"
    return "copied literals" if copied_literals(strategy.text, problem) else None


def lift(tried: Tried) -> float | None:
    """
    Mean outcome of a strategy on siblings, minus that of answers without a strategy on the same problems.

    Args:
        tried ([`Tried`]):
            The strategy with its executions.

    Returns:
        `float` or `None`: In [-1, 1]; `None` if no execution on a sibling could be compared.
    """
    differences = [
        execution.outcome - execution.baseline
        for execution in tried.executions
        if execution.sibling and execution.outcome is not None and execution.baseline is not None
    ]
    return fmean(differences) if differences else None


def rejection(tried: Tried, min_lift: float | None) -> str | None:
    """
    Finds the reason not to keep a strategy.

    Args:
        tried ([`Tried`]):
            The strategy with its executions.
        min_lift (`float` or `None`):
            Lift that must be exceeded. If `None`, a right execution is enough.

    Returns:
        `str` or `None`: Its flaw, `"not verified"`, `"no lift"`, `"wrong"` (no right execution), or `None` for one
        that is kept.
    """
    if tried.flaw is not None:
        return tried.flaw
    if min_lift is not None:
        gained = lift(tried)
        if gained is None:
            return "not verified"
        if gained <= min_lift:
            return "no lift"
    return None if any(execution.outcome == 1 for execution in tried.executions) else "wrong"


def pool(tried: Iterable[Tried]) -> list[Tried]:
    """
    Joins strategies of the same class and text, up to white space and case, with all their executions: the same
    strategy may have been written for several problems. Strategies with a flaw are not joined.
    """
    pooled: dict[tuple[str, str], Tried] = {}
    flawed = []
    for one in tried:
        if one.flaw is not None:
            flawed.append(one)
            continue
        key = _identity(one)
        if (known := pooled.get(key)) is not None:
            sources = tuple(dict.fromkeys(known.sources + one.sources))
            one = replace(known, sources=sources, executions=known.executions + one.executions)
        pooled[key] = one
    return [*pooled.values(), *flawed]


def _identity(one: Tried) -> tuple[str, str]:
    return one.problem_class, " ".join(one.strategy.casefold().split())


def kept(tried: Iterable[Tried], min_lift: float | None) -> list[Tried]:
    """Pools strategies and drops those with a reason for rejection."""
    return [one for one in pool(tried) if rejection(one, min_lift) is None]


def to_traces(
    strategies: Iterable[Tried], prompts: Mapping[str, list[dict[str, str]]], answers: Mapping[str, str | None]
) -> list[Trace]:
    """
    Makes traces of right executions, except on problems whose answer the strategy contains.

    Args:
        strategies (`Iterable[Tried]`):
            Strategies that are kept.
        prompts (`Mapping[str, list[dict]]`):
            Problem id → its messages.
        answers (`Mapping[str, str | None]`):
            Problem id → its short answer, if known.

    Returns:
        `list[Trace]`: Without repetitions.
    """
    traces: dict[tuple[str, str, str], Trace] = {}
    for one in strategies:
        for execution in one.executions:
            prompt = prompts[execution.problem]
            if execution.outcome == 1 and not leak(one.strategy, prompt[-1]["content"], answers[execution.problem]):
                trace = Trace(prompt, one.strategy, execution.text, one.problem_class)
                traces.setdefault((execution.problem, one.strategy, execution.text), trace)
    return list(traces.values())


@dataclass(frozen=True)
class Summary:
    """
    Counts of a bootstrap.

    Args:
        problems (`int`):
            Problems that were tried.
        written (`int`):
            Strategies written.
        texts (`int`):
            Number of distinct texts.
        rejected (`dict[str, int]`):
            Reason → how many of them were rejected for it.
        kept (`int`):
            How many were kept.
        distinct (`int`):
            Number of distinct texts among these.
        mean_lift (`float` or `None`):
            Mean lift of these, `None` if not measured.
        baseline (`float` or `None`):
            Mean outcome without a strategy where strategies were executed, `None` if not measured.
        tokens (`int`):
            Tokens generated.
    """

    problems: int
    written: int
    texts: int
    rejected: dict[str, int]
    kept: int
    distinct: int
    mean_lift: float | None
    baseline: float | None
    tokens: int


def summarize(tried: Sequence[Tried], problems: int, tokens: int, min_lift: float | None) -> Summary:
    """
    Counts strategies by what they were rejected for or kept.

    Args:
        tried (`Sequence[Tried]`):
            All strategies, as written.
        problems (`int`):
            Problems that were tried.
        tokens (`int`):
            Tokens generated.
        min_lift (`float` or `None`):
            As in [`rejection`].

    Returns:
        [`Summary`]
    """
    pooled = [one for one in pool(tried) if one.flaw is None]
    verdicts = {_identity(one): rejection(one, min_lift) for one in pooled}
    reasons = Counter(one.flaw or verdicts[_identity(one)] for one in tried)
    count = reasons.pop(None, 0)
    good = kept(pooled, min_lift)
    lifts = [gained for one in good if (gained := lift(one)) is not None]
    known = {e.problem: e.baseline for one in tried for e in one.executions if e.baseline is not None}
    return Summary(
        problems=problems,
        written=len(tried),
        texts=len({one.strategy for one in tried}),
        rejected={str(reason): times for reason, times in reasons.most_common()},
        kept=count,
        distinct=len(good),
        mean_lift=fmean(lifts) if lifts else None,
        baseline=fmean(known.values()) if known else None,
        tokens=tokens,
    )
