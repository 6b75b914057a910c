"""Reads the records of a run for its report. Missing records are listed in `Run.missing`."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bank.files import BANK_DIRECTORY
from ..bank.snapshot import bank_directory, open_read_only
from ..bank.strategy import Execution, Strategy
from ..checks.json_text import parse_json, read_lines, read_object
from ..checks.paths import if_missing, problem_file
from ..checks.process import CHECKS
from ..checks.repositories import is_within
from ..checks.secrets import redacted
from ..errors import BankError, ConfigError
from ..evaluation.chunks import RESULTS_FILE
from ..evaluation.digest import of_other_weights, weights_digest
from ..method.prompts import problem_text
from .run_files import EARLIER_DIRECTORY, PROGRESS_FILE, REPORT_FILE, RUN_FILE, RUN_SETTINGS_FILE, STATE_FILE
from .valid import DAMAGED, is_count, is_evaluation, is_measured, is_state


if TYPE_CHECKING:
    import pyarrow as pa

MAX_VALUES = 5_000_000  # of a file of rollouts
MAX_BYTES = 128 << 20  # of all rollouts that are read, so that a browser can show the page
MAX_MESSAGES = 1_000  # of a conversation
MAX_PAGES = 512 << 20  # bytes of a file of rollouts, uncompressed
_ROWS = 4  # that are read at a time: a dictionary makes many long texts of one
# Settings of problems that a suite given as NAME=PATH does not have
_NO_SUITE = ("dataset_config", "name", "test_split_size", "prompt_column", "prompt_template")
NO_METRICS = "No metrics yet: they are written when a step is logged (`logging_steps`)."
TEXT_COLUMNS = ("step", "prompt", "completion", "source", "retrieved", "strategy", "execution")


@dataclass(frozen=True)
class Rollout:
    """One logged row: a strategy, its execution, and their rewards."""

    source: str
    strategy: str
    execution: str
    retrieved: list[str]
    parts: dict[str, Any]


@dataclass(frozen=True)
class RolledProblem:
    """A problem with its rollouts of one step."""

    step: int
    text: str
    rollouts: list[Rollout]


@dataclass(frozen=True)
class BankRecord:
    """Everything in a bank."""

    strategies: list[Strategy]
    embeddings: dict[str, np.ndarray]
    executions: dict[str, list[Execution]]

    @cached_property
    def by_id(self) -> dict[str, Strategy]:
        return {strategy.id: strategy for strategy in self.strategies}

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Id of a strategy → ids of the strategies adapted from it."""
        children = defaultdict(list)
        for strategy in self.strategies:
            for parent in strategy.parents:
                children[parent].append(strategy.id)
        return children


@dataclass
class Run:
    """
    A run's output folder, or a checkpoint.

    Args:
        path (`Path`):
            The directory.
        history (`list[dict]`):
            Logged metrics, in the order of their steps.
        steps (`int`), max_steps (`int`):
            Last step with metrics, and the number of planned steps.
        settings (`dict`):
            Names and values.
        measured (`dict`):
            `report.json`: accuracy and transfer before and after training.
        evaluations (`dict[str, dict]`):
            Name → `results.json` of `trl-sgpo eval`. The name says if it is of other weights than the run's.
        bank ([`BankRecord`] or `None`):
            The strategy bank.
        problems (`list[RolledProblem]`):
            Logged problems, spread evenly over all steps.
        logged_steps (`int`):
            Steps with logged rollouts.
        missing (`dict[str, str]`):
            Part of the report → the missing record and how to get it.
    """

    path: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    max_steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    bank: BankRecord | None = None
    problems: list[RolledProblem] = field(default_factory=list)
    logged_steps: int = 0
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def is_finished(self) -> bool:
        return 0 < self.max_steps <= self.steps and not (self.path / PROGRESS_FILE).exists()

    @property
    def has_no_step(self) -> bool:
        """Whether nothing was logged or measured yet, and nothing that was is damaged."""
        return not (self.history or self.measured) and self.missing.get("curves", NO_METRICS) == NO_METRICS

    @property
    def is_empty(self) -> bool:
        return not (self.history or self.settings or self.bank or self.problems)


