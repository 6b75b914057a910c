"""`trl-sgpo push`: publishes a run on the Hugging Face Hub."""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ..checks.arguments import Parser, path_option
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.paths import check_directory
from ..errors import ConfigError, ModelError
from ..evaluation.chunks import RESULTS_FILE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo push",
        allow_abbrev=False,
        description="Publish a run on the Hugging Face Hub, in one commit: the model in safetensors, an export of its "
        "strategy bank, metrics and a model card. Repeating it is safe.",
    )
    parser.add_argument("run", type=path_option, metavar="RUN", help="output folder of a run, or a checkpoint")
    parser.add_argument("repo_id", metavar="USER/MODEL", help="name of the model, created if it does not exist")
    parser.add_argument(
        "--eval", type=path_option, metavar="DIR", help="output folder of `trl-sgpo eval`, for the card's results"
    )
    parser.add_argument("--license", metavar="ID", help="of model and strategies, as apache-2.0 (the base model's)")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--no_bank", action="store_true", help="leave the strategies out")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if it does not exist (main)")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    parser.add_argument(
        "--dry_run",
        type=path_option,
        metavar="DIR",
        help="write what would be pushed to this new directory, and push nothing",
    )
    return parser


def main(argv: list[str]) -> int:
    """Pushes a run. Returns the exit status."""
    options = _parser().parse_args(argv)
    run = Path(options.run)
    evaluation = None if options.eval is None else Path(options.eval)
    if not run.is_dir():
        raise ConfigError(f"There is no run in {run}: name the output folder of one, or a checkpoint.")
    if evaluation is not None and not (evaluation / RESULTS_FILE).is_file():
        raise ConfigError(f"`--eval {evaluation}` holds no results.json: name the output folder of `trl-sgpo eval`.")

    from ..evaluation.digest import of_other_weights
    from ..hub.model_card import HUB_NAME, TrainingFacts
    from ..hub.publication import stage
    from ..hub.push import bank_of, claim, push_folder, staging
    from ..inference.loading import ADAPTER_FILE, adapter_base

    if not HUB_NAME.fullmatch(options.repo_id):
        raise ConfigError(f"{options.repo_id} is no name of a model on the Hub: name it as user/name.")
    if evaluation is not None:
        with expect_readable(evaluation / RESULTS_FILE):
            others = of_other_weights(read_json(evaluation / RESULTS_FILE), run)
        if others:
            raise ConfigError(
                f"`--eval {evaluation}` is of other weights than those in {run}: evaluate these with `trl-sgpo eval "
                f"--model {run}` and another `--output_dir`."
            )
    base = adapter_base(run)
    if base is not None and Path(base).is_dir():
        print(f"The adapter is merged into {base}, which its {ADAPTER_FILE} names, and published with its weights.")
    facts = TrainingFacts.load(run)
    if options.license is not None:
        facts = replace(facts, license={"license": options.license})
    if options.dry_run is not None:
        check_directory("--dry_run", options.dry_run)
        folder = Path(options.dry_run)
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: name a new directory.")
        folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if options.no_bank else bank_of(run) as bank:
            stage(run, folder, options.repo_id, bank, facts, evaluation)
        print(f"What would be pushed to {options.repo_id} is in {folder}.")
        return 0
    repo_id = claim(options.repo_id, private=options.private or None)
    with staging(run) as folder:
        with nullcontext() if options.no_bank else bank_of(run) as bank:
            stage(run, folder, repo_id, bank, facts, evaluation, link=True)
        try:
            sha = push_folder(folder, repo_id, options.message or f"Push {run.resolve().name}", None, options.revision)
        except ModelError as error:
            raise ModelError(f"{error} {repo_id} is as it was: run the same command again.") from error
    print(f"Pushed to {repo_id} as {sha}.")
    print(f'To use exactly this: trl-sgpo solve --model {repo_id} --revision {sha} "PROBLEM"')
    return 0
