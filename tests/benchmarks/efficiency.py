"""
Data efficiency in the laboratory: accuracy on held-out compositions against generated tokens and problems drawn, from
runs of `recipes/lab/lab2.yaml`.

    PYTHONPATH=tests python -m benchmarks.efficiency runs/lab runs/lab-1 --output docs/results/efficiency
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from trl_sgpo.compare.table import table_lines
from trl_sgpo.files import write_file


ARMS = ("sgpo", "transfer_only", "two_phase_grpo", "grpo")
PROBLEMS = 96  # of an epoch
UNITS = {"tokens": "generated tokens", "problems": "problems drawn"}


def points(result: dict[str, Any]) -> list[dict[str, float]]:
    """What a run had used when its accuracy was measured, and the accuracy."""
    found = []
    for point in result["curve"]:
        epochs = max(log["epoch"] for log in result["log"] if log["generated_tokens"] <= point["generated_tokens"])
        found.append(
            {
                "tokens": point["generated_tokens"],
                "problems": epochs * PROBLEMS,
                "accuracy": point["accuracy"],
            }
        )
    return found


def held_out(result: dict[str, Any]) -> float:
    return result["suites"]["held_out"]["sampled"]["accuracy"]["value"]


def read(directories: list[Path]) -> dict[str, Any]:
    """Arm → runs, each with its model, seed and points; and the accuracy of SFT, which generates no tokens."""
    runs: dict[str, Any] = {}
    for directory in directories:
        for arm in ARMS:
            for path in sorted((directory / arm).glob("seed-*/result.json")):
                run = {
                    "model": directory.name,
                    "seed": path.parent.name,
                    "points": points(json.loads(path.read_text())),
                }
                runs.setdefault(arm, []).append(run)
    paths = [path for directory in directories for path in sorted((directory / "sft").glob("seed-*/result.json"))]
    return {"runs": runs, "sft": [held_out(json.loads(path.read_text())) for path in paths]}


def means(runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean points over runs, of which all were measured as often."""
    return [
        {key: fmean(point[key] for point in at) for key in at[0]}
        for at in zip(*(run["points"] for run in runs), strict=True)
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (unit, title) in zip(figure.subplots(1, 2, sharey=True), UNITS.items(), strict=True):
        for index, (arm, runs) in enumerate(found["runs"].items()):
            for run in runs:
                places, values = ([point[key] for point in run["points"]] for key in (unit, "accuracy"))
                axes.plot(places, values, color=f"C{index}", linewidth=0.5, alpha=0.5)
            mean = means(runs)
            axes.plot(
                [point[unit] for point in mean],
                [point["accuracy"] for point in mean],
                color=f"C{index}",
                marker="o",
                label=arm,
            )
        axes.axhline(fmean(found["sft"]), color="#888888", linestyle="--", label="sft, as many tokens trained")
        axes.set(xlabel=title, ylim=(0, 1), xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on held-out compositions")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="output_dir of comparisons")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    options = parser.parse_args()
    found = read(options.directories)
    rows = [
        [arm, f"{point['tokens']:,.0f}", f"{point['problems']:.0f}", f"{point['accuracy']:.2f}"]
        for arm, runs in found["runs"].items()
        for point in means(runs)
    ]
    rows.append(["sft", "0 (200,000 trained)", "–", f"{fmean(found['sft']):.2f}"])
    lines = [
        "# Data efficiency in the laboratory",
        "",
        f"Means over {len(options.directories)} models and their seeds.",
        "",
        *table_lines(["arm", *UNITS.values(), "accuracy"], rows),
    ]
    write_file(options.output.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    write_file(options.output.with_suffix(".md"), "\n".join(lines) + "\n")
    draw(found, options.output.with_suffix(".png"))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
