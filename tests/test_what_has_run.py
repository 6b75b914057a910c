"""The table of what has run names commands that exist and covers what it is expected to cover."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "what_has_run.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("| What |", "|---"))
]
PROMISED = (
    "vLLM, colocate",
    "vLLM, server",
    "CUDA",
    "bitsandbytes",
    "DDP",
    "FSDP2",
    "DeepSpeed",
    "tensorboard, trackio, wandb",
    "Notebook",
    "GGUF",
    "Hub",
    "Chroma",
    "Unsloth",
)


@pytest.mark.parametrize("name", PROMISED)
def test_it_has_a_row(name: str) -> None:
    assert len([row for row in ROWS if name in row[0]]) == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_a_command_that_exists_or_a_reason(row: list[str]) -> None:
    assert len(row) == 4
    what, command, on, result = row
    assert what and result
    if command == "not run":
        assert not on
        return
    assert on
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"`([^`]+)`", command)
    for name in named:
        if name.startswith("tests/"):
            assert (ROOT / name).is_file(), name
        elif name.startswith("make "):
            assert name.split()[1] in targets, name
        else:
            assert name.startswith("trl-sgpo ") and (ROOT / name.split()[-1]).is_file(), name
    assert named or "](" in command
