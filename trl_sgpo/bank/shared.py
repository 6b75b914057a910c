"""
Exchange of trusted strategies between training jobs, through a Chroma server.

A row on the server has the key `strategy:bank:content`, 16 hexadecimal digits each, and never changes: when a bank's
entry for a strategy changes, a row with another key replaces it. So the keys alone tell what is to be sent, deleted or
read, whatever was lost or repeated before.
"""

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..checks.addresses import address_problem, header_problem
from ..checks.json_text import read_json
from ..errors import BankError
from ..files import durable_replace, unfinished_file
from .bank import StrategyBank
from .chroma_server import TOKEN, ChromaServer, Row, ServerError, ServerRefused, batches
from .export_files import published
from .rows import FIELDS, expect_keys, from_json, from_row, to_row
from .strategy import UNVERIFIED, Strategy


logger = logging.getLogger(__name__)

IDENTITY = "shared.json"
ORIGIN = "shared:"  # before the first digits of the bank that sent a strategy
MADE_BY = {"made_by": "trl-sgpo strategies 1"}
MAX_RECEIVED = 1_000  # strategies a sync, because each has to be embedded
MAX_SHARED = 10_000  # strategies of others that a bank keeps
MAX_SOURCES = 1_000  # problems or parents of one of them

_KEY = re.compile(r"([0-9a-f]{16}):([0-9a-f]{16}):[0-9a-f]{16}")
_COLLECTION = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]")
_METADATA = sorted(set(FIELDS) - {"id", "text", "executions", *UNVERIFIED})
_LISTS = ("source_problems", "parents")  # as JSON, because Chroma's metadata has no lists


@dataclass(frozen=True)
class SyncReport:
    """
    Numbers of strategies that a sync sent and received.

    Args:
        sent (`int`):
            Strategies written to the server.
        received (`int`):
            Strategies that are new in the bank.
    """

    sent: int
    received: int


def _identity(directory: Path) -> str:
    """
    Id of a bank on a server, 16 hexadecimal digits. It belongs to the bank's directory: it stays when the bank is
    opened again or a snapshot is loaded into it, while copies of the directory and of snapshots get other ids.
    """
    path = directory / IDENTITY
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = read_json(path)
        if stored["inode"] == path.stat().st_ino and re.fullmatch("[0-9a-f]{16}", stored["id"]):
            return stored["id"]
    identity = uuid.uuid4().hex[:16]
    with unfinished_file(path) as temporary:
        # A file keeps its inode when it is renamed and not when it is copied
        temporary.write_text(json.dumps({"id": identity, "inode": temporary.stat().st_ino}))
        durable_replace(temporary, path)
    return identity


def _row(strategy: Strategy) -> tuple[dict[str, Any], str]:
    """The row of an export that is sent of a strategy, and a digest of it."""
    row = to_row(strategy, ()) | UNVERIFIED
    row["model"] = published(strategy.model)
    row["source_problems"] = sorted(row["source_problems"])
    return row, hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _check_sources(row: dict[str, Any]) -> None:
    """A bank keeps all that it has received, so a row is limited more than that of a file that a user imports."""
    for name in _LISTS:
        if len(row[name]) > MAX_SOURCES:
            raise ValueError(f"{name} has more than {MAX_SOURCES:,} items")


def _from_server(key: str, document: Any, metadata: Any) -> Strategy:
    """The strategy of a row that an untrusted server sent, or a `ValueError`."""
    expect_keys(metadata, _METADATA, "the metadata")
    row = {**metadata, **UNVERIFIED, "id": key[:16], "text": document, "executions": []}
    for name in _LISTS:
        if type(metadata[name]) is not str:
            raise ValueError(f"{name} must be a text")
        row[name] = from_json(metadata[name].encode())
    strategy, _ = from_row(row)
    _check_sources(row)
    _, bank, _ = key.split(":")
    return strategy.quarantined(f"{ORIGIN}{bank[:8]}")


