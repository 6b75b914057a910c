"""A tokenizer that its library refuses, or at which it panics, when it is loaded or encodes and decodes."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import save_tiny_model

from trl_sgpo.cli.main import main


TOKENIZERS: dict[str, dict[str, Any]] = {
    "no such model": {"model": {"type": "X"}},
    "no pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a"}, "content": "b"}},
    "no vocabulary": {"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}},
    "a pattern without end": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}},
    "no characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAA"}},
    "strip beyond the text": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "x"},
                {"type": "Fuse"},
                {"type": "Strip", "content": "x", "start": 10**9, "stop": 10**9},
            ],
        }
    },
}
PROBLEM = "1 + 2 " + "a" * 40 + "!"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_line_and_status_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TOKENIZERS[name]))
    capsys.readouterr()
    status = main(["solve", "--model", str(tmp_path), "--no_bank", "--max_completion_length", "4", PROBLEM])
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "error" in line
    ]  # without what a panic prints itself
    assert (status, [line[:24] for line in lines]) == (2, ["trl-sgpo solve: error: t"]), lines
