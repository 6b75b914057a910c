"""`trl-sgpo convert`: writes the SGPO recipe of a GRPO recipe, says each change, and checks the result."""

import argparse
from pathlib import Path
from typing import Any

from ..checks.arguments import Parser, path_option
from ..checks.console import console
from ..checks.paths import check_file
from ..errors import ConfigError, SettingsError, refuse
from ..files import write_file
from ..yaml_files import read_mapping, read_texts
from .conversion import NONE, Conversion


def main(argv: list[str]) -> int:
    """Converts a recipe. The exit status is 1 if `train` would refuse the result on this machine."""
    options = _parser().parse_args(argv)
    output = options.output or Path(options.recipe).with_name(f"{Path(options.recipe).stem}_sgpo.yaml")
    if Path(output).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`--output {output}` is a YAML file: give it the ending .yaml.")
    check_file("--output", output)
    if Path(output).exists() and not options.overwrite:
        raise ConfigError(f"{output} exists: choose another name by `--output`, or replace it with `--overwrite`.")

    from ..checks.old_names import unknown_key
    from ..recipe import known_keys
    from .convert_keys import rename_keys
    from .convert_values import convert_values, move_outputs

    given = _as_written(options.recipe)
    conversion = Conversion(dict(given))
    rename_keys(conversion)
    known = known_keys()
    conversion.problems += [unknown_key(str(key), known) for key in conversion.values if key not in known]
    convert_values(conversion)
    move_outputs(conversion, Path(options.recipe).stem)
    refuse(options.recipe, conversion.problems)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_file(Path(output), _text(conversion.values), private=True)  # it may hold a token
    for change in conversion.changes:
        _print_change(*change)
    kept = len(given.keys() - {change[0] for change in conversion.changes})
    print(f"{kept} other keys are as they were. Recipe: {output}")
    return _check(str(output))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo convert",
        description="Write the SGPO recipe of a recipe for GRPO: of `trl grpo`, in the style of open-r1, or with the "
        "arguments of Unsloth's notebooks as keys. Each change is printed with its reason, and the result is checked "
        "as `trl-sgpo train` checks it. Nothing is downloaded.",
    )
    parser.add_argument("recipe", type=path_option, metavar="GRPO_RECIPE", help="a YAML file")
    parser.add_argument(
        "--output",
        type=path_option,
        metavar="FILE",
        help="the SGPO recipe (the name of the GRPO recipe with _sgpo, beside it)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def _print_change(key: str, before: str, after: str, why: str) -> None:
    """A line like `max_completion_length: 1024 → 896  (the execution's part of them)`, with colours in a terminal."""
    from rich.text import Text

    if after == NONE:
        change = "left out" if before == NONE else f"{before} → left out"
    else:
        change = f"set to {after}" if before == NONE else f"{before} → {after}"
    console().print(Text.assemble((key, "bold"), f": {change}", (f"  ({why})", "dim")), highlight=False)


def _as_written(path: str) -> dict[str, Any]:
    """The keys and values of a recipe. Words that YAML takes for a truth value, such as `no`, stay words."""
    texts = read_texts(path)
    return {
        str(key): texts[key] if isinstance(value, bool) and texts[key] not in ("true", "false") else value
        for key, value in read_mapping(path).items()
    }


def _text(values: dict[str, Any]) -> str:
    import yaml

    lines = ["# A recipe of SGPO, made by trl-sgpo convert.", ""]
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False, width=119, allow_unicode=True)])


def _check(output: str) -> int:
    """Checks the recipe as `train` does before it loads anything."""
    from ..checks.setup import setup_problems
    from ..data.loading import reward_problems
    from ..recipe import read_recipe

    try:
        read_recipe(
            ["--config", output],
            "trl-sgpo convert",
            lambda values: [*setup_problems(values), *reward_problems(values)],
        )
    except ConfigError as error:
        found = error.problems if isinstance(error, SettingsError) else [str(error)]
        print("On this machine, `trl-sgpo train` would refuse it:", *[f"  - {text}" for text in found], sep="\n")
        return 1
    print(f"Checked. Next:\n  16 rollouts, and what to change   trl-sgpo init --try {output}")
    print(f"  memory                            trl-sgpo estimate --config {output}")
    print(f"  train                             trl-sgpo train --config {output}")
    return 0
