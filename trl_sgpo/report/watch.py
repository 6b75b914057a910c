"""
Serves a run's report on 127.0.0.1 while training writes the run.

There is one page, `/`. A web page of someone else cannot read it: `Host` must be this machine, also where the name of
someone else leads to 127.0.0.1 (DNS rebinding), and no other origin is allowed to fetch it or to frame it.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from ..errors import ConfigError, SGPOError
from .page import content_policy, render
from .records import read_watched
from .run_files import EARLIER_DIRECTORY, REPORT_PAGE


ADDRESS = "127.0.0.1"
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")  # of any port: a tunnel may begin at another one
_READ = (".json", ".jsonl", ".parquet", ".sqlite")  # endings of what a report is made of
_IDLE = 30  # seconds after which a connection without a request is closed
_HEADERS = {
    "Content-Security-Policy": f"{content_policy(True)}; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class WatchedReport:
    """
    The page of a run as it is now. It is made again when files of the run changed, one at a time.

    Args:
        run (`str`):
            Output folder of the run, which may not exist yet.
        other (`str`, *optional*):
            That of a run to compare it with.
        evaluations (`Sequence[str]`, *optional*):
            Output folders of `trl-sgpo eval` outside the run.
        problems (`int`, *optional*, defaults to `40`):
            Number of problems to show rollouts of.

    Raises:
        [`ConfigError`]: A folder holds something else than a run or an evaluation.
    """

    def __init__(self, run: str, other: str | None = None, evaluations: Sequence[str] = (), problems: int = 40):
        self._run, self._other, self._evaluations, self._problems = run, other, evaluations, problems
        self._lock = Lock()
        self._tag, self._page = "", b""
        self.page()

    def page(self) -> tuple[str, bytes]:
        """A tag that changes with the page, and the page."""
        with self._lock:
            tag = self._state()
            if tag != self._tag:
                run = read_watched(self._run, self._evaluations, self._problems)
                other = None if self._other is None else read_watched(self._other, problems=0)
                self._page, self._tag = render(run, other, tag).encode(), tag
            return self._tag, self._page

    def close(self) -> None:
        """Waits for a page that is being made, and makes none after it."""
        self._lock.acquire()

    def _state(self) -> str:
        digest = hashlib.sha256()
        for folder in filter(None, (self._run, self._other, *self._evaluations)):
            for path in _files_read(Path(folder)):
                try:
                    status = path.lstat()
                except FileNotFoundError:  # training replaced it
                    continue
                digest.update(f"{path}\0{status.st_mtime_ns}\0{status.st_size}\n".encode(errors="surrogateescape"))
        return f'"{digest.hexdigest()[:32]}"'


def _files_read(folder: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != EARLIER_DIRECTORY)
        yield from (Path(directory, name) for name in sorted(files) if name.endswith(_READ) and name != REPORT_PAGE)


def serve(report: WatchedReport, port: int) -> ThreadingHTTPServer:
    """
    Binds the server of a report. `serve_forever` runs it.

    Args:
        report ([`WatchedReport`]):
            The report.
        port (`int`):
            Port on 127.0.0.1, 0 for a free one.

    Raises:
        [`ConfigError`]: The port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = "trl-sgpo", "", _IDLE
        error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"

        def do_GET(self) -> None:
            hosts = self.headers.get_all("Host", [])
            if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
                self._answer(HTTPStatus.FORBIDDEN, "The address of this page begins with http://127.0.0.1.")
            elif self.path != "/":
                self._answer(HTTPStatus.NOT_FOUND, "There is one page, at /.")
            else:
                self._answer_page()

        def _answer_page(self) -> None:
            try:
                tag, page = report.page()
            except (SGPOError, OSError) as error:  # files may be moved while they are read
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"Not refreshed: {error}")
                return
            if self.headers.get("If-None-Match") == tag:
                self._answer(HTTPStatus.NOT_MODIFIED, "")
            else:
                self._send(HTTPStatus.OK, "text/html", page, tag)

        def _answer(self, status: HTTPStatus, text: str) -> None:
            self._send(status, "text/plain", text.encode(errors="replace"))

        def _send(self, status: HTTPStatus, kind: str, body: bytes, tag: str | None = None) -> None:
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            if tag is not None:
                self.send_header("ETag", tag)
            if status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Requests are not printed: they are text of anyone."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {ADDRESS} cannot be used ({error.strerror}): name another by `--port`, 0 for a free one."
        ) from error
