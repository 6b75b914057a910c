"""The manifest of a snapshot: the checksum of the ledger beside it, by which damage is found."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..checks.json_text import read_json
from ..errors import BankError
from ..files import write_file
from .files import INDEX, LEDGER, SNAPSHOT_MANIFEST, file_sha256


def is_snapshot(directory: Path) -> bool:
    """Whether a bank's directory is a snapshot, as checkpoints have them."""
    # A bank that an earlier version continued from a snapshot still has the manifest, but an index too
    return (directory / SNAPSHOT_MANIFEST).is_file() and not (directory / INDEX).exists()


def write_manifest(directory: Path, **about: Any) -> None:
    """Write the manifest of the ledger in a directory, with other values that describe it."""
    content = json.dumps(about | {"sha256": file_sha256(directory / LEDGER)}, indent=2)
    write_file(directory / SNAPSHOT_MANIFEST, content)


def copy_verified(snapshot: Path, target: Path) -> None:
    """
    Copy the ledger of a snapshot and compare its checksum.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the snapshot is incomplete or damaged.
    """
    try:
        shutil.copyfile(snapshot / LEDGER, target)
        intact = read_json(snapshot / SNAPSHOT_MANIFEST)["sha256"] == file_sha256(target)
    except (OSError, ValueError, KeyError) as error:
        raise BankError(
            f"{snapshot} is no complete snapshot of a strategy bank: {error}. Resume from another checkpoint."
        ) from error
    if not intact:
        raise BankError(
            f"The snapshot in {snapshot} was damaged or changed after it was written: its checksum is not the one in "
            "its manifest. Resume from another checkpoint."
        )


def snapshot_damage(snapshot: Path) -> list[str]:
    """Differences between a snapshot and its manifest, one line each."""
    manifest, ledger = snapshot / SNAPSHOT_MANIFEST, snapshot / LEDGER
    try:
        expected = read_json(manifest)["sha256"]
    except (ValueError, KeyError, TypeError):
        return [f"{manifest} is damaged"]
    if file_sha256(ledger) == expected:
        return []
    return [f"{ledger} is not what was written: its checksum is not the one in {SNAPSHOT_MANIFEST}"]
