"""
Runs on the Hugging Face Hub: what of a run is published, pushing it in one commit, and pulling it.

Published is what others need to use the model: weights and tokenizer, the settings of the two phases, an export of the
strategy bank, metrics and the model card. Never published are the bank's own files, pickles and logged completions.
"""

import fnmatch
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..bank.exchange import export_bank
from ..bank.export import published
from ..bank.files import BANK_DIRECTORY, EXPORT_FILE, EXPORT_MANIFEST, LEDGER, SNAPSHOT_MANIFEST
from ..bank.hub import COMMIT
from ..bank.snapshot import open_read_only
from ..errors import ModelError
from .errors import may_pass, readable_errors
from .model_card import (
    CARD,
    FACTS_FILE,
    HUB_NAME,
    METRICS_FILE,
    REPORT_FILE,
    RESULTS_DIRECTORY,
    TrainingFacts,
    make_card,
    on_hub,
)


if TYPE_CHECKING:
    from ..bank import StrategyBank

SETTINGS_FILE = "sgpo.json"
TRAINER_STATE = "trainer_state.json"
ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
CONFIGS = ("config.json", "generation_config.json", ADAPTER)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
MODEL_FILES = (*WEIGHTS, *CONFIGS, *TOKENIZER, SETTINGS_FILE)
BANK_FILES = tuple(f"{BANK_DIRECTORY}/{name}" for name in (EXPORT_MANIFEST, EXPORT_FILE))

# What resuming needs: the state that transformers writes, the rollouts still to be trained on, the bank's snapshot
CHECKPOINT_FILES = (
    *MODEL_FILES,
    FACTS_FILE,
    TRAINER_STATE,
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "rollouts_*.safetensors",
    f"{BANK_DIRECTORY}/{LEDGER}",
    f"{BANK_DIRECTORY}/{SNAPSHOT_MANIFEST}",
)
# A push replaces these at the top of a repository, also where an earlier one, or TRL's trainer, left others of them
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
PAUSES = (10.0, 60.0)  # seconds before a push that failed for a passing reason is tried again


# Publishing


