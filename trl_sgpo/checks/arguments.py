"""The parser of command lines: one way to write options, and errors that are raised."""

import argparse
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import ConfigError
from .secrets import arguments_without_secrets


class Parser(argparse.ArgumentParser):
    """
    Parser of a command. Options are written with underscores, as keys of recipes are; `--no-bank` is read as
    `--no_bank`. Errors are raised, so that they are printed as those of all commands.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(arguments_without_secrets(unknown))}")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(None if args is None else _with_underscores(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.{self._similar(message)} `{self.prog} --help` lists the options.")

    def _similar(self, message: str) -> str:
        """Options whose names are similar to those that a message calls unrecognized."""
        known = [option for action in self._actions for option in action.option_strings]
        wrong = re.findall(r"--\w+", message) if message.startswith("unrecognized") else []
        close = [match for option in wrong for match in get_close_matches(option, known, n=2)]
        return f" Did you mean {', '.join(f'`{option}`' for option in close)}?" if close else ""


def path_option(text: str) -> str:
    """Type of options that name a file or folder: `~` is the home directory, also where no shell has replaced it."""
    return os.path.expanduser(text)


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return [_with_underscore(argument) for argument in options] + list(arguments[len(options) :])


def _with_underscore(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument
