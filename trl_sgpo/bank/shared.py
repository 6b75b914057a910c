"""
Exchange of trusted strategies between training jobs, through a Chroma server.

A row on the server has the key `strategy:bank:content`, 16 hexadecimal digits each, and never changes: what a bank has
to say of a strategy is replaced by a row with another key. What is to be sent, taken back or read therefore follows
from the keys alone, whatever was lost or repeated before.

Anyone who reaches the server can write to it. `chromadb.HttpClient` waits for a silent server without end, reads
answers of any size, and builds embedding functions that the server names, so the few requests are made here instead.
"""

import hashlib
import json
import logging
import os
import re
import socket
import ssl
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from ..errors import BankError
from .bank import StrategyBank
from .exchange import published
from .ledger import durable_replace
from .rows import FIELDS, MAX_ROW_BYTES, expect_keys, from_json, from_row, to_row
from .strategy import Strategy


logger = logging.getLogger(__name__)

TOKEN = "TRL_SGPO_BANK_TOKEN"
IDENTITY = "shared.json"
MADE_BY = {"made_by": "trl-sgpo strategies 1"}

PAGE = 5_000  # keys
BATCH = 500  # rows
BATCH_BYTES = 4 * 2**20
MAX_ROWS = 200_000  # on the server
MAX_RECEIVED = 1_000  # a sync, since each has to be embedded
PATIENCE = 10.0  # seconds without a byte
DEADLINE = 60.0  # seconds a sync

_KEY = re.compile(r"([0-9a-f]{16}):([0-9a-f]{16}):[0-9a-f]{16}")
_COLLECTION = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]")
_NOTHING = {"trust": "quarantine", "successes": 0, "trials": 0, "problems": 0, "solved": 0, "baseline": 0, "shown": 0}
_LISTS = ("source_problems", "parents")
_METADATA = set(FIELDS) - {"id", "text", "executions", *_NOTHING}


@dataclass(frozen=True)
class SyncReport:
    """
    What a sync did.

    Args:
        sent (`int`):
            Strategies written to the server.
        received (`int`):
            Strategies that are new in the bank.
    """

    sent: int
    received: int


class _Away(Exception):
    """The server does not do what it should. The message is a clause without a full stop."""


class _TooLarge(_Away):
    """An answer is longer than any that is read."""


class _Refused(_Away):
    """What is set up here cannot work with this server. The message names the fix."""


def _identity(directory: Path) -> str:
    """
    Id of a bank among those of a server, 16 hexadecimal digits. It belongs to the bank's directory: it stays when the
    bank is opened again or a snapshot is loaded into it, and copies of the directory and of its snapshots get others.
    """
    path = directory / IDENTITY
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_text())
        if stored["inode"] == path.stat().st_ino and re.fullmatch("[0-9a-f]{16}", stored["id"]):
            return stored["id"]
    identity = uuid.uuid4().hex[:16]
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    # A file keeps its inode when it is renamed and not when it is copied
    temporary.write_text(json.dumps({"id": identity, "inode": temporary.stat().st_ino}))
    durable_replace(temporary, path)
    return identity


def _row(strategy: Strategy) -> tuple[dict[str, Any], str]:
    """The row of a strategy, and a digest of it."""
    row = to_row(strategy, ()) | _NOTHING
    row["model"] = published(strategy.model)
    row["source_problems"] = sorted(row["source_problems"])
    return row, hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _strategy(key: str, document: Any, metadata: Any) -> Strategy:
    """The strategy of a row that a stranger may have written, or a `ValueError`."""
    expect_keys(metadata, _METADATA, "the metadata")
    row = {**metadata, **_NOTHING, "id": key[:16], "text": document, "executions": []}
    for name in _LISTS:
        if type(metadata[name]) is not str:
            raise ValueError(f"{name} must be a text")
        row[name] = from_json(metadata[name].encode())
    strategy, _ = from_row(row)
    _, bank, _ = key.split(":")
    return replace(strategy, origin=f"shared:{bank[:8]}")


