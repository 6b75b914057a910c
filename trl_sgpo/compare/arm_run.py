"""One run of a comparison: an arm with a seed, from the warm start to its results, in a process of its own."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..bank import StrategyBank
from ..bank.files import BANK_DIRECTORY
from ..bank.strategy import problem_id
from ..checks.command import run_command
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.secrets import redacted
from ..data.classes import with_classes
from ..data.loading import load_data, load_rewards, without_long_problems
from ..data.warmstart import warmstart_model
from ..errors import ConfigError, DataError
from ..evaluation.digest import Record, changes, depends_on, digest, digest_of_files
from ..evaluation.runner import Protocol, evaluate_plain, evaluate_suite, way_figures
from ..evaluation.suites import LoadedSuite, Suite, load_suites
from ..evaluation.transfer_plan import plan_transfer
from ..evaluation.transfer_score import transfer_report
from ..files import write_file
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.settings import TwoPhaseSettings
from ..inference.verifier import verify
from ..method.prompts import Prompt
from ..recipe import Recipe, read_recipe, resume_point
from .config import Arm, Comparison, read_comparison
from .lab.model import fetch_model
from .methods import Task, TrainedArm, plain_settings, train_arm
from .stored import run_result


RESULT_FILE = "result.json"
RECORD_FILE = "depends_on.json"
_MEASURED = ("budget", "transfer", "samples", "pass_samples", "curve_points", "curve_problems")
_PLACES = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint")


def arm_recipe(comparison: Comparison, arm: Arm | None, seed: int) -> Recipe:
    """The shared recipe with the overrides of the comparison and of an arm, for one seed."""
    overrides = comparison.overrides | (arm.overrides if arm is not None else {})
    directory = comparison.warmstart_directory(seed) if arm is None else comparison.run_directory(arm, seed)
    # The budget ends a run; an interrupted run resumes from its last checkpoint
    fixed = {"seed": seed, "output_dir": str(directory), "max_steps": 1_000_000, "report_problems": 0}
    fixed["resume_from_checkpoint"] = "true"
    argv = ["--config", comparison.recipe]
    for key, value in (overrides | fixed).items():
        argv += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}", str(value)]
    return read_recipe(argv, "trl-sgpo compare")


def run_records(
    comparison: Comparison, runs: Iterable[tuple[Arm, int]], with_models: bool = True
) -> dict[tuple[str, int], Record]:
    """
    Records of all that runs depend on.

    Args:
        comparison ([`Comparison`]):
            The comparison.
        runs (`Iterable[tuple[Arm, int]]`):
            Arms and seeds.
        with_models (`bool`, *optional*, defaults to `True`):
            Whether to read the base models.

    Returns:
        `dict`: By name of the arm and seed.
    """
    measured = {
        **{name: vars(comparison)[name] for name in _MEASURED},
        "suites": digest([[asdict(each.suite), each.rows] for each in load_suites(comparison.parsed_suites)])[:16],
    }
    common: dict[str, Record] = {}  # of the model and the data of several runs
    records = {}
    for arm, seed in runs:
        recipe = arm_recipe(comparison, arm, seed)
        settings = _settings(recipe)
        names = [recipe.model.model_name_or_path, recipe.model.model_revision, recipe.script.reward_funcs]
        names += [vars(recipe.mixture), vars(recipe.columns), recipe.script.dataset_name, recipe.script.system_prompt]
        names += [recipe.script.dataset_train_split, recipe.script.warmstart_file]
        key = digest([*names, recipe.script.reward_model_name_or_path])
        if key not in common:
            common[key] = _of_inputs(recipe, with_models)
        records[arm.name, seed] = settings | {"arm": asdict(arm), "seed": seed} | measured | common[key]
    return records


def _settings(recipe: Recipe) -> Record:
    """Values of all keys but those that name places."""
    parts = (recipe.script, recipe.training, recipe.model, recipe.columns)
    values = {item.name: vars(part)[item.name] for part in parts for item in fields(part)}
    return redacted({key: str(value) for key, value in values.items() if key not in _PLACES})


def _of_inputs(recipe: Recipe, with_model: bool) -> Record:
    file = recipe.script.warmstart_file
    model = recipe.model.model_name_or_path if with_model else None
    return {
        **depends_on(model, load_rewards(recipe.script), revision=recipe.model.model_revision),
        "problems": digest(list(load_data(recipe)[recipe.script.dataset_train_split]))[:16],
        "warmstart_traces_in_file": None if file is None else digest_of_files([Path(file)])[:16],
    }


def finished(comparison: Comparison, arm: Arm, seed: int, record: Record) -> dict[str, Any] | None:
    """
    Result of a run, `None` if it is not finished.

    Raises:
        [`ConfigError`]: What is in the run's directory depends on something else, or is damaged.
    """
    directory = comparison.run_directory(arm, seed)
    _check_record(directory, record)
    path = directory / RESULT_FILE
    if not path.exists():
        return None
    with expect_readable(path, "remove it, and run the same command again"):
        result: dict[str, Any] = read_json(path)
        run_result(comparison, seed)(result, arm.name)
    return result


def _verifier(comparison: Comparison, seed: int) -> Any:
    """Verifies the answers of all arms, also of one that is trained with other rewards."""
    return load_rewards(arm_recipe(comparison, None, seed).script)[0]


def _check_record(directory: Path, record: Record) -> None:
    if not (directory / RESULT_FILE).is_file() and not any(directory.glob("checkpoint-*")):
        return
    path = directory / RECORD_FILE
    if path.exists():
        with expect_readable(path, f"move {directory} away, and run the same command again"):
            changed = changes({key: value for key, value in read_json(path).items() if key in record}, record)
        if changed is None:
            return
        other = f"({changed})"
    else:
        other = "by an earlier version, which kept no record of them"
    raise ConfigError(
        f"{directory} holds a run with other settings or inputs {other}: name another `--output_dir`, or move that "
        "directory away to run it again."
    )


def check(comparison: Comparison) -> None:
    """
    Checks recipes, suites and the transfer plan, so that errors are raised before training.

    Raises:
        [`ConfigError`] or [`DataError`]: The message names the fix.
    """
    recipes = [arm_recipe(comparison, arm, comparison.seeds[0]) for arm in comparison.arms]
    for arm, recipe in zip(comparison.arms, recipes, strict=True):
        if arm.method == "internalize_wrong" and recipe.training.internalize not in ("distill", "contrast"):
            raise ConfigError(
                f"The arm {arm.name!r} teaches strategies of other classes by `distill` or `contrast`: set "
                f"`internalize` to one of them, not {recipe.training.internalize}."
            )
        if validation := arm.settings.get("validation"):
            dataset = load_data(recipe)[recipe.script.dataset_train_split]
            _validation_suite(validation, dataset["prompt"], recipe)
    verifier = _verifier(comparison, comparison.seeds[0])
    suites = load_suites(comparison.parsed_suites)
    for loaded in suites:
        some = loaded.rows[:8]
        if all(math.isnan(outcome) for outcome in verify(verifier, some, [""] * len(some))):
            raise DataError(
                f"The verifier cannot tell right from wrong on the suite {loaded.suite.name}: use problems with a "
                "solution."
            )
    loaded = next(loaded for loaded in suites if loaded.suite.name == comparison.transfer["suite"])
    plan = plan_transfer(loaded.rows, loaded.suite.class_column, **_transfer_plan(comparison), seed=0)
    if len(plan.classes) < 2:
        raise DataError(
            f"The suite {loaded.suite.name} has one class, and strategies are compared with those of other classes: "
            "set `transfer.suite` to one with several, or its `class_column`."
        )


def fetch_models(comparison: Comparison) -> None:
    """Fetches the base models of all arms before parallel runs start."""
    for arm in comparison.arms:
        fetch_model(arm_recipe(comparison, arm, comparison.seeds[0]).model.model_name_or_path)


def _transfer_plan(comparison: Comparison) -> dict[str, Any]:
    return {
        "problems_per_class": comparison.transfer.get("problems", 4),
        "transfers": comparison.transfer.get("executions", 2),
        "max_classes": comparison.transfer.get("classes"),
        "pairs_per_cell": comparison.transfer.get("pairs_per_cell", 0),
    }


def warm_start(comparison: Comparison, seed: int) -> str:
    """Warm-starts the recipe's model for all arms of a seed, once. Returns its directory."""
    recipe = arm_recipe(comparison, None, seed)
    model = fetch_model(recipe.model.model_name_or_path)
    if recipe.script.warmstart_traces < 1 and recipe.script.warmstart_file is None:
        return model
    return warmstart_model(recipe, model, load_data(recipe)[recipe.script.dataset_train_split])


