"""Compressed files of a dataset that unpack to far more than they are: refused before anything is written."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trl_sgpo.checks.process import CHECKS
from trl_sgpo.data import compressed, row_files
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.errors import DataError
from trl_sgpo.report.records import read_run


ROWS = b'{"question": "1 + 2", "answer": "3"}\n'


def zipped(content: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.jsonl", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        member = tarfile.TarInfo("train.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def with_a_header(content: bytes) -> bytes:
    """tarfile reads a header of this kind as a whole when it opens an archive."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz", pax_headers={"comment": content.decode()}):
        pass
    return file.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "train.jsonl.gz": gzip.compress,
    "train.jsonl.bz2": bz2.compress,
    "train.jsonl.xz": lzma.compress,
    "train.zip": zipped,
    "train.jsonl.tar.gz": tarred,
}


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes in the cache of the datasets library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "cache" / "extracted"))
    return lambda: sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())


def dataset(directory: Path, name: str, content: bytes) -> str:
    folder = directory / "dataset"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n---\n"
    )
    return str(folder)


@pytest.mark.parametrize("name", PACKED)
def test_a_usual_file_is_read(name: str, tmp_path: Path, left: Callable[[], int]) -> None:
    folder = dataset(tmp_path, name, PACKED[name](ROWS * 100))
    for _ in range(2):
        assert load_problems(folder)[99]["solution"] == "3"


def test_a_packed_file_that_changes_is_read_again(tmp_path: Path, left: Callable[[], int]) -> None:
    folder = dataset(tmp_path, "train.jsonl.gz", gzip.compress(ROWS))
    assert load_problems(folder)["solution"][:] == ["3"]
    (tmp_path / "dataset" / "train.jsonl.gz").write_bytes(gzip.compress(ROWS * 2))
    assert load_problems(folder)["solution"][:] == ["3", "3"]


def archive(members: dict[str, bytes | tuple[bytes, str]]) -> bytes:
    """A tar file. A member of a type has the path that it leads to."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                opened.addfile(member)
            else:
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_usual_members_are_read_in_order(tmp_path: Path, left: Callable[[], int]) -> None:
    rows = {name: f'{{"question": "1 + 2", "answer": "{name[-7]}"}}'.encode() for name in ("b/2.jsonl", "a/1.jsonl")}
    hidden = {"__MACOSX/._1.jsonl": b"\0", ".DS_Store": b"\0"}
    folder = dataset(tmp_path, "train.jsonl.tar", archive(rows | hidden))
    assert load_problems(folder)["solution"][:] == ["1", "2"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_in_an_archive_reads_no_file_of_the_user(kind: bytes, tmp_path: Path, left: Callable[[], int]) -> None:
    """`here/here/../..` is the archive's own directory by name, and two levels above it on the disk."""
    (tmp_path / "secret.csv").write_text("question,answer\nhunter2,3\n")
    target = f"{'here/' * 15}{'../' * 15}{tmp_path.relative_to('/')}/secret.csv"
    members: dict[str, bytes | tuple[bytes, str]] = {"here": (tarfile.SYMTYPE, "."), "train.csv": (kind, target)}
    folder = dataset(tmp_path, "train.csv.tar", archive(members | {"usual.csv": b"question,answer\n1 + 2,3\n"}))
    assert load_problems(folder)["question"][:] == ["1 + 2"]
    with pytest.raises(DataError, match="holds no file"):
        (tmp_path / "dataset" / "train.csv.tar").write_bytes(archive(members))
        load_problems(folder)


def test_a_member_stays_packed(tmp_path: Path, left: Callable[[], int]) -> None:
    folder = dataset(tmp_path, "train.jsonl.tar", archive({"train.jsonl.gz": gzip.compress(ROWS)}))
    with pytest.raises(DataError, match=r"cannot be read: .*utf-8"):
        load_problems(folder)


@pytest.mark.parametrize("name", [*PACKED, "header.jsonl.tar.gz"])
def test_a_file_that_fills_the_disk(
    name: str, tmp_path: Path, left: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "ALLOWANCE", 2**20)
    pack = PACKED.get(name, with_a_header)
    folder = dataset(tmp_path, name, pack(ROWS + b" " * 2**25))
    with pytest.raises(DataError, match="200 times as large"):
        load_problems(folder)
    assert left() == 0


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl.xz", "train.jsonl.bz2", "train.jsonl.tar.gz"])
def test_a_damaged_file_leaves_nothing(name: str, tmp_path: Path, left: Callable[[], int]) -> None:
    folder = dataset(tmp_path, name, PACKED[name](ROWS * 1000)[:-12])
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_problems(folder)
    assert left() == 0


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_that_fill_the_disk(
    form: str, tmp_path: Path, left: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "ALLOWANCE", 2**20)
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        values = pa.array(["a" * 1000] * 10**5).dictionary_encode().cast(pa.string())
        parquet.write_table(pa.table({"question": values, "answer": values}), path, compression="zstd")
    else:
        path.write_text(json.dumps({f"c{number}": 1 for number in range(900)}) + "\n" + "{}\n" * 10**4)
    with pytest.raises(DataError, match="when it is read"):
        load_problems(str(path))
    assert left() == 0


