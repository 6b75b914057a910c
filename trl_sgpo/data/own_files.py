"""Files of a dataset's folder or repository: neither its card nor its rows name those of the user."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..checks.repositories import is_within
from ..errors import DataError


if TYPE_CHECKING:
    from datasets import Features


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


def columns_of_files(features: "Features") -> list[str]:
    """
    The columns that hold pictures, sounds or other files. To read a row opens them, wherever its path or address
    leads, in decoders that are not made for hostile files.

    Args:
        features ([`~datasets.Features`]):
            Types of the columns.
    """
    from datasets import ClassLabel, Features, LargeList, List, Value

    def is_plain(feature: Any) -> bool:
        if isinstance(feature, Features | dict):
            return all(is_plain(part) for part in feature.values())
        if isinstance(feature, list):
            return all(is_plain(part) for part in feature)
        if isinstance(feature, List | LargeList):
            return is_plain(feature.feature)
        return isinstance(feature, Value | ClassLabel)

    return [name for name, feature in features.items() if not is_plain(feature)]