def read_run(path: str | Path, evaluations: Sequence[str] = (), problems: int = 40) -> Run:
    """
    Reads a run, finished or not.

    Args:
        path (`str` or `Path`):
            Output folder of a run, or a checkpoint.
        evaluations (`Sequence[str]`, *optional*):
            Further output folders of `trl-sgpo eval`.
        problems (`int`, *optional*, defaults to `40`):
            Number of problems to keep rollouts of.

    Returns:
        [`Run`]

    Raises:
        [`ConfigError`]: If the directory is not that of a run, or that of an evaluation has no results.
    """
    run = Run(Path(path))
    _read_all(run, evaluations, problems, copies_only=False)
    if run.is_empty:
        raise _no_run(path)
    return run


def read_watched(path: str | Path, evaluations: Sequence[str] = (), problems: int = 40) -> Run:
    """
    Reads a run that may be training, or not have begun. The arguments are those of [`read_run`].

    Until it has finished, of its bank only copies in checkpoints are opened: one that is open cannot be trained with.

    Returns:
        [`Run`]: With nothing in it if the folder is missing, empty, or that of a run that has just begun.

    Raises:
        [`ConfigError`]: If the directory holds something else, or that of an evaluation has no results.
    """
    run = Run(Path(path))
    _read_all(run, evaluations, problems, copies_only=True)
    begun = (
        (run.path / RUN_FILE).is_file() or not run.path.exists() or (run.path.is_dir() and not any(run.path.iterdir()))
    )
    if run.is_empty and not begun:
        raise _no_run(path)
    return run


def _no_run(path: str | Path) -> ConfigError:
    return ConfigError(
        f"{path} holds no run{if_missing(path)}: name the `output_dir` of a training run, with `checkpoint-*`, "
        f"`completions` or `{BANK_DIRECTORY}` in it, or one of its checkpoints."
    )


def _read_all(run: Run, evaluations: Sequence[str], problems: int, copies_only: bool) -> None:
    _read_history(run)
    _read_settings(run)
    _read_measured(run)
    _read_evaluations(run, evaluations)
    _read_bank(run, copies_only and not run.is_finished)
    _read_rollouts(run, problems)


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_object(path) if is_within(path, path.parent) else None  # not through a link out of the run


def _with_checkpoints(run: Run, name: str) -> list[Path]:
    """Files or directories of that name in the run, written when training ends, and in its checkpoints, last first."""
    copies = sorted(run.path.glob(f"checkpoint-*/{name}"), key=lambda path: _step_of(path.parent), reverse=True)
    return [path for path in (run.path / name, *copies) if path.exists()]


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _read_history(run: Run) -> None:
    state, name = _read_progress(run.path / PROGRESS_FILE), PROGRESS_FILE
    if not state and (last := next(filter(None, map(_read_json, _with_checkpoints(run, STATE_FILE))), None)):
        if state is not None:
            run.missing["progress"] = f"Curves end at the last checkpoint: {PROGRESS_FILE} is damaged."
        state, name = last, STATE_FILE
    if state is None:
        run.missing["curves"] = NO_METRICS
        return
    if not is_state(state):
        run.missing["curves"] = f"The metrics cannot be read: {name} is damaged."
        return
    run.history = [log for log in state["log_history"] if "step" in log]
    run.steps, run.max_steps = state["global_step"], state["max_steps"]


def _read_progress(path: Path) -> dict[str, Any] | None:
    """
    What `trainer_state.json` will hold, as far as training has come. `None` where none is under way, empty where the
    record is damaged.
    """
    if not path.exists():
        return None
    try:
        if not is_within(path, path.parent) or path.stat().st_size > MAX_BYTES:
            return {}
        first, *logs = map(parse_json, read_lines(path))
        steps = max((log["step"] for log in logs), default=0)
        return {"log_history": logs, "global_step": steps, "max_steps": first["max_steps"]}
    except FileNotFoundError:  # training has ended meanwhile
        return None
    except (OSError, *DAMAGED):
        return {}


def _read_settings(run: Run) -> None:
    settings = _read_json(run.path / RUN_SETTINGS_FILE) or _read_json(run.path.parent / RUN_SETTINGS_FILE) or {}
    classes = {"problems": settings["problems"]} if "problems" in settings else {}
    run.settings = redacted(settings) | classes  # earlier versions wrote secrets
    if not run.settings:
        run.missing["settings"] = f"No {RUN_SETTINGS_FILE}: the run is of a version that did not write it."