@pytest.mark.parametrize("nested", [False, True])
def test_one_text_of_each_row_of_a_parquet_file(nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few KB hold a long text once, and all rows refer to it: it is not repeated in memory."""
    monkeypatch.chdir(tmp_path)
    rows, size = 200, 2_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
    if nested:
        column = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), column)
    table = pa.table({"prompt": ["1 + 1?"] * rows, "solution": ["2"] * rows, "text": column})
    parquet.write_table(table, "rows.parquet", compression="zstd", dictionary_pagesize_limit=10**9, store_schema=False)
    assert Path("rows.parquet").stat().st_size < 10_000
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"rows\.parquet is 25\d MiB or more when it is read"):
        load_problems("rows.parquet")
    assert pa.default_memory_pool().max_memory() - before < 2**28


def many(elements: int, leaves: int) -> pa.Array:
    """Rows of which the last holds a list of so many elements."""
    zeros = pa.array(np.zeros(elements, dtype=np.int8)).cast(pa.int64())
    each = pa.StructArray.from_arrays([zeros] * leaves, [f"f{place}" for place in range(leaves)])
    return pa.ListArray.from_arrays(pa.array([*[0] * 20, elements], pa.int32()), each)


def write(table: dict[str, Any], path: Path) -> None:
    parquet.write_table(
        pa.table(table),
        path,
        compression="zstd",
        data_page_size=2**31 - 1,
        row_group_size=2**31,
        write_statistics=False,
    )


@pytest.mark.parametrize("kind", ["a list", "a page"])
def test_a_parquet_file_of_few_bytes_that_holds_many_values(
    kind: str, tmp_path: Path, left: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decoded in a process with limits only."""
    if kind == "a list":
        values = {"question": [f"{n} + 1" for n in range(20)], "answer": ["2"] * 20, "x": many(8_000_000, 6)}
    else:
        rows = 1_000_000
        values = {name: pa.nulls(rows, pa.int64()) for name in "abc"} | {"question": pa.nulls(rows, pa.string())}
        monkeypatch.setattr(CHECKS, "ask", lambda *_: None)  # as after its limit of memory
    write(values, tmp_path / "train.parquet")
    assert (tmp_path / "train.parquet").stat().st_size < 100_000
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("decoded here"))
    with pytest.raises(DataError, match="MiB or more when it is read"):
        load_problems(str(tmp_path / "train.parquet"))
    assert left() == 0


def test_rollouts_of_few_bytes_that_hold_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "completions").mkdir()
    (tmp_path / "settings.json").write_text(json.dumps({"seed": 1}))
    texts = {name: ["a"] * 20 for name in ("prompt", "completion", "source", "strategy", "execution")}
    numbers = {"step": [1] * 20, "correctness": [1.0] * 20}
    path = tmp_path / "completions" / "completions_00001.parquet"
    write(texts | numbers | {"x": many(100_000, 1)}, path)
    run = read_run(str(tmp_path), problems=8)
    assert len(run.problems[0].rollouts) == 20 and "x" not in run.problems[0].rollouts[0].parts
    conversations = pa.ListArray.from_arrays(
        pa.array([0, *[100_000] * 20], pa.int32()),
        pa.StructArray.from_arrays([pa.array(["user"] * 100_000), pa.array(["b"] * 100_000)], ["role", "content"]),
    )
    write(texts | numbers | {"prompt": conversations}, path)
    assert "are left out, because" in read_run(str(tmp_path), problems=8).missing["rollouts"]
    monkeypatch.setattr(CHECKS, "ask", lambda *_: None)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("decoded here"))
    assert "are left out, because" in read_run(str(tmp_path), problems=8).missing["rollouts"]


@pytest.mark.parametrize("form", ["lines", "array", "array of one line"])
@pytest.mark.parametrize("values", ["0", "[]", "{}"])
def test_a_row_of_many_values(form: str, values: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_ROW", 2**18)
    good = '{"question": "1 + 2", "answer": "3"}'
    long = f'{{"question": "1 + 2", "answer": "3", "x": [{",".join([values] * 150_000)}]}}'
    (rows := [good] * 3000).insert(1500, long)
    text = {"lines": "\n".join(rows), "array": "[\n" + ",\n".join(rows) + "\n]"}.get(form, f"[{','.join(rows)}]")
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="a row has more than 0 MiB"):
        load_problems(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(text.replace(long, good))
    assert len(load_problems(str(tmp_path / "rows.json"))) == 3001


@pytest.mark.parametrize("size", [100, 70_000, 300_000])
def test_errors_in_long_files_name_their_line(size: int, tmp_path: Path) -> None:
    row = json.dumps({"question": "a" * size, "answer": "3"})
    (tmp_path / "rows.json").write_text("[\n" + ",\n".join([row, row[:-1], row]) + "\n]")
    with pytest.raises(DataError, match="in line 4, column 1"):
        load_problems(str(tmp_path / "rows.json"))
