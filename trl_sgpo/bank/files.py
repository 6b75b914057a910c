"""Names of a bank's files, and functions to hash and identify files."""

import hashlib
from pathlib import Path


BANK_DIRECTORY = "strategy_bank"  # in a run's output folder and in its checkpoints
LEDGER = "ledger.sqlite"
INDEX = "chroma"
SNAPSHOT_MANIFEST = "manifest.json"
EXPORT_MANIFEST = "manifest.json"
EXPORT_FILE = "strategies.jsonl"
PARQUET_FILE = "strategies.parquet"  # in exports of earlier versions, which are not read any more


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, `None` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
