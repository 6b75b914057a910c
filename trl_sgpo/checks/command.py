"""Runs a command and prints errors that a user can mend without a traceback."""

import os
import sys
import traceback
from collections.abc import Callable

from ..errors import ConfigError, SettingsError, SGPOError
from .characters import misplaced
from .origin import what_to_mend
from .terminal import escaped_output


TRACEBACK = "TRL_SGPO_TRACEBACK"
"""Environment variable that lets the traceback of an error be printed before its line."""


def run_command(prog: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """
    Runs a command. What it prints cannot control the terminal.

    Args:
        prog (`str`):
            Name of the command, for messages.
        main (`Callable`):
            The command, from arguments to an exit status.
        argv (`list[str]`):
            Its arguments.

    Returns:
        `int`: Exit status, 2 for an error whose message names the fix. Other errors are raised.
    """
    with escaped_output():
        try:
            for argument in argv:
                if found := misplaced(argument):
                    raise ConfigError(f"The argument {argument[:200]!r} holds {found}: write it in UTF-8.")
            return main(argv)
        except BaseException as error:  # that of a panic is no `Exception`
            message = what_to_mend(error)
            if message is None:
                raise
            if os.environ.get("LOCAL_RANK", "0") == "0":  # not once for each process
                shown = os.environ.get(TRACEBACK) == "1"
                if shown:
                    traceback.print_exc()
                text = message if isinstance(error, SettingsError) else " ".join(message.split())
                of_a_library = not isinstance(error, SGPOError | OSError)
                hint = f" ({TRACEBACK}=1 shows the traceback)" if of_a_library and not shown else ""
                print(f"{prog}: error: {text}{hint}", file=sys.stderr)
            return 2
