"""
Where warm starts stand on candidate families: sampled accuracy on unseen problems, guided and plain.

    PYTHONPATH=tests python -m benchmarks.warm_start --config recipes/lab/smollm2_sgpo.yaml \
      --suites lists=word_programs/seen?family=lists --problems 64 --output docs/results/smollm2_families.json \
      --warmstart_traces 480

Further arguments override the recipe. A measurement is added to those in the file.
"""

import argparse
import json
import resource
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_sgpo.data.loading import load_data, load_rewards
from trl_sgpo.data.warmstart import warmstart_model
from trl_sgpo.evaluation.runner import Protocol, evaluate_plain, evaluate_suite
from trl_sgpo.evaluation.suites import LoadedSuite, load_suites, parse_suite
from trl_sgpo.files import write_file
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.weights import require_model
from trl_sgpo.recipe import Recipe, read_recipe


def measured(model: TwoPhaseModel, suite: LoadedSuite, recipe: Recipe) -> dict[str, Any]:
    """Sampled and greedy accuracy, guided and plain, and tokens an answer."""
    verifier, protocol = load_rewards(recipe.script)[0], Protocol(samples=1, seed=recipe.training.seed, chunk_size=64)
    found: dict[str, Any] = {"suite": suite.suite.name, "path": suite.suite.path, "problems": len(suite.rows)}
    for name, result in (
        ("guided", evaluate_suite(model, suite, verifier, protocol)),
        ("plain", evaluate_plain(model, suite, verifier, protocol)),
    ):
        found[name] = round(result["sampled"]["accuracy"]["value"], 3)
        found[f"{name}, greedy"] = round(result["accuracy"]["value"], 3)
        found[f"{name}, tokens an answer"] = round(result["generated_tokens"] / (2 * len(suite.rows)), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--suites", nargs="+", required=True, help="NAME=PATH, unseen problems")
    parser.add_argument("--problems", type=int, default=64, help="of each suite")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the measurements")
    options, overrides = parser.parse_known_args()
    earlier = json.loads(options.output.read_text()) if options.output.is_file() else []
    suites = load_suites([parse_suite(text) for text in options.suites], limit=options.problems)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", options.config, *overrides, "--output_dir", folder]
        recipe = read_recipe(arguments, "benchmarks.warm_start")
        base = require_model(recipe.model.model_name_or_path)
        data = load_data(recipe)[recipe.script.dataset_train_split]
        name = warmstart_model(recipe, base, data)
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        model = TwoPhaseModel.from_pretrained(name, batch_size=64)
        rows = []
        for suite in suites:
            rows.append(measured(model, suite.with_system_prompt(recipe.script.system_prompt), recipe))
            print(rows[-1], flush=True)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    command = f"PYTHONPATH=tests python -m benchmarks.warm_start {shlex.join(sys.argv[1:])}"
    times = {"cpu seconds, warm start": round(seconds), "cpu seconds, measurement": round(whole - seconds)}
    write_file(
        options.output, json.dumps([*earlier, {"command": command} | times | {"suites": rows}], indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
