"""Pushing a run to the Hugging Face Hub in one commit."""

import fnmatch
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transformers.trainer import TRAINER_STATE_NAME

from ..bank.files import BANK_DIRECTORY
from ..bank.snapshot import open_read_only
from ..errors import ModelError
from ..inference.model_files import MODEL_FILES
from ..report.run_files import REPORT_FILE
from .card_results import RESULTS_DIRECTORY
from .errors import may_pass, readable_errors
from .model_card import FACTS_FILE, METRICS_FILE, TrainingFacts
from .publication import stage, stage_checkpoint


if TYPE_CHECKING:
    from ..bank import StrategyBank


# A push deletes files of these names that it does not write: those of an earlier push, or of TRL's trainer
_REPLACED = (
    *MODEL_FILES,
    FACTS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    f"{BANK_DIRECTORY}/*",
    f"{RESULTS_DIRECTORY}/*",
    "training_args.bin",
    "pytorch_model*.bin",
    "adapter_model.bin",
)
_pusher = ThreadPoolExecutor(1, "trl-sgpo-push")
PAUSES = (10.0, 60.0)  # seconds before a push is retried after a temporary failure


def claim(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """
    Checks that the token may write and creates the repository, so that errors are raised before any long work.

    Args:
        repo_id (`str`):
            Name of the model, `"user/name"`.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        private (`bool`, *optional*):
            Whether the repository must be private.

    Returns:
        `str`: The full name.

    Raises:
        [`ModelError`]: The push would fail.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with readable_errors(f"Preparing {repo_id} on the Hub", ModelError):
        access = api.whoami().get("auth", {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise ModelError(
                f"The access token may only read, so {repo_id} cannot be pushed: make one that may write at "
                "https://huggingface.co/settings/tokens and log in with `hf auth login`."
            )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ModelError(f"{repo_id} is public: make it private on the Hub first, or push to a new name.")
    return repo_id


def push_folder(
    folder: Path, repo_id: str, message: str, token: str | None = None, revision: str | None = None
) -> str:
    """
    Replaces a repository's published files by those of a folder, in one commit. Other files in it stay.

    Args:
        folder (`Path`):
            Folder that [`~trl_sgpo.hub.publication.stage`] wrote.
        repo_id (`str`):
            Name of the model.
        message (`str`):
            Title of the commit.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        revision (`str`, *optional*):
            Branch, created if it does not exist. If `None`, the main one.

    Returns:
        `str`: The commit, 40 hexadecimal digits.

    Raises:
        [`ModelError`]: If the push fails, after retries if the failure may be temporary. The commit is then
        there as a whole or not at all.
    """
    for pause in (*PAUSES, None):
        try:
            with readable_errors(f"Pushing to {repo_id}", ModelError):
                return _push(folder, repo_id, message, token, revision)
        except ModelError as error:
            if pause is None or not may_pass(error):
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def start_push(
    source: Path,
    repo_id: str,
    message: str,
    bank: "StrategyBank | None",
    facts: TrainingFacts,
    checkpoint: str | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> Future[str]:
    """
    Writes the published files of a run to a temporary folder and pushes them in a thread, while training continues.

    Args:
        source (`Path`):
            Output folder of the run, or a checkpoint in it.
        repo_id (`str`):
            Name of the model.
        message (`str`):
            Title of the commit.
        bank ([`StrategyBank`], *optional*):
            The bank to export.
        facts ([`~trl_sgpo.hub.model_card.TrainingFacts`]):
            Facts of the training for the card.
        checkpoint (`str`, *optional*):
            Folder in the repository for the whole checkpoint `source`, to resume from.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        revision (`str`, *optional*):
            Branch. If `None`, the main one.

    Returns:
        `Future`: Gives the commit, or a [`ModelError`] that says how to push again.
    """
    with ExitStack() as opened:
        folder = opened.enter_context(staging(source))
        stage(
            source,
            folder,
            repo_id,
            bank,
            facts,
            link=checkpoint is not None or (source / TRAINER_STATE_NAME).is_file(),
        )
        if checkpoint is not None:
            stage_checkpoint(source, folder, checkpoint)
        kept = opened.pop_all()

    def push() -> str:
        with kept:
            try:
                return push_folder(folder, repo_id, message, token, revision)
            except ModelError as error:
                raise ModelError(
                    f"{error} {repo_id} is as it was, and the model is saved in {source}. To push it again: "
                    f"trl-sgpo push {source} {repo_id}"
                ) from error

    return _pusher.submit(push)


def _push(folder: Path, repo_id: str, message: str, token: str | None, revision: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    current = api.model_info(repo_id, revision=revision)
    added = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    folders = {name.split("/")[0] for name in added if "/" in name}
    old = {sibling.rfilename for sibling in current.siblings or ()} - added.keys()
    outdated = [name for name in sorted(old) if name.split("/")[0] in folders or _is_replaced(name)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, path) for name, path in added.items()),
        *(CommitOperationDelete(name) for name in outdated),
    ]
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, parent_commit=current.sha
    )
    return commit.oid


def _is_replaced(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and ("/" in name) == ("/" in pattern) for pattern in _REPLACED)


@contextmanager
def staging(run: str | Path) -> Iterator[Path]:
    """A temporary directory on the same disk as the run, so that files can be hard-linked."""
    run = Path(run).resolve()
    checkpoint = re.fullmatch(r"checkpoint-\d+", run.name)  # a checkpoint may be deleted while it is pushed
    with TemporaryDirectory(prefix=".hub-", dir=run.parent if checkpoint else run) as directory:
        yield Path(directory)


@contextmanager
def bank_of(run: Path) -> Iterator["StrategyBank | None"]:
    """The bank in a run's folder or checkpoint, if there is one."""
    if not (run / BANK_DIRECTORY).is_dir():
        yield None
        return
    with open_read_only(run) as bank:
        yield bank
