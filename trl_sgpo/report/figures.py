"""Figures that the terminal prints when training ends and the report shows: whether a run learnt (pure functions)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..bank.policy import difference_bounds
from ..bank.statistics import with_bounds
from ..evaluation.tables import WAYS, ResultTable, by_way, rate_cell, ways_rows


TWO_SIDED_95 = 1.96
DECODINGS = {"sampled": "with sampling", "greedy": "with greedy decoding"}
ROLLOUTS = {
    "sgpo/correctness": "correctness of own strategies",
    "sgpo/plain_correctness": "correctness of plain answers",
    "reward": "reward",
}
"""Metrics that a run is judged by where it measured nothing before training, the first that it logged."""
MAX_COMPARED = 12  # rows of evaluations beside those of training

History = Sequence[Mapping[str, Any]]


def logged(history: History, metric: str) -> list[tuple[int, float]]:
    """Steps and values of a metric. A step that was logged again after a resume counts once."""
    values = {log["step"]: log[metric] for log in history if isinstance(log.get(metric), int | float)}
    return sorted((step, value) for step, value in values.items() if math.isfinite(value))


def quarters(history: History, metric: str) -> tuple[float, float] | None:
    """Means of a metric over the first and the last quarter of steps, `None` with fewer than four of them."""
    values = [value for _, value in logged(history, metric)]
    part = len(values) // 4
    return (fmean(values[:part]), fmean(values[-part:])) if part else None


@dataclass(frozen=True)
class Change:
    """A rate before and after training, and the 95% interval of its change."""

    before: float
    after: float
    low: float
    high: float

    @property
    def direction(self) -> str:
        return "rose" if self.low > 0 else "fell" if self.high < 0 else "did not change"

    def clause(self, decoding: str) -> str:
        by, rates = (
            with_bounds(self.after - self.before, self.low, self.high),
            f"{self.before:.2f} to {self.after:.2f}",
        )
        if self.low <= 0 <= self.high:
            return f"did not change beyond its interval {decoding} ({rates}, {by})"
        return f"{self.direction} from {rates} {decoding} ({by})"


def verdict(measured: Mapping[str, Any], history: History) -> str:
    """
    One sentence that says whether a run learnt.

    It is judged by accuracy on unseen problems before and after training, with own strategies alone, so that it is of
    the weights and not of the bank; with plain answers if these are all that was trained. Both measurements are taken
    as independent. Where none was made before training, it is judged by its rollouts.

    Args:
        measured (`Mapping`):
            Content of `report.json`, which may be empty.
        history (`Sequence[Mapping]`):
            Logged metrics.

    Returns:
        `str`
    """
    judged = next((metric for metric in ROLLOUTS if logged(history, metric)), "")
    way = "plain" if judged == "sgpo/plain_correctness" else "own"
    if "before" in measured and "after" in measured:
        found = {
            words: change
            for decoding, words in DECODINGS.items()
            if (change := _change(measured["before"][decoding], measured["after"][decoding], way)) is not None
        }
        if found:
            alike = len({change.direction for change in found.values()}) == 1
            clauses = f"{',' * (not alike)} {'and' if alike else 'but'} ".join(
                change.clause(words) for words, change in found.items()
            )
            answers = {"own": "", "plain": " of plain answers"}[way]
            problems = measured["after"]["greedy"]["problems"]
            return f"Held-out accuracy{answers} {clauses}: 95% intervals, {problems:,} unseen problems."
    return _of_rollouts(history, judged)


def _change(before: Mapping[str, Any], after: Mapping[str, Any], way: str) -> Change | None:
    rates, n = [by_way(dict(score))[way] for score in (before, after)], min(before["problems"], after["problems"])
    first, last = (math.nan if rate is None else rate for rate in rates)
    if n == 0 or math.isnan(first + last):
        return None
    return Change(first, last, *difference_bounds(last * n, first * n, n, TWO_SIDED_95))


def _of_rollouts(history: History, judged: str) -> str:
    unmeasured = "accuracy was not measured both before and after training"
    if not judged:
        return f"Nothing shows yet whether this run learnt: {unmeasured}, and no step is logged."
    means, steps = quarters(history, judged), len(logged(history, judged))
    if means is None:
        return f"Nothing shows yet whether this run learnt: {unmeasured}, and fewer than four steps are logged."
    return (
        f"Judged by its rollouts, as {unmeasured}: {ROLLOUTS[judged]} went from {means[0]:.2f} to {means[1]:.2f} from "
        f"the first to the last quarter of {steps:,} steps, without an interval."
    )


def comparison(
    measured: Mapping[str, Any], history: History, evaluations: Mapping[str, Mapping[str, Any]]
) -> ResultTable | None:
    """
    Ways of answering side by side: plain, own strategy, bank, and strategies on other problems of their class.

    Args:
        measured (`Mapping`), history (`Sequence[Mapping]`):
            As in [`verdict`].
        evaluations (`Mapping[str, Mapping]`):
            Name → `results.json` of `trl-sgpo eval`.

    Returns:
        [`~trl_sgpo.evaluation.tables.ResultTable`] or `None`: `None` where nothing was measured.
    """
    rows = []
    for decoding in DECODINGS if measured else ():
        for when in ("before", "after"):
            if when in measured:
                score = measured[when][decoding]
                cells = [rate_cell(rate, score["problems"]) for rate in by_way(score).values()]
                rows.append([f"{when}, {decoding}", *cells])
    evaluated = [
        [f"{name}: {row[0]}", *row[1:], "–"]
        for name, results in evaluations.items()
        for row in ways_rows(results["suites"])
    ]
    rows += evaluated[:MAX_COMPARED]
    pairs = [quarters(history, metric) for metric in ("sgpo/plain_correctness", "sgpo/correctness", "sgpo/transfer")]
    for index, when in enumerate(("first", "last")):
        plain, own, transfer = ("–" if pair is None else f"{pair[index]:.2f}" for pair in pairs)
        if any(pairs):
            rows.append([f"rollouts, {when} quarter", plain, own, "–", transfer])
    columns = ["", *WAYS.values(), "transfer"]
    return ResultTable("Accuracy by way of answering", columns, rows) if rows else None
