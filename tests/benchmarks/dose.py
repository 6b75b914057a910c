"""
Accuracy on held-out compositions by the share of planted shortcuts, from the comparisons of `recipes/lab/dose.yaml`.

    PYTHONPATH=tests python -m benchmarks.dose runs/dose/*.json --output docs/results/dose
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from matplotlib.figure import Figure

from trl_sgpo.compare.pool import COLLAPSED
from trl_sgpo.compare.table import table_lines
from trl_sgpo.files import write_file


NAME = "held_out accuracy"

Runs = dict[str, dict[float, dict[str, list[float]]]]


def read(files: list[str]) -> Runs:
    """Arm → share of shortcuts → base model → accuracy of each seed."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for file in files:
        summary = json.loads(Path(file).read_text())
        overrides = summary["settings"]["overrides"]
        share = float(parse_qs(urlsplit(overrides["dataset_name"]).query)["shortcuts"][0])
        for arm, figures in summary["arms"].items():
            runs[arm][share][overrides["model_name_or_path"]] = figures[NAME]["values"]
    return runs


def mean(models: dict[str, list[float]]) -> float:
    """Over models, of the mean over seeds."""
    return sum(sum(values) / len(values) for values in models.values()) / len(models)


def markdown(runs: Runs) -> str:
    shares = sorted({share for arm in runs.values() for share in arm})
    models = sorted({model for arm in runs.values() for each in arm.values() for model in each})
    lines = [
        "# Share of planted shortcuts",
        "",
        f"Accuracy on held-out compositions, sampled: mean over models, single runs by model ({', '.join(models)}), "
        f"and how many runs ended below {COLLAPSED}.",
        "",
    ]
    rows = [[arm, *(_cell(shares_of.get(share, {})) for share in shares)] for arm, shares_of in runs.items()]
    return "\n".join(lines + table_lines(["arm", *(f"{share:g}" for share in shares)], rows)) + "\n"


def _cell(models: dict[str, list[float]]) -> str:
    if not models:
        return "not run"
    every = [value for values in models.values() for value in values]
    listed = "; ".join(" ".join(f"{value:.2f}" for value in values) for values in models.values())
    collapsed = sum(value < COLLAPSED for value in every)
    return f"{mean(models):.2f} ({listed})" + (f", {collapsed} of {len(every)} collapsed" if collapsed else "")


def draw(runs: Runs, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for index, (arm, shares) in enumerate(runs.items()):
        points = sorted(shares.items())
        axes.plot([share for share, _ in points], [mean(models) for _, models in points], color=f"C{index}", label=arm)
        for share, models in points:
            for values in models.values():
                places = [share + 0.004 * (index - 2)] * len(values)  # points of arms side by side
                axes.scatter(places, values, s=10, color=f"C{index}", alpha=0.7)
    axes.axhline(COLLAPSED, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of shortcuts among the worked solutions of the warm start")
    axes.set_ylabel("accuracy on held-out compositions")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    options = parser.parse_args()
    runs = read(options.files)
    write_file(options.output.with_suffix(".json"), json.dumps(runs, indent=1) + "\n")
    write_file(options.output.with_suffix(".md"), markdown(runs))
    draw(runs, options.output.with_suffix(".png"))
    print(markdown(runs))


if __name__ == "__main__":
    main()
