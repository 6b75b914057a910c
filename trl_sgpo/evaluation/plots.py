"""Plots of results. matplotlib is imported when one is drawn."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.terminal import printable
from ..files import durable_replace, unfinished_file


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Figures = dict[str, Any]
LONGEST_NAME = 60


def label(text: str) -> str:
    """A name as matplotlib shows it: cut, and not read as mathematics."""
    return printable(text)[:LONGEST_NAME].replace("$", r"\$")


def draw_bars(path: Path, title: str, bars: dict[str, Figures]) -> None:
    """
    Draws means with their intervals.

    Args:
        path (`Path`):
            PNG file.
        title (`str`):
            Title of the picture.
        bars (`dict[str, dict]`):
            `value`, `low` and `high` of each bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.1 * max(len(bars), 3), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [bar["value"] for bar in bars.values()]
    below = [max(0.0, bar["value"] - bar["low"]) for bar in bars.values()]
    above = [max(0.0, bar["high"] - bar["value"]) for bar in bars.values()]
    axes.bar(range(len(bars)), values, yerr=[below, above], capsize=4, color="#4c72b0")
    axes.set_xticks(range(len(bars)), list(map(label, bars)), rotation=20, ha="right")
    axes.set_ylim(min(0.0, *(bar["low"] for bar in bars.values())), 1)
    axes.set_ylabel("mean outcome, 95% interval")
    axes.set_title(label(title))
    _save(figure, path)


def draw_matrix(path: Path, title: str, classes: list[str], matrix: list[list[float | None]]) -> None:
    """
    Draws a transfer matrix.

    Args:
        path (`Path`):
            PNG file.
        title (`str`):
            Title of the picture.
        classes (`list[str]`):
            Names of rows and columns.
        matrix (`list[list[float | None]]`):
            Mean outcomes by class of the strategy (rows) and class of the problem (columns).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 2.5 + 0.7 * len(classes)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [[math.nan if value is None else value for value in row] for row in matrix]
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = "–" if math.isnan(value) else f"{value:.2f}"
            axes.text(x, y, text, ha="center", va="center", color="white" if value <= 0.6 else "black")
    names = [label(name or "(no class)") for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("class of the problem")
    axes.set_ylabel("class of the strategy")
    axes.set_title(label(title))
    figure.colorbar(picture, ax=axes, label="mean outcome")
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    with unfinished_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
        durable_replace(temporary, path)
