"""Runs a command and prints errors that a user can mend without a traceback."""

import os
import sys
from collections.abc import Callable

from ..errors import SettingsError
from .origin import what_to_mend
from .terminal import escaped_output


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
            return main(argv)
        except BaseException as error:  # that of a panic is no `Exception`
            message = what_to_mend(error)
            if message is None:
                raise
            if os.environ.get("LOCAL_RANK", "0") == "0":  # not once for each process
                text = message if isinstance(error, SettingsError) else " ".join(message.split())
                print(f"{prog}: error: {text}", file=sys.stderr)
            return 2
