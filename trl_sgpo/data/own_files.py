"""Files of a dataset's folder or repository: neither its card nor its rows name those of the user."""

import os
from typing import TYPE_CHECKING, Any

from ..checks.repositories import is_within
from ..errors import DataError


if TYPE_CHECKING:
    from datasets import Features


def check_own_files(path: str, name: str | None, data_dir: str | None) -> None:
    """
    Checks that the files that a dataset consists of lie within it, before they are read.

    Args:
        path (`str`):
            A folder, or the id of a dataset repository.
        name (`str`, *optional*):
            Configuration of the dataset.
        data_dir (`str`, *optional*):
            Folder within the dataset.

    Raises:
        [`DataError`]: If its card, or a link in it, names a file elsewhere.
    """
    from datasets import load_dataset_builder

    builder: Any = load_dataset_builder(path, name=name, data_dir=data_dir)
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not _is_of(str(file), path):
                raise DataError(
                    f"{path} names the file {file}, which is not part of it. Its card or a link in it says so: "
                    "correct them, or name the file yourself as `data_files` of a mixture."
                )


def _is_of(file: str, dataset: str) -> bool:
    if os.path.isdir(dataset):
        return "://" not in file and is_within(file, dataset)
    return file.startswith(f"hf://datasets/{dataset}@") and ".." not in file.split("/")


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
