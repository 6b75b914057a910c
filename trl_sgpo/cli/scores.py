"""Figures before and after training on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def print_scores(scores: dict[str, dict[str, Any]], history: Sequence[Mapping[str, Any]] = ()) -> None:
    """
    Prints whether a run learnt, in one sentence, and figures before and after training as a table.

    Args:
        scores (`dict`):
            Content of `report.json`.
        history (`Sequence[Mapping]`, *optional*):
            Logged metrics.
    """
    from rich.table import Table

    from ..checks.console import console
    from ..evaluation.tables import before_and_after
    from ..report.figures import quarters, verdict

    terminal = console()
    terminal.print(verdict(scores, history), highlight=False)
    measured = scores["after"]["greedy"]
    left_out = f", {measured['unverified']} more that the verifier does not judge" if measured["unverified"] else ""
    table = Table(title=f"{measured['problems']} unseen problems{left_out}, with 95% intervals")
    found = before_and_after(scores)
    for name in found.columns:
        table.add_column(name)
    for row in found.rows:
        table.add_row(*row)
    terminal.print(table)
    if (means := quarters(history, "sgpo/correctness")) is not None:
        terminal.print(f"Correctness of rollouts, first and last quarter of steps: {means[0]:.2f} → {means[1]:.2f}")
