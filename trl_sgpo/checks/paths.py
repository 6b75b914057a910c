"""Which paths are files of problems, and whether files can be written to a place, before long work."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import ConfigError
from .repositories import is_within


FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")  # of files of problems


def problem_file(path: str) -> str | None:
    """The file that a path names by its ending, with the home directory for `~`. `None` if it names another source."""
    return os.path.expanduser(path) if path.casefold().endswith(FILE_ENDINGS) else None


def check_directory(key: str, path: str | Path) -> None:
    """
    Checks that files can be written to a directory, which need not exist, and that no link leads out of it. Nothing is
    left behind.

    Args:
        key (`str`):
            The key or option that names it.
        path (`str` or `Path`):
            The directory.

    Raises:
        [`ConfigError`]: They cannot, or one does.
    """
    _check_writable(key, path)
    _check_links(key, path)


def _check_writable(key: str, path: str | Path) -> None:
    if not str(path):
        raise ConfigError(f"`{key}` is empty: name a directory.")
    target = Path(path).expanduser().absolute()
    place = target
    try:
        while not place.exists():
            place = place.parent
        if place.is_dir():
            with TemporaryDirectory(dir=place):
                return
    except OSError as error:
        reason = f"where nothing can be written ({error.strerror})"
        raise ConfigError(f"`{key}` is {path}, {reason}: name another directory.") from error
    raise ConfigError(f"`{key}` is {path}, but {'it' if place == target else place} is a file: name a directory.")


def _check_links(key: str, path: str | Path) -> None:
    """Libraries write through links, and what is removed below a link is removed where it leads."""
    directory = Path(path).expanduser()

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"`{key}` is {path}, and {error.filename} cannot be searched for links out of it ({error.strerror}): let "
            "its owner read it, or name another directory."
        ) from error

    for folder, directories, files in os.walk(directory, onerror=refuse if directory.is_dir() else None):
        for entry in (Path(folder, name) for name in sorted([*directories, *files])):
            if entry.is_symlink() and not is_within(entry, directory):
                raise ConfigError(
                    f"`{key}` is {path}, and {entry} is a link out of it, which would be written through: remove the "
                    "link, or name another directory."
                )


def check_file(option: str, path: str | Path) -> None:
    """
    Checks that a file can be written.

    Args:
        option (`str`):
            The key or option that names it.
        path (`str` or `Path`):
            The file.

    Raises:
        [`ConfigError`]: It is a directory, or nothing can be written beside it.
    """
    if Path(path).is_dir():
        raise ConfigError(f"`{option}` is {path}, a directory: name a file in it.")
    _check_writable(option, Path(path).expanduser().absolute().parent)


def if_missing(path: str | Path) -> str:
    """What a message adds where the folder that it is about does not exist."""
    return "" if Path(path).is_dir() else " (there is no such folder)"
