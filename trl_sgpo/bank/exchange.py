"""
Exchange of strategies between banks.

An export is a directory with one file of strategies, in JSONL or Parquet, and a manifest. It has no embeddings, which
the importing bank makes itself, and nothing that is run or unpacked when read. It is read as what a stranger may have
sent: all of it is checked before a bank is touched, and no other file of the directory is opened.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any, Literal

from .._version import __version__
from ..errors import BankError
from .bank import StrategyBank
from .ledger import durable_replace
from .parquet import from_parquet, to_parquet
from .rows import count, expect_keys, from_json, from_jsonl, from_row, items, line, to_jsonl, to_row
from .strategy import TRUST_STATES, Execution, Strategy


logger = logging.getLogger(__name__)

FileFormat = Literal["jsonl", "parquet"]

FORMAT, FORMAT_VERSION = "trl-sgpo-strategies", 1
MANIFEST = "manifest.json"
FILES: dict[str, str] = {"jsonl": "strategies.jsonl", "parquet": "strategies.parquet"}
MAX_FILE_BYTES = 256 * 2**20  # it is read into memory, and 100,000 strategies with eight executions each take 150
MAX_MANIFEST_BYTES = 2**20
MAX_ROWS = 200_000  # twice as many as a bank was measured with

_MANIFEST_KEYS = (
    "format",
    "format_version",
    "file",
    "sha256",
    "size",
    "count",
    "trust",
    "classes",
    "models",
    "embedding_model",
    "license",
    "trl_sgpo_version",
    "created",
)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImportReport:
    """
    What became of the strategies of an export.

    Args:
        added (`int`):
            Strategies that are new in the bank.
        known (`int`):
            Strategies that the bank had on record already.
        near_copies (`int`):
            Strategies left out because the bank has a near-copy of them.
        quarantined (`int`):
            Those of the added ones that are in quarantine.
        retired (`int`, *optional*, defaults to `0`):
            Strategies that are new and kept on record only: their class is full, or they came as retired ones.
    """

    added: int
    known: int
    near_copies: int
    quarantined: int
    retired: int = 0


# Writing


def published(name: str) -> str:
    """A model's name, of which only the last part is told if it is a path on this machine."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _about(strategies: Sequence[Strategy]) -> dict[str, Any]:
    """What a manifest says of the strategies themselves."""
    return {
        "count": len(strategies),
        "trust": dict(sorted(Counter(strategy.trust for strategy in strategies).items())),
        "classes": len({strategy.problem_class for strategy in strategies}),
        "models": sorted({strategy.model for strategy in strategies} - {""}),
    }


