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
_STARS = re.compile(r"\*+")


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
