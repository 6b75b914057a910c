"""
Writes what `trl-sgpo demo` shows, from a run of the quickstart with seed 42:

    trl-sgpo train --config recipes/quickstart.yaml
    python -m tests.demo_run runs/quickstart --step 20 --block 1

The block is one that shows a strategy that states an answer, and the rest is the run's own.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from trl_sgpo.bank.snapshot import open_read_only
from trl_sgpo.cli.demo import FILE
from trl_sgpo.method.prompts import problem_text
from trl_sgpo.report.run_files import COMPLETIONS_DIRECTORY, REPORT_FILE, RUN_SETTINGS_FILE


KEPT = ("model_name_or_path", "dtype", "seed", "max_steps", "warmstart_traces", "num_generations", "versions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--block", type=int, required=True, help="number of the block in the step, from 0")
    options = parser.parse_args()
    settings = json.loads((options.run / RUN_SETTINGS_FILE).read_text())
    with open_read_only(options.run) as bank:
        strategies = [*bank.strategies(), *bank.retired()]
    classes = {strategy.id: strategy.problem_class for strategy in strategies}
    table = pq.read_table(options.run / COMPLETIONS_DIRECTORY / f"completions_{options.step:05}.parquet").to_pylist()
    size, count = settings["transfer_block_size"], settings["num_generations"]
    rows = table[options.block * size * count :][: size * count]
    problems = [rows[index * count : (index + 1) * count] for index in range(size)]
    written = [
        {
            "text": problems[0][number]["strategy"],
            "problem": next(index for index in range(size) if problems[index][number]["source"] == "own"),
            "credit": round(problems[0][number]["strategy_advantage"], 4),
            "executions": [{"text": of[number]["execution"], "reward": of[number]["correctness"]} for of in problems],
        }
        for number in range(count)
    ]
    block = {
        "step": options.step,
        "problem_class": classes[rows[0]["retrieved"]],
        "problems": [problem_text(of[0]["prompt"]) for of in problems],
        "strategies": written,
    }
    record = {
        "command": "trl-sgpo train --config recipes/quickstart.yaml",
        "settings": {key: settings[key] for key in KEPT},
        "block": block,
        "bank": [asdict(strategy) for strategy in strategies],
        "scores": json.loads((options.run / REPORT_FILE).read_text()),
    }
    FILE.write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