def _read_measured(run: Run) -> None:
    measured = _read_json(run.path / REPORT_FILE)
    if measured and not is_measured(measured):
        run.missing["measured"] = f"Figures before and after training cannot be read: {REPORT_FILE} is damaged."
    else:
        run.measured = measured or {}


def _read_evaluations(run: Run, named: Sequence[str]) -> None:
    for directory in named:
        if not is_evaluation(_read_json(Path(directory) / RESULTS_FILE)):
            raise ConfigError(f"{directory} holds no evaluation: name the `--output_dir` of `trl-sgpo eval`.")
    results = sorted(run.path.glob(f"**/{RESULTS_FILE}"))
    inside = [path.parent for path in results if EARLIER_DIRECTORY not in path.relative_to(run.path).parts]
    folders = list({folder.resolve(): folder for folder in (*inside, *map(Path, named))}.values())
    names = Counter(folder.resolve().name for folder in folders)
    digest_of = cache(weights_digest)
    for folder in folders:
        found = _read_json(folder / RESULTS_FILE)
        if found is None:
            continue
        if is_evaluation(found):
            name = folder.resolve().name
            name = str(folder) if names[name] > 1 else name
            others = " (of other weights than the run's)" if of_other_weights(found, run.path, digest_of) else ""
            run.evaluations[name + others] = found
        elif {"suites", "transfer"} <= found.keys():
            file = folder.relative_to(run.path) / RESULTS_FILE
            run.missing[f"evaluation {folder}"] = f"An evaluation cannot be read: {file} is damaged."
    if not any(results["transfer"] for results in run.evaluations.values()):
        what = "No transfer measured on unseen problems"
        if run.measured:
            what = "Of transfer, nothing to compare it with and no classes were measured"
        run.missing["transfer"] = f"{what}: run `{_eval_command(run)}`, or name such an evaluation by `--eval`."


def _eval_command(run: Run) -> str:
    """Measures transfer on the problems that the run has not seen, where its settings are enough to name them."""
    split = run.settings.get("dataset_test_split")
    parts = run.settings.get("datasets") or [{"path": run.settings.get("dataset_name")}]
    try:
        more = any(each.get(key) for each in (run.settings, *parts) for key in _NO_SUITE)
        whole = [split == "test" and problem_file(part["path"] or "") is not None for part in parts]  # nothing unseen
        paths = [part["path"] for part in parts if part["path"] and split and not more and not any(whole)]
    except DAMAGED:
        paths = []
    suites = [f"id_{number}={path}@{split}" for number, path in enumerate(paths, 1)] or ["NAME=PATH"]
    output = run.path / "eval"
    command = ["trl-sgpo", "eval", "--model", run.path, "--suites", *suites, "--transfer", "--output_dir", output]
    return shlex.join(map(str, command))


def _read_bank(run: Run, copies_only: bool) -> None:
    refused = ""
    own = run.path / BANK_DIRECTORY
    copies = [directory for directory in _with_checkpoints(run, BANK_DIRECTORY) if directory != own]
    for directory in copies if copies_only else [own, *copies]:
        try:
            if not is_within(bank_directory(str(directory)), run.path):
                raise BankError(f"{directory} is a link out of {run.path}: name the bank that it leads to.")
            with open_read_only(str(directory)) as bank:
                strategies = [*bank.strategies(), *bank.retired()]
                executions = {each.id: bank.executions(each.id) for each in strategies}
                run.bank = BankRecord(strategies, bank.embeddings(), executions)
            break
        except BankError as error:
            refused = refused or (str(error) if directory.exists() else "")
    if run.bank is None and copies_only:
        run.missing["bank"] = refused or "The bank is shown from the first checkpoint on (`save_steps`)."
    elif run.bank is None:
        run.missing["bank"] = refused or "No strategy bank: the run has `use_bank: false`, or has not begun."
    elif refused or copies_only:
        told = refused or "Until training ends, it has the bank for itself."
        run.missing["bank"] = f"What is shown is the bank in {directory.relative_to(run.path)}. {told}"
    elif not run.bank.strategies:
        run.missing["bank"] = "The strategy bank is empty: no strategy has done better than its block yet."


