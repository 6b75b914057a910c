"""Text for the terminal: made safe to print, tables, and the usual forms of figures."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bank.strategy import Strategy


def printable(text: str) -> str:
    """The text with escapes for all characters that a terminal would act on, or not show."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def number(value: float) -> str:
    """A number with at most two decimals, such as `3` or `2.5`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def rate(strategy: Strategy) -> str:
    """Successes and executions of a strategy, such as `18/20`."""
    return f"{number(strategy.successes)}/{strategy.trials}"


def print_json(value: Any) -> None:
    """Print a value as a JSON document."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table whose columns before the last are as wide as they need."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns[:-1]:
        table.add_column(Text(column), overflow="fold", max_width=24)
    table.add_column(Text(columns[-1]), overflow="fold")
    for row in rows:
        table.add_row(*[Text(printable(cell)) for cell in row])
    Console().print(table)


def print_facts(facts: dict[str, str]) -> None:
    """Print names and values in two columns."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, Text(printable(value)))
    Console().print(grid)
