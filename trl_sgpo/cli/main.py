"""Entry point of `trl-sgpo`: runs a command and prints errors a user can act on without a traceback."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any

from .._version import __version__
from ..checks.command import run_command
from ..yaml_files import read_mapping, split_config


COMMANDS = {
    "convert": "write the SGPO recipe of a GRPO recipe, and say each change",
    "demo": "show a recorded run: a transfer block, the bank, figures before and after, in seconds",
    "init": "write a recipe, and a reward function, for your model, data and GPU",
    "train": "train a model with SGPO from a recipe",
    "warmstart": "fine-tune a model on two-phase traces, so that there is something to reinforce",
    "bootstrap": "write strategies and two-phase traces without human labels, for a warm start and a bank",
    "eval": "measure a model: suites in and out of distribution, strategy transfer score",
    "export": "export a trained model for transformers or llama.cpp, checked by its logits",
    "compare": "train and measure many arms at an equal budget: SFT, RLHF, PRM, GRPO, SGPO",
    "estimate": "estimate how much memory recipes need, and what makes them fit, before anything is downloaded",
    "bench": "measure SGPO against TRL's GRPOTrainer, and the bank, on this machine",
    "solve": "solve problems with a trained model and its strategy bank: one, a file, or in a terminal",
    "report": "write a run as one HTML file: curves, transfer, strategies, rollouts, settings",
    "push": "publish a run on the Hugging Face Hub: model, bank, metrics and card in one commit",
    "bank": "inspect, check and share a strategy bank",
}


_GOES_ON = "the same command goes on."
_ANEW = "Nothing is kept: the same command starts anew."
KEPT = dict.fromkeys(COMMANDS, _ANEW) | {
    "train": "Checkpoints are kept: the same command with `--resume_from_checkpoint true` goes on.",
    "bootstrap": f"Finished blocks are kept: {_GOES_ON}",
    "eval": f"Finished problems are kept: {_GOES_ON}",
    "compare": f"Finished runs are kept: {_GOES_ON}",
    "push": "A commit that was not reported is not made: the same command pushes again.",
    "bank": "A bank is as it was before the change that was under way: the same command does it again.",
}
"""What is kept of a command that is interrupted, and how to go on."""


def usage() -> str:
    """Text of `trl-sgpo --help`."""
    lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: trl-sgpo COMMAND [options]\n\n"
        "Strategy-Guided Policy Optimization for TRL: train a model to write a strategy, execute it, and keep what\n"
        f"transfers.\n\ncommands:\n{lines}\n\n"
        "`trl-sgpo COMMAND --help` lists a command's options. First run, on a model and problems of\n"
        "yours:\n"
        "  trl-sgpo init\n"
        "  trl-sgpo train --config recipe.yaml"
    )


def _wants_warnings(options: list[str], recipe: Mapping[str, Any]) -> bool:
    """Whether `python -W`, PYTHONWARNINGS, TRANSFORMERS_VERBOSITY or `log_level` asks for what libraries warn of."""
    level = os.environ.get("TRANSFORMERS_VERBOSITY", "")
    level = str(recipe.get("log_level", level))
    for option, value in pairwise([*options, ""]):
        name, _, given = option.partition("=")
        if name in ("--log_level", "--log-level"):
            level = given or value
    return bool(sys.warnoptions) or level in ("info", "debug")


def main(argv: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the program name. Defaults to the process's.

    Returns:
        `int`: Exit status: 0, 1 if a check found something, 2 for an error, whose message names the fix, 130 after an
        interruption, or 141 if standard output was closed.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"trl-sgpo {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"trl-sgpo: error: no command {argv[0]!r}. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]

    def run(rest: list[str]) -> int:
        if not sys.stderr.isatty():  # bars of reading and loading would fill a log
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        path, options = split_config(rest)
        # What cannot be read is told before imports that take seconds
        recipe = {} if path is None else read_mapping(path)
        if not _wants_warnings(options, recipe):
            # Warnings of dependencies for their developers would hide messages for the user
            warnings.filterwarnings("ignore", category=FutureWarning)
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        return import_module(f"trl_sgpo.cli.{name}").main(rest)

    return run_command(f"trl-sgpo {name}", run, rest, KEPT[name])


if __name__ == "__main__":
    sys.exit(main())
