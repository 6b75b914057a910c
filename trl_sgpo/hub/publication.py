"""
The published files of a run, for the Hugging Face Hub.

Published are the files that others need to use the model: weights and tokenizer, prompts and limits (`sgpo.json`), an
export of the strategy bank, metrics and the model card. The bank's own files, pickles and logged completions are not.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME

from ..bank.exchange import export_bank
from ..bank.export_files import published
from ..bank.files import BANK_DIRECTORY, EXPORT_FILE, EXPORT_MANIFEST, LEDGER, SNAPSHOT_MANIFEST
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.repositories import MAX_BYTES, own_file
from ..errors import ModelError
from ..files import write_file
from ..inference.loading import adapter_base
from ..inference.model_files import ADAPTER_FILE, MODEL_FILES, SETTINGS_FILE, TOKENIZER, WARMSTART_DIRECTORY
from ..inference.pretrained import load_adapter, load_adapter_config, load_model
from ..inference.settings import TwoPhaseSettings
from ..report.run_files import REFERENCE_FILE, REPORT_FILE, RUN_FILE, TEACHER_FILE
from ..speed.merging import sharing_refusal
from .card_results import HUB_NAME, RESULTS_DIRECTORY, on_benchmarks
from .license import license_of_card
from .model_card import CARD, FACTS_FILE, METRICS_FILE, TrainingFacts, make_card, on_hub


if TYPE_CHECKING:
    from ..bank import StrategyBank

BANK_FILES = tuple(f"{BANK_DIRECTORY}/{name}" for name in (EXPORT_MANIFEST, EXPORT_FILE))

# Needed to resume: the state that transformers writes, the rollouts not yet trained on, other models of the training,
# the bank's snapshot
CHECKPOINT_FILES = (
    *MODEL_FILES,
    FACTS_FILE,
    RUN_FILE,
    TRAINER_STATE_NAME,
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "rollouts_*.safetensors",
    TEACHER_FILE,
    REFERENCE_FILE,
    f"{BANK_DIRECTORY}/{LEDGER}",
    f"{BANK_DIRECTORY}/{SNAPSHOT_MANIFEST}",
)


def _copy(source: Path, target: Path, patterns: tuple[str, ...], link: bool) -> None:
    """Copies files, or hard-links those of a checkpoint: they may be deleted but are never changed."""
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        name = path.relative_to(source)
        path, place = own_file(source, str(name)), target / name
        if path.suffix == ".json" and path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which none of these files is: remove it.")
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
    Merges an adapter into its base model, on the CPU, and saves the result.

    Args:
        adapter (`Path`):
            Directory of the adapter.
        base (`str`):
            Directory of the base model.
        target (`Path`):
            Directory to write.
    """
    import torch

    if load_adapter_config(adapter).is_prompt_learning:
        raise ModelError(
            f"The adapter in {adapter} learns a prompt and cannot be merged into {base}, which others do not have: "
            "train it on a model of the Hub, by its id."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # keeps the random state
            model = load_model(base, dtype="auto")
            adapted = load_adapter(model, adapter, torch_device="cpu")
        if reason := sharing_refusal(adapted):
            raise ValueError(reason)
        adapted.merge_and_unload().save_pretrained(target)
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
    Writes the published files of a run to an empty directory.

    An adapter whose base model is a local directory, as after a warm start, is merged, because others do not have that
    directory. An adapter of a model on the Hub stays an adapter.

    Args:
        source (`Path`):
            Output folder of a run, or a checkpoint.
        target (`Path`):
            Directory to write.
        repo_id (`str`):
            Name of the repository, for the card.
        bank ([`StrategyBank`], *optional*):
            The bank to export.
        facts ([`~trl_sgpo.hub.model_card.TrainingFacts`], *optional*):
            Facts of the training for the card. If `None`, those that the run saved. If they name no licence, model and
            strategies get that of the base model on the Hub, if the Hub can be reached.
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
        _check_own(Path(base))
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
    _publish_settings(source, target)
    if bank is not None:
        export_bank(bank, target / BANK_DIRECTORY, license=license.get("license", "other"))
    _write_metrics(source, target)
    _copy(source, target, (REPORT_FILE,), link=False)
    if evaluation is not None:
        for name, content in on_benchmarks(evaluation).items():
            (target / RESULTS_DIRECTORY).mkdir(exist_ok=True)
            write_file(target / RESULTS_DIRECTORY / f"{name}.yaml", content)
    facts.save(target)
    card = make_card(target, repo_id, facts, license, adapter=base is not None, evaluation=evaluation)
    write_file(target / CARD, card)


def _check_own(base: Path) -> None:
    """Refuses a base model that is reached through a link of a run's folder, or whose files are links."""
    if base.name == WARMSTART_DIRECTORY:
        own_file(base.parent, base.name)
    for path in base.iterdir():
        own_file(base, path.name)


def _publish_settings(source: Path, directory: Path) -> None:
    """Replaces a local path of the embedding model by its last part."""
    path = directory / SETTINGS_FILE
    if path.is_file():
        name = TwoPhaseSettings.load(source).embedding_model
        settings = read_json(path)
        text = json.dumps(settings | {"embedding_model": published(name)}, indent=2)
        write_file(path, text)  # not in place: it may be a hard link to the checkpoint's file


def _write_metrics(source: Path, target: Path) -> None:
    path = own_file(source, TRAINER_STATE_NAME)
    if path.is_file():
        with expect_readable(path):
            state = read_json(path)
            write_metrics(target, state["global_step"], state["epoch"], state["log_history"])
    elif (source / METRICS_FILE).is_file():
        _copy(source, target, (METRICS_FILE,), link=False)


def write_metrics(directory: Path, step: int, epoch: float | None, log: list[dict[str, Any]]) -> None:
    """Writes the training log as `metrics.json`."""
    write_file(directory / METRICS_FILE, json.dumps({"step": step, "epoch": epoch, "log": log}, indent=1))


def stage_checkpoint(source: Path, target: Path, name: str) -> None:
    """
    Adds a checkpoint to resume from and, if the run has one, the warm-started model to the published files.

    Args:
        source (`Path`):
            The checkpoint.
        target (`Path`):
            Folder that [`stage`] wrote.
        name (`str`):
            Subfolder for the checkpoint.
    """
    _copy(source, target / name, CHECKPOINT_FILES, link=True)
    base = adapter_base(source)
    if base is not None and Path(base).is_dir():
        config = target / name / ADAPTER_FILE
        content = read_json(config) | {"base_model_name_or_path": Path(base).name}
        write_file(config, json.dumps(content, indent=2))  # not in place: it may be a hard link
        if Path(base).resolve().parent == source.resolve().parent:
            _copy(Path(base), target / Path(base).name, (*MODEL_FILES, "warmstart.sha256"), link=True)


def base_license(base_model: str) -> dict[str, str]:
    """Licence metadata of a model on the Hub, empty if it has none or the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if not on_hub(base_model):
        return {}
    try:
        card = HfApi().model_info(base_model, timeout=10).card_data
    except (OSError, HTTPError, ValueError):
        return {}
    return {} if card is None else license_of_card(card.to_dict())
