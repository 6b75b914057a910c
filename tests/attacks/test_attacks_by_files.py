"""Data, traces, weights and records that nest too deeply, hold huge numbers or have a broken header."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from models import save_tiny_model

from trl_sgpo import SGPOConfig
from trl_sgpo.cli import main as cli
from trl_sgpo.data.tasks import answer_reward, load_problems
from trl_sgpo.data.trace_files import read_traces
from trl_sgpo.errors import ConfigError, DataError, ModelError
from trl_sgpo.evaluation.chunks import ChunkLog
from trl_sgpo.inference.loading import adapter_base
from trl_sgpo.inference.solve_file import _finished
from trl_sgpo.method.buffer import load_rollouts, save_rollouts
from trl_sgpo.report.records import _read_json


DIGITS = "9" * 5_000
BRACKETS = "[" * 200_000


# Numbers


ANSWERS = [
    "{}",
    "{}.5",
    "1/{}",
    "{}%",
    "1e{}",
    "-{}",
    "\\frac{{1}}{{{}}}",
    "[{}]",
    "{} apples",
    "{}^2",
    "2^{}",
    "0x{}",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_of_many_digits_is_wrong(answer):
    text = answer.format(DIGITS)
    assert answer_reward([f"#### {text}", f"\\boxed{{{text}}}", text], ["3"] * 3) == [0.0] * 3


def test_a_solution_of_many_digits_is_compared_with():
    assert answer_reward(["#### 3", f"#### {DIGITS}", f"#### {DIGITS}0"], [DIGITS] * 3) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", ["1  2", "1 2", "1\t2", "1\u00a02", "1\u20092", "1 \n2", "1 \\; 2"])
def test_two_numbers_are_not_one(answer):
    assert answer_reward([f"#### {answer}"], ["12"]) == [0.0]


def test_a_number_in_json_lines_that_is_read_as_infinite(caplog):
    Path("rows.jsonl").write_text(f'{{"question": "Many?", "answer": {DIGITS}}}\n{{"question": "3?", "answer": 3}}\n')
    assert load_problems("rows.jsonl")["solution"] == [None, "3"]
    assert "1 of 2 problems has no answer" in caplog.text


def test_a_number_in_csv_that_is_read_as_infinite(caplog):
    Path("rows.csv").write_text("question,answer\nMany?,1e99999\n3?,3\n")
    assert load_problems("rows.csv")["solution"] == [None, "3"]
    assert "1 of 2 problems has no answer" in caplog.text


ROWS = {
    "digits.json": f'[{{"question": "Many?", "answer": {DIGITS}}}]',
    "float.jsonl": '{"question": "Many?", "answer": 1e999}\n',
    "brackets.jsonl": f'{{"question": {BRACKETS}\n',
    "brackets.json": BRACKETS,
    "quote.csv": 'question,answer\n"What?,3\n',
}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_problems_is_refused_by_name(name, capsys):
    Path(name).write_text(ROWS[name])
    with pytest.raises(DataError, match=f"{name} cannot be read: .*Correct the file"):
        load_problems(name)
    assert cli.main(["solve", "--model", "m", "--input", name, "--output", "out.jsonl"]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("trl-sgpo solve: error: ") and name in line and len(line) < 400


# Nested JSON


@pytest.mark.parametrize("text", [BRACKETS, f'{{"prompt": {DIGITS}}}'], ids=["brackets", "digits"])
def test_traces(text):
    Path("traces.jsonl").write_text(text)
    with pytest.raises(DataError, match="line 1: no JSON"):
        read_traces("traces.jsonl")


def test_the_config_of_an_adapter():
    Path("adapter_config.json").write_text(BRACKETS)
    with pytest.raises(ModelError, match="cannot be read"):
        adapter_base(".")


def test_answers_in_a_file_that_is_continued():
    Path("out.jsonl").write_text(BRACKETS + "\n")
    with pytest.raises(ConfigError, match="holds something else"):
        _finished(Path("out.jsonl"), "m", ["What?"], 8)


def test_an_evaluation_that_is_continued():
    Path("run").mkdir()
    Path("run/settings.json").write_text("{}")
    Path("run/rows.jsonl").write_text(BRACKETS + "\n")
    with pytest.raises(DataError, match="is damaged"):
        ChunkLog(Path("run"), {}, 1)


def test_a_record_of_a_run():
    Path("trainer_state.json").write_text(BRACKETS)
    assert _read_json(Path("trainer_state.json")) is None


# Weights


def broken(good: bytes) -> dict[str, bytes]:
    """Files of weights that are none."""
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def made(head: bytes) -> bytes:
        return struct.pack("<Q", len(head)) + head + good[8 + length :]

    def changed(**values: object) -> bytes:
        return made(json.dumps(header | {name: header[name] | values}).encode())

    return {
        "empty": b"",
        "length": b"\xff" * 8 + good[8:],
        "JSON": made(b"{" * 50),
        "brackets": made(BRACKETS.encode()),
        "digits": made(b'{"a":' + DIGITS.encode() + b"}"),
        "cut off": good[:-100],
        "offsets": changed(data_offsets=[0, 10**15]),
        "shape": changed(shape=[10**9, 10**9]),
        "type": changed(dtype="X7"),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


KINDS = ["empty", "length", "JSON", "brackets", "digits", "cut off", "offsets", "shape", "type", "pointer"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Path(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_a_broken_header(kind, tiny, capsys):
    shutil.copytree(tiny, "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(broken(weights.read_bytes())[kind])
    assert cli.main(["solve", "What is 1 + 2?", "--model", "model", "--no_bank"]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("trl-sgpo solve: error: ") and "header" in line


@pytest.mark.parametrize("kind", [*KINDS, "no step"])
def test_rollouts_with_a_broken_header(kind):
    path, args = Path("rollouts_0.safetensors"), SGPOConfig("run", gradient_accumulation_steps=2, bf16=False)
    save_rollouts(".", args, 3, [{"ids": torch.arange(100)}] * 2)
    bad = broken(path.read_bytes()) | {"no step": struct.pack("<Q", 2) + b"{}"}
    path.write_bytes(bad[kind])
    with pytest.raises(ConfigError, match="resume from another checkpoint"):
        load_rollouts(".", args, torch.device("cpu"))