def _columns(answer: Any, *names: str) -> list[Any]:
    """The rows of an answer that has its columns by their names."""
    try:
        return list(zip(*(answer[name] for name in names), strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise _Away("it does not answer as a Chroma server does") from error


class _Server:
    """One connection to a Chroma server, which is cut when it takes too long."""

    def __init__(self, url: SplitResult, headers: dict[str, str]):
        self._root = f"{url.path.rstrip('/')}/api/v2/tenants/default_tenant/databases/default_database/collections"
        self._headers = {**headers, "Content-Type": "application/json"}
        assert url.hostname is not None
        if url.scheme == "https":
            self._connection: HTTPConnection = HTTPSConnection(
                url.hostname, url.port, timeout=PATIENCE, context=ssl.create_default_context()
            )
        else:
            self._connection = HTTPConnection(url.hostname, url.port, timeout=PATIENCE)
        self._socket: socket.socket | None = None
        self._end = monotonic() + DEADLINE
        self._cut = Timer(DEADLINE, self._hang_up)
        self._cut.daemon = True

    def __enter__(self) -> Self:
        self._cut.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cut.cancel()
        self._connection.close()

    def _hang_up(self) -> None:
        # The connection forgets its socket when an answer of unknown length begins
        for each in (self._connection.sock, self._socket):
            if each is not None:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _expect_in_time(self) -> None:
        if monotonic() >= self._end:
            raise _Away(f"it took more than {DEADLINE:g} seconds")

    def _request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        if self._connection.sock is None:
            self._connection.connect()
            self._socket = self._connection.sock
        self._connection.request(method, self._root + path, body and json.dumps(body).encode(), self._headers)
        response = self._connection.getresponse()
        return response.status, response.read(MAX_ROW_BYTES + 1)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        self._expect_in_time()
        try:
            status, data = self._request(method, path, body)
        except (OSError, HTTPException, ValueError) as error:
            self._connection.close()
            self._expect_in_time()
            message = (str(error) or type(error).__name__).encode("unicode_escape").decode()
            raise _Away(message[:200]) from error
        self._expect_in_time()
        if len(data) > MAX_ROW_BYTES:
            self._connection.close()
            raise _TooLarge(f"it answered with more than {MAX_ROW_BYTES >> 20} MiB")
        if status in (401, 403):
            raise _Refused(f"it answered {status}: set {TOKEN} to the token that it, or a proxy, asks for")
        if status != 200:
            raise _Away(f"it answered {status} {data[:200].decode(errors='replace')!a}")
        try:
            return from_json(data)
        except ValueError as error:
            raise _Away(f"it answered what is no JSON: {error}") from error

    def open(self, name: str) -> None:
        """Use the collection of this name, which is created if it does not exist."""
        found = self._ask("POST", "", {"name": name, "metadata": MADE_BY, "get_or_create": True})
        try:
            self._collection = f"/{uuid.UUID(found['id'])}"
            ours = found["metadata"] == MADE_BY and found["dimension"] in (None, 1)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _Away("it does not answer as a Chroma server does") from error
        if not ours:
            raise _Refused(f"its collection {name!r} was made by something else: delete that, or use another server")

    def keys(self) -> Iterator[str | None]:
        """Keys of all rows in the order they were written, `None` for what is no key. Some may come twice."""
        count = self._ask("GET", f"{self._collection}/count")
        if type(count) is not int or count > MAX_ROWS:
            raise _Away(f"it has {ascii(count)[:40]} rows, where {MAX_ROWS} are the most: delete what is no strategy")
        for start in range(0, count, PAGE):
            yield from self._keys(start, PAGE)

    def _keys(self, offset: int, limit: int) -> list[str | None]:
        try:
            answer = self._ask("POST", f"{self._collection}/get", {"include": [], "offset": offset, "limit": limit})
        except _TooLarge:
            if limit == 1:
                return [None]
            half = limit // 2
            return self._keys(offset, half) + self._keys(offset + half, limit - half)
        return [key if type(key) is str and _KEY.fullmatch(key) else None for (key,) in _columns(answer, "ids")]

    def rows(self, keys: list[str]) -> Iterator[tuple[str, Any, Any]]:
        """Key, document and metadata of the rows that are still there, only the key of one beyond all limits."""
        for start in range(0, len(keys), BATCH):
            yield from self._rows(keys[start : start + BATCH])

    def _rows(self, keys: list[str]) -> list[tuple[str, Any, Any]]:
        include = ["documents", "metadatas"]
        try:
            answer = self._ask("POST", f"{self._collection}/get", {"ids": keys, "include": include})
        except _TooLarge:
            if len(keys) == 1:
                return [(keys[0], None, None)]
            half = len(keys) // 2
            return self._rows(keys[:half]) + self._rows(keys[half:])
        return [row for row in _columns(answer, "ids", *include) if row[0] in keys]

    def write(self, rows: dict[str, dict[str, Any]]) -> None:
        """Write rows by their keys, or replace them."""
        metadatas = [
            {name: json.dumps(row[name]) if name in _LISTS else row[name] for name in sorted(_METADATA)}
            for row in rows.values()
        ]
        body = {
            "ids": list(rows),
            "documents": [row["text"] for row in rows.values()],
            "metadatas": metadatas,
            "embeddings": [[1.0]] * len(rows),  # Chroma wants some; jobs embed differently, and so each for itself
        }
        self._ask("POST", f"{self._collection}/upsert", body)

    def delete(self, keys: list[str]) -> None:
        """Remove rows."""
        for start in range(0, len(keys), BATCH):
            self._ask("POST", f"{self._collection}/delete", {"ids": keys[start : start + BATCH]})


def _batches(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, dict[str, Any]]]:
    batch: dict[str, dict[str, Any]] = {}
    size = 0
    for key, row in rows:
        more = len(json.dumps(row))
        if batch and (len(batch) == BATCH or size + more > BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[key] = row
        size += more
    if batch:
        yield batch


def _parse_url(url: str) -> SplitResult:
    try:
        parsed = urlsplit(url)
        usable = parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", url) or {"@", "?", "#"} & set(url):
        given = "one with a user" if "@" in url else repr(url)
        raise BankError(
            f"The address of a bank server must be like http://127.0.0.1:8000 or https://bank.example.org/path, got "
            f"{given}. A token belongs into the environment variable {TOKEN}."
        )
    return parsed


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not (re.fullmatch(r"[A-Za-z0-9-]+", name) and re.fullmatch(r"[ -~]+", value)):
            raise BankError(
                f"The header {name!r} for the bank server, or the token in {TOKEN}, is empty or has characters that a "
                "header cannot have: pass it on one line and in ASCII."
            )
    return headers


class SharedBank:
    """
    A bank that exchanges trusted strategies with those of other training jobs through a Chroma server.

    What comes from the server is text from strangers: it is checked like an import and enters quarantine, without
    counts. What the bank has on record, retired strategies too, is not changed by it. Trust and counts are not
    exchanged: each job executes and judges for itself.

    Args:
        bank ([`StrategyBank`]):
            The bank of this job.
        url (`str`):
            Address of the server, such as `"http://127.0.0.1:8000"`.
        collection (`str`, *optional*, defaults to `"trl_sgpo_strategies"`):
            Name of the collection on the server. Jobs that name another one do not meet.
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
        self._url = _parse_url(url)
        if not _COLLECTION.fullmatch(collection):
            raise BankError(
                f"collection must have 3 to 512 letters, digits or ._- and a letter or digit at either end, got "
                f"{collection!r}."
            )
        self._collection = collection
        if headers is None:
            headers = {"Authorization": f"Bearer {os.environ[TOKEN].strip()}"} if TOKEN in os.environ else {}
        self._headers = _check_headers(headers)
        if headers and self._url.scheme == "http" and self._url.hostname not in ("127.0.0.1", "localhost", "::1"):
            logger.warning(
                "The token for the bank server at %s travels unencrypted: use https or an SSH tunnel.",
                self._url.geturl(),
            )
        self.id = _identity(bank.path)
        self._met = False  # whether the server was ever there and as it should be
        self._settled: set[str] = set()  # keys of rows that no other sync needs to look at
        self._strange = 0  # rows without a proper key at the last sync

    def sync(self) -> SyncReport:
        """
        Send what the bank has come to trust, take back what it trusts no longer, and receive what others sent.

        If the server is away, or fails on the way, a warning says so and what was not done is done by the next sync.

        Returns:
            [`SyncReport`]: How many strategies were sent and received.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the server refuses the token, or has a collection of that name which is
                none of strategies, and that at the first meeting: later it is a warning, as training goes on.
        """
        sent = 0
        arrived: dict[str, tuple[str, Strategy]] = {}
        try:
            with _Server(self._url, self._headers) as server:
                server.open(self._collection)
                self._met = True
                keys = list(server.keys())
                arrived = self._receive(server, keys)
                own = {key for key in keys if key is not None and self._is_own(key)}
                trusted = self._trusted()
                for batch in _batches(self._sendable(trusted, own)):
                    server.write(batch)
                    sent += len(batch)
                server.delete([key for key in own if key not in trusted])
        except _Away as error:
            if isinstance(error, _Refused) and not self._met:
                raise BankError(f"The bank server at {self._url.geturl()} cannot be used: {error}.") from error
            logger.warning(
                "The bank server at %s cannot be used now: %s. Training goes on, and the next sync tries again.",
                self._url.geturl(),
                error,
            )
        added = self._bank.add([strategy for _, strategy in arrived.values()])
        # Near-copies of what the bank has
        self._settled.update(key for key, strategy in arrived.values() if self._bank.get(strategy.id) is None)
        return SyncReport(sent=sent, received=len(added))

    def _is_own(self, key: str) -> bool:
        return key[17:33] == self.id

    def _receive(self, server: _Server, keys: list[str | None]) -> dict[str, tuple[str, Strategy]]:
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
        strange = keys.count(None)
        refused = max(strange - self._strange, 0)
        self._strange = strange
        for key, document, metadata in server.rows(wanted[:MAX_RECEIVED]):
            try:
                strategy = _strategy(key, document, metadata)
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

    def _sendable(self, rows: dict[str, dict[str, Any]], known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows that the server does not have yet, without those that no other bank would take."""
        for key, row in rows.items():
            if key in known or key in self._settled:
                continue
            try:
                from_row(row)
            except ValueError as error:
                self._settled.add(key)
                logger.warning("Strategy %s is not sent, as no other bank would take it: %s.", key[:16], error)
            else:
                yield key, row
