"""Geometry of the report's charts: SVG coordinates from numbers (pure functions). The template draws them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..bank import policy
from ..bank.strategy import Strategy


WIDTH, HEIGHT = 360, 220  # of a view box about as wide as a phone, so that its text can be read there
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 26
MAX_POINTS = 120
COLOURS = 8  # of classes and lines; further classes share the last one
MAP_SIZE, MAP_MARGIN = 360, 16

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, colour, dashes for the run compared with, SVG path, and dots with labels."""

    name: str
    colour: int
    dashed: bool
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """A line chart with its table: `rows` has a step and a value or an empty cell a line."""

    id: str
    title: str
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    rows: list[list[str]]
    averaged: int  # number of steps averaged in a point


@dataclass(frozen=True)
class Mark:
    """The mark of a strategy on the map of the bank."""

    strategy: Strategy
    x: float
    y: float
    shape: str  # SVG path
    colour: int


def number(value: float) -> str:
    """A number, rounded for a table."""
    if value == 0 or 0.001 <= abs(value) < 100_000:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, which must be larger."""
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def averaged(points: Points, most: int = MAX_POINTS) -> tuple[list[tuple[float, float]], int]:
    """Means of neighbouring points, so that at most `most` remain, and the number of points in each mean."""
    size = -(-len(points) // most) if points else 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts], size


def line_chart(
    id: str, title: str, note: str, lines: Sequence[tuple[str, Points, int, bool]], within: tuple[float, float] | None
) -> Chart | None:
    """
    Lays out a line chart.

    Args:
        id (`str`):
            Its id in the page.
        title (`str`), note (`str`):
            Title and explanation.
        lines (`Sequence[tuple]`):
            Name, points in the order of their steps, colour and dashes of each line. Lines without points are left
            out.
        within (`tuple[float, float]`, *optional*):
            Bounds of the values, such as `(0, 1)` for rates. If `None`, they are taken from the values.

    Returns:
        [`Chart`] or `None`: `None` if no line has points.
    """
    drawn = [(name, *averaged(points), colour, dashed) for name, points, colour, dashed in lines if points]
    if not drawn:
        return None
    xs = [x for _, points, *_ in drawn for x, _ in points]
    ys = [y for _, points, *_ in drawn for _, y in points]
    x_ticks = ticks(min(0, *xs), max(xs) if max(xs) > 0 else 1)
    low, high = within or (min(ys), max(ys))
    y_ticks = ticks(low, high if high > low else low + (abs(low) or 1))
    inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def x_of(x: float) -> float:
        return round(LEFT + (x - x_ticks[0]) / (max(xs[-1], max(xs), 1) - x_ticks[0]) * inner[0], 1)

    def y_of(y: float) -> float:
        return round(TOP + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * inner[1], 1)

    laid_out = []
    for name, points, _, colour, dashed in drawn:
        dots = [Dot(x_of(x), y_of(y), f"{name}, step {x:g}: {number(y)}") for x, y in points]
        path = "M" + " L".join(f"{dot.x:g} {dot.y:g}" for dot in dots)
        laid_out.append(Line(name, colour, dashed, path, dots))
    values = [dict(points) for _, points, *_ in drawn]
    steps = sorted({step for each in values for step in each})
    rows = [[f"{step:g}", *(number(each[step]) if step in each else "" for each in values)] for step in steps]
    return Chart(
        id,
        title,
        note,
        laid_out,
        [Tick(x_of(x), number(x)) for x in x_ticks if x <= max(xs)],
        [Tick(y_of(y), number(y)) for y in y_ticks],
        rows,
        max(size for _, _, size, *_ in drawn),
    )


def class_colours(strategies: Sequence[Strategy]) -> dict[str, int]:
    """A colour for each class, largest first. If there are more classes than colours, the smallest share one."""
    sizes = Counter(strategy.problem_class for strategy in strategies)
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    return {name: min(index, COLOURS) for index, name in enumerate(ordered)}


def project(embeddings: np.ndarray) -> tuple[np.ndarray, float]:
    """
    The two principal components.

    Args:
        embeddings (`np.ndarray` of shape `(n, d)`):
            Embeddings.

    Returns:
        `tuple` of the coordinates, of shape `(n, 2)`, and the share of the variance that they keep.
    """
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    coordinates = np.zeros((len(embeddings), 2))
    kept = min(2, len(sizes))
    signs = np.sign(
        right[np.arange(kept), np.abs(right[:kept]).argmax(axis=1)]
    )  # the sign of a component is arbitrary
    coordinates[:, :kept] = left[:, :kept] * sizes[:kept] * signs
    variance = float((sizes**2).sum())
    return coordinates, float((sizes[:2] ** 2).sum()) / variance if variance > 0 else 1.0


def shape(trust: str, x: float, y: float, area: float) -> str:
    """SVG path of a mark: circle, square or triangle by trust, all of the same area."""
    if trust == "trusted":
        half = math.sqrt(area) / 2
        return f"M{x - half:.1f} {y - half:.1f}h{2 * half:.1f}v{2 * half:.1f}h{-2 * half:.1f}z"
    if trust == "quarantine":
        side = math.sqrt(area * 4 / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        return f"M{x:.1f} {y - height * 2 / 3:.1f}l{side / 2:.1f} {height:.1f}h{-side:.1f}z"
    radius = round(math.sqrt(area / math.pi), 1)
    arc = f"a{radius:.1f} {radius:.1f} 0 1 0"
    return f"M{x - radius:.1f} {y:.1f}{arc} {2 * radius:.1f} 0{arc} {-2 * radius:.1f} 0z"


def bank_map(strategies: Sequence[Strategy], embeddings: dict[str, np.ndarray]) -> tuple[list[Mark], float]:
    """
    Lays out the map of a bank: distance shows similarity, colour class, shape trust and area utility.

    Args:
        strategies (`Sequence[Strategy]`):
            Strategies. Those without an embedding, the retired ones, are left out.
        embeddings (`dict[str, np.ndarray]`):
            Strategy id → embedding of shape `(d,)`.

    Returns:
        `tuple` of the marks, large ones first, and the share of the embeddings' variance that the map keeps.
    """
    placed = [strategy for strategy in strategies if strategy.id in embeddings]
    if not placed:
        return [], 1.0
    coordinates, kept = project(np.stack([embeddings[strategy.id] for strategy in placed]))
    low, span = coordinates.min(axis=0), np.ptp(coordinates, axis=0)
    unit = np.where(span > 1e-9, (coordinates - low) / np.maximum(span, 1e-9), 0.5)
    at = MAP_MARGIN + unit * (MAP_SIZE - 2 * MAP_MARGIN)
    colours = class_colours(placed)
    marks = []
    for strategy, (x, y) in zip(placed, at, strict=True):
        area = 30 + 170 * policy.utility(strategy.successes, strategy.trials)
        path = shape(strategy.trust, x, y, area)
        marks.append(Mark(strategy, round(x, 1), round(y, 1), path, colours[strategy.problem_class]))
    marks.sort(key=lambda mark: -policy.utility(mark.strategy.successes, mark.strategy.trials))
    return marks, kept