def make_export(
    entries: Sequence[tuple[Strategy, Sequence[Execution]]],
    embedding_model: str,
    file_format: FileFormat = "jsonl",
    license: str = "other",
) -> tuple[str, bytes, bytes]:
    """
    The two files of an export.

    Args:
        entries (`Sequence[tuple[Strategy, Sequence[Execution]]]`):
            The strategies, each with its executions.
        embedding_model (`str`):
            Name of the model the bank embeds with.
        file_format (`str`, *optional*, defaults to `"jsonl"`):
            `"jsonl"` or `"parquet"`.
        license (`str`, *optional*, defaults to `"other"`):
            Licence of the strategies, as the Hub names licences.

    Returns:
        `tuple[str, bytes, bytes]`: Name and content of the file of strategies, and content of the manifest.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the format is unknown, the licence no name of one, or the export too large.
    """
    if file_format not in FILES:
        raise BankError(f"file_format must be one of {', '.join(FILES)}, got {file_format!r}.")
    if not _LICENSE.fullmatch(license):
        raise BankError(
            f"license must be the Hub's name of a licence, such as apache-2.0, cc-by-4.0 or other, got {license!r}."
        )
    rows = [to_row(strategy, executions) for strategy, executions in entries]
    data = to_jsonl(rows) if file_format == "jsonl" else to_parquet(rows)
    if len(rows) > MAX_ROWS or len(data) > MAX_FILE_BYTES:
        raise BankError(
            f"The export would have {len(rows)} strategies in {len(data) >> 20} MiB, and an import takes up to "
            f"{MAX_ROWS} in {MAX_FILE_BYTES >> 20} MiB: export fewer trust states."
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "file": FILES[file_format],
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        **_about([strategy for strategy, _ in entries]),
        "embedding_model": published(embedding_model),
        "license": license,
        "trl_sgpo_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return FILES[file_format], data, (json.dumps(manifest, indent=2) + "\n").encode()


def write_export(directory: Path, file: str, data: bytes, manifest: bytes) -> None:
    """
    Write the two files of an export, or replace those of an earlier one.

    Args:
        directory (`Path`):
            Where to. It is created if it does not exist.
        file (`str`):
            Name of the file of strategies.
        data (`bytes`):
            Its content.
        manifest (`bytes`):
            Content of the manifest, which is written last: what a crash leaves is no export that could be imported.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If there is anything else in the directory, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own = {MANIFEST, *FILES.values()}
        foreign = sorted(path.name for path in directory.iterdir() if path.name.removesuffix(".tmp") not in own)
        if foreign:
            raise BankError(f"{directory} has {foreign[0]!r} in it: name a directory for nothing but the export.")
        for name, content in ((file, data), (MANIFEST, manifest)):
            temporary = directory / f"{name}.tmp"
            temporary.unlink(missing_ok=True)
            temporary.write_bytes(content)
            durable_replace(temporary, directory / name)
        for name in own - {MANIFEST, file}:
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise BankError(
            f"{directory} cannot be written: {error.strerror}. Name a directory you may write to, on a disk with room."
        ) from error


def export_bank(
    bank: StrategyBank,
    directory: str | Path,
    file_format: FileFormat = "jsonl",
    license: str = "other",
    states: Sequence[str] = ("candidate", "trusted"),
) -> Path:
    """
    Write strategies of a bank, with their executions, to a directory that another bank can import.

    A strategy that an import would refuse, for instance because its text has a control token of a chat template, is
    left out with a warning. Of models that are paths on this machine, only the last part is written.

    Args:
        bank ([`StrategyBank`]):
            The bank.
        directory (`str` or `Path`):
            Directory of the export, which may have nothing but an earlier export in it.
        file_format (`str`, *optional*, defaults to `"jsonl"`):
            `"jsonl"` or `"parquet"`.
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
    write_export(directory, *make_export(entries, bank.made_with or bank.embedding_model, file_format, license))
    return directory


# Reading


def is_export(directory: Path) -> bool:
    """Whether a directory looks like an export."""
    return (directory / MANIFEST).is_file() and any((directory / name).is_file() for name in FILES.values())


def copy_export(directory: Path, target: Path) -> None:
    """Copies the two files of an export, and nothing else, out of the Hub's cache, where they are links."""
    try:
        for name in (MANIFEST, *FILES.values()):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, target / name)
    except OSError as error:
        raise BankError(f"{directory} cannot be copied: {error.strerror}. Make room, or pull it again.") from error


