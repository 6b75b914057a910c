"""Results of a comparison: means over seeds with intervals, differences from an arm, tables and plots."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation.chunks import write_text
from .config import Comparison


@dataclass(frozen=True)
class Interval:
    """
    A mean over seeds.

    Args:
        mean (`float`):
            The mean.
        low (`float`), high (`float`):
            95% interval of Student's t distribution; NaN with a single seed.
        values (`list[float]`):
            One value a seed.
    """

    mean: float
    low: float
    high: float
    values: list[float]

    def to_dict(self) -> dict[str, Any]:
        def plain(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {"mean": plain(self.mean), "low": plain(self.low), "high": plain(self.high), "values": self.values}


def interval(values: list[float]) -> Interval:
    """
    Mean and 95% interval over seeds.

    Args:
        values (`list[float]`):
            One value a seed, at least one.

    Returns:
        [`Interval`]
    """
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, values)


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run that a table shows, by name."""
    figures: dict[str, float] = {}
    for name, suite in result["suites"].items():
        figures[f"{name} accuracy"] = suite["sampled"]["accuracy"]["value"]
        figures[f"{name} accuracy, greedy"] = suite["accuracy"]["value"]
    transfer = result["transfer"]
    conditions, differences = transfer["conditions"], transfer["differences"]
    figures["transfer score"] = conditions["transfer"]["value"]
    figures["own strategy"] = conditions["own"]["value"]
    figures["other class's strategy"] = conditions["other"]["value"]
    figures["empty strategy"] = conditions["empty"]["value"]
    figures["no strategy"] = conditions["none"]["value"]
    figures["lift"] = differences["transfer - none"]["value"]
    figures["own - other"] = differences["own - other"]["value"]
    figures["own - none"] = differences["own - none"]["value"]
    for index, point in enumerate(result["curve"], start=1):
        figures[f"curve {index}"] = point["accuracy"]
    for name, value in result["tokens"].items():
        figures[f"tokens {name}"] = float(value)
    figures["training seconds"] = result["training_seconds"]
    return figures


