"""Text for the terminal: made safe to print, tables, and the usual forms of figures."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..bank.strategy import Strategy
from ..checks.console import console
from ..checks.terminal import printable


SHORT = 20  # columns: cells up to this width are not wrapped
TEXT = 30  # wider cells are text, and not wrapped to less
GAP = 2


def number(value: float) -> str:
    """A number with at most two decimals, such as `3` or `2.5`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def rate(strategy: Strategy) -> str:
    """Successes and executions of a strategy, such as `18/20`."""
    return f"{number(strategy.successes)}/{strategy.trials}"


def print_json(value: Any) -> None:
    """Print a value as a JSON document."""
    print(json.dumps(value, indent=2))


def _width(text: str) -> int:
    return max(cell_len(line) for line in text.split("\n"))


def _longest_word(cells: Sequence[str]) -> int:
    return max(cell_len(word) for cell in cells for word in ["", *cell.split()])


def _widths(columns: Sequence[Sequence[str]], available: int, cap: int) -> list[int] | None:
    """
    Widths of columns with which no word is broken, or `None` if there is not enough room.

    Args:
        columns (`Sequence[Sequence[str]]`):
            Cells of each column, with its name.
        available (`int`):
            Width of the table.
        cap (`int`):
            Width to which longer words are truncated.
    """
    widths = [max(map(_width, cells)) for cells in columns]
    least = [
        width if width <= SHORT else min(_longest_word(cells), cap)
        for width, cells in zip(widths, columns, strict=True)
    ]
    if widths[-1] > TEXT:
        least[-1] = max(least[-1], TEXT)
    room = available - GAP * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        row = max(range(len(widths)), key=lambda each: (widths[each] > least[each], widths[each]))
        widths[row] -= 1
    return widths


def _layout(columns: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Widths of the columns that fit side by side: all of them, or all but the last one if it is text."""
    choices = [columns, columns[:-1]] if len(columns) > 1 and max(map(_width, columns[-1])) > TEXT else [columns]
    for cap in (available, 24, 12):
        for chosen in choices:
            if (widths := _widths(chosen, available, cap)) is not None:
                return widths
    return None


def _leading(columns: Sequence[Sequence[str]], available: int) -> list[int]:
    """Widths of the first columns, as many as fit side by side, at least two. Empty if these do not fit."""
    for cap in (available, 24, 12):
        for count in range(len(columns) - 1, 1, -1):
            if (widths := _widths(columns[:count], available, cap)) is not None:
                return widths
    return []


def _line(cells: Iterable[str], widths: Sequence[int], style: str = "") -> Table:
    grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    for width in widths:
        grid.add_column(width=width, overflow="ellipsis")
    grid.add_row(*[Text(cell, style) for cell in cells])
    return grid


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """
    Print a table. Where its words do not fit side by side, the last column is printed beneath each row if it is text,
    then long words are truncated with `…`, then other columns are printed beneath, with their names, and at last each
    row is printed as a list.
    """
    terminal = console()
    columns = [printable(column) for column in columns]
    body = [[printable(cell) for cell in row] for row in rows]
    cells = [list(column) for column in zip(columns, *body, strict=True)]
    widths = _layout(cells, terminal.width) or _leading(cells, terminal.width)
    terminal.print(Text(f"\n{title}" if title else "", "italic"))
    if not widths:
        for row in body:
            print_facts(dict(zip(columns, row, strict=True)))
            terminal.print()
        return
    shown = len(widths)
    text = len(columns) - (shown < len(columns) and max(map(_width, cells[-1])) > TEXT)
    terminal.print(_line(columns[:shown], widths, "bold"))
    terminal.print(Text("─" * (sum(widths) + GAP * (shown - 1))))
    for row in body:
        terminal.print(_line(row[:shown], widths))
        named = "   ".join(f"{name} {cell}" for name, cell in zip(columns[shown:text], row[shown:text], strict=True))
        for beneath in filter(None, (named, *row[text:])):
            terminal.print(Padding(Text(beneath, overflow="fold"), (0, 0, 0, 2)))
    terminal.print()


def print_facts(facts: dict[str, str]) -> None:
    """Print names and values in two columns."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(printable(name)), Text(printable(value)))
    console().print(grid)
