"""
Answers to hypotheses H1 and H4 to H7 of `docs/hypotheses.md`, from the comparisons of `recipes/lab/lab2.yaml`.

    PYTHONPATH=tests python -m benchmarks.hypotheses docs/results/lab2_lab*.json --output docs/results/hypotheses
"""

import argparse
import json
from pathlib import Path
from typing import Any

from trl_sgpo.compare.pool import COLLAPSED, pooled, read_summaries
from trl_sgpo.compare.table import table_lines
from trl_sgpo.files import write_file


NAME = "held_out accuracy"
DIFFERENCES = {
    "H1": ("sgpo", "two_phase_grpo"),
    "H4": ("transfer_only", "two_phase_grpo"),
    "H5": ("two_phase_grpo_bank", "two_phase_grpo"),
}
ENOUGH = 0.5  # accuracy that H6 counts tokens to
OF_SGPO, OTHERS = "sgpo", ("grpo", "two_phase_grpo")


def difference(summaries: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """First arm minus second one, with the interval of `compare --pool`."""
    return pooled([{**summary, "reference": first} for summary in summaries])["differences"][second][NAME]


def tokens_to(curve: list[dict[str, Any]]) -> int | None:
    """Generated tokens at the first measured point with enough accuracy."""
    return next((point["generated_tokens"] for point in curve if point["accuracy"] >= ENOUGH), None)


def answers(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, arms in DIFFERENCES.items():
        figure = difference(summaries, *arms)
        found[name] = {"arms": arms, **figure, "answer": "held" if figure["low"] > 0 else "refuted"}
    tokens = {
        arm: [[tokens_to(run) for run in summary["curves"][arm]] for summary in summaries]
        for arm in (OF_SGPO, *OTHERS)
    }
    as_fast = [not _is_faster(*runs) for runs in zip(tokens[OF_SGPO], tokens["grpo"], strict=True)]
    found["H6"] = {"tokens": tokens, "answer": "refuted" if sum(as_fast) * 2 >= len(as_fast) else "held"}
    collapsed = {
        arm: [[value < COLLAPSED for value in summary["arms"][arm][NAME]["values"]] for summary in summaries]
        for arm in (OF_SGPO, *OTHERS)
    }
    counts = {arm: [sum(runs) for runs in models] for arm, models in collapsed.items()}
    holds = not any(counts[OF_SGPO]) and any(sum(counts[arm]) for arm in OTHERS)
    found["H7"] = {"collapsed": counts, "answer": "held" if holds else "refuted"}
    return found


def _is_faster(ours: list[int | None], theirs: list[int | None]) -> bool:
    """Whether the runs of one model get there with fewer tokens on average. One that does not counts as endless."""
    mean = [sum(float("inf") if each is None else each for each in runs) / len(runs) for runs in (ours, theirs)]
    return mean[0] < mean[1]


def markdown(found: dict[str, Any], models: list[str]) -> str:
    rows = []
    for name in DIFFERENCES:
        entry = found[name]
        by_model = [f"{sum(values) / len(values):+.2f}" for values in entry["values"]]
        interval = f"{entry['mean']:+.2f} [{entry['low']:+.2f}, {entry['high']:+.2f}]"
        rows.append([name, f"{entry['arms'][0]} − {entry['arms'][1]}", entry["answer"], interval, *by_model])
    for arm, runs in found["H6"]["tokens"].items():
        cells = [" ".join("never" if each is None else f"{each:,}" for each in of_model) for of_model in runs]
        rows.append(["H6", f"tokens to {ENOUGH}, {arm}", found["H6"]["answer"], "", *cells])
    for arm, counts in found["H7"]["collapsed"].items():
        rows.append(["H7", f"collapsed runs, {arm}", found["H7"]["answer"], str(sum(counts)), *map(str, counts)])
    head = ["", "compared on held-out compositions", "answer", "over models", *models]
    return "\n".join(["# Answers to hypotheses of the laboratory", "", *table_lines(head, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="tables (.json) of comparisons, one for each model")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    options = parser.parse_args()
    summaries = read_summaries(options.files)
    found = answers(summaries)
    models = [summary["settings"]["overrides"]["model_name_or_path"] for summary in summaries]
    text = markdown(found, models)
    write_file(options.output.with_suffix(".json"), json.dumps({"models": models, **found}, indent=1) + "\n")
    write_file(options.output.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
