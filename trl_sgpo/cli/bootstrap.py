"""`trl-sgpo bootstrap`: strategies and two-phase traces without human labels, for a warm start and for a bank."""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bank.files import BANK_DIRECTORY
from ..checks.arguments import Parser, path_option
from ..checks.paths import check_directory
from ..errors import ConfigError, DataError


if TYPE_CHECKING:
    from ..data.acceptance import Summary, Tried
    from ..data.bootstrap import Block, Plan, Row, Writer
    from ..method.prompts import Prompt
    from ..recipe import Recipe

SOURCES = ("model", "teacher", "server", "worked")
WRITERS = ("rule", "model", "teacher", "server")
RECORD, TRACES, LOCK = "bootstrap.jsonl", "traces.jsonl", "bootstrap.lock"


def main(argv: list[str]) -> int:
    """Makes traces and candidate strategies from the recipe's training problems."""
    options, overrides = _parser().parse_known_args(argv)
    _check(options)
    check_directory("--output_dir", options.output_dir)

    from filelock import FileLock, Timeout

    from ..checks.setup import path_problems
    from ..recipe import read_recipe

    recipe = read_recipe(["--config", options.config, *overrides], "trl-sgpo bootstrap", path_problems)
    output_dir = Path(options.output_dir)
    if options.bank is None and output_dir.resolve() == Path(str(recipe.training.output_dir)).resolve():
        raise ConfigError(
            f"{output_dir} is where the recipe trains, which empties {output_dir / BANK_DIRECTORY}: name another "
            "`--output_dir`."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output_dir / LOCK, timeout=0):
            bootstrap(recipe, options, output_dir)
    except Timeout:
        raise ConfigError(f"Another bootstrap writes to {output_dir}: wait, or name another `--output_dir`.") from None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo bootstrap",
        description="Write strategies and two-phase traces for the training problems of a recipe, without human "
        "labels. A strategy is kept if it is well formed, gives no answer away, copies no number of its problem, and "
        "lifts: on other problems of its class, executions of it are right more often than answers without a "
        "strategy. What is kept becomes traces to warm-start on and candidates in a strategy bank.",
        epilog="Any key of the recipe can be overridden, such as --temperature 0.8 or --max_strategy_length 64. Each "
        f"finished block of problems is on record in OUTPUT_DIR/{RECORD}: run the same command again to continue. "
        f"Then: trl-sgpo warmstart --config RECIPE --traces OUTPUT_DIR/{TRACES}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=path_option, required=True, metavar="RECIPE", help="names problems, verifier, model, prompts"
    )
    parser.add_argument(
        "--output_dir", type=path_option, required=True, help=f"for {RECORD}, {TRACES} and {BANK_DIRECTORY}/"
    )
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="model",
        help="what writes and executes: the recipe's model, a stronger local one, a server; or worked solutions in "
        "the data, which are the executions and need no lift (model)",
    )
    parser.add_argument("--teacher", type=path_option, metavar="NAME", help="directory or Hub id of a stronger model")
    parser.add_argument("--server", metavar="URL", help="OpenAI-compatible server, like http://127.0.0.1:8000/v1")
    parser.add_argument("--server_model", metavar="NAME", help="the model's name on that server")
    parser.add_argument(
        "--writer",
        choices=WRITERS,
        help="with --source worked, what writes a solution's strategy: a rule for calculator annotations and "
        "covered reasoning-gym families, or a model that is shown the solution (rule)",
    )
    parser.add_argument("--num_strategies", type=_positive, default=4, metavar="N", help="for each problem (4)")
    parser.add_argument(
        "--block_size",
        type=_positive,
        default=4,
        metavar="K",
        help="problems that execute each other's strategies (4)",
    )
    parser.add_argument(
        "--num_answers", type=_positive, default=4, metavar="N", help="without strategy, for each problem (4)"
    )
    parser.add_argument("--answer_prompt", metavar="TEXT", help="added to a problem to be answered without strategy")
    parser.add_argument("--min_lift", type=float, default=0.1, help="smallest lift that is not kept (0.1)")
    parser.add_argument("--max_problems", type=_positive, metavar="N", help="stop after about N problems (all)")
    parser.add_argument("--batch_size", type=_positive, default=32, help="texts generated at a time (32)")
    parser.add_argument("--concurrency", type=_positive, default=8, help="requests to the server at a time (8)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="time limit of a request to the server in seconds (600)"
    )
    parser.add_argument(
        "--bank",
        type=path_option,
        metavar="DIR",
        help=f"bank to add the strategies to, as candidates (OUTPUT_DIR/{BANK_DIRECTORY})",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _check(options: argparse.Namespace) -> None:
    if options.writer is not None and options.source != "worked":
        raise ConfigError("`--writer` is for `--source worked`: leave it out.")
    options.by = (options.writer or "rule") if options.source == "worked" else options.source
    if (options.by == "teacher") != (options.teacher is not None):
        raise ConfigError("`--source teacher` (or `--writer teacher`) and `--teacher NAME` go together: give both.")
    if (options.by == "server") != (options.server is not None and options.server_model is not None):
        raise ConfigError(
            "`--source server` (or `--writer server`), `--server URL` and `--server_model NAME` go together: give all."
        )
    if options.source != "worked" and options.block_size < 2:
        raise ConfigError("`--block_size 1` leaves no siblings to measure a lift on: set it to 2 or more.")


def bootstrap(recipe: "Recipe", options: argparse.Namespace, output_dir: Path) -> None:
    """
    Runs the unfinished blocks and writes traces and bank.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe.
        options (`argparse.Namespace`):
            The command's own options.
        output_dir (`Path`):
            Where the record and the traces go.

    Raises:
        [`DataError`]: The problems cannot be verified, or have no usable worked solutions.
    """
    from ..bank.strategy import problem_id
    from ..data.acceptance import kept, summarize, to_traces
    from ..data.bootstrap import ANSWER_PROMPT, Plan, run_blocks, worked_prompts
    from ..data.loading import load_data, load_rewards
    from ..data.trace_files import write_traces
    from ..evaluation.digest import digest
    from ..inference.model import Decoding
    from ..inference.settings import TwoPhaseSettings

    training = recipe.training
    verifier = load_rewards(recipe.script)[0]
    if isinstance(verifier, str):
        raise ConfigError("A reward model does not verify answers: put a reward function first in `reward_funcs`.")
    dataset = load_data(recipe)[recipe.script.dataset_train_split]
    worked = options.source == "worked"
    classes, blocks = _blocks(dataset, recipe, options)
    rows = list(dataset)
    settings = TwoPhaseSettings.from_config(training)
    plan = Plan(
        Decoding(greedy=False, temperature=training.temperature, top_p=training.top_p, seed=training.seed),
        options.num_strategies,
        options.num_answers,
        options.answer_prompt or ANSWER_PROMPT,
    )
    name = {"teacher": options.teacher, "server": options.server_model, "rule": "rule"}.get(
        options.by, recipe.model.model_name_or_path
    )
    ids = [problem_id(row["prompt"]) for row in rows]
    data = [[key, row.get("solution"), row.get("worked_solution")] for key, row in zip(ids, rows, strict=True)]
    made_with = {
        "source": options.source,
        "writer": options.by,
        "model": name,
        **asdict(settings),
        "num_strategies": plan.num_strategies,
        "num_answers": plan.num_answers,
        "answer_prompt": plan.answer_prompt,
        **asdict(plan.decoding),
        "block_size": options.block_size,
        "verifier": f"{verifier.__module__}.{verifier.__qualname__}",
        "problems": digest([data, classes])[:16],
        **_of_writer(recipe, options, verifier),
    }

    _check_embedder(recipe, options, output_dir)
    chosen = [rows[index] for block in blocks for index in block]
    room = [prompt for prompt, _ in worked_prompts(chosen).values()] if worked else [row["prompt"] for row in chosen]
    do = _doing(recipe, options, settings, plan, rows, classes, verifier, room)
    done = run_blocks(output_dir / RECORD, made_with, blocks, ids, do)
    tried = [one for block in done for one in block.tried]
    if worked and not tried:
        raise DataError(
            "No problem has a worked solution that can be used: take data with `worked_solution`s (as GSM8K, MATH), "
            "`--writer model` where they have no calculator annotations, or another `--source`."
        )
    min_lift = None if worked else options.min_lift
    good = kept(tried, min_lift)
    prompts = {key: row["prompt"] for key, row in zip(ids, rows, strict=True)}
    answers = {key: row.get("solution") for key, row in zip(ids, rows, strict=True)}
    traces = to_traces(good, prompts, answers)
    write_traces(traces, output_dir / TRACES)
    added = _put_into_bank(good, recipe, options, output_dir, name)
    problems = {key for block in done for key in block.problems}
    summary = summarize(tried, len(problems), sum(block.tokens for block in done), min_lift)
    _print(summary, len(traces), added, options, output_dir)


def _of_writer(recipe: "Recipe", options: argparse.Namespace, verifier: Any) -> dict[str, Any]:
    """Digests of the model that writes, if it is on this machine, of how it is loaded, and of the verifier."""
    from trl import get_quantization_config

    from ..compare.lab.model import prepare_model
    from ..evaluation.digest import depends_on, digest
    from ..recipe import model_init_kwargs

    if options.by not in ("model", "teacher"):
        return depends_on(None, [verifier])
    name = options.teacher or recipe.model.model_name_or_path
    prepare_model(name)
    revision = None if options.teacher else recipe.model.model_revision
    loading = [model_init_kwargs(recipe), get_quantization_config(recipe.model)]
    return depends_on(name, [verifier], revision=revision) | {"loading": digest(loading)[:16]}


def _blocks(dataset: Any, recipe: "Recipe", options: argparse.Namespace) -> tuple[list[str], list[list[int]]]:
    """The class of each problem, and the blocks."""
    from ..bank.embedding import load_embedder
    from ..data.bootstrap import cut_blocks
    from ..data.classes import block_classes

    training = recipe.training

    def embed(texts: list[str]) -> Any:
        return load_embedder(training.embedding_model)(texts)

    size = 1 if options.source == "worked" else options.block_size
    try:
        classes = block_classes(dataset, training, size, embed)
    except DataError as error:
        raise DataError(str(error).replace("--transfer_block_size", "--block_size")) from error
    answers = [str(answer) for answer in dataset["solution"]] if "solution" in dataset.column_names else None
    blocks = cut_blocks(classes, answers, size, training.seed)
    if options.source == "worked":  # worked solutions need no siblings: a block is the unit that is recorded
        order = [index for block in blocks for index in block]
        blocks = [order[start : start + options.block_size] for start in range(0, len(order), options.block_size)]
    if options.max_problems is not None:
        blocks = blocks[: max(options.max_problems // options.block_size, 1)]
    return classes, blocks


def _doing(
    recipe: "Recipe",
    options: argparse.Namespace,
    settings: Any,
    plan: "Plan",
    rows: list["Row"],
    classes: list[str],
    verifier: Callable[..., list[float | None]],
    prompts: list["Prompt"],
) -> Callable[[list[int], int], "Block"]:
    """The function that runs a block. The model is loaded, and checked for the prompts, by the first that needs it."""
    from functools import cache

    from ..compare.lab.model import fetch_model
    from ..data.bootstrap import Block, by_rule, by_writer, try_block, work_block
    from ..inference.model import TwoPhaseModel
    from ..method.context_length import EXECUTION, STRATEGY

    @cache
    def writer() -> "Writer":
        model = _load_writer(recipe, options, settings)
        if isinstance(model, TwoPhaseModel):
            model.check_room(prompts, phases=[STRATEGY] if options.source == "worked" else [STRATEGY, EXECUTION])
        return model

    @cache
    def tokenizer() -> Any:
        from ..inference.pretrained import load_tokenizer

        return load_tokenizer(fetch_model(recipe.model.model_name_or_path))

    def fits(strategy: str, execution: str) -> bool:
        lengths = [len(ids) for ids in tokenizer()([strategy, execution], add_special_tokens=False)["input_ids"]]
        return lengths[0] < settings.max_strategy_length and lengths[1] < settings.max_completion_length

    def write(chosen: list["Row"], named: list[str], number: int) -> Any:
        decoding = plan.decoding_of(number)
        if options.by == "rule":
            return by_rule(chosen, named, plan.num_strategies, decoding.seed)
        return by_writer(writer(), chosen, named, replace(plan, decoding=decoding))

    def do(indices: list[int], number: int) -> Block:
        chosen, named = [rows[index] for index in indices], [classes[index] for index in indices]
        if options.source != "worked":
            return try_block(writer(), chosen, named, verifier, replace(plan, decoding=plan.decoding_of(number)))
        before = 0 if options.by == "rule" else writer().generated_tokens
        block = work_block(write, chosen, named, verifier, fits, number)
        return replace(block, tokens=0 if options.by == "rule" else writer().generated_tokens - before)

    return do


def _load_writer(recipe: "Recipe", options: argparse.Namespace, settings: Any) -> "Writer":
    from trl import get_quantization_config

    from ..compare.lab.model import prepare_model
    from ..inference.model import TwoPhaseModel
    from ..inference.server import TOKEN_VARIABLE, ServerModel, encoder_of
    from ..recipe import model_init_kwargs

    if options.by == "server":
        model = ServerModel(
            options.server,
            options.server_model,
            settings,
            token=os.environ.get(TOKEN_VARIABLE),
            concurrency=options.concurrency,
            timeout=options.timeout,
        )
        model.encoder = encoder_of(options.server_model, named_by_user=True)
        return model
    kwargs = {key: value for key, value in model_init_kwargs(recipe).items() if value is not None}
    if (quantization := get_quantization_config(recipe.model)) is not None:
        kwargs["quantization_config"] = quantization
    if options.by == "teacher":
        kwargs.pop("revision", None)  # the revision is that of the recipe's model
    name = options.teacher or recipe.model.model_name_or_path
    prepare_model(name)
    return TwoPhaseModel.from_pretrained(
        name,
        settings,
        options.batch_size,
        "cpu" if recipe.training.use_cpu else None,
        **kwargs,
    )


def _open_bank(recipe: "Recipe", options: argparse.Namespace, output_dir: Path) -> Any:
    from ..bank import StrategyBank

    training = recipe.training
    return StrategyBank(
        options.bank or output_dir / BANK_DIRECTORY,
        training.embedding_model,
        capacity_per_class=training.bank_capacity,
    )


def _check_embedder(recipe: "Recipe", options: argparse.Namespace, output_dir: Path) -> None:
    """Opens the bank and embeds a text, so that errors are raised before hours of generation."""
    with _open_bank(recipe, options, output_dir) as bank:
        bank.embed(["What is asked?"])


def _put_into_bank(
    good: list["Tried"], recipe: "Recipe", options: argparse.Namespace, output_dir: Path, name: str
) -> int:
    """Adds strategies as candidates. Strategies that the bank has retired are not added again."""
    from ..bank import Strategy

    strategies = [
        Strategy(
            one.strategy,
            one.problem_class,
            one.sources,
            model="" if name == "rule" else str(name)[:200],
            run=output_dir.name[:200],
            origin=f"bootstrap:{options.source}",
        )
        for one in good
    ]
    with _open_bank(recipe, options, output_dir) as bank:
        known = {strategy.id for strategy in bank.retired()}
        return len(bank.add(strategy for strategy in strategies if strategy.id not in known))


def _print(summary: "Summary", traces: int, added: int, options: argparse.Namespace, output_dir: Path) -> None:
    from rich.table import Table

    from ..checks.console import console

    terminal = console()
    table = Table(title=f"Bootstrap, {options.source}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("problems", f"{summary.problems:,}")
    table.add_row("strategies written", f"{summary.written:,}, {summary.texts:,} distinct")
    for reason, count in summary.rejected.items():
        table.add_row(f"  rejected: {reason}", f"{count:,}")
    table.add_row("kept", f"{summary.kept:,}, {summary.distinct:,} distinct")
    table.add_row("mean lift of these", _figure(summary.mean_lift, "+.2f"))
    table.add_row("outcome without strategy", _figure(summary.baseline, ".2f"))
    table.add_row("new candidates in the bank", f"{added:,}")
    table.add_row("traces", f"{traces:,}")
    table.add_row("tokens generated", f"{summary.tokens:,}")
    terminal.print(table)
    if traces == 0:
        terminal.print("No strategy was kept: lower --min_lift, or use a stronger --teacher or --server.")
        return
    bank = options.bank or output_dir / BANK_DIRECTORY
    terminal.print(
        f"Next:\n  warm start  trl-sgpo warmstart --config {options.config} --traces {output_dir / TRACES}\n"
        f"  use bank    trl-sgpo train --config {options.config} --bank_path {bank}",
        highlight=False,
        soft_wrap=True,
    )


def _figure(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)
