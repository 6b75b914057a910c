"""`trl-sgpo eval`: accuracy and strategy transfer of a model, on suites of problems."""

import argparse
import importlib.util
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_directory
from ..checks.secrets import redacted
from ..errors import ConfigError, DataError
from ..evaluation.suites import NAMED, UNKNOWN, LoadedSuite, Suite, load_suites, parse_suite
from ..yaml_files import check_keys, read_mapping
from .options import check_at_least


if TYPE_CHECKING:
    from ..bank import StrategyBank
    from ..evaluation.tables import ResultTable
    from ..inference.model import TwoPhaseModel
    from ..inference.verifier import Verifier

DTYPES = ("auto", "bfloat16", "float16", "float32")
COLUMNS = ("prompt_column", "prompt_template", "answer_column")
TWO_PHASE = (
    "strategy_prompt",
    "execution_prompt",
    "strategy_format",
    "max_strategy_length",
    "max_completion_length",
    "num_retrieved",
    "system_prompt",
)


def main(argv: list[str]) -> int:
    """Evaluates a model, or checks a verifier. Returns the exit status, which is 1 where a check found something."""
    options = read_options(argv)
    check_directory("--output_dir", options.output_dir)
    return check(options) if options.check_verifier else evaluate(options)


# Options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo eval",
        allow_abbrev=False,
        description="Measure a model on suites of problems: accuracy, and with --transfer how well its strategies do "
        "on problems they were not written for. Finished chunks are kept in the output directory: the same command "
        "resumes.",
    )
    parser.add_argument(
        "--config", type=path_option, metavar="FILE", help="YAML file with these options; the command line wins"
    )
    parser.add_argument(
        "--model", type=path_option, metavar="DIR_OR_ID", help="directory or Hub id of a model or adapter"
    )
    parser.add_argument(
        "--suites",
        nargs="+",
        metavar="SUITE",
        help=f"{', '.join(NAMED)}, or NAME=PATH[@SPLIT] with a path as in recipes; a NAME beginning with id_, ood or "
        "harder says what the problems are, compared with those trained on",
    )
    parser.add_argument("--prompt_column", metavar="NAME", help="column with the problem, for suites given by a path")
    parser.add_argument(
        "--prompt_template",
        metavar="TEXT",
        help="text of the problem with names of columns, such as '{Body} {Question}'",
    )
    parser.add_argument("--answer_column", metavar="NAME", help="column with the answer, for suites given by a path")
    parser.add_argument(
        "--output_dir", type=path_option, default="runs/eval", metavar="DIR", help="where results go (runs/eval)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the evaluation in the output directory")
    parser.add_argument(
        "--data_dir",
        type=path_option,
        metavar="DIR",
        help="read gsm8k, gsm_plus and math500 from DIR/NAME/test.jsonl, not the Hub",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="N problems a suite, always the same ones (all)")
    parser.add_argument(
        "--form",
        choices=("two_phase", "plain"),
        default="two_phase",
        help="strategy first (two texts an attempt), and plain answers beside it; or plain answers only (one text)",
    )
    parser.add_argument(
        "--no_plain",
        action="store_true",
        help="measure no plain answers beside two_phase, which are one more text an attempt, at up to the length of "
        "the other two",
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="sampled attempts a problem, beside the greedy one (0)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampled attempts (1.0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="of sampled attempts (1.0)")
    parser.add_argument("--seed", type=int, default=42, help="seed of all random draws (42)")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="problems a chunk (32)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto)")
    parser.add_argument(
        "--verifier", default="answer_reward", help="reward function, by name or dotted path (answer_reward)"
    )
    parser.add_argument(
        "--bank",
        type=path_option,
        metavar="DIR",
        help="bank whose trusted strategies are shown; auto: the one beside the model. Own strategies without it are "
        "measured too: two more texts an attempt",
    )
    parser.add_argument(
        "--embedding_model", type=path_option, metavar="MODEL", help="of the bank (the one that it was made with)"
    )
    transfer = parser.add_argument_group("transfer")
    transfer.add_argument(
        "--transfer", nargs="*", metavar="NAME", help="measure strategy transfer on these suites (all suites)"
    )
    transfer.add_argument("--transfer_classes", type=int, default=8, metavar="N", help="largest classes measured (8)")
    transfer.add_argument(
        "--transfer_problems", type=int, default=16, metavar="N", help="problems a class, written on and unseen (16)"
    )
    transfer.add_argument("--transfers", type=int, default=2, metavar="N", help="strategies tried on a problem (2)")
    transfer.add_argument("--pairs_per_cell", type=int, default=8, metavar="N", help="of the transfer matrix (8)")
    phases = parser.add_argument_group("the two phases", "Defaults are read from the model's sgpo.json.")
    phases.add_argument("--system_prompt", metavar="TEXT", help="system message put before prompts that have none")
    phases.add_argument("--strategy_prompt", metavar="TEXT", help="request for a strategy, with {problem}")
    phases.add_argument("--execution_prompt", metavar="TEXT", help="request to execute it")
    phases.add_argument("--strategy_format", choices=("text", "steps"))
    phases.add_argument("--max_strategy_length", type=int, metavar="TOKENS")
    phases.add_argument("--max_completion_length", type=int, metavar="TOKENS")
    phases.add_argument("--num_retrieved", type=int, metavar="N", help="strategies of the bank shown with a problem")
    parser.add_argument("--no_plots", action="store_true", help="draw no pictures")
    parser.add_argument(
        "--check_verifier",
        action="store_true",
        help="evaluate no model: count which right and wrong solutions the verifier accepts; exit status 1 if it "
        "accepts less than 99%% of right or more than 1%% of wrong ones",
    )
    return parser


