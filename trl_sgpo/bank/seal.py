"""
The seal of a closed index: checksums of its files, signed with a key of this user's cache.

Opening a damaged index can end the process or fill the disk, and one that a stranger made reaches parsers of Chroma
and SQLite, which deletes files that a journal names. So only an index that this user closed is opened, any other is
rebuilt.
"""

import hmac
import json
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..checks.json_text import read_json
from ..files import write_file
from .files import file_sha256


SEAL = "seal.json"
KEY_FILE = "seal.key"


def seal(directory: Path, state: str) -> None:
    """Write the checksums of a closed index, and the state of the ledger, by [`Ledger.state`], that it holds."""
    content = _content(directory, state)
    write_file(directory / SEAL, json.dumps(content | {"signature": _signature(content)}))


def break_seal(directory: Path, state: str) -> bool:
    """
    Remove the seal, because a crash can damage an index in use, and return whether the files are those that were
    sealed for this state of the ledger.
    """
    path = directory / SEAL
    try:
        sealed = read_json(path)
    except (OSError, ValueError):
        return False
    path.unlink()
    content = _content(directory, state)
    signature = sealed.pop("signature", None) if isinstance(sealed, dict) else None
    return hmac.compare_digest(str(signature).encode(), _signature(content).encode()) and sealed == content


def _content(directory: Path, state: str) -> dict[str, Any]:
    files = {
        str(path.relative_to(directory)): file_sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    return {"state": state, "files": files}


def _signature(content: dict[str, Any]) -> str:
    return hmac.digest(_key(), json.dumps(content).encode(), "sha256").hex()


def _key() -> bytes:
    """The key of this user, made at its first use. One that cannot be kept fits no seal."""
    from huggingface_hub import constants

    file = Path(constants.HF_HOME, "trl_sgpo", KEY_FILE)
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, token_hex(32), private=True)
        return file.read_bytes()
    except OSError:
        return token_hex(32).encode()
