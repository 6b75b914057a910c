"""Measurements in processes of their own, so that peaks of memory are those of one trainer."""

import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
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


def peak_resident() -> int:
    """
    Most bytes of memory that this process had resident.

    On Linux, `ru_maxrss` is at least what the process had that started this one. `VmHWM` is of this one alone.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