def read_options(argv: list[str]) -> argparse.Namespace:
    """
    Reads the command line and its `--config` file. The command line overrides the file.

    Args:
        argv (`list[str]`):
            The command line.

    Raises:
        [`ConfigError`]: A file that cannot be read, an unknown key or an invalid value.
    """
    parser = _parser()
    path = parser.parse_known_args(argv)[0].config
    options = parser.parse_args([*_from_file(path, parser), *argv] if path else argv)
    if not options.suites:
        raise ConfigError(
            f"Name the problems to evaluate on: `--suites` with {', '.join(NAMED)} or NAME=PATH[@SPLIT]."
        )
    if options.model is None and not options.check_verifier:
        raise ConfigError("Name the model to evaluate: `--model` with a directory or Hub id.")
    check_at_least(
        options,
        samples=0,
        batch_size=1,
        transfer_classes=1,
        transfer_problems=1,
        transfers=1,
        pairs_per_cell=1,
        limit=1,
        max_strategy_length=1,
        max_completion_length=1,
        num_retrieved=0,
    )
    if options.temperature <= 0 or not 0 < options.top_p <= 1:
        raise ConfigError(
            f"`--temperature` must be above 0 and `--top_p` above 0 and at most 1, got {options.temperature} and "
            f"{options.top_p}."
        )
    if options.bank is not None and options.form == "plain" and options.transfer is None:
        raise ConfigError("Plain answers see no strategies: leave out `--bank`, or use `--form two_phase`.")
    if options.no_plain and options.form == "plain":
        raise ConfigError("`--form plain` measures plain answers only: leave out `--no_plain`, or `--form`.")
    return options


