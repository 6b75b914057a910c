"""How commands end: interrupted, with a closed pipe, with a full disk."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from trl_sgpo.checks.command import run_command
from trl_sgpo.cli import main as cli
from trl_sgpo.cli.bench import SUBJECTS


FULL = Path("/dev/full")
LINES = "import sys\nfrom trl_sgpo.checks.command import run_command\n"
PRINTS = f"{LINES}sys.exit(run_command('trl-sgpo x', lambda rest: [print('line') for _ in range(100000)] and 0, []))"
TABLE = (
    f"{LINES}from trl_sgpo.cli.text import print_table\n"
    "sys.exit(run_command('trl-sgpo x', lambda rest: print_table(['a'], [['line']] * 9999) or 0, []))"
)
ONE = f"{LINES}sys.exit(run_command('trl-sgpo x', lambda rest: print('line') or 0, []))"


def raising(error: BaseException):
    def command(arguments: list[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "trl-sgpo x: interrupted. Finished chunks are kept: the same command goes on.\n"),
        (KeyboardInterrupt("Go on with `y`."), "trl-sgpo x: interrupted. Go on with `y`.\n"),
    ],
)
def test_an_interrupted_command_says_what_is_kept(error, line, capsys):
    kept = "Finished chunks are kept: the same command goes on."
    assert run_command("trl-sgpo x", raising(error), [], kept) == 130
    assert capsys.readouterr().err.lstrip("\n") == line


def test_every_command_says_what_is_kept(monkeypatch, capsys):
    """Ctrl-C at any place: while modules are imported, too."""
    monkeypatch.setattr(cli, "import_module", raising(KeyboardInterrupt()))
    for name in cli.COMMANDS:
        assert cli.main([name]) == 130
        line = capsys.readouterr().err.lstrip("\n")
        assert line.startswith(f"trl-sgpo {name}: interrupted. ") and line.count("\n") == 1 and "command" in line


@pytest.mark.parametrize("program", [PRINTS, TABLE], ids=["lines", "table"])
def test_a_closed_pipe_is_one_line(program):
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        message = process.stderr.read()
    assert process.returncode == 141
    assert message == "trl-sgpo x: standard output was closed.\n"


@pytest.mark.parametrize("program", [PRINTS, TABLE, ONE], ids=["lines", "table", "one line"])
def test_standard_output_on_a_full_disk_is_one_line(program):
    with FULL.open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.returncode == 2
    assert process.stderr.startswith("trl-sgpo x: error: No space left on device") and process.stderr.count("\n") == 1


OF_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
OF_PYTHON = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_state(arguments):
    torch.save({"a": torch.ones(1000)}, FULL)


def write_text(arguments):
    with FULL.open("w") as file:
        file.write("text")


def _run_epoch(arguments):
    """Named as the function of transformers in which checkpoints are written."""
    raise OF_RUST


@pytest.mark.parametrize("command", [raising(OF_RUST), raising(OF_PYTHON), save_state, write_text, _run_epoch])
def test_a_full_disk_is_one_line(command, capsys):
    """Whatever library writes, also where the error does not name the file."""
    assert run_command("trl-sgpo x", command, []) == 2
    message = capsys.readouterr().err
    assert message.startswith("trl-sgpo x: error: ") and message.count("\n") == 1 and "space" in message


def test_a_directory_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    denied = OSError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "closed"))
    for command in (raising(denied), lambda rest: os.makedirs(tmp_path / "file" / "under")):
        assert run_command("trl-sgpo x", command, []) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"trl-sgpo x: error: {tmp_path}") and message.count("\n") == 1


@pytest.mark.parametrize("subject", SUBJECTS)
def test_benchmarks_check_their_output_before_they_measure(subject, capsys, tmp_path):
    (tmp_path / "file").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    arguments = ["bench", subject, "--config", str(recipe), "--output", str(tmp_path / "file" / "figures.json")]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("trl-sgpo bench: error: `--output` is ") and message.count("\n") == 1
