"""
Commands in processes of their own that do not import first: they are forked from a process that has.

A GPU cannot be used in a forked process. Where there is one, every process imports for itself.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from isolation import hugging_face_home
from workers import forked


CONTEXT: Any = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "forkserver")
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(
        [
            "processes",
            "models",
            "trl_sgpo.cli.bench",
            "trl_sgpo.cli.bootstrap",
            "trl_sgpo.cli.eval",
            "trl_sgpo.cli.train",
            "trl_sgpo.cli.warmstart",
            "trl_sgpo.compare.arm_run",
        ]
    )


class Process(CONTEXT.Process):
    """A process with the environment and the working directory of the one that makes it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.environment, self.working = {**os.environ}, os.getcwd()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.working)
        with hugging_face_home(Path(os.environ["HF_HOME"])), forked():
            super().run()


def _call_main(module: str, arguments: list[str], logs: list[str]) -> None:
    for number, log in enumerate(logs, start=1):  # standard output and standard error
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv[1:] = arguments
    sys.exit(import_module(module).main(arguments))


def start(module: str, *arguments: str, output: Path | str = os.devnull, errors: Path | str = os.devnull) -> Process:
    """Starts `main` of a module in a new process."""
    process = Process(target=_call_main, args=(module, [*arguments], [str(output), str(errors)]))
    process.start()
    return process


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `main` of a module in a new process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = start(module, *arguments, output=output, errors=errors)
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())
