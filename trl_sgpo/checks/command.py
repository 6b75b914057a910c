"""Runs a command and prints errors that a user can mend, and interruptions, without a traceback."""

import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import ConfigError, SettingsError, SGPOError
from ..files import nowhere
from .characters import misplaced
from .origin import what_to_mend
from .secrets import arguments_without_secrets
from .terminal import escaped_output


TRACEBACK = "TRL_SGPO_TRACEBACK"
"""Environment variable that lets the traceback of an error be printed before its line."""
MAX_LINE, MAX_LINES, _END = 2_000, 200, 500
"""Characters of a line and lines of an error that are printed: it may quote what someone else wrote."""
INTERRUPTED, PIPE_CLOSED = 130, 141
"""Exit statuses by which shells know that a signal ended a command: 128 + SIGINT, 128 + SIGPIPE."""


def run_command(prog: str, main: Callable[[list[str]], int], argv: list[str], kept: str = "") -> int:
    """
    Runs a command. What it prints cannot control the terminal.

    Args:
        prog (`str`):
            Name of the command, for messages.
        main (`Callable`):
            The command, from arguments to an exit status.
        argv (`list[str]`):
            Its arguments.
        kept (`str`, *optional*, defaults to `""`):
            What is kept after an interruption, and how to go on. A `KeyboardInterrupt` with a text says it itself.

    Returns:
        `int`: Exit status: 2 for an error whose message names the fix, 130 after an interruption, 141 if standard
        output was closed, as by `head`. Other errors are raised.
    """
    with escaped_output(), _shown_to_trackers(prog, argv):
        try:
            for argument in argv:
                if found := misplaced(argument):
                    raise ConfigError(f"The argument {argument!r} holds {found}: write it in UTF-8.")
            status = main(argv)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt as interruption:
            text = " ".join(map(str, interruption.args)) or kept
            _say(f"\n{prog}: interrupted. {text}".rstrip())  # after `^C`, or a bar
            return INTERRUPTED
        except BaseException as error:  # that of a panic is no `Exception`
            pipe_closed = isinstance(error, BrokenPipeError) and _reader_is_gone()
            _drop_output()
            if pipe_closed:
                _say(f"{prog}: standard output was closed.")
                return PIPE_CLOSED
            message = what_to_mend(error)
            if message is None:
                raise
            shown = os.environ.get(TRACEBACK) == "1"
            if shown:
                traceback.print_exc()
            text = message if isinstance(error, SettingsError) else " ".join(message.split())
            of_a_library = not isinstance(error, SGPOError | OSError)
            hint = f" ({TRACEBACK}=1 shows the traceback)" if of_a_library and not shown else ""
            _say(f"{prog}: error: {text}{hint}")
            return 2


@contextmanager
def _shown_to_trackers(prog: str, argv: list[str]) -> Iterator[None]:
    """
    wandb records `sys.argv`, and what is written to the standard streams before it is escaped: within the context it
    finds no secret there, and does not record the streams unless `WANDB_CONSOLE` is set.
    """
    os.environ.setdefault("WANDB_CONSOLE", "off")
    before, sys.argv = sys.argv, [sys.argv[0], *prog.split()[1:], *arguments_without_secrets(argv)]
    yield
    sys.argv = before


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # not once for each process
        return
    lines = text.split("\n")
    shown = [_cut(line) for line in lines[:MAX_LINES]]
    more = [f"  … and {len(lines) - MAX_LINES:,} more lines"] if len(lines) > MAX_LINES else []
    print(*shown, *more, sep="\n", file=sys.stderr)


def _cut(line: str) -> str:
    """A line of which the middle is left out where it is long: what to do stands at its end."""
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - _END]} … {line[-_END:]}"


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nothing reads any more."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in output.poll(0))
    except OSError:  # no file, as in tests
        return False


def _drop_output() -> None:
    """Drops what is left of standard output if it cannot be written, for which Python would fail at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(nowhere(), sys.stdout.fileno())
