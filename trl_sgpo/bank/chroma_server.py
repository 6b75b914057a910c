"""
The few requests to a Chroma server by which banks exchange strategies.

Anyone who reaches the server can write to it. `chromadb.HttpClient` waits for a silent server without end, reads
answers of any size, and builds embedding functions that the server names, so it is not used here.
"""

import json
import ssl
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any, Self

from ..checks import http_limits
from ..checks.secrets import without_sent
from .rows import MAX_ROW_BYTES, from_json


TOKEN = "TRL_SGPO_BANK_TOKEN"
PAGE = 5_000  # keys a request
BATCH = 500  # rows a request
BATCH_BYTES = 4 * 2**20
MAX_ANSWER_BYTES = MAX_ROW_BYTES
MAX_ROWS = 200_000  # on the server
READ_TIMEOUT = 10.0  # seconds without a byte
DEADLINE = 60.0  # seconds for all requests together

_TOO_LONG = f"it took more than {DEADLINE:g} seconds"

Row = tuple[str, dict[str, Any]]  # document and metadata


class ServerError(Exception):
    """The server cannot be reached or answers wrongly. The message is a clause without a full stop."""


class AnswerTooLarge(ServerError):
    """An answer exceeds the size limit."""


class ServerRefused(ServerError):
    """The configuration cannot work with this server. The message names the fix."""


def _columns(answer: Any, asked: int, *names: str) -> list[Any]:
    """The rows of an answer that consists of named columns, as many as were asked for at most."""
    try:
        columns = [answer[name] for name in names]
        if any(len(column) > asked for column in columns):
            raise ServerError("it answered with more entries than were asked for")
        return list(zip(*columns, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError("it does not answer as a Chroma server does") from error


def batches(rows: Iterable[tuple[str, Row]]) -> Iterator[dict[str, Row]]:
    """Rows by their keys, in parts that are small enough for a request."""
    batch: dict[str, Row] = {}
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


class ChromaServer:
    """
    Requests to a Chroma server, which together must end before a deadline.

    Args:
        url (`str`):
            Address of the server.
        headers (`dict[str, str]`):
            Headers of each request.
    """

    def __init__(self, url: str, headers: dict[str, str]):
        self._root = f"{url.rstrip('/')}/api/v2/tenants/default_tenant/databases/default_database/collections"
        self._headers = headers
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        client = http_limits.limited_client(
            self._headers,
            MAX_ANSWER_BYTES,
            timeout=READ_TIMEOUT,
            trust_env=False,
            verify=ssl.create_default_context(),
        )
        self._client = self._opened.enter_context(client)
        self._end = monotonic() + DEADLINE
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx

        try:
            answer = self._client.request(method, self._root + path, self._end - monotonic(), body)
        except TimeoutError as error:
            raise ServerError(_TOO_LONG) from error
        except http_limits.AnswerTooLarge as error:
            raise AnswerTooLarge(str(error)) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, http_limits.AnswerRefused) as error:
            message = (str(error) or type(error).__name__).encode("unicode_escape").decode()
            raise ServerError(message[:200]) from error
        status, data = answer.status, answer.content
        if status in (401, 403):
            raise ServerRefused(f"it answered {status}: set {TOKEN} to the token that it, or a proxy, asks for")
        if status != 200:
            text = without_sent(data[:1_000].decode(errors="replace"), self._headers)
            raise ServerError(f"it answered {status} {text[:200]!a}")
        try:
            value = from_json(data)
        except ValueError as error:
            raise ServerError(f"it answered what is no JSON: {error}") from error
        if monotonic() > self._end:
            raise ServerError(_TOO_LONG)
        return value

    def open(self, name: str, metadata: dict[str, str]) -> None:
        """Use the collection of this name. It is created if it does not exist, and must have the metadata."""
        collection = self._ask("POST", "", {"name": name, "metadata": metadata, "get_or_create": True})
        try:
            self._collection = f"/{uuid.UUID(collection['id'])}"
            ours = collection["metadata"] == metadata and collection["dimension"] in (None, 1)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError("it does not answer as a Chroma server does") from error
        if not ours:
            raise ServerRefused(
                f"its collection {name!r} was made by something else: delete that, or use another server"
            )

    def all_keys(self) -> Iterator[Any]:
        """
        Keys of all rows in the order they were written, in whatever form the server sends them, `None` for one that is
        too large. A key may come twice.
        """
        count = self._ask("GET", f"{self._collection}/count")
        if type(count) is not int or count > MAX_ROWS:
            raise ServerError(
                f"it has {ascii(count)[:40]} rows, where {MAX_ROWS} are the most: delete what is no strategy"
            )
        for start in range(0, count, PAGE):
            yield from self._keys(start, PAGE)

    def _keys(self, offset: int, limit: int) -> list[Any]:
        try:
            answer = self._ask("POST", f"{self._collection}/get", {"include": [], "offset": offset, "limit": limit})
        except AnswerTooLarge:
            if limit == 1:
                return [None]
            half = limit // 2
            return self._keys(offset, half) + self._keys(offset + half, limit - half)
        return [key for (key,) in _columns(answer, limit, "ids")]

    def rows(self, keys: list[str]) -> Iterator[tuple[str, Any, Any]]:
        """Key, document and metadata of rows: nothing of a deleted one, only the key of one that is too large."""
        for start in range(0, len(keys), BATCH):
            yield from self._rows(keys[start : start + BATCH])

    def _rows(self, keys: list[str]) -> list[tuple[str, Any, Any]]:
        include = ["documents", "metadatas"]
        try:
            answer = self._ask("POST", f"{self._collection}/get", {"ids": keys, "include": include})
        except AnswerTooLarge:
            if len(keys) == 1:
                return [(keys[0], None, None)]
            half = len(keys) // 2
            return self._rows(keys[:half]) + self._rows(keys[half:])
        wanted = set(keys)
        rows = _columns(answer, len(keys), "ids", *include)
        return [row for row in rows if type(row[0]) is str and row[0] in wanted]

    def write(self, rows: dict[str, Row]) -> None:
        """Write rows by their keys, or replace them."""
        body = {
            "ids": list(rows),
            "documents": [document for document, _ in rows.values()],
            "metadatas": [metadata for _, metadata in rows.values()],
            "embeddings": [[1.0]] * len(rows),  # Chroma requires some, but each job embeds with its own model
        }
        self._ask("POST", f"{self._collection}/upsert", body)

    def delete(self, keys: list[str]) -> None:
        """Remove rows."""
        for start in range(0, len(keys), BATCH):
            self._ask("POST", f"{self._collection}/delete", {"ids": keys[start : start + BATCH]})
