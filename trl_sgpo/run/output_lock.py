"""A lock on the output folder of a run: two trainings in one folder would mix their checkpoints and banks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError
from ..files import lock


_HELD: set[Path] = set()
"""Folders that this process holds."""


@contextmanager
def held(output_dir: str | Path, saves: bool) -> Iterator[None]:
    """
    Holds an output folder within the context. The operating system releases it when the process ends or is killed.

    Args:
        output_dir (`str` or `Path`):
            The folder. It is created if there is none, and removed again if nothing was written into it.
        saves (`bool`):
            Whether this process saves the run. Others hold nothing.

    Raises:
        [`ConfigError`]: Another process holds the folder.
    """
    directory = Path(output_dir).resolve()
    if not saves or directory in _HELD or sys.platform == "win32":  # where no folder can be opened
        yield
        return
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise ConfigError(
                f"Another process trains in {output_dir}: wait until it has ended, or name another `--output_dir`."
            )
        _HELD.add(directory)
        yield
    finally:
        _HELD.discard(directory)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # it is not empty
                directory.rmdir()
