"""
A comparison with the learning rates that were best for its arms in a sweep, whose arms are named `<arm>-<rate>`.

    PYTHONPATH=tests python -m benchmarks.learning_rates runs/smollm2_rates/comparison.json \
      --comparison recipes/lab/smollm2.yaml --output runs/smollm2_chosen.yaml

An arm's rate is that with the highest mean of sampled accuracy on the suite of the sweep in the form that the arm is
trained in; of equal ones the lowest. An arm without a sweep has the rate of the arm that `LIKE` names.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from trl_sgpo.files import write_file


LIKE = {"wrong": "distill"}
KEYS = ("learning_rate", "sft_learning_rate")


def best_rates(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Arm → the key and value of its best learning rate."""
    suite = summary["settings"]["transfer"]["suite"]
    found: dict[str, list[tuple[float, float, str]]] = {}
    for name, figures in summary["arms"].items():
        keys = summary["settings"]["arms"][name]
        key = next(key for key in reversed(KEYS) if key in keys)
        rate = float(keys[key])
        found.setdefault(name.partition("-")[0], []).append((figures[f"{suite} accuracy"]["mean"], -rate, key))
    return {arm: {key: -negated} for arm, rates in found.items() for _, negated, key in [max(rates)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="comparison.json of the sweep")
    parser.add_argument("--comparison", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rates = best_rates(json.loads(options.sweep.read_text()))
    comparison = yaml.safe_load(options.comparison.read_text())
    for name, arm in comparison["arms"].items():
        arm |= rates.get(LIKE.get(name, name), {})
        print(name, {key: arm[key] for key in KEYS if key in arm})
    write_file(options.output, yaml.safe_dump(comparison, sort_keys=False))


if __name__ == "__main__":
    main()