def summary(comparison: Comparison, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """
    Summarises the finished runs.

    Args:
        comparison ([`Comparison`]):
            The comparison.
        results (`dict[str, list[dict]]`):
            Results by arm, one a seed.

    Returns:
        `dict`: With `arms` (each figure's mean, interval and values), `differences` (reference minus arm, paired by
        seed), `curves` and `settings`.
    """
    rows = {name: [figures_of(result) for result in runs] for name, runs in results.items() if runs}
    arms = {
        name: {figure: interval([row[figure] for row in values]).to_dict() for figure in values[0]}
        for name, values in rows.items()
    }
    differences: dict[str, Any] = {}
    reference = {result["seed"]: figures_of(result) for result in results.get(comparison.reference, [])}
    for name, runs in results.items():
        paired = [(reference[run["seed"]], figures_of(run)) for run in runs if run["seed"] in reference]
        if paired and name != comparison.reference:
            differences[name] = {
                figure: interval([ours[figure] - theirs[figure] for ours, theirs in paired]).to_dict()
                for figure in paired[0][1]
                if figure in paired[0][0] and not figure.startswith(("tokens", "training"))
            }
    return {
        "settings": {
            "recipe": comparison.recipe,
            "budget": comparison.budget,
            "seeds": comparison.seeds,
            "suites": [asdict(suite) for suite in comparison.parsed_suites],
            "transfer": comparison.transfer,
            "overrides": comparison.overrides,
            "arms": {
                arm.name: {"method": arm.method, "form": arm.form} | arm.settings | arm.overrides
                for arm in comparison.arms
            },
        },
        "reference": comparison.reference,
        "arms": arms,
        "differences": differences,
        "curves": {name: [run["curve"] for run in runs] for name, runs in results.items() if runs},
        "matrices": {
            name: {"classes": runs[0]["transfer"]["classes"], "matrix": runs[0]["transfer"]["matrix"]}
            for name, runs in results.items()
            if runs
        },
    }


def markdown(summed: dict[str, Any]) -> str:
    """The tables of a summary."""
    suites = [suite["name"] for suite in summed["settings"]["suites"]]
    columns = [f"{name} accuracy" for name in suites] + ["transfer score", "lift", "own - other", "own - none"]
    seeds = summed["settings"]["seeds"]
    lines = [
        f"# Comparison: {summed['settings']['recipe']}",
        "",
        f"{summed['settings']['budget']:,} tokens an arm and seed, seeds {', '.join(map(str, seeds))}. Means over "
        "seeds with 95% intervals (Student's t). Accuracies are of sampled answers, each arm in the form it was "
        "trained in.",
        "",
        *_table(
            ["arm", "seeds", *columns],
            [
                [name, str(len(f[columns[0]]["values"])), *(_cell(f[c]) for c in columns)]
                for name, f in summed["arms"].items()
            ],
        ),
        "",
        f"## {summed['reference']} minus the others, paired by seed",
        "",
        *_table(
            ["arm", *columns],
            [[name, *(_cell(f[c], signed=True) for c in columns)] for name, f in summed["differences"].items()],
        ),
        "",
        "## Adherence: the same problems with the own strategy and others, and greedy accuracies",
        "",
    ]
    more = ["own strategy", "transfer score", "other class's strategy", "empty strategy", "no strategy"]
    more += [f"{name} accuracy, greedy" for name in suites]
    lines += _table(["arm", *more], [[name, *(_cell(f[c]) for c in more)] for name, f in summed["arms"].items()])
    points = sorted({name for f in summed["arms"].values() for name in f if name.startswith("curve ")})
    if points:
        suite = summed["settings"]["transfer"]["suite"]
        tokens = [f"{summed['settings']['budget'] * (i + 1) // len(points):,} tokens" for i in range(len(points))]
        learning = {name: f for name, f in summed["arms"].items() if points[0] in f}
        differences = {name: f for name, f in summed["differences"].items() if points[0] in f}
        lines += ["", f"## Learning curves: {suite} accuracy, sampled, on the first problems of the suite", ""]
        lines += _table(["arm", *tokens], [[name, *(_cell(f[c]) for c in points)] for name, f in learning.items()])
        lines += ["", f"{summed['reference']} minus the others, paired by seed:", ""]
        rows = [[name, *(_cell(f[c], signed=True) for c in points)] for name, f in differences.items()]
        lines += _table(["arm", *tokens], rows)
    lines += ["", "## Cost: means over seeds", ""]
    cost = ["tokens generated", "tokens labels", "tokens trained", "training seconds"]
    lines += _table(
        ["arm", "generated tokens", "of these for labels", "imitated tokens", "seconds"],
        [[name, *(f"{f[c]['mean']:,.0f}" for c in cost)] for name, f in summed["arms"].items()],
    )
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _cell(figure: dict[str, Any], signed: bool = False) -> str:
    sign = "+" if signed else ""
    if figure["low"] is None:
        return f"{figure['mean']:{sign}.2f}"
    return f"{figure['mean']:{sign}.2f} [{figure['low']:{sign}.2f}, {figure['high']:{sign}.2f}]"


def picture(summed: dict[str, Any], path: Path) -> None:
    """Draws accuracy of the suites, transfer score and learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [suite["name"] for suite in summed["settings"]["suites"]]
    panels = [f"{name} accuracy" for name in suites] + ["transfer score"]
    names = list(summed["arms"])
    figure, axes = plt.subplots(
        1,
        len(panels) + 1,
        figsize=(3 * len(panels) + 5, 0.32 * len(names) + 2),
        width_ratios=[*[1] * len(panels), 1.6],
    )
    for axis, panel in zip(axes[:-1], panels, strict=True):
        for position, name in enumerate(names):
            value = summed["arms"][name][panel]
            colour = "#c44e52" if name == summed["reference"] else "#4c72b0"
            spread = None
            if value["low"] is not None:
                spread = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            axis.errorbar([value["mean"]], [position], xerr=spread, fmt="o", color=colour, capsize=3, markersize=4)
        axis.set_title(panel, fontsize=9)
        axis.set_xlim(-0.05, 1.05)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_prop_cycle(color=[plt.get_cmap("tab20")(index) for index in range(20)])
    for name, runs in summed["curves"].items():
        if not runs[0]:
            continue
        points = list(zip(*runs, strict=False))
        tokens = [sum(run["generated_tokens"] for run in point) / len(point) / 1000 for point in points]
        accuracy = [sum(run["accuracy"] for run in point) / len(point) for point in points]
        axes[-1].plot(tokens, accuracy, marker=".", label=name, linewidth=2.5 if name == summed["reference"] else 1)
    axes[-1].set_title(f"{summed['settings']['transfer']['suite']} accuracy by thousand tokens", fontsize=9)
    axes[-1].set_ylim(0, 1)
    axes[-1].grid(alpha=0.3)
    if axes[-1].get_lines():
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(summed: dict[str, Any], stem: Path) -> list[Path]:
    """Writes a summary beside `stem` as `.json`, `.md` and `.png`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    write_text(paths[0], json.dumps(summed, indent=1) + "\n")
    write_text(paths[1], markdown(summed))
    picture(summed, paths[2])
    return paths
