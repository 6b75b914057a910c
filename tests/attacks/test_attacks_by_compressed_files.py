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

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from trl_sgpo.data import compressed
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.errors import DataError


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
    "train.tar.gz": tarred,
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


@pytest.mark.parametrize("name", [name for name in PACKED if "tar" not in name])
def test_a_usual_file_is_read(name: str, tmp_path: Path, left: Callable[[], int]) -> None:
    folder = dataset(tmp_path, name, PACKED[name](ROWS * 100))
    for _ in range(2):
        assert load_problems(folder)[99]["solution"] == "3"


@pytest.mark.parametrize("name", [*PACKED, "header.tar.gz", "train.txt.gz"])
def test_a_file_that_fills_the_disk(
    name: str, tmp_path: Path, left: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "ALLOWANCE", 2**20)
    pack = {"header.tar.gz": with_a_header, "train.txt.gz": gzip.compress, **PACKED}[name]
    folder = dataset(tmp_path, name, pack(ROWS + b" " * 2**25))
    with pytest.raises(DataError, match="200 times as large"):
        load_problems(folder)
    assert left() == 0


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl.xz", "train.jsonl.bz2", "train.tar.gz"])
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
