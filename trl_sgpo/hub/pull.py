"""Pulling a run from the Hugging Face Hub at one commit."""

from pathlib import Path

from ..bank.hub import COMMIT
from ..errors import ModelError
from ..inference.model_files import MODEL_FILES, SETTINGS_FILE
from ..inference.weights import check_hub, local_weights
from .errors import readable_errors
from .model_card import on_hub
from .publication import BANK_FILES


def pull_run(name: str, revision: str | None = None) -> Path | None:
    """
    Downloads a model that `trl_sgpo` pushed and the export of its bank, at one commit, to the Hugging Face cache.

    Only safetensors, configurations, tokenizer files and the export are downloaded, no code and no pickles.

    Args:
        name (`str`):
            A Hub id or a directory.
        revision (`str`, *optional*):
            Branch, tag or commit. If `None`, the latest commit.

    Returns:
        `Path` or `None`: A directory with the commit as its name, or `None` if `name` is a directory or a model
        that `trl_sgpo` did not push.

    Raises:
        [`ModelError`]: The download fails, or there is no such revision.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    if Path(name).is_dir() or not on_hub(name) or local_weights(name) != name:
        if revision is not None:
            raise ModelError(f"`--revision` is for models on the Hub, and {name} is not one: leave it out.")
        return None
    check_hub(name, SETTINGS_FILE, revision)
    with readable_errors(f"Pulling {name}", ModelError):
        try:
            sha = Path(hf_hub_download(name, SETTINGS_FILE, revision=revision)).parent.name
        except (EntryNotFoundError, RepositoryNotFoundError) as error:
            if revision is None:
                return None  # not pushed by trl_sgpo, or missing: then loading it raises an error
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise ModelError(
                    f"{name} has no {SETTINGS_FILE} at {revision}: `--revision` is for models that `trl-sgpo` pushed."
                ) from error
            raise
        if not COMMIT.fullmatch(sha):
            raise ModelError(f"Pulling {name} failed: the Hub names no commit for it. Check its address.")
        return Path(snapshot_download(name, revision=sha, allow_patterns=[*MODEL_FILES, *BANK_FILES]))
