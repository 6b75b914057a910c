"""Formats and settings of a dataset that lead to other files, run code, never end or change what is read."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from trl_sgpo.cli.main import main
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.errors import DataError


ROWS = {"question": ["1 + 2"], "answer": ["3"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (path := tmp_path / "dataset").mkdir()
    return path


def card(folder: Path, files: str, settings: str = "") -> None:
    lines = f"configs:\n- config_name: default\n  data_files: {files}\n  {settings}\n"
    (folder / "README.md").write_text(f"---\n{lines}---\n")


def task(folder: Path) -> Path:
    (path := folder / "tasks" / "a").mkdir(parents=True)
    (path / "task.toml").write_text('schema_version = "1"\n')
    card(folder, "tasks/a/task.toml")
    return path


def harbor_link(folder: Path) -> None:
    (folder.parent / "secret").write_text("password hunter2")
    (task(folder) / "instruction.md").symlink_to(folder.parent / "secret")


def harbor_loop(folder: Path) -> None:
    path = task(folder)
    (path / "instruction.md").write_text("1 + 2")
    for name in "ab":
        (path / name).symlink_to(".")


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def members(folder: Path) -> None:
    with tarfile.open(folder / "train.tar", "w") as archive:
        for name, content in {"a.question.txt": b"1 + 2", "a.x.pth": pickle.dumps(Command())}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def packed_arrow(folder: Path) -> None:
    table = pa.table({"question": [" " * 2**20], "answer": ["3"]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(folder / "train.arrow", table.schema, options=options) as stream:
        stream.write_table(table)


def saved(folder: Path) -> None:
    Dataset.from_dict(ROWS).save_to_disk(folder)


def texts(folder: Path) -> None:
    (folder / "train.txt").write_text("1 + 2\n")


FORMATS = {
    harbor_link: "harbor",
    harbor_loop: "harbor",
    members: "webdataset",
    packed_arrow: "arrow",
    saved: "arrow",
    texts: "text",
}


@pytest.mark.parametrize("make", FORMATS)
def test_a_format_that_only_the_datasets_library_reads(
    make: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: object, **keywords: object) -> None:
        raise AssertionError("The library opens the files.")

    make(folder)
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", opened)
    options = ["--prompt_column", "instruction", "--no_bank", "--model", "m", "--output", "out.jsonl"]
    assert main(["solve", "--input", str(folder), *options]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert f"is `{FORMATS[make]}`, and JSON, CSV and Parquet are read" in line and "Dataset.to_parquet" in line
    assert not Path("ran").exists() and "hunter2" not in line


SETTINGS = [
    ("csv", 'quotechar: "\'"'),
    ("csv", "names: [question, answer]"),
    ("csv", "skiprows: 1"),
    ("csv", "encoding: 5"),
    ("json", "encoding_errors: replace"),
    ("json", "field: [a]"),
    ("parquet", "columns: question"),
    ("parquet", "on_bad_files: skip"),
]


@pytest.mark.parametrize(("form", "setting"), SETTINGS)
def test_a_setting_that_changes_what_is_read(form: str, setting: str, folder: Path) -> None:
    (folder / f"train.{form}").write_bytes(b"")
    card(folder, f"train.{form}", setting)
    with pytest.raises(DataError, match=f"sets `{setting.partition(':')[0]}`, which is not read here: save its rows"):
        load_problems(str(folder))


@pytest.mark.parametrize("encoding", ["utf-7", "UTF7", "idna", "punycode", "base64", "unicode_escape", "none-such"])
def test_an_encoding_that_is_decoded_again_with_each_block(encoding: str, folder: Path) -> None:
    (folder / "train.json").write_bytes(b"")
    card(folder, "train.json", f"encoding: {encoding}")
    with pytest.raises(DataError, match="save the files as UTF-8"):
        load_problems(str(folder))


KEPT = [
    ("csv", "encoding: latin-1", "question,answer,x\n1 + 2,007,1\n2 + 2,12.50,2\n"),
    ("csv", "sep: ';'", "question;answer;x\n1 + 2;007;1\n2 + 2;12.50;2\n"),
    ("csv", "delimiter: ';'", "question;answer;x\n1 + 2;007;1\n2 + 2;12.50;2\n"),
    ("csv", "chunksize: 7", "question,answer,x\n1 + 2,007,1\n2 + 2,12.50,2\n"),
    ("csv", "keep_default_na: false", "question,answer,x\n1 + 2,007,1\n2 + 2,12.50,2\n"),
    (
        "json",
        "field: data",
        '{"data": [{"question": "1 + 2", "answer": "007"}, {"question": "2 + 2", "answer": 12.50}], "x": 1}',
    ),
]


@pytest.mark.parametrize(("form", "setting", "text"), KEPT)
def test_a_setting_that_is_kept_reads_what_is_written(form: str, setting: str, text: str, folder: Path) -> None:
    (folder / f"train.{form}").write_text(text)
    card(folder, f"train.{form}", setting)
    answers = load_problems(str(folder))["solution"][:]
    assert answers == ["007", "12.50"] or (form == "json" and answers == ["007", "12.5"])


def test_columns_that_a_card_chooses_are_read_with_the_same_limits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = pa.array([0.1, 12.5], pa.float32())
    table = pa.table({"question": ["1 + 2", "2 + 2"], "answer": numbers, "solution": ["It is 3.", "It is 4."]})
    parquet.write_table(table, folder / "train.parquet")
    card(folder, "train.parquet", "columns: [question, answer]")
    problems = load_problems(str(folder))
    assert problems["solution"][:] == ["0.1", "12.5"] and "worked_solution" not in problems.column_names

    monkeypatch.setattr("trl_sgpo.data.compressed.ALLOWANCE", 2**20)
    values = pa.array(["a" * 1000] * 10**5).dictionary_encode().cast(pa.string())
    parquet.write_table(pa.table({"question": values, "answer": values}), folder / "train.parquet")
    with pytest.raises(DataError, match="when it is read"):
        load_problems(str(folder))


@pytest.mark.parametrize("text", ["configs:\n- 5\n", "configs: [x\n", "configs:\n- config_name: b\n  data_dir: 7\n"])
def test_a_damaged_card_is_one_line(text: str, folder: Path) -> None:
    Dataset.from_dict(ROWS).to_json(folder / "train.jsonl")
    (folder / "README.md").write_text(f"---\n{text}---\n")
    with pytest.raises(DataError, match=r"cannot be loaded .*correct its card") as error:
        load_problems(str(folder))
    assert "\n" not in str(error.value)


def test_configurations_of_a_dataset(folder: Path) -> None:
    for name in ("b", "c"):
        Dataset.from_dict(ROWS | {"answer": [name]}).to_parquet(folder / f"{name}/train-00000-of-00001.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train-*.parquet\n" for name in ("b", "c"))
    features = "  features:\n  - name: question\n    dtype: string\n"
    info = f"dataset_info:\n- config_name: b\n{features}- config_name: c\n{features}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}{info}---\n")
    assert load_problems(str(folder), name="c")["solution"][:] == ["c"]
    with pytest.raises(DataError, match=r"available configs: .'b', 'c'.*name a configuration"):
        load_problems(str(folder))


def test_rows_that_the_datasets_library_keeps_are_read_without_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the decimals that 32-bit numbers were made of, and times as texts."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    numbers, times = pa.array([0.1, 12.5], pa.float32()), pa.array([2**53, 0], pa.timestamp("us"))
    parquet.write_table(pa.table({"question": ["1", "2"], "answer": numbers, "x": times}), folder / "train.parquet")
    datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    (made,) = (tmp_path / "cache").rglob("dataset_info.json")
    shutil.copytree(made.parent, kept := tmp_path / "cache" / "someone___problems" / "default" / "0.0.0" / "abc")
    (kept / "parquet-train.arrow").rename(kept / "problems-train.arrow")
    info = json.loads(made.read_text()) | {"config_name": "default", "dataset_name": "problems"}
    (kept / "dataset_info.json").write_text(json.dumps(info))
    problems = load_problems("someone/problems")
    assert problems["solution"][:] == ["0.1", "12.5"] and problems["x"][1].startswith("1970-01-01")
    with pytest.raises(DataError, match="no split `dev`: use one of train"):
        load_problems("someone/problems", "dev")


ADDRESSES = [
    "{}*.jsonl",
    "{}secret.jsonl",
    "zip://*.jsonl::{}a.zip",
    "simplecache::{}a.jsonl",
    "/etc/*.jsonl",
    "hf://datasets/other/data/a.jsonl",
    "file:///etc/a.jsonl",
    "memory://a.jsonl",
]


@pytest.mark.parametrize("pattern", ADDRESSES)
def test_an_address_in_a_card_is_not_asked(folder: Path, pattern: str) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        (folder / "rows.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": "3"}) + "\n")
        card(folder, json.dumps(pattern.format(f"http://127.0.0.1:{server.server_port}/")))
        with pytest.raises(DataError, match="which is not part of it"):
            load_problems(str(folder), "train")
        server.shutdown()
        thread.join()
    assert asked == []


def test_a_folder_in_a_card_holds_addresses(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": "3"}) + "\n")
    card(folder, '"*.jsonl"', settings='data_dir: "x::http://127.0.0.1:1/"')
    with pytest.raises(DataError, match="which is not part of it"):
        load_problems(str(folder), "train")
    card(folder, '"*.jsonl"')
    assert len(load_problems(str(folder), "train")) == 1


@pytest.mark.parametrize("pattern", ["**/" * 12 + "z.jsonl", "*a" * 9 + "b.jsonl"])
def test_a_pattern_in_a_card_that_never_ends(folder: Path, pattern: str) -> None:
    deep = folder / "/".join("a" * 60) / ("a" * 200)
    deep.mkdir(parents=True)
    (deep / "rows.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": "3"}) + "\n")
    card(folder, json.dumps(pattern))
    with pytest.raises(DataError, match=r"which may match for ever: use fewer `\*`"):
        load_problems(str(folder), "train")


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("merge", ["[{0}, {0}]", "{{<<: [{0}, {0}]}}"])
def test_a_card_whose_aliases_repeat(folder: Path, file: str, merge: str) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": "3"}) + "\n")
    lines = ["x0: &x0 {a: b}"] + [f"x{n}: &x{n} {merge.format(f'*x{n - 1}')}" for n in range(1, 40)]
    lines.append("configs: [{config_name: default, data_files: *x39}]")
    text = "\n".join(lines) + "\n"
    (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)
    with pytest.raises(DataError, match="its aliases repeat more than 1000000 values"):
        load_problems(str(folder), "train")
