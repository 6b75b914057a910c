"""The picture of a comparison: accuracies with their intervals and single runs, and learning curves."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.plots import label, new_figure, save


logger = logging.getLogger(__name__)

MAX_ARMS, MAX_PANELS = 60, 12


@dataclass(frozen=True)
class Bar:
    """
    A mean and what it is of.

    Args:
        mean (`float`):
            The mean.
        low (`float`):
            Lower end of its interval.
        high (`float`):
            Upper end.
        runs (`list[list[float]]`):
            Single runs of each base model.
        note (`str`, *optional*, defaults to `""`):
            Text at the right of the bar.
    """

    mean: float
    low: float
    high: float
    runs: list[list[float]]
    note: str = ""


def draw_comparison(
    path: Path,
    panels: Mapping[str, Mapping[str, Bar]],
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    curve_title: str,
    reference: str,
) -> None:
    """
    Draws each figure of each arm, with a grey point for each run, and mean learning curves.

    Args:
        path (`Path`):
            PNG file.
        panels (`Mapping[str, Mapping[str, Bar]]`):
            Title of a figure → arm → its bar. An arm without it is left out there.
        curves (`Mapping[str, Sequence]`):
            Arm → runs → points with `generated_tokens` and `accuracy`.
        curve_title (`str`):
            Title of the learning curves.
        reference (`str`):
            Arm that is drawn in another colour.

    Of more than 60 arms or 12 figures, the first are drawn.
    """
    names = list(dict.fromkeys(arm for bars in panels.values() for arm in bars))
    if len(names) > MAX_ARMS or len(panels) > MAX_PANELS:
        figures, arms = len(panels), len(names)
        names = names[:MAX_ARMS]
        panels = {
            title: {arm: bar for arm, bar in bars.items() if arm in names}
            for title, bars in list(panels.items())[:MAX_PANELS]
        }
        curves = {arm: runs for arm, runs in curves.items() if arm in names}
        logger.warning(f"{path} shows {len(panels)} of {figures} figures and {len(names)} of {arms} arms.")
    figure = new_figure(3 * len(panels) + 5, 0.32 * len(names) + 2)
    axes = figure.subplots(1, len(panels) + 1, width_ratios=[*[1] * len(panels), 1.6], squeeze=False)[0]
    for axis, (panel, bars) in zip(axes[:-1], panels.items(), strict=True):
        for arm, bar in bars.items():
            position = names.index(arm)
            colour = "#c44e52" if arm == reference else "#4c72b0"
            spread = [[max(bar.mean - bar.low, 0.0)], [max(bar.high - bar.mean, 0.0)]]
            axis.errorbar([bar.mean], [position], xerr=spread, fmt="o", color=colour, capsize=3, markersize=4)
            for model, values in enumerate(bar.runs):
                axis.scatter(values, [position + 0.2 + 0.12 * model] * len(values), s=4, color="#888888")
            axis.text(1.06, position, bar.note, fontsize=7, va="center")
        axis.set_title(label(panel), fontsize=9)
        axis.set_xlim(-0.05, 1.05)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), list(map(label, names)) if axis is axes[0] else [])
        axis.grid(axis="x", alpha=0.3)
    _draw_curves(axes[-1], curves, reference)
    axes[-1].set_title(label(curve_title), fontsize=9)
    save(figure, path)


def _draw_curves(axis: Any, curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], reference: str) -> None:
    from matplotlib import colormaps

    axis.set_prop_cycle(color=[colormaps["tab20"](index) for index in range(20)])
    for name, runs in curves.items():
        points = list(zip(*runs, strict=False))
        if not points:
            continue
        tokens = [sum(run["generated_tokens"] for run in point) / len(point) / 1000 for point in points]
        accuracy = [sum(run["accuracy"] for run in point) / len(point) for point in points]
        axis.plot(tokens, accuracy, marker=".", label=label(name), linewidth=2.5 if name == reference else 1)
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    if axis.get_lines():
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
