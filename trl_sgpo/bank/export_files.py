"""
The files of an export, by which banks exchange strategies.

An export is a directory with one file of strategies in JSONL and a manifest. It has no embeddings, which the importing
bank makes itself, and nothing that is executed or unpacked when read. It is untrusted: all of it is
checked before a bank is changed, and no other file of the directory is opened.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from .._version import __version__
from ..errors import BankError
from ..files import durable_replace, unfinished_file, unfinished_files
from .files import EXPORT_FILE, EXPORT_MANIFEST, PARQUET_FILE
from .rows import count, expect_keys, from_json, from_jsonl, from_row, items, line, to_jsonl, to_row
from .strategy import Execution, Strategy


FORMAT, FORMAT_VERSION = "trl-sgpo-strategies", 2  # version 1 has no counts beside plain answers
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
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


# Writing


def published(name: str) -> str:
    """A model's name as an export has it: of a path on this machine, only the last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _about(strategies: Sequence[Strategy]) -> dict[str, Any]:
    """The values of a manifest that follow from the strategies."""
    return {
        "count": len(strategies),
        "trust": dict(sorted(Counter(strategy.trust for strategy in strategies).items())),
        "classes": len({strategy.problem_class for strategy in strategies}),
        "models": sorted({strategy.model for strategy in strategies} - {""}),
    }


def make_export(
    entries: Sequence[tuple[Strategy, Sequence[Execution]]], embedding_model: str, license: str = "other"
) -> tuple[bytes, bytes]:
    """
    The contents of the two files of an export.

    Args:
        entries (`Sequence[tuple[Strategy, Sequence[Execution]]]`):
            The strategies, each with its executions.
        embedding_model (`str`):
            Name of the model the bank embeds with.
        license (`str`, *optional*, defaults to `"other"`):
            Licence of the strategies, as the Hub names licences.

    Returns:
        `tuple[bytes, bytes]`: Contents of the file of strategies and of the manifest.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the licence is not the name of one, or the export is too large.
    """
    if not LICENSE.fullmatch(license):
        raise BankError(
            f"license must be the Hub's name of a licence, such as apache-2.0, cc-by-4.0 or other, got {license!r}."
        )
    rows = [to_row(strategy, executions) for strategy, executions in entries]
    data = to_jsonl(rows)
    if len(rows) > MAX_ROWS or len(data) > MAX_FILE_BYTES:
        raise BankError(
            f"The export would have {len(rows)} strategies in {len(data) >> 20} MiB, and an import takes up to "
            f"{MAX_ROWS} in {MAX_FILE_BYTES >> 20} MiB: export fewer trust states."
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "file": EXPORT_FILE,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        **_about([strategy for strategy, _ in entries]),
        "embedding_model": published(embedding_model),
        "license": license,
        "trl_sgpo_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return data, (json.dumps(manifest, indent=2) + "\n").encode()


def write_export(directory: Path, data: bytes, manifest: bytes) -> None:
    """
    Write the two files of an export, or replace those of an earlier one.

    Args:
        directory (`Path`):
            Where to. It is created if it does not exist.
        data (`bytes`):
            Content of the file of strategies.
        manifest (`bytes`):
            Content of the manifest. It is written last, so that a crash leaves no export that could be imported.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If there is anything else in the directory, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own = [directory / name for name in (EXPORT_MANIFEST, EXPORT_FILE, PARQUET_FILE)]
        own += [left for path in own for left in unfinished_files(path)]
        foreign = sorted(path.name for path in {*directory.iterdir()} - {*own})
        if foreign:
            raise BankError(f"{directory} has {foreign[0]!r} in it: name a directory for nothing but the export.")
        for name, content in ((EXPORT_FILE, data), (EXPORT_MANIFEST, manifest)):
            with unfinished_file(directory / name) as temporary:
                temporary.write_bytes(content)
                durable_replace(temporary, directory / name)
        (directory / PARQUET_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise BankError(
            f"{directory} cannot be written: {error.strerror}. Name a directory you may write to, on a disk with room."
        ) from error


# Reading


def is_export(directory: Path) -> bool:
    """Whether a directory looks like an export, also one of an earlier version."""
    names = (EXPORT_FILE, PARQUET_FILE)
    return (directory / EXPORT_MANIFEST).is_file() and any((directory / name).is_file() for name in names)


def copy_export(directory: Path, target: Path) -> None:
    """Copy the two files of an export out of the Hub's cache, where they are links, which are not read."""
    try:
        for name in (EXPORT_MANIFEST, EXPORT_FILE):
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
    Read and check a manifest.

    Args:
        data (`bytes`):
            Content of the file.
        where (`str`):
            Name of the manifest in messages.

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
        if version < 1:
            raise ValueError(f"format_version must be 1 to {FORMAT_VERSION}")
        expect_keys(manifest, _MANIFEST_KEYS, "the manifest")
        if manifest["file"] == PARQUET_FILE:
            raise BankError(
                f"{where} is of an export in Parquet, which this version of trl-sgpo does not read: export the bank "
                "again as JSONL, with this version or with the one that wrote it."
            )
        if manifest["file"] != EXPORT_FILE:
            raise ValueError(f"file must be {EXPORT_FILE}")
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
        if not LICENSE.fullmatch(line(manifest["license"], "license")):
            raise ValueError("license must be the Hub's name of a licence")
        for key in ("embedding_model", "trl_sgpo_version", "created"):
            line(manifest[key], key)
    except ValueError as error:
        raise BankError(f"{where} is no manifest of exported strategies: {error}. Export them again.") from error
    return manifest


def check_export(directory: str | Path) -> None:
    """Raises [`~trl_sgpo.errors.BankError`] if there is no such directory."""
    if not Path(directory).is_dir():
        raise BankError(f"There is no directory {directory} with an export: name one that an export or a pull wrote.")


def read_export(directory: str | Path) -> tuple[list[Strategy], list[Execution], dict[str, Any]]:
    """
    Read an export and check all of it.

    Args:
        directory (`str` or `Path`):
            The directory. Only the manifest and the file of strategies are opened.

    Returns:
        `tuple[list[Strategy], list[Execution], dict]`: The strategies and their executions with trust states and
        counts as exported, and the manifest.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If anything is missing, damaged, inconsistent or too large.
    """
    check_export(directory)
    directory = Path(directory)
    manifest_path, path = directory / EXPORT_MANIFEST, directory / EXPORT_FILE
    manifest = parse_manifest(_read(manifest_path, MAX_MANIFEST_BYTES), str(manifest_path))
    data = _read(path, MAX_FILE_BYTES)
    if len(data) != manifest["size"] or hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise BankError(
            f"{path} was cut off or changed after it was written: its size or checksum is not that in its manifest. "
            "Copy, pull or export it again."
        )
    strategies: dict[str, Strategy] = {}
    executions: list[Execution] = []
    try:
        for number, row in enumerate(from_jsonl(data, manifest["count"]), 1):
            try:
                strategy, its_executions = from_row(row, with_plain=manifest["format_version"] > 1)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            if strategy.id in strategies:
                raise ValueError(f"row {number}: it has the id of an earlier one")
            strategies[strategy.id] = strategy
            executions += its_executions
    except ValueError as error:
        raise BankError(
            f"{path} is refused, and nothing of it imported: {error}. Correct it in the bank it comes from and "
            "export again."
        ) from error
    for key, value in _about(list(strategies.values())).items():
        if manifest[key] != value:
            raise BankError(
                f"{manifest_path} does not fit {path.name}: {key} is another one there. Export the bank again."
            )
    return list(strategies.values()), executions, manifest