def run_arm(comparison: Comparison, arm: Arm, seed: int) -> dict[str, Any]:
    """
    Trains and evaluates an arm with a seed and writes `result.json` into its directory.

    Args:
        comparison ([`Comparison`]):
            The comparison.
        arm ([`Arm`]):
            One of its arms.
        seed (`int`):
            One of its seeds.

    Returns:
        `dict`: The result.
    """
    started = time.monotonic()
    directory = comparison.run_directory(arm, seed)
    recipe = arm_recipe(comparison, arm, seed)
    suites = [
        loaded.with_system_prompt(recipe.script.system_prompt) for loaded in load_suites(comparison.parsed_suites)
    ]
    training = recipe.training
    model_name = fetch_model(recipe.model.model_name_or_path)
    record = run_records(comparison, [(arm, seed)])[arm.name, seed]
    _check_record(directory, record)
    checkpoint = resume_point(training)
    if checkpoint is None:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / RECORD_FILE, json.dumps(record, indent=1, default=str))
    verifier = _verifier(comparison, seed)
    plain = plain_settings(training)
    settings = TwoPhaseSettings.from_config(training) if arm.form == "two_phase" else plain
    rows = training.per_device_train_batch_size * training.steps_per_generation
    transfer_suite = next(loaded for loaded in suites if loaded.suite.name == comparison.transfer["suite"])
    problems = load_data(recipe)[recipe.script.dataset_train_split]
    dataset = with_classes(without_long_problems(problems, recipe.script.max_problem_tokens, model_name), training)
    if validation := arm.settings.get("validation"):
        curve_suite = _validation_suite(validation, dataset["prompt"], recipe)
    else:
        curve_suite = replace(transfer_suite, rows=transfer_suite.rows[: comparison.curve_problems])

    def measure(trainer: Any) -> float:
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        model = TwoPhaseModel(unwrapped, trainer.processing_class, settings, batch_size=rows)
        accuracy = _sampled(model, curve_suite, verifier, arm, seed)
        trainer.model.train()
        return accuracy

    number = arm.settings.get("validation_points", comparison.curve_points)
    points = [comparison.budget * (i + 1) // number for i in range(number)]
    warm = warm_start(comparison, seed)
    task = Task(arm, recipe, warm, dataset, comparison.budget, points, measure, checkpoint, keep_best=bool(validation))
    trained = train_arm(task)
    seconds = time.monotonic() - started
    model = TwoPhaseModel.from_pretrained(trained.model, settings, batch_size=rows)
    bank = _bank(recipe, arm, directory)
    try:
        result = _measure(comparison, arm, seed, model, suites, transfer_suite, verifier, bank, plain)
    finally:
        if bank is not None:
            bank.close()
    result |= _account(trained) | {
        "arm": arm.name,
        "method": arm.method,
        "seed": seed,
        "curve": [] if validation else trained.curve,
        "validation": trained.curve if validation else [],
        "training_seconds": round(seconds, 1),
    }
    write_file(directory / RESULT_FILE, json.dumps(result, indent=1))
    return result


def _validation_suite(path: str, trained_on: Sequence[Prompt], recipe: Recipe) -> LoadedSuite:
    """Problems that choose weights, without those that are trained on."""
    (loaded,) = load_suites([Suite("validation", path, split="train")])
    loaded = loaded.with_system_prompt(recipe.script.system_prompt)
    known = {problem_id(prompt) for prompt in trained_on}
    rows = [row for row in loaded.rows if problem_id(row["prompt"]) not in known]
    if not rows:
        raise DataError(f"All problems of `validation` ({path}) are trained on: name others, or another seed.")
    return replace(loaded, rows=rows)


def _sampled(model: TwoPhaseModel, loaded: LoadedSuite, verifier: Any, arm: Arm, seed: int) -> float:
    protocol = Protocol(form=arm.form, samples=1, seed=seed, chunk_size=max(len(loaded.rows), 1))
    return evaluate_suite(model, loaded, verifier, protocol)["sampled"]["accuracy"]["value"]


def _bank(recipe: Recipe, arm: Arm, directory: Path) -> StrategyBank | None:
    if arm.form != "two_phase" or not recipe.training.use_bank:
        return None
    return StrategyBank(directory / BANK_DIRECTORY, embedding_model=recipe.training.embedding_model)


def _measure(
    comparison: Comparison,
    arm: Arm,
    seed: int,
    model: TwoPhaseModel,
    suites: list[LoadedSuite],
    transfer_suite: LoadedSuite,
    verifier: Any,
    bank: StrategyBank | None,
    plain: TwoPhaseSettings,
) -> dict[str, Any]:
    results = {}
    trusted = bank is not None and any(strategy.trust == "trusted" for strategy in bank.strategies())
    for loaded in suites:
        usual = Protocol(form=arm.form, samples=comparison.samples, seed=seed, chunk_size=model.batch_size)
        more = comparison.pass_samples if loaded is transfer_suite else None
        protocol = replace(usual, samples=more or usual.samples)
        found = evaluate_suite(model, loaded, verifier, protocol, bank)
        two_phase = arm.form == "two_phase"
        answers = evaluate_plain(model, loaded, verifier, usual) if two_phase else found
        results[loaded.suite.name] = found | {"plain": way_figures(answers)}
        if bank is not None:
            # A bank that trusts no strategy shows none
            own = evaluate_suite(model, loaded, verifier, usual) if trusted else found
            results[loaded.suite.name]["own"] = way_figures(own)
    # Equal limits for all arms: a plain answer may be as long as strategy and execution together
    model.settings = plain
    report = transfer_report(
        model,
        transfer_suite.rows,
        transfer_suite.suite.class_column,
        verifier,
        **_transfer_plan(comparison),
        seed=seed,
        decoding=Decoding(greedy=False, seed=seed),
    )
    transfer = report.to_dict()
    del transfer["problems"]
    return {"suites": results, "transfer": transfer}


def _account(trained: TrainedArm) -> dict[str, Any]:
    return {
        "tokens": {"generated": trained.generated, "labels": trained.labelled, "trained": trained.trained},
        "details": trained.details,
        "log": trained.log,
    }


def main(argv: list[str]) -> int:
    """Runs `CONFIG CHANGES_AS_JSON SEED [ARM]`; without an arm, only the seed's warm start."""
    comparison = read_comparison(argv[0], json.loads(argv[1]))
    seed = int(argv[2])
    if len(argv) == 3:
        warm_start(comparison, seed)
        return 0
    arm = next(arm for arm in comparison.arms if arm.name == argv[3])
    run_arm(comparison, arm, seed)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("trl-sgpo compare", main, sys.argv[1:]))
