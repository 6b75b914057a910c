"""Malformed exports, made from valid ones, for testing that importing them does nothing."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from .exchange import FILES, MANIFEST, make_export
from .parquet import schema, to_parquet
from .rows import to_jsonl, to_row
from .strategy import TRUST_STATES, Execution, Strategy


KINDS = ("jsonl", "parquet", "manifest")

# JSON in the place of a value: of another type, beyond a limit, no text that is taken, no JSON
_JUNK = (
    ["null", "true", "-1", "0.5", "1e999", "-1e308", "9007199254740993", "[]", "{}", "[[]]", "[null]", "[{}]"]
    + ["NaN", "-Infinity", "tru", "01", "0x1f", "'", '"a', "1,", "}", "]", '{"id": 1, "id": 2}', '["../"]']
    + ["9" * 30, "9" * 5_000, "[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 2_000, json.dumps(["f" * 16] * 2_000)]
    + [json.dumps(text) for text in ("", " ", "\0", "\x1b[31m", "\ud800", "\u2028", "x" * 5_000, "x" * 201, "a\nb")]
    + [json.dumps(text) for text in ("<|im_end|>", "[INST] do", "</s>", "../../etc/passwd", "trusted", "f" * 16)]
)
_NUMBERS = [-1, 2**53 + 1, 2**63 - 1, 10**6]
_REALS = [-1.0, -0.0, 1e300, float("nan"), float("inf"), 1e6]
_TEXTS = ["", " ", "\0", "\x1b[31m", "\u2028", "x" * 5_000, "a\nb", "<|im_start|>", "[/INST]", "../x", "f" * 16]
_LINES = [b"", b"\n", b"[]\n", b"null\n", b"\xef\xbb\xbf{}\n", b"\xff\n", b'"\xed\xa0\x80"\n']
_COLUMNS: list[list[Any]] = [[1, 2, 3, 4, 5], ["a"] * 5, [b"\xff"] * 5, [[[]]] * 5, [{"a": None}] * 5, [1.5] * 5]
_NO_PARQUET = [b"", b"PAR1", b"PAR1PAR1", b"\x80\x04cos\nsystem\n.", b"PK\x03\x04", b"\x1f\x8b\x08\0", b"ARROW1\0\0"]
_FILES = [
    *("../strategies.jsonl", "./strategies.jsonl", "strategies.jsonl/", "STRATEGIES.JSONL", "strategies.jsonl\\u0000"),
    *("/etc/passwd", "strategies.pkl", "strategies.zip", "chroma/chroma.sqlite3", "manifest.json", "strategies"),
]


@cache
def _entries() -> list[tuple[Strategy, list[Execution]]]:
    def entry(number: int) -> tuple[Strategy, list[Execution]]:
        strategy = Strategy(
            f"{number}. Write down what is given.\n2. Name — in symbols — what is asked.\n3. Check the result.",
            "algebra" if number % 2 else "counting",
            (f"{number:016x}",),
            parents=("0123456789abcdef",) * (number % 3),
            model=f"org/model-{number % 2}",
            run="first",
            step=number,
            trust=TRUST_STATES[number % 2],
            successes=1.5 * number,
            trials=2 * number,
            problems=number,
            solved=0.75 * number,
            baseline=0.5 * number,
            shown=number,
        )
        return strategy, [
            Execution(strategy.id, f"{100 + each:016x}", strategy.problem_class, 2, 1.5, 1.0) for each in range(number)
        ]

    return [entry(number) for number in range(5)]


@cache
def _export(file_format: Any) -> tuple[str, bytes, bytes]:
    return make_export(_entries(), "embedder", file_format)


def _rows() -> list[dict[str, Any]]:
    return [to_row(*entry) for entry in _entries()]


def malformed_export(seed: int, directory: Path) -> None:
    """
    Write an export that is broken in one way or several, of which few leave it valid.

    The file of strategies is JSONL or Parquet with values, structure or bytes changed, and its manifest gives the
    checksum and size of what it became, so that they do not save a reader from looking at it. Or else the manifest is
    changed, or what it names.

    Args:
        seed (`int`):
            Seed of all that is drawn. The same seed gives the same files.
        directory (`Path`):
            Where to. It is created if it does not exist, and should be empty.
    """
    draw = Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    kind = draw.choice(KINDS)
    if kind == "manifest":
        file, data, manifest = _export(draw.choice(tuple(FILES)))
        (directory / file).write_bytes(data)
        _break_manifest(draw, directory, file, manifest)
        return
    file, data, manifest = _export(kind)
    change = draw.choice((_change_rows, _change_rows, _change_bytes) if kind == "jsonl" else _PARQUET)
    data = change(draw, data)
    (directory / file).write_bytes(data)
    sealed = json.loads(manifest) | {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    if kind == "jsonl" and draw.random() < 0.5:
        sealed["count"] = data.count(b"\n")
    (directory / MANIFEST).write_text(json.dumps(sealed))


def _break_manifest(draw: Random, directory: Path, file: str, manifest: bytes) -> None:
    path, way = directory / file, draw.randrange(8)
    if way == 0:
        path.unlink()
        draw.choice((path.mkdir, lambda: path.symlink_to(os.devnull), lambda: os.mkfifo(path), lambda: None))()
    elif way == 1:
        manifest = manifest.replace(f'"{file}"'.encode(), f'"{draw.choice(_FILES)}"'.encode())
    elif way == 2:
        manifest = _change_bytes(draw, manifest)
    else:
        manifest = _with_junk(draw, json.loads(manifest))
    (directory / MANIFEST).write_bytes(manifest)


def _change_bytes(draw: Random, data: bytes) -> bytes:
    """Some bytes flipped, cut, repeated, moved or inserted, often near the end, where Parquet has its structure."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        size = len(changed)
        if size == 0:
            break
        start = draw.randrange(size) if draw.random() < 0.5 else max(size - draw.randrange(1, 1_200), 0)
        stop = start + draw.choice((1, 2, 4, 16, 200))
        way = draw.randrange(10)
        if way < 5:
            changed[start] ^= 1 << draw.randrange(8)
        elif way == 5:
            changed[start] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif way == 6:
            del changed[start:stop]
        elif way == 7:
            changed[start:start] = changed[start:stop]
        elif way == 8:
            changed[start:stop] = draw.randbytes(stop - start)
        elif draw.random() < 0.3:
            del changed[start:]
    return bytes(changed)


