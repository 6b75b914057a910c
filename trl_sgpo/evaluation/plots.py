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


def new_figure(width: float, height: float) -> "Figure":
    """
    An empty figure with the library's own settings. A `matplotlibrc` where the command runs could have texts set by
    LaTeX.

    Args:
        width (`float`):
            In inches.
        height (`float`):
            In inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG."""
    with unfinished_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
        durable_replace(temporary, path)


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
    figure = new_figure(1.5 + 1.1 * max(len(bars), 3), 4)
    axes = figure.subplots()
    values = [bar["value"] for bar in bars.values()]
    below = [max(0.0, bar["value"] - bar["low"]) for bar in bars.values()]
    above = [max(0.0, bar["high"] - bar["value"]) for bar in bars.values()]
    axes.bar(range(len(bars)), values, yerr=[below, above], capsize=4, color="#4c72b0")
    axes.set_xticks(range(len(bars)), list(map(label, bars)), rotation=20, ha="right")
    axes.set_ylim(min(0.0, *(bar["low"] for bar in bars.values())), 1)
    axes.set_ylabel("mean outcome, 95% interval")
    axes.set_title(label(title))
    save(figure, path)


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
    size = 2.5 + 0.7 * len(classes)
    figure = new_figure(size + 1, size)
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
    save(figure, path)
