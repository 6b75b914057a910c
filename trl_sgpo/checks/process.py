"""
What may take long or much memory, in a process of its own: mathematics, verifiers of families, chat templates,
patterns of adapters, the opening of models and the decoding of Parquet files.
"""

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ..errors import DataError


logger = logging.getLogger(__name__)

START_SECONDS = 120.0
SECONDS = {
    "equal": 5.0,
    "entry": 15.0,
    "accepts": 15.0,
    "render": 10.0,
    "opens": 180.0,
    "patterns": 10.0,
    "decodes": 900.0,
}

_PACKAGES = {
    "equal": ("math_verify", "math"),
    "entry": ("reasoning_gym", "gym"),
    "accepts": ("reasoning_gym", "gym"),
    "render": ("transformers", ""),
    "patterns": ("re", ""),
    "opens": ("transformers", ""),
    "decodes": ("pyarrow", ""),
}


_FAILED = {
    "equal": "A comparison of expressions passed its limit of time or memory, and counts as not equal.",
    "entry": "A problem of reasoning-gym could not be generated within its limit of time or memory.",
    "accepts": "A verifier of reasoning-gym passed its limit of time or memory, and the answer counts as wrong.",
    "render": "A chat template passed its limit of time or memory.",
    "patterns": "The patterns of an adapter passed their limit of time or memory.",
}


class CheckProcess:
    """
    A process with a limit of memory and a time limit for each request: 2 seconds of computation for mathematics and
    chat templates, 5 for a verifier or an adapter, 60 to open a model, 300 to decode a file. It starts with the first
    request, and again after one that passed a limit. Threads may share it.

    Args:
        memory (`int`, *optional*, defaults to `3`):
            Its limit of memory in GiB.
    """

    def __init__(self, memory: int = 3) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()
        self._told: set[str] = set()
        atexit.register(self.close)
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._forget)

    def ask(self, name: str, *arguments: Any) -> Any:
        """
        Sends a request and waits for the reply.

        Args:
            name (`str`):
                `"equal"`, `"entry"`, `"accepts"`, `"render"`, `"patterns"`, `"opens"` or `"decodes"`, see
                [`~trl_sgpo.checks.worker`].
            *arguments:
                Its arguments, as JSON has them.

        Returns:
            The reply, `None` if it failed or passed a limit.

        Raises:
            [`DataError`]: If the package that it needs is not installed, or the process does not start.
        """
        with self._lock:
            try:
                used = self._is_ready(name)
                reply = self._exchange([name, *arguments], SECONDS[name])
                if reply is None and used and self._ended_by_itself():  # memory of earlier requests may be the cause
                    self.close()
                    self._is_ready(name)
                    reply = self._exchange([name, *arguments], SECONDS[name])
            except BaseException:  # an interruption: the next request would read the reply to this one
                self.close()
                raise
            if reply is None:
                self.close()
                if name in _FAILED and name not in self._told:
                    self._told.add(name)
                    logger.warning(f"{_FAILED[name]} Later cases are not logged.")
            try:
                return None if reply is None else json.loads(reply)
            except ValueError:  # a number of more digits than Python reads
                return None

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        self._loaded = set()
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # a request that it ended without reading
                        pipe.close()

    def _forget(self) -> None:
        # a forked process starts one of its own
        self._process, self._lock, self._loaded = None, threading.Lock(), set()

    def _is_ready(self, name: str) -> bool:
        """Whether the process has served requests before. It is started, and loads what the request needs."""
        package, extra = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise DataError(f"Checking these answers needs `pip install 'trl-sgpo[{extra}]'`.")
        used = self._process is not None and self._process.poll() is None
        if package in self._loaded and used:
            return True
        if used and self._load(name, package):
            return True
        self._start()
        if not self._load(name, package):
            self.close()
            raise DataError(f"A process with limits does not start: see `python -c 'import {package}'`.")
        return False

    def _ended_by_itself(self) -> bool:
        """Whether the process ended at its limit of memory, and not at one of time."""
        return self._process is not None and self._process.wait() == 0

    def _start(self) -> None:
        self.close()
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(self._memory)],  # -P: modules beside the script do not hide others
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=None if sys.platform == "win32" else 0,  # Ctrl-C ends requests, not the process
            # Problems of some families depend on the first. What is read here lies on this machine
            env=os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"},
        )

    def _load(self, name: str, package: str) -> bool:
        if self._exchange(["load", name], START_SECONDS) != '"loaded"':
            return False
        self._loaded.add(package)
        return True

    def _exchange(self, request: list[Any], seconds: float) -> str | None:
        """The reply to a request, `None` if the process ended or the time is up."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        limit = threading.Timer(seconds, self._process.kill)
        limit.daemon = True
        limit.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            return None
        finally:
            limit.cancel()
        return line.decode().strip() if line.endswith(b"\n") else None


CHECKS = CheckProcess()
"""The process of this one."""


def compared_expressions(gold: str, answer: str) -> bool | None:
    """Whether two expressions in LaTeX are equal by math-verify, `None` if the comparison passes a limit."""
    found: bool | None = CHECKS.ask("equal", gold, answer)
    return found
