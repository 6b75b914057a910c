"""
Files and directories that appear complete, or not at all, and files that grow.

Until they are complete they have a name that nobody can foresee, so that no link can wait there to be written through.
This is the only file that opens others for writing (`tests/test_structure.py`).
"""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TextIO

from .errors import ConfigError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ENDING = ".unfinished"


def unfinished_files(target: Path) -> list[Path]:
    """What killed processes left beside a file or directory that they were writing."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.*{_ENDING}*"))


def _new_name(target: Path) -> Path:
    """A name beside a file or directory. Removes what killed processes left there."""
    for left in unfinished_files(target):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.{token_hex(8)}{_ENDING}")


def _create(path: Path, private: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.open(path, flags, 0o600 if private else 0o666)


def private_file(path: Path) -> TextIO:
    """
    Opens a new file, for what may hold a secret: only the user may read it, from the start.

    Args:
        path (`Path`):
            The file. One of this name, or a link, is removed. Its directory is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return os.fdopen(_create(path, private=True), "w", encoding="utf-8")


@contextmanager
def unfinished_file(target: Path, private: bool = False) -> Iterator[Path]:
    """
    Makes an empty file beside another one, to be moved over it by [`durable_replace`]. If it is not, it is removed.

    Args:
        target (`Path`):
            The file to write or replace.
        private (`bool`, *optional*, defaults to `False`):
            Whether only the user may read the file.
    """
    path = _new_name(target)
    os.close(_create(path, private))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def unfinished_directory(target: Path) -> Iterator[Path]:
    """
    Makes an empty directory beside another one, to be moved there. If it is not, it is removed.

    Args:
        target (`Path`):
            The directory to write. Its parents are created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _new_name(target)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def durable_replace(temporary: Path, target: Path) -> None:
    """Moves a file over another one so that a crash leaves either the old or the new content."""
    for path, move in ((temporary, True), (target.parent, False)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if move:
            os.replace(temporary, target)


def lock(descriptor: int) -> bool:
    """
    Locks an open file or directory until it is closed, also by the end of the process. Returns `False` if it is locked
    already. Where the system has no locks, nothing is locked.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def append_file(path: Path, length: int | None = None) -> TextIO:
    """
    Opens a file to append to it. It is created if there is none.

    Args:
        path (`Path`):
            The file.
        length (`int`, *optional*):
            Bytes of the file to keep. If `None`, all.

    Raises:
        [`~trl_sgpo.errors.ConfigError`]: It is a link, or another process appends to it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        message = f"{path} is a link, and nothing is written through links: remove it, or name another file."
        raise ConfigError(message) from error
    if not lock(descriptor):
        os.close(descriptor)
        raise ConfigError(f"Another process writes {path}: wait until it has ended, or name another file.")
    if length is not None:
        os.truncate(descriptor, length)
    return os.fdopen(descriptor, "a", encoding="utf-8")


def write_file(target: Path, content: str, private: bool = False) -> None:
    """
    Writes a file: a killed process leaves the old or the new content, never a part of it.

    Args:
        target (`Path`):
            The file to write or replace.
        content (`str`):
            Its text.
        private (`bool`, *optional*, defaults to `False`):
            Whether only the user may read the file.
    """
    with unfinished_file(target, private) as temporary:
        temporary.write_text(content, encoding="utf-8")
        durable_replace(temporary, target)


def nowhere() -> int:
    """A descriptor to which everything can be written and that keeps nothing."""
    return os.open(os.devnull, os.O_WRONLY)
