"""Files of a dataset's folder or repository: its card names none of the user's."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from ..checks.repositories import is_within
from ..errors import DataError


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
            raise DataError(
                f"{path} names the file {file}, which is not part of it. Its card or a link in it says so: correct "
                "them, or name the file yourself as `data_files` of a mixture."
            )
