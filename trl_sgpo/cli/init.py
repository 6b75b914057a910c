"""`trl-sgpo init`: writes a recipe, and a reward function, for a model, data and GPU."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..checks.arguments import Parser, path_option
from ..checks.paths import FILE_ENDINGS, check_directory, check_file, problem_file
from ..data.columns import Columns
from ..errors import ConfigError, DataError, ModelError, SGPOError
from ..files import write_file
from .init_problems import choose_columns, has_answers
from .init_recipe import ANSWERS, BLOCK_SIZE, MIN_TO_REPORT, NO_ANSWERS, SIZES, recipe_text, sections
from .trial import try_recipe


if TYPE_CHECKING:
    from ..data.rows import Rows

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"

_T = TypeVar("_T")


def main(argv: list[str]) -> int:
    """Asks for missing options and writes the files, or tries a recipe that is there."""
    options = _parser().parse_args(argv)
    if isinstance(options.trial, str):
        if len(argv) > 1 + (options.trial in argv):
            raise ConfigError(f"`--try {options.trial}` tries a recipe as it is: leave the other options out.")
        try_recipe(options.trial)
        return 0
    recipe = Path(options.output)
    rewards = None if options.reward_file is None else Path(options.reward_file)
    output_dir = f"runs/{recipe.stem}" if options.output_dir is None else options.output_dir
    given = Columns(options.prompt_column, options.prompt_template, options.answer_column)
    try:
        _check_paths(recipe, rewards, options.overwrite)
        check_directory("--output_dir", output_dir)
        if options.vram is not None:
            _check_vram(options.vram)  # before data are loaded
        model = _get(options.model, "--model", "Model, a Hub id or directory", DEFAULT_MODEL, _check_model)
        data, rows = _get(
            options.data,
            "--data",
            "Problems, a file, Hub id or reasoning-gym family like lcm+gcd",
            None,
            lambda text: _load(text, options.data_config),
        )
        columns, problems = choose_columns(rows, given, data, _ask if _asking() else None, rewards is None)
        memory = _memory()
        vram = _get(
            options.vram, "--vram", "Memory of the GPU in GB, 0 for none", f"{memory:g}", _check_vram, always=memory
        )
        solutions = has_answers(problems)
        if rewards is None and not solutions:
            rewards = _get(None, "--reward_file", _NO_SOLUTIONS, "my_rewards.py", _reward_path)
        elif rewards is None and _asking() and _agrees("A reward function in a file of your own?"):
            rewards = _get(None, "--reward_file", "Its file", "my_rewards.py", _reward_path)
        _check_paths(recipe, rewards, options.overwrite)
    except EOFError:
        raise ConfigError("Stopped: nothing is written.") from None
    written = sections(model, data, options.data_config, columns, problems, vram, rewards, output_dir)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_file(recipe, recipe_text(written, recipe, vram))
    print(f"Recipe: {recipe}")
    if rewards is not None:
        rewards.parent.mkdir(parents=True, exist_ok=True)
        write_file(rewards, ANSWERS if solutions else NO_ANSWERS)
        print(f"Reward function: {rewards}, imported from the directory that you train in")
    if any(section.get("report_problems") == 0 for section in written.values()):
        print(
            f"With fewer than {MIN_TO_REPORT} problems none is kept apart: the report will not say whether it learnt."
        )
    if options.trial or (_asking() and _agrees("Try 16 rollouts with it now?")):
        try_recipe(str(recipe))
    print(
        f"\nNext:\n  try 16 rollouts   trl-sgpo init --try {recipe}\n"
        "     If few answers are right, the model needs a warm start first: docs/bootstrap.md.\n"
        f"  train             trl-sgpo train --config {recipe}\n"
        f"  what it learnt    trl-sgpo report {output_dir}\n"
        f"  its strategies    trl-sgpo bank list {output_dir}\n"
        f"  solve a problem   trl-sgpo solve --model {output_dir}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo init",
        allow_abbrev=False,
        description="Write a recipe for a model, problems and a GPU. Missing options are asked for in a terminal.",
    )
    parser.add_argument(
        "--model", type=path_option, metavar="DIR_OR_ID", help="directory or Hub id of the model to train"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help=f"problems: a {', '.join(FILE_ENDINGS)} file, a Hub id, or reasoning-gym families, as lcm+gcd",
    )
    parser.add_argument(
        "--data_config", metavar="NAME", help="configuration of a Hub dataset, as main of openai/gsm8k"
    )
    parser.add_argument(
        "--prompt_template",
        metavar="TEXT",
        help="text of the problem with columns in braces, like '{Body} {Question}'",
    )
    parser.add_argument(
        "--prompt_column", metavar="NAME", help="column with the problem (prompt, question or problem)"
    )
    parser.add_argument("--answer_column", metavar="NAME", help="column with the answer (answer, else solution)")
    parser.add_argument("--vram", metavar="GB", help="memory of the GPU, 0 to train without (that of this machine's)")
    parser.add_argument(
        "--output", type=path_option, default="recipe.yaml", metavar="FILE", help="the recipe (recipe.yaml)"
    )
    parser.add_argument(
        "--reward_file",
        type=path_option,
        metavar="FILE",
        help="write a reward function to change, as my_rewards.py, and train with it",
    )
    parser.add_argument(
        "--output_dir", type=path_option, metavar="DIR", help="of the training (runs/ and the recipe's name)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--try",
        type=path_option,
        dest="trial",
        nargs="?",
        const=True,
        metavar="RECIPE",
        help="make 16 rollouts with the recipe that is written, or with RECIPE, and say what to change first",
    )
    return parser


# Asking and checking


_NO_SOLUTIONS = (
    "The problems have no answers: name their column by `--answer_column`, or write a reward function. Its file"
)


def _asking() -> bool:
    return sys.stdin.isatty()


def _agrees(question: str) -> bool:
    return _answer(f"{question} [y/N] ").casefold() in ("y", "yes")


def _answer(question: str) -> str:
    print(question, end="", flush=True)  # `input` would write it past the escaping of names
    return input().strip()


def _get(
    given: str | None,
    option: str,
    question: str,
    default: str | None,
    check: Callable[[str], _T],
    always: float | None = None,
) -> _T:
    """The given option, or the answer to the question, once it passes the check."""
    if given is not None:
        return check(given)
    if not _asking():
        if always is not None:
            return check(str(always))
        raise ConfigError(f"{question}: name it by `{option}`, or start in a terminal to be asked.")
    return _ask(question, default, check)


def _ask(question: str, default: str | None, check: Callable[[str], _T]) -> _T:
    """Asks until the answer passes the check."""
    while True:
        answer = _answer(f"{question}{f' [{default}]' if default else ''}: ") or default
        try:
            if answer:
                return check(answer)
        except SGPOError as error:
            print(error)


def _check_paths(recipe: Path, rewards: Path | None, overwrite: bool) -> None:
    if recipe.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`--output {recipe}` is a YAML file: give it the ending .yaml.")
    if rewards is not None:
        _reward_path(str(rewards))
    check_file("--output", recipe)
    for path in (recipe, rewards):
        if path is not None and path.exists() and not overwrite:
            raise ConfigError(f"{path} exists: choose another name, or replace it with `--overwrite`.")


def _reward_path(text: str) -> Path:
    path = Path(text)
    names = path.with_suffix("").parts
    if path.suffix != ".py" or path.is_absolute() or not all(name.isidentifier() for name in names):
        raise ConfigError(
            f"`--reward_file {text}` is imported: give it a name like my_rewards.py, below this directory."
        )
    spec = importlib.util.find_spec(names[0])
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != path.resolve():
        raise ConfigError(f"`--reward_file {text}` would hide the installed module {names[0]}: choose another name.")
    return path


def _check_model(name: str) -> str:
    from ..compare.lab.model import fetch_model

    found = Path(fetch_model(name))
    if found.is_dir() and not any((found / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(f"`--model` is {name}, and {name} has no config.json: name the directory of a model.")
    return name


def _check_vram(text: str) -> float:
    try:
        vram = float(text.casefold().removesuffix("gb"))
    except ValueError:
        vram = -1.0
    if not 0 <= vram < 10_000:
        raise ConfigError(f"`--vram {text}` is no memory of a GPU: give it in GB, like 16, or 0 to train without one.")
    if 0 < vram < SIZES[1].vram:
        raise ConfigError(
            f"{vram:g} GB are too little to train on: give at least {SIZES[1].vram:g}, or 0 for the CPU."
        )
    return vram


def _memory() -> float:
    """Memory of the first GPU in GB, 0 without one."""
    import torch

    return round(torch.cuda.get_device_properties(0).total_memory / 2**30) if torch.cuda.is_available() else 0.0


def _load(text: str, config: str | None) -> tuple[str, "Rows"]:
    """The problems' path in recipes, and their rows."""
    from ..data.sources import load_rows

    path = text
    if not text.strip():
        raise DataError("`--data` is empty: name a file, a Hub id or reasoning-gym families.")
    if Path(text).is_dir():
        raise DataError(f"`--data {text}`: {text} is a directory, name a file in it.")
    if "/" not in text.partition("?")[0] and problem_file(text) is None:
        path = f"reasoning_gym/{text}"
    rows = load_rows(path, "train", config)
    if len(rows.dataset) < BLOCK_SIZE:
        raise DataError(f"{path} has {len(rows.dataset)} problems: at least {BLOCK_SIZE} are needed, better hundreds.")
    return path, rows
