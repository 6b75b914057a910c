"""Measurements in processes of their own, so that peaks of memory are those of one trainer."""

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any


def in_new_process(target: Callable[..., None], *arguments: Any) -> Any | None:
    """
    Calls a function in a new process.

    Args:
        target (`Callable`):
            Function of a module. Its last argument is a connection, by which it sends its result.
        *arguments:
            Its other arguments.

    Returns:
        What it sends, `None` if the process ends before.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, send))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the new process, which this one ends after Ctrl-C
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
