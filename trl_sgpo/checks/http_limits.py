"""
Requests to servers that are not trusted: each has a deadline and limits on the size of its answer, and is cancelled at
once when the command is interrupted.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import httpx
    from anyio.from_thread import BlockingPortal

MAX_LINE_BYTES = 2**20
MAX_STREAM_BYTES = 64 * 2**20

OnLine = Callable[[bytes], None]


class AnswerRefused(Exception):
    """An answer that is not read. The message is a clause without a full stop."""


class AnswerTooLarge(AnswerRefused):
    """An answer that exceeds a size limit."""


@dataclass(frozen=True)
class Answer:
    """
    A server's answer.

    Args:
        status (`int`):
            Its HTTP status.
        headers (`httpx.Headers`):
            Its headers.
        content (`bytes`):
            Its body, empty where the lines of a stream were passed on.
    """

    status: int
    headers: "httpx.Headers"
    content: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The body as UTF-8. The server does not choose the codec."""
        return self.content.decode(errors="replace")


class LimitedClient:
    """
    Sends requests. Several threads may share it. See [`limited_client`].

    Args:
        client (`httpx.AsyncClient`):
            The client.
        portal (`anyio.from_thread.BlockingPortal`):
            The event loop that it runs in.
        max_bytes (`int`):
            Limit of the size of an answer that is not a stream of events.
    """

    def __init__(self, client: "httpx.AsyncClient", portal: "BlockingPortal", max_bytes: int):
        self._client, self._portal, self._max_bytes = client, portal, max_bytes

    def request(
        self, method: str, url: str, seconds: float, body: Any = None, on_line: OnLine | None = None
    ) -> Answer:
        """
        Sends a request and reads the answer.

        Args:
            method (`str`), url (`str`):
                Method and address.
            seconds (`float`):
                Time limit from the connection to the end of the answer.
            body (`Any`, *optional*):
                What is sent as JSON.
            on_line (`Callable`, *optional*):
                Receives the lines of a stream of events as they arrive.

        Raises:
            [`AnswerRefused`]: The answer is compressed or too large.
            `TimeoutError`: The time is up. The message is a clause without a full stop.
            `httpx.HTTPError`, `httpx.InvalidURL`: The request failed.
        """
        return self._portal.call(self._request, method, url, seconds, body, on_line)

    def sleep(self, seconds: float) -> None:
        """Waits, unless the client is closed."""
        import anyio

        self._portal.call(anyio.sleep, seconds)

    async def _request(self, method: str, url: str, seconds: float, body: Any, on_line: OnLine | None) -> Answer:
        import anyio

        content = None if body is None else json.dumps(body).encode()
        with anyio.move_on_after(seconds):
            async with self._client.stream(method, url, content=content) as response:
                return await self._read(response, on_line)
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    async def _read(self, response: "httpx.Response", on_line: OnLine | None) -> Answer:
        if (response.headers.get("Content-Encoding") or "identity").lower() != "identity":
            raise AnswerRefused("it sent a compressed answer, which was not asked for")
        if not response.is_success or "event-stream" not in response.headers.get("Content-Type", ""):
            on_line = None
        limit = self._max_bytes if on_line is None else MAX_STREAM_BYTES
        content, size = bytearray(), 0
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > limit:
                raise AnswerTooLarge(f"it answered with more than {limit >> 20} MiB")
            content += piece
            if on_line is not None and b"\n" in piece:
                *lines, content = content.split(b"\n")
                for line in lines:
                    on_line(bytes(line))
            if on_line is not None and len(content) > MAX_LINE_BYTES:
                raise AnswerTooLarge(f"it sent a line of more than {MAX_LINE_BYTES >> 20} MiB")
        if on_line is not None:
            on_line(bytes(content))
            content.clear()
        return Answer(response.status_code, response.headers, bytes(content))


@contextmanager
def limited_client(headers: dict[str, str], max_bytes: int, **options: Any) -> Iterator[LimitedClient]:
    """
    Opens a client. On an error or Ctrl-C its requests are cancelled.

    Args:
        headers (`dict[str, str]`):
            Headers of each request.
        max_bytes (`int`):
            Limit of the size of an answer that is not a stream of events.
        **options:
            Passed on to `httpx.AsyncClient`.
    """
    import httpx
    from anyio.from_thread import start_blocking_portal

    # Answers are asked for, and read, without compression, so that the size limit holds for what is parsed
    own = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    client = httpx.AsyncClient(headers=headers | own, **options)
    with start_blocking_portal() as portal:
        try:
            yield LimitedClient(client, portal, max_bytes)
        finally:
            portal.call(client.aclose)
