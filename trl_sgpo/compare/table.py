"""Results of a comparison: means over seeds with intervals, differences from an arm, tables and plots."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checks.secrets import redacted
from ..evaluation.tables import in_markdown
from ..files import write_file
from .config import Comparison
from .pictures import Bar, draw_comparison


APART = 0.3
_COSTS = ("tokens", "training")
_TOKENS = "tokens an answer"
_SIGNED = ("lift", "own - other", "own - none")


@dataclass(frozen=True)
class Interval:
    """
    A mean over seeds.

    Args:
        mean (`float`):
            The mean.
        low (`float`), high (`float`):
            95% interval of Student's t distribution, NaN where there is none.
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


def interval(values: list[float], least: float = -math.inf, most: float = math.inf) -> Interval:
    """
    Mean and 95% interval over seeds.

    Student's t needs values that vary about their mean. There is no interval for one seed, for seeds that all end
    alike, and, where the range is limited, for seeds that end further apart than `APART`: of these, a part collapsed.

    Args:
        values (`list[float]`):
            One value a seed, at least one.
        least (`float`, *optional*, defaults to `-inf`), most (`float`, *optional*, defaults to `inf`):
            Range of the values, which the interval does not leave.

    Returns:
        [`Interval`]
    """
    from scipy.special import stdtrit

    n = len(values)
    mean = math.fsum(values) / n
    spread = max(values) - min(values)
    if n == 1 or spread < 1e-9 or (spread > APART and math.isfinite(most)):
        return Interval(mean, math.nan, math.nan, values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return Interval(mean, max(mean - half, least), min(mean + half, most), values)


def _range(figure: str) -> tuple[float, float]:
    """Smallest and largest possible value of a figure."""
    if figure.startswith(_COSTS) or figure.endswith(_TOKENS):
        return 0.0, math.inf
    return (-1.0, 1.0) if figure in _SIGNED else (0.0, 1.0)


_WAYS = {"own": "accuracy without the bank", "plain": "plain accuracy"}


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run that a table shows, by name."""
    figures: dict[str, float] = {}
    for name, suite in result["suites"].items():
        figures[f"{name} accuracy"] = suite["sampled"]["accuracy"]["value"]
        figures[f"{name} accuracy, greedy"] = suite["accuracy"]["value"]
        figures |= _of_all_answers(name, suite)
        for way, kind in _WAYS.items():
            if way in suite:
                figures[f"{name} {kind}"] = suite[way]["sampled"]["accuracy"]["value"]
                figures[f"{name} {kind}, greedy"] = suite[way]["accuracy"]["value"]
        if "plain" in suite:
            figures |= _of_all_answers(f"{name} plain", suite["plain"])
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


def _of_all_answers(name: str, suite: dict[str, Any]) -> dict[str, float]:
    """Share of problems that any of the sampled answers solves, and tokens an answer, where both were kept."""
    sampled, answered = suite["sampled"], suite["accuracy"].get("problems", 0)
    if "samples" not in sampled or "generated_tokens" not in suite or answered == 0:
        return {}
    k = sampled["samples"]
    figures = {f"{name} {_TOKENS}": suite["generated_tokens"] / (answered * (1 + k))}
    return figures | ({f"{name} pass@{k}": sampled["pass_at_k"][str(k)]["value"]} if k > 1 else {})


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
        name: {
            figure: interval([row[figure] for row in values], *_range(figure)).to_dict()
            for figure in values[0]
            if all(figure in row for row in values)
        }
        for name, values in rows.items()
    }
    differences: dict[str, Any] = {}
    reference = {result["seed"]: figures_of(result) for result in results.get(comparison.reference, [])}
    for name, runs in results.items():
        paired = [(reference[run["seed"]], figures_of(run)) for run in runs if run["seed"] in reference]
        if paired and name != comparison.reference:
            differences[name] = {
                figure: _difference(figure, [ours[figure] - theirs[figure] for ours, theirs in paired]).to_dict()
                for figure in paired[0][1]
                if all(figure in row for pair in paired for row in pair)
                and not (figure.startswith(_COSTS) or figure.endswith(_TOKENS))
            }
    return {
        "settings": redacted(
            {
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
            }
        ),
        "reference": comparison.reference,
        "arms": arms,
        "seeds": {name: [run["seed"] for run in runs] for name, runs in results.items() if runs},
        "problems": _problems(results),
        "differences": differences,
        "curves": {name: [run["curve"] for run in runs] for name, runs in results.items() if runs},
        "matrices": {
            name: {"classes": runs[0]["transfer"]["classes"], "matrix": runs[0]["transfer"]["matrix"]}
            for name, runs in results.items()
            if runs
        },
    }


def _problems(results: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """Judged problems of each suite. Results of earlier versions lack them."""
    suites = next(run["suites"] for runs in results.values() for run in runs)
    return {name: suite["accuracy"].get("problems", 0) for name, suite in suites.items()}


def _difference(figure: str, values: list[float]) -> Interval:
    least, most = _range(figure)
    return interval(values, least - most, most - least)


def markdown(summed: dict[str, Any]) -> str:
    """The tables of a summary."""
    suites = [suite["name"] for suite in summed["settings"]["suites"]]
    # Earlier versions have one way only
    known = dict.fromkeys(figure for arm in summed["arms"].values() for figure in arm)
    accuracies = [f"{name} {kind}" for name in suites for kind in ("accuracy", *_WAYS.values())]
    accuracies = [name for name in accuracies if name in known]
    columns = [*accuracies, "transfer score", "lift", "own - other", "own - none"]
    seeds = summed["settings"]["seeds"]
    lines = [
        f"# Comparison: {summed['settings']['recipe']}",
        "",
        f"{summed['settings']['budget']:,} tokens an arm and seed, seeds {', '.join(map(str, seeds))}. Means over "
        "seeds with 95% intervals (Student's t) in brackets, or the range of seeds that end apart in parentheses. A "
        "mean alone is of one seed, or of seeds that all end alike. Accuracies are of sampled answers, each arm in "
        "the form it was trained in"
        + (
            ", plain ones of its answers to the bare problem, and those without the bank where it has one."
            if len(accuracies) > len(suites)
            else "."
        ),
        "",
        *table_lines(
            ["arm", "seeds", *columns],
            [
                [name, str(len(f[columns[0]]["values"])), *(_cell_of(f, c) for c in columns)]
                for name, f in summed["arms"].items()
            ],
        ),
        "",
        f"## {summed['reference']} minus the others, paired by seed",
        "",
        *table_lines(
            ["arm", *columns],
            [[name, *(_cell_of(f, c, signed=True) for c in columns)] for name, f in summed["differences"].items()],
        ),
        "",
        "## Adherence: the same problems with the own strategy and others, and greedy accuracies",
        "",
    ]
    more = ["own strategy", "transfer score", "other class's strategy", "empty strategy", "no strategy"]
    more += [f"{name}, greedy" for name in accuracies]
    lines += table_lines(
        ["arm", *more], [[name, *(_cell_of(f, c) for c in more)] for name, f in summed["arms"].items()]
    )
    further = [name for name in known if "pass@" in name] + [name for name in known if name.endswith(_TOKENS)]
    if further:
        lines += ["", "## Problems that one of k sampled answers solves (pass@k), and tokens an answer", ""]
        rows = [[name, *(_further_cell(f, c) for c in further)] for name, f in summed["arms"].items()]
        lines += table_lines(["arm", *further], rows)
    points = sorted({name for f in summed["arms"].values() for name in f if name.startswith("curve ")})
    if points:
        suite = summed["settings"]["transfer"]["suite"]
        tokens = [f"{summed['settings']['budget'] * (i + 1) // len(points):,} tokens" for i in range(len(points))]
        learning = {name: f for name, f in summed["arms"].items() if points[0] in f}
        differences = {name: f for name, f in summed["differences"].items() if points[0] in f}
        lines += ["", f"## Learning curves: {suite} accuracy, sampled, on the first problems of the suite", ""]
        lines += table_lines(["arm", *tokens], [[name, *(cell(f[c]) for c in points)] for name, f in learning.items()])
        lines += ["", f"{summed['reference']} minus the others, paired by seed:", ""]
        rows = [[name, *(cell(f[c], signed=True) for c in points)] for name, f in differences.items()]
        lines += table_lines(["arm", *tokens], rows)
    lines += ["", "## Cost: means over seeds", ""]
    cost = ["tokens generated", "tokens labels", "tokens trained", "training seconds"]
    lines += table_lines(
        ["arm", "generated tokens", "of these for labels", "imitated tokens", "seconds"],
        [[name, *(f"{f[c]['mean']:,.0f}" for c in cost)] for name, f in summed["arms"].items()],
    )
    return "\n".join(lines) + "\n"


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(map(in_markdown, row))} |" for row in [header, ["---"] * len(header), *rows]]


def _cell_of(figures: dict[str, Any], name: str, signed: bool = False) -> str:
    return cell(figures[name], signed) if name in figures else "–"


def _further_cell(figures: dict[str, Any], name: str) -> str:
    tokens = name.endswith(_TOKENS) and name in figures
    return f"{figures[name]['mean']:.1f}" if tokens else _cell_of(figures, name)


def _ends(figure: dict[str, Any]) -> tuple[float, float]:
    """The interval of a figure, or the range of its seeds where it has none."""
    if figure["low"] is None:
        return min(figure["values"]), max(figure["values"])
    return figure["low"], figure["high"]


def cell(figure: dict[str, Any], signed: bool = False) -> str:
    """A figure of a summary: its mean with its interval, with the range of the seeds, or alone."""
    low, high = _ends(figure)
    mean, low_text, high_text = (f"{value:{'+' if signed else ''}.2f}" for value in (figure["mean"], low, high))
    if figure["low"] is not None:
        return f"{mean} [{low_text}, {high_text}]"
    return f"{mean} ({low_text} to {high_text})" if high - low > APART else mean


def files_of_table(stem: Path) -> list[Path]:
    """The files `.json`, `.md` and `.png` of a table. A stem may have points in its name, as in `share-0.9`."""
    return [stem.with_name(stem.name + suffix) for suffix in (".json", ".md", ".png")]


def write(summed: dict[str, Any], stem: Path) -> list[Path]:
    """Writes a summary beside `stem` as `.json`, `.md` and `.png`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = files_of_table(stem)
    write_file(paths[0], json.dumps(summed, indent=1) + "\n")
    write_file(paths[1], markdown(summed))
    suites = [suite["name"] for suite in summed["settings"]["suites"]]
    panels = {
        name: {arm: _bar(figures[name]) for arm, figures in summed["arms"].items()}
        for name in [*(f"{suite} accuracy" for suite in suites), "transfer score"]
    }
    title = f"{summed['settings']['transfer']['suite']} accuracy by thousand tokens"
    draw_comparison(paths[2], panels, summed["curves"], title, summed["reference"])
    return paths


def _bar(figure: dict[str, Any]) -> Bar:
    return Bar(figure["mean"], *_ends(figure), runs=[figure["values"]])
