"""Finding a bank beside a model, and reading one without changing it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import BankError
from .bank import INDEX, LEDGER, MANIFEST, StrategyBank
from .embedding import Embedder
from .exchange import FILES, MAX_ROWS, copy_export, import_bank


BANK_DIRECTORY = "strategy_bank"  # in a run's output folder and in its checkpoints


def bank_directory(path: str | Path) -> Path:
    """
    The directory of the bank that a path leads to.

    Args:
        path (`str` or `Path`):
            A bank, a snapshot, a checkpoint or a run's output folder.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If there is no bank.
    """
    for directory in (Path(path), Path(path) / BANK_DIRECTORY):
        if (directory / LEDGER).is_file():
            return directory
    if any((Path(path) / name).is_file() for name in FILES.values()):
        raise BankError(f"{path} is an export: add it to a bank by `trl-sgpo bank import BANK {path}`.")
    raise BankError(
        f"{path} holds no strategy bank: name a directory with a {LEDGER}, or a checkpoint or output folder with "
        f"one in {BANK_DIRECTORY}/."
    )


def is_snapshot(directory: Path) -> bool:
    """Whether a bank's directory is a snapshot, as checkpoints have them."""
    # A bank that was continued from a snapshot still has its manifest, but an index too
    return (directory / MANIFEST).is_file() and not (directory / INDEX).exists()


@contextmanager
def to_read(directory: Path) -> Iterator[Path]:
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
def reading(path: str | Path) -> Iterator[StrategyBank]:
    """A bank to read."""
    with to_read(bank_directory(path)) as directory, StrategyBank.restore(directory) as bank:
        yield bank


@contextmanager
def reading_copy(path: str | Path) -> Iterator[StrategyBank]:
    """A copy of a bank to read, so that others can open the bank meanwhile."""
    with TemporaryDirectory(prefix="trl-sgpo-bank-") as temporary:
        with reading(path) as bank:
            bank.snapshot(temporary)
        with StrategyBank.restore(temporary) as copy:
            yield copy


@contextmanager
def reading_export(
    directory: Path, embedding_model: str | Embedder, origin: str | None = None
) -> Iterator[StrategyBank]:
    """A bank, for as long as it is read, of an export with the trust states that its author gave it."""
    with TemporaryDirectory(prefix="trl-sgpo-bank-") as temporary:
        export = Path(temporary) / "export"
        export.mkdir()
        copy_export(directory, export)
        with StrategyBank(Path(temporary) / "bank", embedding_model, MAX_ROWS) as bank:
            import_bank(bank, export, keep_trust=True, origin=origin)
            yield bank
