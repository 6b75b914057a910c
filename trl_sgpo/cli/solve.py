"""`trl-sgpo solve`: solves one problem, a file of them, or those entered in a terminal, with a strategy bank."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_file
from ..errors import ConfigError, DataError
from .options import check_at_least
from .solve_pipeline import open_pipeline


if TYPE_CHECKING:
    from ..inference.model import Decoding
    from ..inference.pipeline import SGPOPipeline
    from ..inference.solution import Solution
    from ..method.problem import Problem

DTYPES = ("auto", "bfloat16", "float16", "float32")
OF_STRATEGIES = ("strategy", "bank", "embedding_model", "num_retrieved", "problem_class")

CHAT_HELP = """\
Write a problem to solve it. Problems are independent: earlier ones are not remembered.
  /strategy TEXT   execute this strategy from now on; /strategy alone: the model writes it again
  /class NAME      show strategies of this class only; /class alone: of any class
  /n N             N sampled attempts, and the majority's answer
  /help            this text
  /quit            quit, as Ctrl-D does"""


def main(argv: list[str]) -> int:
    """Solves what is asked for. Returns the exit status."""
    options = read_options(argv)
    try:
        return _solve(options)
    except KeyboardInterrupt:
        if options.output is None:
            raise
        raise KeyboardInterrupt(f"Finished answers are in {options.output}: the same command goes on.") from None


# Options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo solve",
        allow_abbrev=False,
        description="Solve problems with a trained model: show it trusted strategies of its bank, let it write a "
        "strategy, then execute it, or with --plain answer at once. With PROBLEM one problem, with --input a file of "
        "them, otherwise those that you write in the terminal.",
    )
    parser.add_argument("problem", nargs="?", metavar="PROBLEM", help="what is to be solved")
    parser.add_argument(
        "--model",
        type=path_option,
        metavar="DIR_OR_ID",
        help="a run's output folder, a checkpoint, a merged or any other model's directory, or a Hub id, of which a "
        "bank that was pushed with it is pulled at the same commit; with --server, the model's name there",
    )
    parser.add_argument(
        "--run",
        type=path_option,
        metavar="DIR_OR_ID",
        help="output folder of the training, or Hub id, for its prompts and bank (that of --model)",
    )
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch on the Hub (the latest commit)")
    files = parser.add_argument_group("a file of problems")
    files.add_argument(
        "--input",
        type=path_option,
        metavar="PATH",
        help=".jsonl, .json, .parquet or .csv file with a column prompt, question or problem, or what recipes take as "
        "dataset_name, with @SPLIT at its end",
    )
    files.add_argument(
        "--prompt_template", metavar="TEXT", help="problem of several columns, like '{Body} {Question}'"
    )
    files.add_argument("--prompt_column", metavar="NAME", help="column of --input with the problem")
    files.add_argument(
        "--output",
        type=path_option,
        metavar="FILE",
        help=".jsonl file for the answers, a line for each problem; the same command resumes",
    )
    files.add_argument("--overwrite", action="store_true", help="delete --output and start again")
    bank = parser.add_argument_group("strategies")
    bank.add_argument(
        "--bank",
        type=path_option,
        metavar="DIR_OR_ID",
        help="bank, checkpoint or run to take strategies from (that of --run); with --trust_bank also an export or a "
        "model on the Hub",
    )
    bank.add_argument(
        "--trust_bank",
        action="store_true",
        help="show what the author of a --bank that does not come with the model trusted, though nothing was "
        "verified here",
    )
    bank.add_argument(
        "--embedding_model",
        type=path_option,
        metavar="DIR_OR_ID",
        help="embeds problems and strategies (that of the bank, or of an export the default, because a file of "
        "someone else does not decide what is downloaded)",
    )
    bank.add_argument("--no_bank", action="store_true", help="show no strategies of a bank")
    bank.add_argument(
        "--class", dest="problem_class", metavar="NAME", help="show strategies of this class only (any, or the "
        "problem_class in --input)",
    )  # fmt: skip
    bank.add_argument("--num_retrieved", type=int, metavar="N", help="strategies of the bank shown (as trained)")
    bank.add_argument("--strategy", metavar="TEXT", help="execute this strategy; none is retrieved")
    bank.add_argument(
        "--plain", action="store_true", help="answer the bare problem, without a strategy and a bank, at up to the "
        "length of both phases",
    )  # fmt: skip
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--n", type=int, default=1, metavar="N", help="attempts, each with its own strategy, and a vote on their "
        "answers (1)",
    )  # fmt: skip
    decoding.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the likeliest token (0, or 1 if --n is above 1)"
    )
    decoding.add_argument("--top_p", type=float, default=1.0, metavar="P", help="probability mass sampled from (1)")
    decoding.add_argument("--seed", type=int, default=42, help="of the sampling (42)")
    decoding.add_argument("--max_strategy_length", type=int, metavar="TOKENS", help="of a strategy (as trained)")
    decoding.add_argument("--max_completion_length", type=int, metavar="TOKENS", help="of an execution (as trained)")
    local = parser.add_argument_group("a model on this machine")
    local.add_argument("--batch_size", type=int, default=32, metavar="N", help="texts generated at a time (32)")
    local.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto)")
    local.add_argument("--load_in_4bit", action="store_true", help="quantize the weights, for small GPUs")
    local.add_argument("--device", help="such as cpu or cuda:1 (the accelerator, if there is one)")
    server = parser.add_argument_group("a model behind a server", "A token is read from TRL_SGPO_SERVER_TOKEN.")
    server.add_argument(
        "--server", metavar="URL", help="OpenAI-compatible server, like http://127.0.0.1:8000/v1: vLLM, llama.cpp, "
        "transformers serve",
    )  # fmt: skip
    server.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (8)")
    server.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (600)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def read_options(argv: list[str]) -> argparse.Namespace:
    """
    Reads the command line.

    Args:
        argv (`list[str]`):
            The command line.

    Raises:
        [`ConfigError`]: Options that are out of range or contradict each other.
    """
    options = _parser().parse_args(argv)
    if options.model is None and options.server is None:
        raise ConfigError("Name the model: `--model` with a run's folder, a model's directory or Hub id.")
    check_at_least(
        options, n=1, batch_size=1, concurrency=1, max_strategy_length=1, max_completion_length=1, num_retrieved=0
    )
    if options.temperature is None:
        options.temperature = 0.0 if options.n == 1 else 1.0
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError(
            f"`--temperature` must be at least 0 and `--top_p` above 0 and at most 1, got {options.temperature} and "
            f"{options.top_p}."
        )
    if options.n > 1 and options.temperature == 0:
        raise ConfigError("`--n` attempts at `--temperature 0` are all the same: leave one of them out.")
    if options.strategy is not None and not options.strategy.strip():
        raise ConfigError("`--strategy` is empty: write one, or leave it out and let the model write it.")
    strategies = [name for name in OF_STRATEGIES if vars(options)[name] is not None]
    if options.plain and strategies:
        names = ", ".join(f"`--{name.removeprefix('problem_')}`" for name in strategies)
        raise ConfigError(f"`--plain` answers without strategies, which {names} would use: leave one of them out.")
    if options.bank is not None and (options.no_bank or options.strategy is not None):
        raise ConfigError("`--bank` shows strategies; `--no_bank` and `--strategy` show none: leave one of them out.")
    if options.trust_bank and options.bank is None:
        raise ConfigError("`--trust_bank` is about a bank that does not come with the model: name it by `--bank`.")
    if (options.input is None) != (options.output is None):
        raise ConfigError("`--input` and `--output` go together: give both.")
    if options.input is None and (options.prompt_template is not None or options.prompt_column is not None):
        raise ConfigError("`--prompt_template` and `--prompt_column` are about a file: name it by `--input`.")
    if options.input is not None and (options.problem is not None or options.json):
        raise ConfigError("With `--input`, problems come from a file and JSON goes to one: leave out the rest.")
    if options.problem is not None and not options.problem.strip():
        raise ConfigError('The problem is empty: write what is to be solved, as in `trl-sgpo solve "What is 2 + 3?"`.')
    if options.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("`--load_in_4bit` needs `pip install 'trl-sgpo[quantization]'`.")
    return options


def _decoding(options: argparse.Namespace) -> "Decoding":
    from ..inference.model import Decoding

    greedy = options.temperature == 0
    return Decoding(greedy, 1.0 if greedy else options.temperature, options.top_p, options.seed)


# Commands


def _solve(options: argparse.Namespace) -> int:
    if options.input is not None:
        return _solve_file(options)
    if options.problem is None and sys.stdin.isatty():
        if options.json:
            raise ConfigError("`--json` is for one problem: give it, or leave `--json` out.")
        with open_pipeline(options) as pipeline:
            return _chat(pipeline, options)
    problem = sys.stdin.read() if options.problem is None else options.problem
    if not problem.strip():
        raise ConfigError("The problem is empty: pass it as an argument or on standard input, or use `--input`.")
    with open_pipeline(options) as pipeline:
        if options.json:
            prepared = pipeline.prepare([problem.strip()], [options.problem_class])
            (solution,) = pipeline.solve(
                prepared, options.strategy, options.n, _decoding(options), plain=options.plain
            )
            print(json.dumps(solution.to_dict(), indent=2))
        else:
            _solve_aloud(pipeline, problem.strip(), options)
    return 0


def _solve_aloud(pipeline: "SGPOPipeline", problem: str, options: argparse.Namespace) -> None:
    """Solves a problem and prints retrieved strategies and generated text as it is generated."""
    prepared = pipeline.prepare([problem], [options.problem_class], retrieve=options.strategy is None)
    if prepared[0].retrieved:
        _print_shown(prepared[0])
    watch = _printer() if options.n == 1 else None
    (solution,) = pipeline.solve(prepared, options.strategy, options.n, _decoding(options), watch, options.plain)
    if watch is None:
        if not options.plain:
            _heading("Strategy")
            _write(solution.strategy)
        _heading("Plain answer" if options.plain else "Execution")
        _write(solution.execution.strip())
    _print_answer(solution, pipeline, options.plain)


def _print_shown(problem: "Problem") -> None:
    from .text import rate

    _heading("From the bank")
    lines = [
        f"{strategy.id}  {strategy.problem_class}, {strategy.trust}, right {rate(strategy)}, similarity to the "
        f"problem {similarity:.2f}\n  {' '.join(strategy.text.split())}"
        for strategy, similarity in zip(problem.retrieved, problem.similarities, strict=True)
    ]
    _write("\n".join(lines))


def _printer() -> Callable[[str, str], None]:
    def watch(phase: str, text: str) -> None:
        if text:
            _write(text)
        else:
            _heading(phase.capitalize())

    return watch


def _print_answer(solution: "Solution", pipeline: "SGPOPipeline", plain: bool) -> None:
    attempts, settings = len(solution.attempts), pipeline.model.settings
    _heading("Answer")
    agree = f"  ({solution.votes[0][1]} of {attempts} attempts)" if attempts > 1 and solution.answer else ""
    _write(f"{solution.answer or 'none found'}{agree}\n")
    others = [(answer or "no answer", count) for answer, count in solution.votes[1 if solution.answer else 0 :]]
    if attempts > 1 and others:
        _write(f"Others: {', '.join(f'{answer} ({count})' for answer, count in others)}\n")
    if attempts > 1 and len(set(solution.attempts)) == 1:
        print(
            "All attempts are the same, so their vote says nothing. If the server does not sample, as `transformers "
            "serve` where the model's generation_config.json does not say `do_sample`, let it.",
            file=sys.stderr,
        )
    if solution.attempts[solution.chosen].flaw == "truncated":
        limit = settings.max_strategy_length
        print(f"The strategy was cut off at {limit} tokens: see `--max_strategy_length`.", file=sys.stderr)
    if solution.answer is None:
        text = "plain answer" if plain else "execution"
        limit = settings.max_plain_length if plain else settings.max_completion_length
        print(
            f'An answer is what follows ####, stands in \\boxed{{}} or follows "answer is". If the {text} was cut '
            f"off, at {limit} tokens, raise `--max_completion_length`.",
            file=sys.stderr,
        )


def _heading(text: str) -> None:
    from ..checks.console import console

    console().print(f"\n{text}", style="bold")


def _write(text: str) -> None:
    """Prints untrusted text of a model or a bank, without control characters."""
    from ..checks.terminal import printable

    print(printable(text), end="", flush=True)


# Chat


def _chat(pipeline: "SGPOPipeline", options: argparse.Namespace) -> int:
    import readline  # noqa: F401  (gives `input` a history and editing)

    print(CHAT_HELP)
    while True:
        try:
            line = input("\nproblem> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("  (/quit or Ctrl-D ends)")
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return 0
        try:
            if command.startswith("/"):
                print(_set(options, command, rest.strip()))
            elif line:
                _solve_aloud(pipeline, line, options)
        except KeyboardInterrupt:
            print("\nStopped.")
        except (ConfigError, DataError) as error:
            print(error)


def _set(options: argparse.Namespace, command: str, value: str) -> str:
    """Changes an option by a command of the chat. Returns a message with the new value."""
    if command == "/strategy":
        options.strategy = value or None
        return "This strategy is executed from now on." if value else "The model writes strategies."
    if command == "/class":
        options.problem_class = value or None
        return f"Strategies of {value or 'any class'} are shown."
    if command == "/n" and value.isdecimal() and len(value) < 5 and int(value) > 0:
        options.n = int(value)
        options.temperature = (options.temperature or 1.0) if options.n > 1 else 0.0
        return f"{options.n} sampled attempts." if options.n > 1 else "One greedy attempt."
    return CHAT_HELP


# Files


def _solve_file(options: argparse.Namespace) -> int:
    from ..evaluation.digest import depends_on, digest
    from ..evaluation.suites import load_suites, parse_suite
    from ..inference.model import TwoPhaseModel
    from ..inference.solve_file import check_output, solve_file

    output = check_output(options.output, options.input)
    check_file("--output", output)
    try:
        suite = parse_suite(f"input={options.input}")
        columns = {"prompt_template": options.prompt_template, "prompt_column": options.prompt_column}
        (loaded,) = load_suites([replace(suite, **columns)])
    except DataError as error:
        raise DataError(str(error).replace("The suite input", "`--input`")) from error
    prompts = [row["prompt"] for row in loaded.rows]
    classes = [options.problem_class or row.get("problem_class") for row in loaded.rows]
    with open_pipeline(options) as pipeline:
        model, bank = pipeline.model, pipeline.bank
        local = isinstance(model, TwoPhaseModel)
        revision = None if pipeline.pulled is None else pipeline.pulled.rpartition("@")[2]
        record = depends_on(options.model if local else None, [], bank, revision if local else None) | {
            "server": None if isinstance(model, TwoPhaseModel) else [model.base, model.name],
            "dtype": [options.dtype, options.load_in_4bit],
            "settings": asdict(model.settings),
            "strategy": options.strategy,
            "plain": options.plain,
            "class": options.problem_class,
            "decoding": [options.n, options.temperature, options.top_p, options.seed, options.batch_size],
        }
        answered, solved = solve_file(
            pipeline,
            prompts,
            classes,
            output,
            {key: digest(value)[:8] for key, value in record.items()},
            options.strategy,
            options.n,
            _decoding(options),
            options.batch_size,
            options.overwrite,
            options.plain,
        )
    print(f"{len(prompts)} problems in {output}; {answered} of {solved} solved now have an answer.")
    return 0