def adapter_base(directory: str | Path) -> str | None:
    """
    What an adapter belongs to.

    Args:
        directory (`str` or `Path`):
            Directory of a model or an adapter.

    Returns:
        `str` or `None`: A directory, a Hub id, or `None` if this is no adapter. A run that was moved is found to hold
        its warm-started model still.
    """
    try:
        base = json.loads(Path(directory, ADAPTER).read_text())["base_model_name_or_path"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{Path(directory, ADAPTER)} cannot be read: save the adapter again.") from error
    if not Path(base).is_dir():
        for run in (Path(directory), Path(directory).resolve().parent):
            if (run / Path(base).name / "config.json").is_file():
                return str(run / Path(base).name)
    return str(base)


def _copy(source: Path, target: Path, patterns: tuple[str, ...], link: bool) -> None:
    """Copies files, or links those of a checkpoint, which are never written again but may be deleted."""
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                place.hardlink_to(path)
                continue
            except OSError:
                pass
        shutil.copyfile(path, place)


def merge_adapter(adapter: Path, base: str, target: Path) -> None:
    """
    Writes the model that an adapter and the model it belongs to are together, on the CPU.

    Args:
        adapter (`Path`):
            Directory of the adapter.
        base (`str`):
            Directory of the model it belongs to.
        target (`Path`):
            Where to.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read: training must not notice
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            model = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
        model.merge_and_unload().save_pretrained(target)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The adapter in {adapter} and its model in {base} cannot be merged: {error}") from error


def stage(
    source: Path,
    target: Path,
    repo_id: str,
    bank: "StrategyBank | None",
    facts: TrainingFacts | None = None,
    evaluation: Path | None = None,
    link: bool = False,
) -> None:
    """
    Writes what is published of a run to an empty directory.

    An adapter of a model in a local directory, as a warm start leaves it, is merged, because nobody else has that
    directory. An adapter of a model on the Hub stays one.

    Args:
        source (`Path`):
            Output folder of a run, or a checkpoint.
        target (`Path`):
            Where to.
        repo_id (`str`):
            Name of the repository, for the card.
        bank ([`StrategyBank`], *optional*):
            The bank, of which an export is written.
        facts ([`~trl_sgpo.hub.model_card.TrainingFacts`], *optional*):
            What the card says of the training. If `None`, what the run saved. Without a licence there, model and
            strategies get that of the base model on the Hub, if it can be asked.
        evaluation (`Path`, *optional*):
            Output folder of `trl-sgpo eval`.
        link (`bool`, *optional*, defaults to `False`):
            Whether files may be linked instead of copied.

    Raises:
        [`ModelError`]: There is no model, it has no safetensors, or its adapter cannot be merged.
    """
    facts = facts or TrainingFacts.load(source)
    license = facts.license or base_license(facts.base_model)
    base = adapter_base(source)
    if base is not None and Path(base).is_dir():
        _copy(source, target, (*TOKENIZER, SETTINGS_FILE), link)
        merge_adapter(source, base, target)
        base = None
    else:
        if base is not None and not HUB_NAME.fullmatch(base):
            raise ModelError(
                f"The adapter in {source} belongs to {base}, which is no directory here: push it from where that is, "
                f"or put the model back."
            )
        _copy(source, target, MODEL_FILES, link)
    if not any(target.glob("*.safetensors")):
        raise ModelError(f"{source} holds no model in safetensors: name a run's output folder or a checkpoint.")
    _publish_settings(target)
    if bank is not None:
        export_bank(bank, target / BANK_DIRECTORY, license=license.get("license", "other"))
    _write_metrics(source, target)
    if (source / REPORT_FILE).is_file():
        shutil.copyfile(source / REPORT_FILE, target / REPORT_FILE)
    if evaluation is not None:
        _copy(evaluation / "hub", target, (f"{RESULTS_DIRECTORY}/*.yaml",), link=False)
    facts.save(target)
    card = make_card(target, repo_id, facts, license, adapter=base is not None, evaluation=evaluation)
    (target / CARD).write_text(card, encoding="utf-8")


def _publish_settings(directory: Path) -> None:
    """Leaves of an embedding model's path on this machine only the last part."""
    path = directory / SETTINGS_FILE
    if path.is_file():
        settings = json.loads(path.read_text())
        text = json.dumps(settings | {"embedding_model": published(settings["embedding_model"])}, indent=2)
        path.unlink()  # it may be a link to the checkpoint's
        path.write_text(text)


def _write_metrics(source: Path, target: Path) -> None:
    if (source / TRAINER_STATE).is_file():
        state = json.loads((source / TRAINER_STATE).read_text())
        write_metrics(target, state["global_step"], state["epoch"], state["log_history"])
    elif (source / METRICS_FILE).is_file():
        shutil.copyfile(source / METRICS_FILE, target / METRICS_FILE)


def write_metrics(directory: Path, step: int, epoch: float | None, log: list[dict[str, Any]]) -> None:
    """Writes what was logged during training as `metrics.json`."""
    (directory / METRICS_FILE).write_text(json.dumps({"step": step, "epoch": epoch, "log": log}, indent=1))


def stage_checkpoint(source: Path, target: Path, name: str) -> None:
    """
    Adds to what is published a checkpoint to resume from and, if the run has one, the model that was warm-started.

    Args:
        source (`Path`):
            The checkpoint.
        target (`Path`):
            Where the publication is.
        name (`str`):
            Folder of the checkpoint in it.
    """
    _copy(source, target / name, CHECKPOINT_FILES, link=True)
    base = adapter_base(source)
    if base is not None and Path(base).is_dir():
        config = target / name / ADAPTER
        content = json.loads(config.read_text()) | {"base_model_name_or_path": Path(base).name}
        config.unlink()  # it may be a link to the checkpoint's
        config.write_text(json.dumps(content, indent=2))
        if Path(base).resolve().parent == source.resolve().parent:
            _copy(Path(base), target / Path(base).name, (*MODEL_FILES, "warmstart.sha256"), link=True)


def base_license(base_model: str) -> dict[str, str]:
    """Licence metadata of a model on the Hub, or nothing if it has none or cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if not on_hub(base_model):
        return {}
    try:
        card = HfApi().model_info(base_model, timeout=10).card_data
    except (OSError, HTTPError, ValueError):
        return {}
    given = {} if card is None else card.to_dict()
    return {key: str(given[key]) for key in ("license", "license_name", "license_link") if given.get(key)}


# Pushing


def claim(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """
    Makes sure that a push can succeed, before any long work: the token may write, and the repository exists.

    Args:
        repo_id (`str`):
            Name of the model, `"user/name"`.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        private (`bool`, *optional*):
            Whether it must be private.

    Returns:
        `str`: The full name.

    Raises:
        [`ModelError`]: If it cannot.
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
    Makes a repository's published files those of a folder, in one commit. Other files in it stay.

    Args:
        folder (`Path`):
            What [`stage`] wrote.
        repo_id (`str`):
            Name of the model.
        message (`str`):
            Title of the commit.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        revision (`str`, *optional*):
            Branch, which is made if it does not exist. If `None`, the main one.

    Returns:
        `str`: The commit, 40 hexadecimal digits.

    Raises:
        [`ModelError`]: If the push fails, also a minute later if that could help. The repository then has all of it
        or nothing.
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
    Stages what is published of a run, so that training may go on, and pushes it in a thread, one after the other.

    Args:
        source (`Path`):
            Output folder of the run, or a checkpoint in it.
        repo_id (`str`):
            Name of the model.
        message (`str`):
            Title of the commit.
        bank ([`StrategyBank`], *optional*):
            The bank, of which an export is written.
        facts ([`~trl_sgpo.hub.model_card.TrainingFacts`]):
            What the card says of the training.
        checkpoint (`str`, *optional*):
            Folder in the repository for all of the checkpoint that `source` is, to resume from.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        revision (`str`, *optional*):
            Branch. If `None`, the main one.

    Returns:
        `Future`: Gives the commit, or a [`ModelError`] that says how to push again.
    """
    with ExitStack() as opened:
        folder = opened.enter_context(staging(source))
        stage(source, folder, repo_id, bank, facts, link=checkpoint is not None or (source / TRAINER_STATE).is_file())
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
    found = api.model_info(repo_id, revision=revision)
    added = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    folders = {name.split("/")[0] for name in added if "/" in name}
    old = {sibling.rfilename for sibling in found.siblings or ()} - added.keys()
    gone = [name for name in sorted(old) if name.split("/")[0] in folders or _is_replaced(name)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, path) for name, path in added.items()),
        *(CommitOperationDelete(name) for name in gone),
    ]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=found.sha)
    return commit.oid


def _is_replaced(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and ("/" in name) == ("/" in pattern) for pattern in _REPLACED)


@contextmanager
def staging(run: str | Path) -> Iterator[Path]:
    """A directory on the disk of a run or of its checkpoint, which has room for it. It is deleted in the end."""
    run = Path(run).resolve()
    checkpoint = re.fullmatch(r"checkpoint-\d+", run.name)  # which may be deleted meanwhile
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


# Pulling


def pull_run(name: str, revision: str | None = None) -> Path | None:
    """
    Downloads a model that was pushed by `trl_sgpo`, with the export of its bank, at one commit, into the Hub's cache.

    Only safetensors, configurations, tokenizer files and the export are downloaded, no code and no pickles.

    Args:
        name (`str`):
            A Hub id, or anything else.
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

    from ..inference.weights import local_weights

    if Path(name).is_dir() or not HUB_NAME.fullmatch(name) or local_weights(name) != name:
        if revision is not None:
            raise ModelError(f"`--revision` is for models on the Hub, and {name} is not one: leave it out.")
        return None
    with readable_errors(f"Pulling {name}", ModelError):
        try:
            sha = Path(hf_hub_download(name, SETTINGS_FILE, revision=revision)).parent.name
        except (EntryNotFoundError, RepositoryNotFoundError) as error:
            if revision is None:
                return None  # another model, or one that is found to be missing when it is loaded
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise ModelError(
                    f"{name} has no {SETTINGS_FILE} at {revision}: `--revision` is for models that `trl-sgpo` pushed."
                ) from error
            raise
        if not COMMIT.fullmatch(sha):
            raise ModelError(f"Pulling {name} failed: the Hub names no commit for it. Check its address.")
        return Path(snapshot_download(name, revision=sha, allow_patterns=[*MODEL_FILES, *BANK_FILES]))