def _from_file(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML file's options as a command line."""
    content = read_mapping(path)
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    check_keys(content, known, path)
    arguments = []
    for key, value in content.items():
        if value is True:
            arguments.append(f"--{key}")
        elif isinstance(value, list):
            arguments += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        elif value is not None and value is not False:
            arguments.append(f"--{key}={value}")
    return arguments


def _load_verifier(name: str, loaded: list[LoadedSuite]) -> "Verifier":
    from ..data.loading import load_rewards
    from ..data.tasks import answer_reward
    from ..recipe import SGPOScriptArguments

    verifier = load_rewards(SGPOScriptArguments(reward_funcs=[name]))[0]
    for each in loaded:
        if verifier is answer_reward and all(row.get("solution") is None for row in each.rows):
            raise DataError(
                f"The suite {each.suite.name} has no solutions: add a column `solution` or `answer`, name its "
                "`answer_column`, or a `--verifier` that needs none."
            )
    return verifier


def _suites(options: argparse.Namespace) -> list[Suite]:
    """The suites. The columns named by options are those of suites that are given by a path and name none."""
    given = {key: vars(options)[key] for key in COLUMNS if vars(options)[key] is not None}
    suites = [parse_suite(text) for text in options.suites]
    own = [suite in NAMED.values() or any(vars(suite)[key] is not None for key in COLUMNS) for suite in suites]
    return [suite if has_own else replace(suite, **given) for suite, has_own in zip(suites, own, strict=True)]


# Commands


def check(options: argparse.Namespace) -> int:
    """`trl-sgpo eval --check_verifier`"""
    from ..evaluation.verifier_check import check_verifier
    from ..files import write_file

    loaded = load_suites(_suites(options), options.data_dir, options.limit)
    verifier = _load_verifier(options.verifier, loaded)
    path = Path(options.output_dir) / "verifier_check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {each.suite.name: check_verifier(each.rows, verifier, seed=options.seed) for each in loaded}
    for name, result in found.items():
        print(
            f"{name}: {options.verifier} accepts {result.gold_accepted} of {result.gold} worked solutions and "
            f"{result.wrong_accepted} of {result.wrong} solutions of other problems"
        )
    write_file(path, json.dumps({name: result.to_dict() for name, result in found.items()}, indent=2) + "\n")
    print(f"Written to {path}")
    return int(any(not result.sound for result in found.values()))


def evaluate(options: argparse.Namespace) -> int:
    """`trl-sgpo eval`"""
    suites = _suites(options)
    names = [suite.name for suite in suites]
    measured = None if options.transfer is None else options.transfer or names
    for name in measured or []:
        if name not in names:
            raise ConfigError(f"`--transfer {name}` names none of the suites {', '.join(names)}.")
    if not options.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("Pictures need `pip install 'trl-sgpo[plots]'`: install it, or pass `--no_plots`.")

    from ..evaluation.chunks import ChunkLog
    from ..evaluation.digest import depends_on, digest
    from ..evaluation.hub_results import write_hub_results
    from ..evaluation.runner import (
        Protocol,
        evaluate_suite,
        evaluate_ways,
        suite_texts,
        summarise_kinds,
        ways_texts,
    )
    from ..evaluation.tables import judged, tables, write_results
    from ..evaluation.transfer_plan import plan_transfer
    from ..evaluation.transfer_score import measure_plan
    from ..method.context_length import EXECUTION, STRATEGY
    from ..method.conversation import check_system_role

    loaded = load_suites(suites, options.data_dir, options.limit)
    verifier = _load_verifier(options.verifier, loaded)
    protocol = Protocol(
        options.form, options.samples, options.temperature, options.top_p, options.seed, options.batch_size
    )
    plans = {
        each.suite.name: plan_transfer(
            each.rows,
            each.suite.class_column,
            options.transfer_problems,
            options.transfers,
            options.seed,
            options.transfer_classes,
            options.pairs_per_cell,
            bank=options.bank is not None,
        )
        for each in loaded
        if each.suite.name in (measured or [])
    }
    model = _load_model(options)
    loaded = [each.with_system_prompt(model.settings.system_prompt) for each in loaded]
    for each in loaded if not model.settings.plain_text else ():
        check_system_role(model.tokenizer, each.rows[0]["prompt"], model.settings.chat_template_kwargs)
    shown_strategies = 0 if options.bank is None else model.settings.num_retrieved
    phases = [STRATEGY, EXECUTION] if options.form == "two_phase" or plans else [EXECUTION]
    model.check_room([row["prompt"] for each in loaded for row in each.rows], shown_strategies, phases)
    output = Path(options.output_dir)
    with ExitStack() as stack:
        bank = _open_bank(options, stack)
        settings: dict[str, Any] = redacted(
            {
                "model": options.model,
                "two_phase": asdict(model.settings),
                "dtype": options.dtype,
                "suites": {each.suite.name: asdict(each.suite) | {"rows": digest(each.rows)} for each in loaded},
                "protocol": asdict(protocol),
                "verifier": options.verifier,
                **depends_on(options.model, [verifier], bank),
                "transfer": {name: digest(asdict(plan)) for name, plan in plans.items()},
            }
        )
        guided, plain = options.form == "two_phase", not options.no_plain
        shown = bank if guided else None
        texts = sum(plan.texts for plan in plans.values())
        for each in loaded:
            size = len(each.rows)
            texts += ways_texts(size, protocol, shown is not None, plain) if guided else suite_texts(size, protocol)
        log = stack.enter_context(ChunkLog(output, settings, texts, options.overwrite))
        results: dict[str, Any] = {"settings": settings, "suites": {}, "transfer": {}}
        for each in loaded:
            name = each.suite.name
            results["suites"][name] = (
                evaluate_ways(model, each, verifier, protocol, shown, log.run, plain)
                if guided
                else evaluate_suite(model, each, verifier, protocol, run=log.run)
            )
            if name in plans:
                report = measure_plan(
                    model,
                    each.rows,
                    each.suite.class_column,
                    plans[name],
                    verifier,
                    options.seed,
                    bank=bank,
                    run=log.run,
                    chunk_size=options.batch_size,
                    name=name,
                )
                results["transfer"][name] = report.to_dict()
    results["kinds"] = summarise_kinds(results["suites"])
    setup = f"{'strategy, then execution' if guided else 'plain answer'}, greedy, zero-shot"
    setup += ", with a strategy bank" if shown is not None else ""
    written = write_results(output, results, not options.no_plots)
    written += write_hub_results(output, Path(options.model).name, suites, results["suites"], setup)
    _print_tables(tables(results))
    for each in loaded:
        measured_problems = judged(results["suites"][each.suite.name])
        if each.suite.hub_id is not None and measured_problems < each.available:
            print(f"{each.suite.name}: no file for the Hub, {measured_problems} of {each.available} problems measured")
    unknown = [suite.name for suite in suites if suite.kind == UNKNOWN]
    if unknown:
        print(
            f"The kind of {', '.join(unknown)} is unknown: begin a suite's name with id_, ood or harder, or set its "
            "`kind`, to say how its problems compare with those trained on."
        )
    print("Written:", *written, sep="\n  ")
    return 0


def _load_model(options: argparse.Namespace) -> "TwoPhaseModel":
    from ..compare.lab.model import fetch_model
    from ..inference.model import TwoPhaseModel
    from ..inference.settings import TwoPhaseSettings

    given = {key: vars(options)[key] for key in TWO_PHASE if vars(options)[key] is not None}
    if "strategy_format" in given:
        given.setdefault("strategy_prompt", "")  # the default one of the format
    settings = replace(TwoPhaseSettings.load(fetch_model(options.model)), **given)
    return TwoPhaseModel.from_pretrained(options.model, settings, options.batch_size, dtype=options.dtype)


def _open_bank(options: argparse.Namespace, stack: ExitStack) -> "StrategyBank | None":
    from ..bank.files import BANK_DIRECTORY
    from ..bank.snapshot import embed_with, open_read_only

    beside = Path(options.model) / BANK_DIRECTORY
    if options.bank is None:
        if beside.is_dir():
            print(f"{beside} is not used: pass `--bank auto` to show its strategies.")
        return None
    bank = stack.enter_context(open_read_only(str(beside.parent) if options.bank == "auto" else options.bank))
    embed_with(bank, options.embedding_model)
    return bank


def _print_tables(tables: "list[ResultTable]") -> None:
    from .text import print_table

    for each in tables:
        print_table(each.columns, each.rows, each.title)
