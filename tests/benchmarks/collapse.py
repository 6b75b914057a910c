"""
What the first steps of a run in the laboratory say of its end: the share of strategies that leak the answer, entropy
and training accuracy in the first and last ten steps, beside the accuracy on held-out compositions.

    PYTHONPATH=tests python -m benchmarks.collapse runs/lab runs/lab-1 --arms two_phase_grpo sgpo \\
      --output docs/results/collapse
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_sgpo.compare.table import table_lines
from trl_sgpo.files import write_file


STEPS = 10
COLUMNS = {
    "leaks": "sgpo/leak",
    "entropy": "entropy",
    "training accuracy": "rewards/answer_reward/mean",
    "distinct strategies": "sgpo/distinct_strategies",
}


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Means over the first and last ten steps, and the end."""
    log, found = result["log"], {}
    for name, key in COLUMNS.items():
        if key in log[0]:
            found[f"{name}, first"] = fmean(entry[key] for entry in log[:STEPS])
            found[f"{name}, last"] = fmean(entry[key] for entry in log[-STEPS:])
    return found | {"held out": result["suites"]["held_out"]["sampled"]["accuracy"]["value"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="output_dir of comparisons")
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    options = parser.parse_args()
    runs = [
        {"model": directory.name, "arm": arm, "seed": path.parent.name.removeprefix("seed-")}
        | figures(json.loads(path.read_text()))
        for directory in options.directories
        for arm in options.arms
        for path in sorted((directory / arm).glob("seed-*/result.json"))
    ]
    names = list(dict.fromkeys(name for run in runs for name in run))
    rows = [
        [f"{run[name]:.2f}" if isinstance(run.get(name), float) else run.get(name, "–") for name in names]
        for run in runs
    ]
    lines = ["# First and last ten steps of runs, and their end", "", *table_lines(names, rows)]
    write_file(options.output.with_suffix(".json"), json.dumps(runs, indent=1) + "\n")
    write_file(options.output.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
