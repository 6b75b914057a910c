"""Checks of a model, named by a directory or a Hub id, before a library loads it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from ..checks.repositories import base_of_adapter, check_model_folder, weights_in
from ..errors import ModelError
from .model_files import ADAPTER_WEIGHTS, CONFIG


_TEXTS = ("*.json", "*.jinja", "vocab*", "merges.txt", "*.model", ADAPTER_WEIGHTS)  # weights of adapters are small


class _NoBar(tqdm):
    """No progress bar: most often all files are in the cache."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


def checked(source: str | Path, kwargs: dict[str, Any], weights: bool = False) -> dict[str, Any]:
    """
    Checks the files of a model before a library reads them. Those of a Hub id are downloaded, but for weights.

    Args:
        source (`str` or `Path`):
            Directory or Hub id.
        kwargs (`dict`):
            What will be passed to `from_pretrained`.
        weights (`bool`, *optional*, defaults to `False`):
            Whether weights will be loaded: then a library follows an adapter to its base, which is checked, too.

    Returns:
        `dict`: The same arguments. For a Hub id, the commit that was checked is their `revision`.

    Raises:
        [`ModelError`]: There is no such model, or [`~trl_sgpo.checks.repositories.check_model_folder`] refuses it.
    """
    directory, pinned = Path(source), kwargs
    if not directory.is_dir():
        directory, pinned = _texts_of(str(source), kwargs)
    folders = [folder for folder in {directory, directory / (kwargs.get("subfolder") or "")} if folder.is_dir()]
    for folder in folders:
        check_model_folder(folder, source)
    if weights and directory != Path(source):
        _download_weights(str(source), directory, pinned)
        for folder in folders:
            check_model_folder(folder, source)
    if weights and not (Path(source) / CONFIG).is_file() and (base := base_of_adapter(directory)) is not None:
        checked(base, kwargs)
    return pinned


def _download_weights(repository: str, snapshot: Path, kwargs: dict[str, Any]) -> None:
    """Downloads the weights that a library will read into a snapshot, so that they are checked there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    from ..hub.errors import readable_errors

    source = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    names = [path.name for path in weights_in(snapshot)]
    with readable_errors(f"Reading {repository}", ModelError), suppress(IncompleteSnapshotError):
        snapshot_download(repository, allow_patterns=names, revision=snapshot.name, **source)


def _texts_of(repository: str, kwargs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import ResolvedRevision, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    from ..hub.errors import readable_errors

    revision = kwargs.get("revision")
    if isinstance(revision, ResolvedRevision):  # of an earlier check, which may have been of another repository
        revision = revision.initial
    source = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    with readable_errors(f"Reading {repository}", ModelError):
        try:
            for place in {"", f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""}:
                found = snapshot_download(
                    repository,
                    allow_patterns=[f"{place}{name}" for name in _TEXTS],
                    ignore_patterns=f"{place}*/*",
                    revision=revision,
                    tqdm_class=_NoBar,
                    **source,
                )
        except IncompleteSnapshotError as error:  # the Hub cannot be reached: only what is in the cache will be read
            found, kwargs = error.snapshot_path, {**kwargs, "local_files_only": True}
    return Path(found), {**kwargs, "revision": ResolvedRevision(Path(found).name, revision, repository)}
