"""Files of a dataset's folder or repository: its card names none of the user's, and no address."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

from ..checks.repositories import is_within
from ..errors import DataError
from ..speed.patches import CountedPatch


MAX_FOLDERS, MAX_STARS = 2, 4  # as many as the library's own patterns have, and one more
_STARS, _WILD = re.compile(r"\*+"), re.compile(r"[*?\[]")


def check_own_files(path: str, files: Mapping[Any, Iterable[Any]]) -> None:
    """
    Checks that the files that a dataset consists of lie within it, before they are read.

    Args:
        path (`str`):
            A folder, or the id of a dataset repository.
        files (`Mapping`):
            Files of each split.

    Raises:
        [`DataError`]: If its card, or a link in it, names a file elsewhere.
    """
    if not os.path.isdir(path):
        return  # of a repository on the Hub, the datasets library checks this
    for file in map(str, chain.from_iterable(files.values())):
        if "://" in file or not is_within(file, path):
            raise _elsewhere(path, file)


def check_matched_files(folder: str | None, patterns: Iterable[str], files: Mapping[Any, Iterable[Any]]) -> None:
    """
    Checks that patterns name no file through a link out of the folder in which they look.

    Args:
        folder (`str`, *optional*):
            The folder to which patterns are relative. If `None`, the working directory.
        patterns (`Iterable[str]`):
            Paths of files on this machine, which may have `*`, `?` and `[`. A file that is named without them may be a
            link.
        files (`Mapping`):
            Files of each split.

    Raises:
        [`DataError`]: One does.
    """
    paths = [os.path.join(folder or "", os.path.expanduser(pattern)) for pattern in patterns]
    named = {os.path.abspath(path) for path in paths if _WILD.search(path) is None}
    searched = [os.path.dirname(_WILD.split(path)[0]) or "." for path in paths if _WILD.search(path) is not None]
    for file in map(str, chain.from_iterable(files.values())):
        own = "://" in file or os.path.abspath(file) in named
        if searched and not own and not any(is_within(file, place) for place in searched):
            raise DataError(
                f"`data_files` names {file}, a link out of its folder: name the file itself, if you mean it."
            )


def _elsewhere(path: str, file: str) -> DataError:
    return DataError(
        f"{path} names the file {file}, which is not part of it. Its card or a link in it says so: correct them, or "
        "name the file yourself as `data_files` of a mixture."
    )


def _own(resolve: Callable[..., list[str]], pattern: str, base_path: str, *args: Any, **kwargs: Any) -> list[str]:
    joined = f"{base_path.removeprefix('hf://')}/{pattern}"
    if "://" in joined or "::" in joined or os.path.isabs(pattern):
        raise _elsewhere(base_path, pattern)
    if joined.count("**") > MAX_FOLDERS or len(_STARS.findall(joined)) > MAX_STARS:
        raise DataError(f"{base_path} names its files by {pattern[:80]!r}, which may match for ever: use fewer `*`.")
    return resolve(pattern, base_path, *args, **kwargs)


def _resolver() -> Callable[..., list[str]]:
    from datasets import data_files

    return data_files.resolve_pattern


def _set_resolver(resolver: Callable[..., list[str]]) -> None:
    from datasets import data_files

    data_files.resolve_pattern = partial(_own, data_files.resolve_pattern) if resolver is _own else resolver


OWN_PATTERNS = CountedPatch(_resolver, _set_resolver, _own)
"""
Within the context, the datasets library looks for files below the folder or the repository of a dataset only. It would
ask any address that a card names before [`check_own_files`] can see the files.
"""
