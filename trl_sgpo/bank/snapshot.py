"""Finding a bank beside a model, and opening one without changing it."""

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..checks.paths import if_missing
from ..checks.repositories import is_within
from ..errors import BankError
from .bank import StrategyBank
from .embedding import Embedder
from .export_files import MAX_ROWS, copy_export, is_export, read_export
from .files import BANK_DIRECTORY, LEDGER
from .manifest import is_snapshot
from .strategy import DEFAULT_EMBEDDING_MODEL


def bank_directory(path: str | Path) -> Path:
    """
    The directory of the bank that a path leads to.

    Args:
        path (`str` or `Path`):
            A bank, a snapshot, a checkpoint or a run's output folder.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If there is no bank, or a link leads out of the path to that of someone else.
    """
    for directory in (Path(path), Path(path) / BANK_DIRECTORY):
        if (directory / LEDGER).is_file():
            if not is_within(directory / LEDGER, path):
                raise BankError(
                    f"{directory / LEDGER} is a link out of {path}, or in one: name the bank that it leads to."
                )
            return directory
    if is_export(Path(path)):
        raise BankError(f"{path} is an export: add it to a bank by `trl-sgpo bank import BANK {path}`.")
    raise BankError(
        f"{path} holds no strategy bank{if_missing(path)}: name a directory with a {LEDGER}, or a checkpoint or "
        f"output folder with one in {BANK_DIRECTORY}/."
    )


@contextmanager
def read_only_directory(directory: Path) -> Iterator[Path]:
    """A bank's directory, or a copy of a snapshot, so that no lock, index or migration changes a checkpoint."""
    if not is_snapshot(directory):
        yield directory
        return
    with TemporaryDirectory(prefix="trl-sgpo-bank-") as temporary:
        shutil.copyfile(directory / LEDGER, Path(temporary) / LEDGER)
        try:
            yield Path(temporary)
        except BankError as error:
            raise BankError(str(error).replace(temporary, str(directory))) from error


@contextmanager
def open_read_only(path: str | Path) -> Iterator[StrategyBank]:
    """A bank that is only read: a snapshot is opened as a copy, which leaves it as it is."""
    with read_only_directory(bank_directory(path)) as directory, StrategyBank.restore(directory) as bank:
        yield bank


@contextmanager
def open_copy(path: str | Path) -> Iterator[StrategyBank]:
    """A copy of a bank, so that other processes can open the bank meanwhile."""
    with TemporaryDirectory(prefix="trl-sgpo-bank-") as temporary:
        with open_read_only(path) as bank:
            bank.snapshot(temporary)
        with StrategyBank.restore(temporary) as copy:
            yield copy


@contextmanager
def open_export(directory: Path, embedding_model: str | Embedder, origin: str | None = None) -> Iterator[StrategyBank]:
    """A temporary bank with the strategies of an export in the trust states that its author gave them."""
    with TemporaryDirectory(prefix="trl-sgpo-bank-") as temporary:
        export = Path(temporary) / "export"
        export.mkdir()
        copy_export(directory, export)
        with StrategyBank(Path(temporary) / "bank", embedding_model, MAX_ROWS) as bank:
            strategies, executions, _ = read_export(export)
            bank.merge([replace(s, origin=origin or s.origin) for s in strategies], executions, judge=False)
            yield bank


def embed_with(bank: StrategyBank, name: str | None = None) -> None:
    """
    Sets the embedding model of a bank, by default the one that it was made with.

    Args:
        bank ([`StrategyBank`]):
            The bank.
        name (`str`, *optional*):
            The model that the user named.

    Raises:
        [`~trl_sgpo.errors.BankError`]: The bank was made with a model in a folder, or with one that would have to be
            downloaded. The user must name it, because the files of a bank can be from someone else.
    """
    recorded = bank.made_with or bank.embedding_model
    if name is None and (reason := _not_loaded(recorded)):
        raise BankError(
            f"The bank was made with the embedding model {recorded}, which {reason} because a bank names it: pass "
            f"`--embedding_model {shlex.quote(recorded)}` if you trust it, or another one."
        )
    of_others = "/" in recorded and recorded != DEFAULT_EMBEDDING_MODEL  # a plain name is of sentence-transformers
    bank._name_embedding_model(name or recorded, cached_only=name is None and of_others)


def _not_loaded(recorded: str) -> str | None:
    """Why a model that the files of a bank name is not loaded."""
    from ..hub.card_results import HUB_NAME
    from ..inference.weights import on_this_machine

    if recorded == DEFAULT_EMBEDDING_MODEL:
        return None
    if Path(recorded).is_dir():
        return "is a folder and is not loaded"
    if "/" in recorded and not (HUB_NAME.fullmatch(recorded) and on_this_machine(recorded)):
        return "is not on this machine and is not downloaded"
    return None