# JSON


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Container and key of every value inside a value."""
    if isinstance(value, dict):
        inside = list(value.items())
    else:
        inside = list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in inside] + [place for _, each in inside for place in _places(each)]


def _with_junk(draw: Random, value: Any) -> bytes:
    """JSON of a value in which one thing inside is replaced, dropped, added or doubled."""
    container, key = draw.choice(_places(value))
    mark, way = "\ue000", draw.randrange(6)
    junk = draw.choice(_JUNK)
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[draw.choice(("extra", "", "Text", "__class__"))] = mark
    elif way == 2 and isinstance(container, dict):
        container[mark] = container[key]
        junk = json.dumps(key)
    else:
        container[key] = mark
    return json.dumps(value, ensure_ascii=False).replace(json.dumps(mark, ensure_ascii=False), junk).encode()


def _change_rows(draw: Random, _: bytes) -> bytes:
    rows = _rows()
    lines = to_jsonl(rows).splitlines(keepends=True)
    number = draw.randrange(len(lines))
    way = draw.randrange(9)
    if way == 0:
        lines.insert(number, draw.choice(lines))
    elif way == 1:
        lines[number] = draw.choice(_LINES)
    elif way == 2:
        lines[number] = lines[number].replace(b"\n", draw.choice((b"", b"\r", b"\0\n", b" {}\n", b"\n\n")))
    else:
        lines[number] = _with_junk(draw, rows[number]) + b"\n"
    return b"".join(lines)


# Parquet


def _change_values(draw: Random, _: bytes) -> bytes:
    """A file of the right schema with one value that is not valid, or that contradicts others."""
    rows = _rows()
    container, key = draw.choice(_places(rows[draw.randrange(1, len(rows))]))
    value = container[key]
    if isinstance(value, str):
        container[key] = draw.choice(_TEXTS)
    elif isinstance(value, int):
        container[key] = draw.choice(_NUMBERS)
    elif isinstance(value, float):
        container[key] = draw.choice(_REALS)
    elif isinstance(value, list) and value:
        container[key] = value * draw.choice((2, 50_000)) if draw.random() < 0.5 else []
    if draw.random() < 0.2:
        rows.append(draw.choice(rows))
    return to_parquet(rows)


def _change_structure(draw: Random, _: bytes) -> bytes:
    """A file of another schema, or written in another way, or no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(_rows(), schema=schema())
    name = draw.choice(table.column_names)
    place = table.column_names.index(name)
    options: dict[str, Any] = {"use_dictionary": False, "store_schema": False, "write_statistics": False}
    way = draw.randrange(9)
    if way == 0:
        table = table.drop_columns([name])
    elif way == 1:
        table = table.append_column(draw.choice(("extra", name)), table[name])
    elif way == 2:
        table = table.set_column(place, name, pa.nulls(len(table), table[name].type))
    elif way == 3:
        table = table.set_column(place, name, pa.array(draw.choice(_COLUMNS)))
    elif way == 4:
        table = table.select(draw.sample(table.column_names, len(table.column_names)))
    elif way == 5:
        table = table.slice(0, draw.randrange(len(table)))
    elif way == 6:
        return draw.choice(_NO_PARQUET)
    elif way == 7:
        # Text for which a small file stands by its dictionary
        size = draw.choice((5_000, 1_000_000))
        table = table.set_column(1, table.schema.field(1), pa.array(["x" * size] * len(table)))
        options["use_dictionary"] = draw.random() < 0.5
    else:
        options |= draw.choice(
            (
                {"use_dictionary": True},
                {"store_schema": True},
                {"write_statistics": True},
                {"data_page_version": "2.0"},
                {"compression": draw.choice(("none", "gzip", "lz4", "brotli"))},
                {"row_group_size": 1},
                {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
                {"column_encoding": {"step": "DELTA_BINARY_PACKED"}},
                {"use_byte_stream_split": ["baseline"]},
            )
        )
    file = BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


@cache
def _unprotected() -> bytes:
    """A valid file whose pages have neither checksums nor compression, so that changed bytes are decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = BytesIO()
    table = pa.Table.from_pylist(_rows(), schema=schema())
    pq.write_table(table, file, compression="none", use_dictionary=False, store_schema=False, write_statistics=False)
    return file.getvalue()


def _change_unprotected(draw: Random, _: bytes) -> bytes:
    return _change_bytes(draw, _unprotected())


def _change_both(draw: Random, data: bytes) -> bytes:
    return _change_bytes(draw, _change_structure(draw, data))


_PARQUET: tuple[Callable[[Random, bytes], bytes], ...] = (
    _change_bytes,
    _change_unprotected,
    _change_unprotected,
    _change_values,
    _change_structure,
    _change_both,
)
