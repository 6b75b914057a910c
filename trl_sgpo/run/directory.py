"""
The output folder of a run. It belongs to one run, whose id is in `run.json` there and in each of its checkpoints.

A new run sets aside what an earlier one left: it is moved to `earlier/ID/`. Nothing is deleted or overwritten, also if
the process is killed meanwhile.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from secrets import token_hex

from ..bank.files import BANK_DIRECTORY
from ..checks.damaged import expect_readable
from ..checks.json_text import read_object
from ..checks.shapes import count as whole_number
from ..errors import ConfigError
from ..evaluation.chunks import RESULTS_FILE
from ..files import unfinished_directory, write_file
from ..hub.model_card import CARD, FACTS_FILE, METRICS_FILE
from ..inference.model_files import ADAPTER_FILE, MODEL_FILES, WARMSTART_DIRECTORY, WEIGHTS
from ..report.run_files import (
    BEFORE_FILE,
    COMPLETIONS_DIRECTORY,
    EARLIER_DIRECTORY,
    PROGRESS_FILE,
    REPORT_FILE,
    REPORT_PAGE,
    RUN_FILE,
    RUN_SETTINGS_FILE,
    STATE_FILE,
)


_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}(?:-[0-9]{1,9})?")
_CHECKPOINTS = "checkpoint-*"
# A folder without any of these, and without checkpoints, holds no run: what it has is the user's
_EVIDENCE = (*WEIGHTS, "pytorch_model*.bin", "adapter_model.bin", "training_args.bin", BANK_DIRECTORY, STATE_FILE)
_OF_A_RUN = (
    *_EVIDENCE,
    *MODEL_FILES,
    COMPLETIONS_DIRECTORY,
    FACTS_FILE,
    METRICS_FILE,
    CARD,
    BEFORE_FILE,
    PROGRESS_FILE,
    REPORT_FILE,
    REPORT_PAGE,
    RUN_SETTINGS_FILE,
)


@dataclass(frozen=True)
class Run:
    """
    A run.

    Args:
        id (`str`):
            Its id.
        earlier (`Path`, *optional*):
            Folder for what an earlier run left in its output folder. `None` if the run continues.
    """

    id: str
    earlier: Path | None = None


def run_id(directory: str | Path) -> str | None:
    """
    Id of the run that an output folder or a checkpoint belongs to, `None` if a version without ids wrote it.

    Raises:
        [`ConfigError`]: It is none that a run writes. It names a folder, so that any text could name any folder.
    """
    file = Path(directory) / RUN_FILE
    found = read_object(file)
    if found is None or "id" not in found:
        return None
    if not isinstance(found["id"], str) or _ID.fullmatch(found["id"]) is None:
        raise ConfigError(f"The `id` in {file} is none of a run: delete the file.")
    return found["id"]


def write_run_id(directory: str | Path, run: str) -> None:
    """Writes the id of a run to its output folder, or to a checkpoint."""
    write_file(Path(directory) / RUN_FILE, json.dumps({"id": run}))


def begin_run(
    output_dir: str | Path,
    checkpoint: str | None = None,
    kept: Collection[str] = (),
    inputs: Iterable[str | None] = (),
) -> Run:
    """
    Makes an output folder that of a run: sets aside what belongs to another one. One process calls it for all.

    Args:
        output_dir (`str` or `Path`):
            The folder.
        checkpoint (`str`, *optional*):
            Checkpoint that the run resumes from. Later ones of the same run in the folder are set aside, with logged
            rollouts and evaluations after its step.
        kept (`Collection[str]`, *optional*):
            Names of what stays, because the run uses it, such as its bank.
        inputs (`Iterable[str]`, *optional*):
            What else the run reads. Those that are no paths are ignored.

    Returns:
        [`Run`]

    Raises:
        [`ConfigError`]: An input is among what would be set aside, or that cannot be moved.
    """
    directory = Path(output_dir)
    found = run_id(directory)
    if checkpoint is None:
        run, leave = _new_id(time.time()), _left(directory, kept)
    else:
        source = Path(checkpoint)
        inside = source.resolve().parent == directory.resolve()
        own = run_id(source)
        same = own == found and (inside or own is not None)
        run = own or (found if same else None) or _new_id(time.time())
        leave = _later(directory, source) if same else _left(directory, kept)
        leave = [name for name in leave if not inside or name != source.name]
        if own is None and inside:
            write_run_id(source, run)
        if same:
            _set_aside(directory, leave, run)
            write_run_id(directory, run)
            return Run(run)
    _check_inputs(directory, leave, inputs)
    earlier = directory / EARLIER_DIRECTORY / (found or _new_id(_written(directory, leave)))
    if leave:
        if found is None:  # so that this folder is found again, if the process is killed
            write_run_id(directory, earlier.name)
        earlier = _set_aside(directory, [*leave, RUN_FILE], earlier.name)
        print(_told(directory, earlier))
    directory.mkdir(parents=True, exist_ok=True)
    write_run_id(directory, run)
    return Run(run, earlier)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """
    Finds the last complete checkpoint of the run that an output folder belongs to.

    Args:
        output_dir (`str` or `Path`):
            The folder.

    Returns:
        `str` or `None`: A directory, `None` if there is no complete checkpoint of this run.

    Raises:
        [`ConfigError`]: It is unknown to which run checkpoints of a version without ids belong.
    """
    directory = Path(output_dir)
    complete = [path for path in _checkpoints(directory) if is_complete(path)]
    run = run_id(directory)
    if run is None and not _of_one_run(complete):
        raise ConfigError(
            f"The checkpoints in {directory} are of several runs, and they do not say which is the last: name one, "
            f"such as `--resume_from_checkpoint {complete[-1]}`."
        )
    own = [path for path in complete if run is None or run_id(path) == run]
    return str(own[-1]) if own else None


def is_complete(checkpoint: Path) -> bool:
    """Whether the trainer state, which is written last, can be read."""
    return read_object(checkpoint / STATE_FILE) is not None


def holds_adapters(directory: Path) -> bool:
    """Whether a run's output folder holds an adapter, or a checkpoint with one, which need their base model."""
    return any(
        path.is_file() for pattern in ("", f"{_CHECKPOINTS}/") for path in directory.glob(pattern + ADAPTER_FILE)
    )


