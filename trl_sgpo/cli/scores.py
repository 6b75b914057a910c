"""Figures before and after training as a table on the terminal."""

from typing import Any


def print_scores(scores: dict[str, dict[str, Any]]) -> None:
    """
    Prints figures before and after training.

    Args:
        scores (`dict`):
            Content of `report.json`.
    """
    from rich.table import Table

    from ..checks.console import console
    from ..evaluation.tables import before_and_after

    measured = scores["after"]["greedy"]
    left_out = f", {measured['unverified']} more that the verifier does not judge" if measured["unverified"] else ""
    table = Table(title=f"{measured['problems']} unseen problems{left_out}, with 95% intervals")
    found = before_and_after(scores)
    for name in found.columns:
        table.add_column(name)
    for row in found.rows:
        table.add_row(*row)
    console().print(table)
