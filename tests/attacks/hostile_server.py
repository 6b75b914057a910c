"""A local HTTP server whose replies a test writes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Reads a request and leaves the reply to `reply`."""

    stopped: threading.Event

    def reply(self) -> None: ...

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with suppress(OSError):
            self.reply()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        """Sends a whole reply."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_pieces(self, pieces: Iterator[bytes], content_type: str, pause: float = 0.0) -> None:
        """Sends a reply that ends with the connection, or with the test."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            if self.stopped.wait(pause):
                return


@contextmanager
def serving(reply: Callable[[Any], None]) -> Iterator[str]:
    """Runs a server that answers each request by `reply(handler)`, and gives its address."""
    stopped = threading.Event()
    handler = type("Replying", (Handler,), {"reply": reply, "stopped": stopped})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
