"""
How far supervised steps bring the plain answers of an SGPO model of the laboratory to its guided ones: on its own
right guided answers to the training problems, and on those to fresh problems, whose right answers are not used.

    PYTHONPATH=tests python -m benchmarks.plain_ceiling --runs runs/lab/sgpo/seed-1 runs/lab-1/sgpo/seed-1 \
      --output docs/results/plain_ceiling.json

Half of the answers are written as plain ones, strategy and execution after the bare problem, half as they are.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_sgpo.compare.lab.list_functions import problems
from trl_sgpo.data.loading import load_rewards
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.data.warmstart import warmstart
from trl_sgpo.data.worked import Trace
from trl_sgpo.evaluation.runner import Protocol, evaluate_plain, evaluate_suite
from trl_sgpo.evaluation.suites import load_suites, parse_suite
from trl_sgpo.files import write_file
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.pipeline import SGPOPipeline
from trl_sgpo.inference.verifier import verify
from trl_sgpo.recipe import Recipe, read_recipe


BATCH, SAMPLES = 64, 8
TRAINED, HELD_OUT = "list_functions/seen?size=96&shortcuts=0.667", "list_functions/held_out?size=384"
# fresh problems (0: the training problems, of which right answers are kept), steps, learning rate
PLANS = ((0, 60, 1e-4), (0, 60, 3e-4), (768, 60, 1e-4), (768, 60, 3e-4), (4096, 180, 5e-4))


def measured(name: str, recipe: Recipe) -> dict[str, float]:
    """Sampled accuracy of guided and plain answers to held-out compositions."""
    model = TwoPhaseModel.from_pretrained(name, batch_size=128)
    (loaded,) = load_suites([parse_suite(json.dumps({"name": "held_out", "path": HELD_OUT, "split": "test"}))])
    verifier, protocol = load_rewards(recipe.script)[0], Protocol(samples=1, seed=recipe.training.seed, chunk_size=128)
    found = evaluate_suite(model, loaded, verifier, protocol), evaluate_plain(model, loaded, verifier, protocol)
    guided, plain = (each["sampled"]["accuracy"]["value"] for each in found)
    return {"guided": round(guided, 3), "plain": round(plain, 3)}


def guided_answers(model: str, recipe: Recipe, fresh: int) -> list[Trace]:
    """Sampled strategies and executions: right ones on the training problems, or all on fresh ones."""
    rows: list[dict[str, Any]]
    rows = problems("seen", "train", fresh, seed=77) if fresh else load_problems(TRAINED).to_list()
    pipeline, verifier = (
        SGPOPipeline(TwoPhaseModel.from_pretrained(model, batch_size=128)),
        load_rewards(recipe.script)[0],
    )
    prepared, kept = pipeline.prepare([row["prompt"] for row in rows]), []
    for seed in range(1 if fresh else SAMPLES):
        attempts = [each.attempts[0] for each in pipeline.solve(prepared, decoding=Decoding(greedy=False, seed=seed))]
        outcomes = [1.0] * len(rows) if fresh else verify(verifier, rows, [each.execution for each in attempts])
        kept += [
            Trace(row["prompt"], attempt.strategy, attempt.execution, row["problem_class"])
            for row, attempt, outcome in zip(rows, attempts, outcomes, strict=True)
            if outcome > 0.5 and attempt.flaw is None
        ]
    return kept


def in_turn(traces: list[Trace], count: int) -> Iterator[Trace]:
    """All of them, in a new order each time, until there are so many."""
    rng, given = random.Random(1), 0
    while given < count:
        some = rng.sample(traces, min(len(traces), count - given))
        given += len(some)
        yield from some


def rows_of(run: Path, folder: Path) -> Iterator[dict[str, Any]]:
    model = str(run / "model")
    seed = json.loads((run / "result.json").read_text())["seed"]
    arguments = ["--config", "recipes/lab/sgpo.yaml", "--model_name_or_path", model, "--seed", str(seed)]
    recipe = read_recipe([*arguments, "--output_dir", str(folder)], "benchmarks.plain_ceiling")
    common = {"run": "/".join(run.parts[-3:])}
    yield common | {"fresh_problems": None, "steps": 0, "learning_rate": 0.0} | measured(model, recipe)
    for place, (fresh, steps, rate) in enumerate(PLANS):
        traces = list(in_turn(guided_answers(model, recipe, fresh), BATCH * steps))
        trained = warmstart(
            model, traces, recipe.training, folder / str(place), rate, batch_size=BATCH, plain_share=0.5, full=True
        )
        yield common | {"fresh_problems": fresh, "steps": steps, "learning_rate": rate} | measured(trained, recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="folders of finished runs of `compare`")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the figures")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows_of(run, Path(folder)):
                rows.append(row)
                print(row, flush=True)
                write_file(options.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