def _read_rollouts(run: Run, problems: int) -> None:
    files = sorted((run.path / "completions").glob("completions_*.parquet"))
    if not files:
        run.missing["rollouts"] = "No rollouts on record: set `log_completions: true` to log those of every step."
        return
    run.logged_steps = len(files)
    chosen = _evenly(files, problems)
    cut = []
    for index, path in enumerate(chosen):
        share = problems * (index + 1) // len(chosen) - problems * index // len(chosen)
        found, is_cut = _rolled_problems(path, MAX_BYTES // len(chosen))
        run.problems += found[:share]
        cut += [path.name] if is_cut else []
    if cut:
        run.missing["rollouts"] = f"Rollouts are left out, because these files are too large: {', '.join(cut)}."
    elif not run.problems:
        run.missing["rollouts"] = "The logged rollouts cannot be read: the files in `completions` are damaged."


def _evenly(values: list[Any], n: int) -> list[Any]:
    """At most `n` of the values, evenly, with the first and the last."""
    if len(values) <= n:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, n).round().astype(int)]


def _rolled_problems(path: Path, most: int) -> tuple[list[RolledProblem], bool]:
    """Problems of a file up to the rollout at which they reach a number of bytes, and whether some are left out."""
    from pyarrow import ArrowException, parquet

    groups: dict[tuple[int, str], list[Rollout]] = defaultdict(list)
    if not path.is_file() or not is_within(path, path.parent):
        return [], False
    try:
        with parquet.ParquetFile(path) as file:
            size = file.metadata
            parts = sum(size.row_group(index).total_byte_size for index in range(size.num_row_groups))
            if size.num_rows * size.num_columns > MAX_VALUES or parts > MAX_PAGES:
                return [], True
            left, columns = size.num_rows, _shown_columns(file.schema_arrow)
            largest = CHECKS.ask("decodes", str(path.resolve()), columns, _ROWS)
            if largest is None or largest > most:
                return [], True
            for batch in file.iter_batches(_ROWS, columns=columns):
                if any(_is_long(column) for column in batch.columns):
                    return [], True
                for row in batch.to_pylist():
                    groups[_step(row), _text(problem_text(row["prompt"]))].append(_rollout(row))
                most, left = most - batch.nbytes, left - len(batch)
                if most < 0:
                    break
    except (ArrowException, OSError, *DAMAGED):  # a run in progress may be writing it
        return [], False
    return [RolledProblem(step, text, rollouts) for (step, text), rollouts in groups.items()], left > 0


def _shown_columns(schema: "pa.Schema") -> list[str]:
    """Columns of texts, conversations and numbers: not lists of others, which may hold any number of values."""
    from pyarrow import types

    texts = (types.is_string, types.is_large_string)
    kinds = (*texts, types.is_null, types.is_boolean, types.is_integer, types.is_floating)

    def is_one(kind: "pa.DataType", of: Any) -> bool:
        return any(is_kind(kind) for is_kind in of)

    def is_shown(name: str, kind: "pa.DataType") -> bool:
        if is_one(kind, kinds):
            return True
        is_listed = (
            name in TEXT_COLUMNS
            and is_one(kind, (types.is_list, types.is_large_list))
            and types.is_struct(kind.value_type)
        )
        return is_listed and all(is_one(part.type, texts) for part in kind.value_type)

    return [field.name for field in schema if is_shown(field.name, field.type)]


def _is_long(column: "pa.Array") -> bool:
    from pyarrow import types

    return (types.is_list(column.type) or types.is_large_list(column.type)) and len(
        column.flatten()
    ) > MAX_MESSAGES * len(column)


def _step(row: dict[str, Any]) -> int:
    if not is_count(row["step"]):
        raise ValueError("no number of a step")
    return row["step"]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _rollout(row: dict[str, Any]) -> Rollout:
    if not isinstance(row.get("correctness"), int | float | None):
        raise TypeError("no outcome")
    return Rollout(
        source=_text(row.get("source") or ""),
        strategy=_text(row.get("strategy") or ""),
        execution=_text(row["execution"] if "execution" in row else problem_text(row["completion"])),
        retrieved=_text(row.get("retrieved") or "").split(),
        parts={key: value for key, value in row.items() if key not in TEXT_COLUMNS},
    )
