"""Mathematical equality of two expressions, decided by math-verify in a process of its own."""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from ..errors import DataError


START_SECONDS = 120.0
CHECK_SECONDS = 5.0


class MathWorker:
    """
    A process that compares expressions. It has a limit of 2 GiB of memory and of 2 seconds a comparison, and is
    started again after one that passed a limit. It is started by the first comparison, and may be used from threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._forget)

    def equal(self, gold: str, answer: str) -> bool:
        """
        Whether two expressions are equal.

        Args:
            gold (`str`):
                The right answer in LaTeX.
            answer (`str`):
                Another one.

        Returns:
            `bool`: `False` also where the comparison passed a limit.

        Raises:
            [`DataError`]: If math-verify is not installed or its process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._ask(json.dumps([gold, answer]), CHECK_SECONDS)
            if reply is None:
                self.close()
            return reply == "true"

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _forget(self) -> None:
        self._process, self._lock = None, threading.Lock()  # a forked process starts one of its own

    def _start(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise DataError("Comparing mathematical expressions needs `pip install 'trl-sgpo[math]'`.")
        self.close()
        script = Path(__file__).with_name("math_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],  # -P: modules beside the script do not hide others
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._read(START_SECONDS) != '"ready"':
            self.close()
            raise DataError(
                "The process that compares mathematical expressions does not start: run "
                "`python -c 'import math_verify'` to see why."
            )

    def _ask(self, request: str, seconds: float) -> str | None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._read(seconds)

    def _read(self, seconds: float) -> str | None:
        """A line of the process, `None` if it ended or the time is up."""
        assert self._process is not None and self._process.stdout is not None
        limit = threading.Timer(seconds, self._process.kill)
        limit.daemon = True
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        return line.decode().strip() if line.endswith(b"\n") else None


equal_expressions = MathWorker().equal
