"""
Processes with limits (`trl_sgpo.checks.worker`) that do not import first: they are forked from a server that has.

The server starts with the first of them, serves all processes of the session, and ends with it. Only the two processes
that the package shares are forked. A `CheckProcess` that a test makes is started as that of a user.
"""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trl_sgpo.checks.opening import OPENING
from trl_sgpo.checks.process import CHECKS, CheckProcess


SCRIPT = Path(sys.modules[CheckProcess.__module__].__file__ or "").with_name("worker.py")
_start = CheckProcess._start


class Worker:
    """A forked process, with what `CheckProcess` uses of `subprocess.Popen`."""

    def __init__(self, memory: int) -> None:
        its_input, our_output = os.pipe()
        our_input, its_output = os.pipe()
        self.stdin, self.stdout = os.fdopen(our_output, "wb"), os.fdopen(our_input, "rb")
        self.returncode: int | None = None
        self._server = _connected()
        socket.send_fds(self._server, [b"."], [its_input, its_output])
        os.close(its_input)
        os.close(its_output)
        self._told = self._server.makefile("r")
        self._server.sendall(json.dumps([memory, os.getcwd(), {**os.environ}]).encode() + b"\n")
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        return self.wait() if self.returncode is not None or select.select([self._server], [], [], 0)[0] else None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._told.readline())
            self._told.close()
            self._server.close()
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@contextmanager
def forked() -> Iterator[None]:
    """For a while the processes that the package shares are forked."""

    def start(self: CheckProcess) -> None:
        if self is CHECKS or self is OPENING:
            self.close()
            self._process = Worker(self._memory)  # type: ignore[assignment]
        else:
            _start(self)

    with patch.object(CheckProcess, "_start", start):
        yield


def _connected() -> socket.socket:
    """A connection to the server of the session, which is started if there is none."""
    session = Path(os.environ["TRL_SGPO_TESTS"])
    address = session / "workers"
    with (session / "workers.lock").open("w") as lock, (session / "workers.log").open("a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, str(Path(__file__)), str(address)]
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            while not address.exists():
                assert server.poll() is None, (session / "workers.log").read_text()
                time.sleep(0.01)  # polls for an event, measures nothing
            server.returncode = 0  # it ends by itself
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    return connection


def serve(address: Path, session: int) -> None:
    """Forks a process for each connection, until the folder of the address or the process of the session is gone."""
    spec = spec_from_file_location("worker", SCRIPT)
    assert spec is not None and spec.loader is not None
    worker = module_from_spec(spec)
    spec.loader.exec_module(worker)
    for name in ("equal", "render", "entry", "opens", "decodes"):
        worker.load(name)
    worker.render([], {"chat_template": "a"})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)
        while address.exists() and _runs(session):
            if select.select([listener], [], [], 1)[0]:
                connection, _ = listener.accept()
                if os.fork() == 0:
                    listener.close()
                    _attend(connection, worker)
                connection.close()
            with suppress(ChildProcessError):  # there is none
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _attend(connection: socket.socket, worker: Any) -> None:
    """Forks one process, tells its id, and its exit status once it has ended."""
    _, (its_input, its_output), _, _ = socket.recv_fds(connection, 1, 2)
    memory, folder, environment = json.loads(connection.makefile("r").readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.dup2(its_input, 0)
        os.dup2(its_output, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, max(its_input, its_output) + 1)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, status = [str(SCRIPT), str(memory)], 1
        try:
            worker.main()
            status = 0
        finally:
            os._exit(status)
    os.close(its_input)
    os.close(its_output)
    connection.sendall(f"{pid}\n".encode())
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its id stays taken, so that nobody kills another one
    assert ended is not None
    status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    try:
        connection.sendall(f"{status}\n".encode())
        connection.recv(1)  # until it is closed
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(os.environ["TRL_SGPO_TESTS_PID"]))
