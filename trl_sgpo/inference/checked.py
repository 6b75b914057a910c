"""Checks of a model, named by a directory or a Hub id, before a library loads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from ..checks.adapters import check_whole
from ..checks.repositories import check_model_folder, weights_in
from ..errors import ModelError
from .model_files import ADAPTER_WEIGHTS


# Weights of adapters are small
_TEXTS = (
    "*.json", "*.jinja", "*.model", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer", "vocab*", "merges.txt",
    "dict.txt", ADAPTER_WEIGHTS,
)  # fmt: skip
_TEMPLATES = "additional_chat_templates/"


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
            Whether weights will be loaded.

    Returns:
        `dict`: The same arguments. For a Hub id, the commit that was checked is their `revision`, and nothing more is
        downloaded.

    Raises:
        [`ModelError`]: There is no such model, [`~trl_sgpo.checks.repositories.check_model_folder`] refuses it, or
            weights will be loaded and it is an adapter.
    """
    directory, pinned = checked_folder(source, kwargs, weights)
    if weights:
        check_whole(directory, source)
        check_whole(directory / (kwargs.get("subfolder") or ""), source)
    return pinned


def checked_folder(source: str | Path, kwargs: dict[str, Any], weights: bool = False) -> tuple[Path, dict[str, Any]]:
    """As [`checked`], without the base of an adapter. Returns also the folder, which is a snapshot for a Hub id."""
    directory, pinned = Path(source), kwargs
    if not directory.is_dir():
        directory, pinned = _texts_of(str(source), kwargs)
    read = directory / (kwargs.get("subfolder") or "")
    folders = [folder for folder in {directory, read} if folder.is_dir()]
    for folder in folders:
        check_model_folder(folder, source)
    if weights and directory != Path(source):
        names = _weights_of(read, kwargs)
        _download(str(source), [f"{_place(kwargs)}{name}" for name in names], directory.name, kwargs)
        if not any(any(read.glob(name)) for name in (*names, ADAPTER_WEIGHTS)):
            raise ModelError(
                f"{source} has no {names[0]}, or it could not be downloaded. Other files of weights can run code when "
                "they are read: name a model whose weights are safetensors."
            )
        for folder in folders:
            check_model_folder(folder, source)
    return directory, pinned


def _place(kwargs: dict[str, Any]) -> str:
    return f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""


def _weights_of(folder: Path, kwargs: dict[str, Any]) -> list[str]:
    """Patterns of the weights that a library will read from a folder."""
    if kwargs.get("gguf_file"):
        return [kwargs["gguf_file"]]
    if kwargs.get("variant"):
        return [f"*.{kwargs['variant']}*.safetensors"]
    return [path.name for path in weights_in(folder)]


def _texts_of(repository: str, kwargs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import ResolvedRevision
    from transformers.utils.hub import list_repo_templates

    from ..hub.errors import readable_errors

    revision = kwargs.get("revision")
    if isinstance(revision, ResolvedRevision):  # of an earlier check, which may have been of another repository
        revision = revision.initial
    found = _download(repository, _TEXTS, revision, kwargs, ignored="*/*", bar=_NoBar)
    with readable_errors(f"Reading {repository}", ModelError):
        templates = list_repo_templates(
            repository,
            local_files_only=bool(kwargs.get("local_files_only")),
            revision=found.name,
            cache_dir=kwargs.get("cache_dir"),
            token=kwargs.get("token"),
        )
    names = [f"{_TEMPLATES}{name}" for name in templates]
    if place := _place(kwargs):
        names += [f"{place}{name}" for name in _TEXTS]
    if names:
        _download(repository, names, found.name, kwargs, ignored=f"{place or '*/'}*/*", bar=_NoBar)
    return found, {
        **kwargs,
        "revision": ResolvedRevision(found.name, revision, repository),
        "local_files_only": True,
    }


def _download(
    repository: str,
    names: Sequence[str],
    revision: str | None,
    kwargs: dict[str, Any],
    ignored: str | None = None,
    bar: type[tqdm] | None = None,
) -> Path:
    """Downloads files into a snapshot, and returns it. If the Hub cannot be reached, it holds what is in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    from ..hub.errors import readable_errors

    source = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    with readable_errors(f"Reading {repository}", ModelError):
        try:
            return Path(
                snapshot_download(
                    repository,
                    allow_patterns=list(names),
                    ignore_patterns=ignored,
                    revision=revision,
                    tqdm_class=bar,
                    **source,
                )
            )
        except IncompleteSnapshotError as error:
            return Path(error.snapshot_path)
