"""Imports of malformed exports, made from a valid one, which must change nothing."""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tqdm.auto import tqdm

from trl_sgpo.bank import StrategyBank
from trl_sgpo.bank.exchange import import_bank
from trl_sgpo.bank.export_files import make_export
from trl_sgpo.bank.files import EXPORT_FILE, EXPORT_MANIFEST
from trl_sgpo.bank.rows import to_jsonl, to_row
from trl_sgpo.bank.strategy import TRUST_STATES, Execution, Strategy
from trl_sgpo.errors import BankError

from .synthetic import Clusters, made_up


def measure(inputs: int, directory: Path) -> dict[str, Any]:
    """
    Imports malformed exports into a bank. Anything but a [`BankError`] or an intact import ends the benchmark.

    Args:
        inputs (`int`):
            How many.
        directory (`Path`):
            An empty directory.

    Returns:
        `dict`: How many were `refused`, how many happened to be valid, and `partial_imports`.
    """
    outcomes = Counter[str]()
    start = time.perf_counter()
    with StrategyBank(directory / "bank", Clusters(8)) as bank:
        bank.add([made_up(number, "class") for number in range(8)])
        before = {strategy.id: strategy for strategy in bank.strategies()}
        for seed in tqdm(range(inputs), desc="Malformed imports"):
            source = directory / "export"
            malformed_export(seed, source)
            try:
                import_bank(bank, source)
                outcomes["valid"] += 1
                bank.clear()
                bank.add(before.values())
            except BankError:
                outcomes["refused"] += 1
                outcomes["partial"] += {strategy.id: strategy for strategy in bank.strategies()} != before
            shutil.rmtree(source)
    return {
        "malformed_imports": inputs,
        "refused": outcomes["refused"],
        "happened_to_be_valid": outcomes["valid"],
        "partial_imports": outcomes["partial"],
        "fuzz_seconds": time.perf_counter() - start,
    }


# Malformed exports


# Replacements of JSON values: of another type, beyond a limit, text that is refused, no JSON
_JUNK = (
    ["null", "true", "-1", "0.5", "1e999", "-1e308", "9007199254740993", "[]", "{}", "[[]]", "[null]", "[{}]"]
    + ["NaN", "-Infinity", "tru", "01", "0x1f", "'", '"a', "1,", "}", "]", '{"id": 1, "id": 2}', '["../"]']
    + ["9" * 30, "9" * 5_000, "[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 2_000, json.dumps(["f" * 16] * 2_000)]
    + [json.dumps(text) for text in ("", " ", "\0", "\x1b[31m", "\ud800", "\u2028", "x" * 5_000, "x" * 201, "a\nb")]
    + [json.dumps(text) for text in ("<|im_end|>", "[INST] do", "</s>", "../../etc/passwd", "trusted", "f" * 16)]
)
_LINES = [b"", b"\n", b"[]\n", b"null\n", b"\xef\xbb\xbf{}\n", b"\xff\n", b'"\xed\xa0\x80"\n']
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
def _export() -> tuple[bytes, bytes]:
    return make_export(_entries(), "embedder")


def _rows() -> list[dict[str, Any]]:
    return [to_row(*entry) for entry in _entries()]


def malformed_export(seed: int, directory: Path) -> None:
    """
    Write an export that is broken in one way or several, of which few leave it valid.

    The file of strategies has values, structure or bytes changed, and its manifest gives the checksum and size of the
    result, so that a reader must look at the file itself. Or else the manifest is changed, or what it names.

    Args:
        seed (`int`):
            Seed of all that is drawn. The same seed gives the same files.
        directory (`Path`):
            Where to. It is created if it does not exist, and should be empty.
    """
    draw = Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    data, manifest = _export()
    if draw.random() < 1 / 3:
        (directory / EXPORT_FILE).write_bytes(data)
        _break_manifest(draw, directory, manifest)
        return
    data = draw.choice((_change_rows, _change_rows, _change_bytes))(draw, data)
    (directory / EXPORT_FILE).write_bytes(data)
    sealed = json.loads(manifest) | {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    if draw.random() < 0.5:
        sealed["count"] = data.count(b"\n")
    (directory / EXPORT_MANIFEST).write_text(json.dumps(sealed))


def _break_manifest(draw: Random, directory: Path, manifest: bytes) -> None:
    path, way = directory / EXPORT_FILE, draw.randrange(8)
    if way == 0:
        path.unlink()
        draw.choice((path.mkdir, lambda: path.symlink_to(os.devnull), lambda: os.mkfifo(path), lambda: None))()
    elif way == 1:
        manifest = manifest.replace(f'"{EXPORT_FILE}"'.encode(), f'"{draw.choice(_FILES)}"'.encode())
    elif way == 2:
        manifest = _change_bytes(draw, manifest)
    else:
        manifest = _with_junk(draw, json.loads(manifest))
    (directory / EXPORT_MANIFEST).write_bytes(manifest)


def _change_bytes(draw: Random, data: bytes) -> bytes:
    """Some bytes flipped, cut, repeated, moved or inserted."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        size = len(changed)
        if size == 0:
            break
        start = draw.randrange(size)
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