def _told(directory: Path, earlier: Path) -> str:
    told = f"What an earlier run left in {directory} is now in {earlier}."
    complete = [path for path in _checkpoints(earlier) if is_complete(path)]
    if complete:
        told += f" To continue that run: `--resume_from_checkpoint {complete[-1]}`."
    if (earlier / BANK_DIRECTORY).is_dir():
        told += f" To start with its strategies: `--bank_path {earlier / BANK_DIRECTORY}`."
    return told


def _new_id(seconds: float) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(seconds))}-{token_hex(2)}"


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in the order of their steps."""
    numbered = [
        (int(path.name.rsplit("-", 1)[1]), path)
        for path in directory.glob(_CHECKPOINTS)
        if path.name.rsplit("-", 1)[1].isdecimal()
    ]
    return [path for _, path in sorted(numbered)]


def _of_one_run(checkpoints: list[Path]) -> bool:
    """Whether the log of each checkpoint goes on in that of the last."""
    states = [read_object(path / STATE_FILE) or {} for path in checkpoints]
    logs = [[json.dumps(entry) for entry in state.get("log_history", [])] for state in states]
    same = all(log == logs[-1][: len(log)] for log in logs)
    return same and len({run_id(path) for path in checkpoints}) < 2


def _left(directory: Path, kept: Collection[str]) -> list[str]:
    """
    Names of what a run left in its output folder, checkpoints first, so that none of them is resumed any more. What is
    kept is neither among them nor evidence of a run.
    """
    checkpoints = [path.name for path in _checkpoints(directory)]
    if not (checkpoints or (directory / RUN_FILE).is_file() or set(_matches(directory, _EVIDENCE)) - {*kept}):
        return []
    names = [*checkpoints, *_matches(directory, _OF_A_RUN), *_evaluations(directory)]
    return [name for name in names if name not in kept]


def _matches(directory: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in directory.glob(pattern)})


def _evaluations(directory: Path) -> dict[str, Path]:
    """Folders of `trl-sgpo eval` with results of the model in this folder, or of a checkpoint in it, and which."""
    found = {}
    for path in sorted(directory.glob(f"*/{RESULTS_FILE}")):
        settings = (read_object(path) or {}).get("settings")
        try:
            model = Path(str(settings.get("model") if isinstance(settings, dict) else os.devnull)).resolve()
        except (OSError, RuntimeError, ValueError):  # no name of a folder, or links that lead in a circle
            continue
        if directory.resolve() in (model, model.parent):
            found[path.parent.name] = model
    return found


def _later(directory: Path, checkpoint: Path) -> list[str]:
    """
    Complete checkpoints, logged rollouts and evaluations after a checkpoint that is resumed: they are of a training
    that it does not continue.
    """
    step = _step(checkpoint)
    after = [path for path in _checkpoints(directory) if is_complete(path) and _number(path, "-") > step]
    logged = sorted(directory.glob(f"{COMPLETIONS_DIRECTORY}/completions_*.parquet"))
    after += [path for path in logged if path.stem.rsplit("_", 1)[1].isdecimal() and _number(path, "_") > step]
    evaluations = [name for name, model in _evaluations(directory).items() if _step(model) > step]
    return [*(str(path.relative_to(directory)) for path in after), *evaluations]


def _step(directory: Path) -> int:
    """Step of the weights in an output folder or a checkpoint."""
    with expect_readable(directory / STATE_FILE, "resume from another checkpoint, or delete it"):
        step = (read_object(directory / STATE_FILE) or {}).get("global_step", 0)
        whole_number(step, "`global_step`")
        return int(step)


def _number(path: Path, before: str) -> int:
    return int(path.stem.rsplit(before, 1)[1])


def _written(directory: Path, names: list[str]) -> float:
    return max(((directory / name).stat().st_mtime for name in names), default=time.time())


def _check_inputs(directory: Path, leave: list[str], inputs: Iterable[str | None]) -> None:
    moved = {(directory / name).resolve() for name in leave}
    for given in inputs:
        path = Path(given or os.devnull).resolve()
        if moved and (path == directory.resolve() or not moved.isdisjoint([path, *path.parents])):
            raise ConfigError(
                f"The new run reads {given}, which an earlier run left in its output folder: name another "
                "`--output_dir`."
            )


def _set_aside(directory: Path, names: list[str], run: str) -> Path:
    """Moves files and folders, one by one, to a folder where none of them is yet. Returns it."""
    earlier = directory / EARLIER_DIRECTORY
    folders = (earlier / (run if number == 1 else f"{run}-{number}") for number in count(1))
    target = next(folder for folder in folders if not any((folder / name).exists() for name in names))
    if not names:
        return target
    for folder in (earlier, target, *((target / name).parent for name in names)):
        if folder.is_symlink():
            raise ConfigError(f"{folder} is a link to another folder: delete it.")
    target.mkdir(parents=True, exist_ok=True)
    try:
        if any(name == ADAPTER_FILE or (directory / name / ADAPTER_FILE).is_file() for name in names):
            _keep_base(directory / WARMSTART_DIRECTORY, target / WARMSTART_DIRECTORY)
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            os.rename(directory / name, target / name)
    except OSError as error:
        raise ConfigError(
            f"What an earlier run left in {directory} cannot be moved to {target} ({error}): move it, or name another "
            "`--output_dir`."
        ) from error
    return target


def _keep_base(warm: Path, target: Path) -> None:
    """Adapters keep the base model that they were trained on, though a later warm start replaces it."""
    if not warm.is_dir() or target.exists():
        return
    with unfinished_directory(target) as unfinished:
        for path in warm.iterdir():
            if path.is_file():  # a link to a folder may lead to one that it lies in
                _link(str(path), str(unfinished / path.name))
        os.replace(unfinished, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
