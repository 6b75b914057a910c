"""Files of a dataset's folder or repository: its card cannot name those of the user."""

import os
from pathlib import Path
from typing import Any

from ..errors import DataError


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
            if not _is_within(str(file), path):
                raise DataError(
                    f"{path} names the file {file}, which is not part of it. Its card or a link in it says so: "
                    "correct them, or name the file yourself as `data_files` of a mixture."
                )


def _is_within(file: str, dataset: str) -> bool:
    if not os.path.isdir(dataset):
        return file.startswith(f"hf://datasets/{dataset}@") and ".." not in file.split("/")
    folder = Path(dataset).resolve()
    folders = [folder]
    if folder.parent.name == "snapshots":  # of the Hub's cache, whose files are links to its blobs
        folders.append(folder.parent.parent / "blobs")
    return "://" not in file and any(Path(file).resolve().is_relative_to(allowed) for allowed in folders)
