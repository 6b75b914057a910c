"""Data, traces, weights and records that nest too deeply, hold huge numbers or have a broken header."""

import json
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from models import save_tiny_model
from pyarrow import parquet

from trl_sgpo import SGPOConfig
from trl_sgpo.cli import main as cli
from trl_sgpo.data.sources import load_rows
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


NUMBERS = {
    "digits.jsonl": f'{{"question": "Many?", "answer": {DIGITS}}}\n{{"question": "3?", "answer": 3}}\n',
    "digits.json": f'[{{"question": "Many?", "answer": {DIGITS}}}, {{"question": "3?", "answer": 3}}]',
    "digits.csv": f"question,answer\nMany?,{DIGITS}\n3?,3\n",
    "exponent.jsonl": '{"question": "Many?", "answer": 1e99999}\n{"question": "3?", "answer": 3}\n',
    "exponent.csv": "question,answer\nMany?,1e99999\n3?,3\n",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_no_type_holds_is_read_as_text(name):
    Path(name).write_text(NUMBERS[name])
    solutions = load_problems(name)["solution"][:]
    assert solutions == [DIGITS if "digits" in name else "1e99999", "3"]
    assert answer_reward(["#### 3", "#### 3"], solutions) == [0.0, 1.0]


def invalid_parquet() -> bytes:
    """A text that is not UTF-8."""
    sink = pa.BufferOutputStream()
    bad = pa.array([b"What \xff?"]).view(pa.string())
    parquet.write_table(pa.table({"question": bad, "answer": ["3"]}), sink)
    return sink.getvalue().to_pybytes()


ROWS = {
    "brackets.jsonl": f'{{"question": {BRACKETS}\n'.encode(),
    "closed.jsonl": f'{{"question": {BRACKETS + BRACKETS.replace("[", "]")}}}\n'.encode(),
    "brackets.json": BRACKETS.encode(),
    "nested.jsonl": f'{{"question": "What?", "other": {"[" * 900}1{"]" * 900}}}\n'.encode(),
    "surrogate.jsonl": b'{"question": "What?", "answer": "\\ud800"}\n',
    "surrogate.json": b'[{"question": "What?", "answer": ["\\udfff"]}]',
    "latin.jsonl": '{"question": "Was f\u00e4llt?"}\n'.encode("latin-1"),
    "utf16.jsonl": '{"question": "Was?"}\n'.encode("utf-16")[:-1],
    "twice.jsonl": b'{"question": "What?", "question": "Why?"}\n',
    "scalar.json": b"[1]",
    "open.json": b'[{"question": "What?"}',
    "more.json": b'[{"question": "What?"}] []',
    "quote.csv": b'question,answer\n"What?,3\n',
    "cells.csv": b"question,answer\nWhat, is it?,3\n",
    "utf8.parquet": invalid_parquet(),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_problems_is_refused_by_name(name, capsys):
    Path(name).write_bytes(ROWS[name])
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
    with pytest.raises(ConfigError, match="is damaged"):
        _finished(Path("out.jsonl"), "m", ["What?"], 8)


def test_an_evaluation_that_is_continued():
    Path("run").mkdir()
    Path("run/settings.json").write_text("{}")
    Path("run/rows.jsonl").write_text(BRACKETS + "\n")
    with pytest.raises(ConfigError, match="is damaged"):
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


# A dataset's folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "secret.json"
    path.parent.mkdir()
    path.write_text('{"question": "the secret", "answer": "1"}\n')
    return path


@pytest.mark.parametrize("files", ["{}", "../home/*.json"])
def test_a_dataset_card_reads_no_file_of_the_user(tmp_path: Path, secret: Path, files: str) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    card = f"---\nconfigs:\n- config_name: default\n  data_files: '{files.format(secret)}'\n---\n"
    (folder / "README.md").write_text(card)
    with pytest.raises(DataError, match="not part of it"):
        load_problems(str(folder))


@pytest.mark.parametrize("more", ["", "  engine: python\n"])
@pytest.mark.parametrize("separator", ["(a|a)*b", ";;", ""])
def test_a_dataset_card_gives_no_pattern(tmp_path: Path, more: str, separator: str) -> None:
    (tmp_path / "data.csv").write_text(f"question,answer{'a' * 40}\n1 + 2?,3\n")
    card = f"---\nconfigs:\n- config_name: default\n  data_files: data.csv\n  sep: '{separator}'\n{more}---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(DataError, match="set it to one character"):
        load_problems(str(tmp_path))


def test_a_link_in_a_dataset_reads_no_file_of_the_user(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "data.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match="not part of it"):
        load_problems(str(folder))
    with pytest.raises(DataError, match="not part of it"):
        load_rows("json", "train", data_dir=str(folder))
    for path, pattern in ((str(folder), "*.jsonl"), ("json", f"{folder}/*.jsonl")):
        with pytest.raises(DataError, match="a link out of its folder: name the file itself"):
            load_rows(path, "train", data_files=pattern)
    assert len(load_rows("json", "train", data_files=str(folder / "data.jsonl")).dataset) == 1  # one's own choice
    (folder / "data.jsonl").unlink()
    shutil.copy(secret, folder / "data.jsonl")
    assert len(load_rows("json", "train", data_dir=str(folder)).dataset) == 1


def test_a_snapshot_of_the_hub_is_read(tmp_path: Path, secret: Path) -> None:
    repository = tmp_path / "datasets--user--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "blobs" / "1").write_bytes(secret.read_bytes())
    (repository / "snapshots" / "abc" / "data.jsonl").symlink_to("../../blobs/1")
    assert load_problems(str(repository / "snapshots" / "abc"))[0]["solution"] == "1"


@pytest.mark.parametrize("kind", ["picture", "nested", "list"])
def test_a_row_opens_no_file(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset, Features, Image, List, Value

    (tmp_path / "private.png").write_text("no picture")
    path = {"bytes": None, "path": str(tmp_path / "private.png")}
    feature, value = {
        "picture": (Image(), path),
        "nested": ({"inner": Image()}, {"inner": path}),
        "list": (List(Image()), [path]),
    }[kind]
    features = Features({"question": Value("string"), "answer": Value("string"), "picture": feature})
    rows = Dataset.from_dict({"question": ["1 + 2"], "answer": ["3"], "picture": [value]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    problems = load_problems(str(tmp_path / "rows.parquet"))
    assert problems[0]["solution"] == "3" and "Image" not in str(problems.features)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_row_of_many_columns_is_refused(form: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    row, path = {f"c{number}": "1" for number in range(20_000)}, tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(pa.table({name: [value] for name, value in row.items()}), path)
    else:
        path.write_text(json.dumps(row) if form == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(DataError, match="more than 1,000 columns"):
        load_problems(str(path))


def test_the_name_of_a_type_calls_no_function(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    told = {"info": {"features": {"question": {"_type": "Value", "dtype": "show_versions"}}}}
    table = pa.table({"question": ["1 + 2"], "answer": ["3"]}).replace_schema_metadata(
        {"huggingface": json.dumps(told)}
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert load_problems(str(tmp_path / "rows.parquet"))[0]["solution"] == "3"
    assert "pyarrow version" not in capfd.readouterr().out


def test_a_header_of_equal_names_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"question,answer{',a' * 900}\n1 + 2,3{',1' * 900}\n")
    problems = load_problems(str(path))
    assert problems[0]["solution"] == "3" and "a.899" in problems.column_names


def test_a_key_twice_among_many_is_found(tmp_path: Path) -> None:
    keys = "".join(f', "k{number}": 1' for number in range(200_000))
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "1 + 2", "answer": "3"{keys}, "z": 1, "z": 2}}\n')
    with pytest.raises(DataError, match="key 'z' twice"):
        load_problems(str(tmp_path / "rows.jsonl"))


def test_a_mapping_of_many_keys_stays_json(tmp_path: Path) -> None:
    from datasets import Json

    many = {f"k{number}": {"a": number} for number in range(100_000)}
    row = {"question": "1 + 2", "answer": "3", "x": many, "y": {"a": 1, "b": [{"c": 2.5}]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    problems = load_problems(str(tmp_path / "rows.jsonl"))
    assert problems[0]["x"] == many and problems[0]["y"] == row["y"]
    assert isinstance(problems.features["x"], Json) and not isinstance(problems.features["y"], Json)


def test_a_column_of_many_columns_is_refused(tmp_path: Path) -> None:
    struct = pa.struct([(f"k{number}", pa.int8()) for number in range(20_000)])
    parquet.write_table(
        pa.table({"question": ["1"], "answer": ["1"], "x": pa.nulls(1, struct)}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="more than 10,000 columns"):
        load_problems(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("column", ["solution", "other", "nested"])
@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("us", tz="UTC"), pa.date32(), pa.date64(), pa.duration("s")]
)
def test_a_time_that_python_does_not_have_is_text(kind: pa.DataType, column: str, tmp_path: Path) -> None:
    times = pa.array([2**30 if kind == pa.date32() else 2**53, 0], kind)
    nested = pa.StructArray.from_arrays([times], ["at"])
    columns = {"question": ["1 + 2", "2 + 2"], "solution": ["3", "4"], column: nested if column == "nested" else times}
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = load_problems(str(tmp_path / "rows.parquet")).to_list()
    assert [row["prompt"][0]["content"] for row in rows] == ["1 + 2", "2 + 2"]
    assert all(isinstance(row["solution"], str) for row in rows)


def test_a_date_is_the_text_that_it_is_written_as(tmp_path: Path) -> None:
    from datetime import date

    parquet.write_table(pa.table({"question": ["When?"], "answer": [date(2024, 2, 29)]}), tmp_path / "rows.parquet")
    assert load_problems(str(tmp_path / "rows.parquet"))[0]["solution"] == "2024-02-29"