class SharedBank:
    """
    A bank that exchanges trusted strategies with those of other training jobs through a Chroma server.

    Texts from the server are untrusted: they are checked like an import and enter quarantine, without
    counts. They do not change what the bank has on record, retired strategies included. Trust and counts are not
    exchanged: each job has its own.

    Args:
        bank ([`StrategyBank`]):
            The bank of this job.
        url (`str`):
            Address of the server, such as `"http://127.0.0.1:8000"`.
        collection (`str`, *optional*, defaults to `"trl_sgpo_strategies"`):
            Name of the collection on the server, by which jobs exchange strategies.
        headers (`dict[str, str]`, *optional*):
            Headers of each request. If `None`, the token in the environment variable `TRL_SGPO_BANK_TOKEN` is sent as
            `Authorization: Bearer`, if it is set.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the address, the name or a header cannot be one.
    """

    def __init__(
        self,
        bank: StrategyBank,
        url: str,
        *,
        collection: str = "trl_sgpo_strategies",
        headers: dict[str, str] | None = None,
    ):
        self._bank = bank
        examples = "http://127.0.0.1:8000 or https://bank.example.org/path"
        if problem := address_problem(url, "a bank server", examples, TOKEN):
            raise BankError(problem)
        self._url = urlsplit(url)
        if not _COLLECTION.fullmatch(collection):
            raise BankError(
                f"collection must have 3 to 512 letters, digits or ._- and a letter or digit at either end, got "
                f"{collection!r}."
            )
        self._collection = collection
        if headers is None:
            headers = {"Authorization": f"Bearer {os.environ[TOKEN].strip()}"} if TOKEN in os.environ else {}
        if problem := header_problem(headers, "the bank server", TOKEN):
            raise BankError(problem)
        self._headers = headers
        if headers and self._url.scheme == "http" and self._url.hostname not in ("127.0.0.1", "localhost", "::1"):
            logger.warning(
                "The token for the bank server at %s travels unencrypted: use https or an SSH tunnel.",
                self._url.geturl(),
            )
        self.id = _identity(bank.path)
        self._met = False  # whether the server was reached before
        self._settled: set[str] = set()  # keys of rows that no later sync needs to read or send
        self._full = False  # whether it was said that no more are received
        self._invalid = 0  # rows with an invalid key at the last sync

    def sync(self) -> SyncReport:
        """
        Send newly trusted strategies, delete own ones that are not trusted any more, and receive those of others.

        If the server cannot be reached or fails, a warning says so, and the next sync does what was left undone.

        Returns:
            [`SyncReport`]: How many strategies were sent and received.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the server, at the first contact, refuses the token or has another
                collection of that name. Later this is a warning, because training goes on.
        """
        sent = 0
        arrived: dict[str, tuple[str, Strategy]] = {}
        try:
            with ChromaServer(self._url.geturl(), self._headers) as server:
                server.open(self._collection, MADE_BY)
                self._met = True
                keys = [key if type(key) is str and _KEY.fullmatch(key) else None for key in server.all_keys()]
                arrived = self._receive(server, keys)
                own = {key for key in keys if key is not None and self._is_own(key)}
                trusted = self._trusted()
                for batch in batches(self._sendable(trusted, own)):
                    server.write(batch)
                    sent += len(batch)
                server.delete([key for key in own if key not in trusted])
        except ServerError as error:
            if isinstance(error, ServerRefused) and not self._met:
                raise BankError(f"The bank server at {self._url.geturl()} cannot be used: {error}.") from error
            logger.warning(
                "The bank server at %s cannot be used now: %s. Training goes on, and the next sync tries again.",
                self._url.geturl(),
                error,
            )
        added = self._bank.add([strategy for _, strategy in arrived.values()])
        # The bank leaves out near-copies of its own strategies
        self._settled.update(key for key, strategy in arrived.values() if self._bank.get(strategy.id) is None)
        return SyncReport(sent=sent, received=len(added))

    def _is_own(self, key: str) -> bool:
        return key[17:33] == self.id

    def _receive(self, server: ChromaServer, keys: list[str | None]) -> dict[str, tuple[str, Strategy]]:
        """Strategies that others sent and the bank has no record of, by id, each with the key of its row."""
        wanted = [
            key
            for key in dict.fromkeys(keys)
            if key is not None
            and not self._is_own(key)
            and key not in self._settled
            and self._bank.get(key[:16]) is None
        ]
        arrived: dict[str, tuple[str, Strategy]] = {}
        invalid = keys.count(None)
        refused = max(invalid - self._invalid, 0)
        self._invalid = invalid
        known = [*self._bank.strategies(), *self._bank.retired()]
        kept = sum(strategy.origin.startswith(ORIGIN) for strategy in known)
        room = max(MAX_SHARED - kept, 0)
        if len(wanted) > room and not self._full:
            self._full = True
            logger.warning(
                "The bank keeps %d strategies of other jobs, retired ones included, and at most %d: of %d others on "
                "the server at %s it receives %d. To receive more, export those that you keep by "
                "`trl-sgpo bank export` and import them into a new bank.",
                *(kept, MAX_SHARED, len(wanted), self._url.geturl(), room),
            )
        for key, document, metadata in server.rows(wanted[: min(MAX_RECEIVED, room)]):
            try:
                strategy = _from_server(key, document, metadata)
            except ValueError:
                self._settled.add(key)
                refused += 1
            else:
                arrived.setdefault(strategy.id, (key, strategy))
        if refused:
            logger.warning(
                "%d rows on the bank server at %s are no strategies that could be imported: they are left out.",
                refused,
                self._url.geturl(),
            )
        return arrived

    def _trusted(self) -> dict[str, dict[str, Any]]:
        """Rows of all trusted strategies by their keys."""
        rows = {}
        for strategy in self._bank.strategies():
            if strategy.trust == "trusted":
                row, digest = _row(strategy)
                rows[f"{strategy.id}:{self.id}:{digest}"] = row
        return rows

    def _sendable(self, rows: dict[str, dict[str, Any]], known: set[str]) -> Iterator[tuple[str, Row]]:
        """Rows that the server does not have yet, without those that other banks refuse."""
        for key, row in rows.items():
            if key in known or key in self._settled:
                continue
            try:
                from_row(row)
                _check_sources(row)
            except ValueError as error:
                self._settled.add(key)
                logger.warning("Strategy %s is not sent, because other banks refuse it: %s.", key[:16], error)
                continue
            metadata = {name: json.dumps(row[name]) if name in _LISTS else row[name] for name in _METADATA}
            yield key, (row["text"], metadata)
