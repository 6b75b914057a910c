"""Export, import and publication of the strategies of a bank."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import BankError
from .bank import StrategyBank
from .export_files import make_export, published, read_export, write_export
from .hub import push_export
from .rows import from_row, to_row
from .strategy import TRUST_STATES, ImportReport


logger = logging.getLogger(__name__)


def export_bank(
    bank: StrategyBank,
    directory: str | Path,
    license: str = "other",
    states: Sequence[str] = ("candidate", "trusted"),
) -> Path:
    """
    Write strategies of a bank, with their executions, to a directory that another bank can import.

    A strategy that an import would refuse, for instance because its text has a control character, is
    left out with a warning. Of models that are paths on this machine, only the last part is written.

    Args:
        bank ([`StrategyBank`]):
            The bank.
        directory (`str` or `Path`):
            Directory of the export, which may have nothing but an earlier export in it.
        license (`str`, *optional*, defaults to `"other"`):
            Licence of the strategies, as the Hub names licences.
        states (`Sequence[str]`, *optional*, defaults to `("candidate", "trusted")`):
            Trust states of the strategies to export.

    Returns:
        `Path`: The directory.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If an argument is unknown, or the directory is in use or cannot be written.
    """
    directory = Path(directory)
    if unknown := sorted(set(states) - set(TRUST_STATES)):
        raise BankError(f"states must be of {', '.join(TRUST_STATES)}, got {unknown[0]!r}.")
    entries = []
    for strategy in [*bank.strategies(), *bank.retired()]:
        if strategy.trust not in states:
            continue
        strategy = replace(strategy, model=published(strategy.model))
        executions = bank.executions(strategy.id)
        try:
            from_row(to_row(strategy, executions))
        except ValueError as error:
            logger.warning(
                "Strategy %s is left out of the export since no bank would import it: %s.", strategy.id, error
            )
            continue
        entries.append((strategy, executions))
    write_export(directory, *make_export(entries, bank.made_with or bank.embedding_model, license))
    return directory


def import_bank(
    bank: StrategyBank, directory: str | Path, keep_trust: bool = False, origin: str | None = None
) -> ImportReport:
    """
    Add the strategies of an export to a bank: all that can be, in one transaction, or none if the export is damaged.

    They come into quarantine and without counts, because no execution was verified here. What the bank has on record
    already, retired strategies too, stays as it is.

    Args:
        bank ([`StrategyBank`]):
            The bank.
        directory (`str` or `Path`):
            Directory of the export.
        keep_trust (`bool`, *optional*, defaults to `False`):
            Whether this is a bank of your own, whose trust states, counts and executions are to be merged with those
            of this one.
        origin (`str`, *optional*):
            New `origin` of the strategies. If `None`, `"import"`, or the one they had with `keep_trust`.

    Returns:
        [`ImportReport`]: How many strategies were added, known and left out.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the export is damaged or not what it says. The bank then stays as it is.
    """
    strategies, executions, _ = read_export(directory)
    return bank.import_strategies(strategies, executions, keep_trust, origin)


def push_bank(
    bank: StrategyBank,
    repo_id: str,
    *,
    license: str = "other",
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    message: str | None = None,
    parent_commit: str | None = None,
) -> str:
    """
    Export a bank to a dataset on the Hub, in one commit.

    Args:
        bank ([`StrategyBank`]):
            The bank, of which candidates and trusted strategies are exported.
        repo_id (`str`):
            Name of the dataset, `"user/name"`. It is created if it does not exist.
        license (`str`, *optional*, defaults to `"other"`):
            Licence of the strategies, as the Hub names licences.
        private (`bool`, *optional*, defaults to `False`):
            Whether the dataset must be private. One that exists keeps its visibility.
        token (`str`, *optional*):
            Access token. If `None`, the one that `hf auth login` stored.
        endpoint (`str`, *optional*):
            Address of another Hub.
        message (`str`, *optional*):
            Title of the commit.
        parent_commit (`str`, *optional*):
            Commit that must be the latest. If `None`, the one that is when the push begins.

    Returns:
        `str`: The new commit, 40 hexadecimal digits.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the export or the push fails. The dataset then has all of it or nothing.
    """
    with TemporaryDirectory() as temporary:
        directory = export_bank(bank, Path(temporary) / "export", license)
        return push_export(
            directory,
            repo_id,
            private=private,
            token=token,
            endpoint=endpoint,
            message=message,
            parent_commit=parent_commit,
        )