def _open_no_link(path: str, flags: int) -> int:
    """Opens a file, but no link to one, and does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _read(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_no_link) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise BankError(f"{path} is no regular file: name a directory that an export or a pull wrote.")
            if about.st_size > limit:
                raise BankError(
                    f"{path} has {about.st_size} bytes, and at most {limit} are read: export fewer strategies."
                )
            return file.read(about.st_size)
    except OSError as error:
        raise BankError(
            f"{path} cannot be read: {error.strerror}. Name a directory that an export or a pull wrote."
        ) from error


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """
    The content of a manifest, checked.

    Args:
        data (`bytes`):
            The file.
        where (`str`):
            How a message names it.

    Returns:
        `dict[str, Any]`: Its values.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If it is no manifest, or one that this version does not read.
    """
    try:
        manifest = from_json(data)
        if type(manifest) is not dict or manifest.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        version = count(manifest.get("format_version"), "format_version")
        if version > FORMAT_VERSION:
            raise BankError(
                f"{where} has format version {version} and this version of trl-sgpo reads up to {FORMAT_VERSION}: "
                "upgrade trl-sgpo."
            )
        if version < FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}")
        expect_keys(manifest, _MANIFEST_KEYS, "the manifest")
        if manifest["file"] not in list(FILES.values()):
            raise ValueError(f"file must be {' or '.join(FILES.values())}")
        if not _SHA256.fullmatch(line(manifest["sha256"], "sha256")):
            raise ValueError("sha256 must be 64 hexadecimal digits")
        if count(manifest["size"], "size") > MAX_FILE_BYTES:
            raise ValueError(f"size must be at most {MAX_FILE_BYTES}")
        if count(manifest["count"], "count") > MAX_ROWS:
            raise ValueError(f"count must be at most {MAX_ROWS}")
        if type(manifest["trust"]) is not dict:
            raise ValueError("trust must be an object")
        for number in manifest["trust"].values():
            count(number, "trust")
        count(manifest["classes"], "classes")
        items(manifest["models"], "models", lambda each: line(each, "a model"))
        if not _LICENSE.fullmatch(line(manifest["license"], "license")):
            raise ValueError("license must be the Hub's name of a licence")
        for key in ("embedding_model", "trl_sgpo_version", "created"):
            line(manifest[key], key)
    except ValueError as error:
        raise BankError(f"{where} is no manifest of exported strategies: {error}. Export them again.") from error
    return manifest


def read_exchange(directory: str | Path) -> tuple[list[Strategy], list[Execution], dict[str, Any]]:
    """
    Read an export and check all of it. No bank is touched.

    Args:
        directory (`str` or `Path`):
            The directory. Only the manifest and the file of strategies that it names are opened.

    Returns:
        `tuple[list[Strategy], list[Execution], dict]`: The strategies and their executions with trust states and
        counts as exported, and the manifest.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If anything is missing, damaged, inconsistent or beyond the limits.
    """
    directory = Path(directory)
    manifest = parse_manifest(_read(directory / MANIFEST, MAX_MANIFEST_BYTES), str(directory / MANIFEST))
    path = directory / manifest["file"]
    data = _read(path, MAX_FILE_BYTES)
    if len(data) != manifest["size"] or hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise BankError(
            f"{path} was cut off or changed after it was written: its size or checksum is not that in its manifest. "
            "Copy, pull or export it again."
        )
    rows = (from_jsonl if path.suffix == ".jsonl" else from_parquet)(data, manifest["count"])
    strategies: dict[str, Strategy] = {}
    executions: list[Execution] = []
    try:
        for number, row in enumerate(rows, 1):
            try:
                strategy, its_executions = from_row(row)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            if strategy.id in strategies:
                raise ValueError(f"row {number}: it has the id of an earlier one")
            strategies[strategy.id] = strategy
            executions += its_executions
    except ValueError as error:
        raise BankError(
            f"{path} is refused, and nothing of it imported: {error}. Mend or drop that in the bank it comes from and "
            "export again."
        ) from error
    for key, value in _about(list(strategies.values())).items():
        if manifest[key] != value:
            raise BankError(
                f"{directory / MANIFEST} does not fit {path.name}: {key} is another one there. Export the bank again."
            )
    return list(strategies.values()), executions, manifest


def import_bank(
    bank: StrategyBank, directory: str | Path, keep_trust: bool = False, origin: str | None = None
) -> ImportReport:
    """
    Add the strategies of an export to a bank: all that can be, in one transaction, or none if the export is damaged.

    They come into quarantine and without counts, since nothing here has verified what others say of them. What the
    bank has on record already, retired strategies too, stays as it is.

    Args:
        bank ([`StrategyBank`]):
            The bank.
        directory (`str` or `Path`):
            Directory of the export.
        keep_trust (`bool`, *optional*, defaults to `False`):
            Whether this is a bank of your own, whose trust states, counts and executions are to be merged with those
            of this one.
        origin (`str`, *optional*):
            What the strategies' `origin` becomes. If `None`, `"import"`, or what it was with `keep_trust`.

    Returns:
        [`ImportReport`]: How many strategies were added, known and left out.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the export is damaged or not what it says. The bank then stays as it is.
    """
    strategies, executions, _ = read_exchange(directory)
    known = {strategy.id for strategy in strategies if bank.get(strategy.id) is not None}
    if keep_trust:
        taken = strategies if origin is None else [replace(strategy, origin=origin) for strategy in strategies]
        added = bank.merge(taken, executions)
    else:
        added = bank.add(
            replace(
                strategy,
                origin=origin or "import",
                trust="quarantine",
                successes=0,
                trials=0,
                problems=0,
                solved=0,
                baseline=0,
                shown=0,
            )
            for strategy in strategies
            if strategy.id not in known
        )
    new = set(added)
    absent = sum(bank.get(strategy.id) is None for strategy in strategies)
    quarantined = sum(strategy.trust == "quarantine" for key in added if (strategy := bank.get(key)) is not None)
    return ImportReport(
        added=len(new),
        known=len(known - new),
        near_copies=absent,
        quarantined=quarantined,
        retired=len(strategies) - len(new | known) - absent,
    )
