"""A bank's ledger that someone else wrote computes nothing when it is opened, and its values are those of a bank."""

import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bank_helpers import hashed_words, make

from trl_sgpo import StrategyBank
from trl_sgpo.bank import Outcome
from trl_sgpo.bank.seal import break_seal, seal
from trl_sgpo.bank.strategy import UNVERIFIED
from trl_sgpo.cli.main import main
from trl_sgpo.errors import BankError


LEDGER = "ledger.sqlite"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add(make(name) for name in "abc")
        bank.update([Outcome(make("a").id, "p", 1.0, text="A problem.")])
    return bank.path


def change(bank: Path, *statements: str) -> None:
    with closing(sqlite3.connect(bank / LEDGER)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def told(bank: Path, command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["bank", command, str(bank)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def remake(bank: Path, table: str, before: str = "", after: str = "") -> None:
    """Makes a table again, with a text in its statement replaced, or an addition before its last bracket."""
    with closing(sqlite3.connect(bank / LEDGER)) as connection:
        (statement,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    head, tail = statement.rsplit(")", 1)
    new = statement.replace(before, after) if before else f"{head}{after}){tail}"
    change(bank, f"ALTER TABLE {table} RENAME TO old", new, f"INSERT INTO {table} SELECT * FROM old", "DROP TABLE old")


COMPUTES = ", CHECK (length(hex(zeroblob(400 + length({})))) > 0)"


@pytest.mark.parametrize(
    ("table", "column"),
    [("strategies", "text"), ("embeddings", "number"), ("executions", "problem"), ("meta", "value")],
)
def test_a_constraint_that_computes(table: str, column: str, bank: Path) -> None:
    """SQLite evaluates it for each row when it checks the file."""
    remake(bank, table, after=COMPUTES.format(column))
    with pytest.raises(BankError, match=f"its table {table} has a form which no bank has"):
        StrategyBank(bank, hashed_words)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE INDEX i ON strategies (length(hex(zeroblob(400 + number))))",
        "CREATE INDEX i ON meta (key) WHERE length(hex(zeroblob(400))) > length(value)",
        "CREATE TABLE more (a)",
        "ALTER TABLE strategies ADD COLUMN more TEXT",
        "ALTER TABLE strategies DROP COLUMN shown",
    ],
)
def test_a_table_or_index_of_another_form(statement: str, bank: Path) -> None:
    change(bank, statement)
    with pytest.raises(BankError, match="which no bank has"):
        StrategyBank(bank, hashed_words)


def test_a_statement_of_many_expressions(bank: Path) -> None:
    """SQLite would parse it before anything is read."""
    change(bank, f"CREATE TABLE more (a, CHECK (a IN ({', '.join(map(str, range(100_000)))})))")
    with pytest.raises(BankError, match="damaged"):
        StrategyBank(bank, hashed_words)


def test_a_value_of_hundreds_of_megabytes(bank: Path) -> None:
    change(bank, "UPDATE embeddings SET embedding = zeroblob(300000000) WHERE number = 1")
    with pytest.raises(BankError, match="too big"):
        StrategyBank(bank, hashed_words)


@pytest.mark.parametrize("table", ["strategies", "embeddings", "executions", "problems", "meta"])
def test_a_table_that_was_renamed(table: str, bank: Path) -> None:
    """Its statement has quotes then, and other tools write other white space."""
    remake(bank, table, " ", "  ")
    change(bank, f"ALTER TABLE {table} RENAME TO old", f"ALTER TABLE old RENAME TO {table}")
    with StrategyBank(bank, hashed_words) as again:
        assert len(again) == 3


TEXTS = ("text", "problem_class", "model", "run", "origin", "trust")
COUNTS = ("step", *(name for name in UNVERIFIED if name != "trust"))
LISTS = ("source_problems", "parents")
NO_COUNTS = ("x'ff00'", "'text'", "9e999", "9223372036854775807")
NO_LISTS = ("x'5b5d'", "'{}'", "'5'", "'[5]'", "'[[]]'", "9e999", "replace(hex(zeroblob(3000)), '0', '[')")


@pytest.mark.parametrize("command", ["list", "verify"])
@pytest.mark.parametrize(
    "change_made",
    [
        *[f"strategies SET {name} = x'ff00'" for name in TEXTS],
        *[f"strategies SET {name} = {value}" for name in COUNTS for value in NO_COUNTS],
        *[f"strategies SET {name} = {value}" for name in LISTS for value in NO_LISTS],
        *[f"embeddings SET embedding = {value}" for value in ("x'010203'", "'text'", "5", "x''", "zeroblob(300000)")],
        "embeddings SET embedding = zeroblob(8) WHERE number = 1",
        "embeddings SET embedding = CAST(zeroblob(1020) || x'0000c07f' AS BLOB)",
        "meta SET value = x'ff' WHERE key = 'schema_version'",
    ],
)
def test_a_value_of_another_type(command: str, change_made: str, bank: Path, capsys: Any) -> None:
    change(bank, f"UPDATE {change_made}")
    status, text = told(bank, command, capsys)
    assert status == (1 if command == "verify" else 2)
    assert text.count("a value that cannot be") == 1 and (command == "verify" or text.count("\n") == 1)


@pytest.mark.parametrize("command", ["stats", "verify"])
@pytest.mark.parametrize(
    "change_made",
    [
        "problem = x'ff'", "problem_class = x'ff'", "trials = x'ff'", "trials = 'text'", "trials = 0",
        "trials = 9e999", "successes = 'text'", "successes = 9e999", "successes = -1", "baseline = x'ff'",
        "baseline = 9e999", "plain_trials = 2", "plain_trials = -1", "plain_successes = 1", "plain_baseline = 'text'",
    ],
)  # fmt: skip
def test_an_execution_of_other_types(command: str, change_made: str, bank: Path, capsys: Any) -> None:
    change(bank, f"UPDATE executions SET {change_made}")
    status, text = told(bank, command, capsys)
    assert status == (1 if command == "verify" else 2)
    assert text.count("a value that cannot be") == 1


@pytest.mark.parametrize("value", ["x'ff'", "'{}'", "'5'", "'[\"x\"]'", "'[NaN]'", "'[1e999]'", NO_LISTS[-1]])
def test_a_fingerprint_that_is_none(value: str, bank: Path) -> None:
    change(bank, f"UPDATE meta SET value = {value} WHERE key = 'fingerprint'")
    with StrategyBank(bank, hashed_words) as again, pytest.raises(BankError, match="a value that cannot be"):
        again.retrieve(["x"])


def test_a_text_of_a_problem_that_is_none(bank: Path) -> None:
    change(bank, "UPDATE problems SET text = x'ff'", "UPDATE strategies SET trust = 'trusted'")
    with StrategyBank(bank, hashed_words) as again, pytest.raises(BankError, match="a value that cannot be"):
        again.retrieve(["a"])


def journal(bank: Path, victim: Path) -> None:
    """A journal of SQLite that names another file as its super-journal, which SQLite deletes with it."""
    content, name = (bank / LEDGER).read_bytes(), os.fsencode(victim)
    (page,) = struct.unpack(">H", content[16:18])
    magic = bytes.fromhex("d9d505f920a163d7")
    header = magic + struct.pack(">IIIII", 0, 0, len(content) // page, 512, page)
    end = struct.pack(">II", len(name), sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF)
    parts = (header.ljust(512, b"\0"), struct.pack(">I", 2**30 // page + 1), name, end, magic)
    (bank / f"{LEDGER}-journal").write_bytes(b"".join(parts))


@pytest.mark.parametrize("command", ["list", "verify", "stats"])
def test_a_journal_beside_it_deletes_no_file(
    bank: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "thesis.txt"
    victim.write_text("precious")
    journal(bank, victim)
    status, said = told(bank, command, capsys)
    assert victim.read_text() == "precious"
    assert status == (1 if command == "verify" else 2)
    assert "ledger.sqlite-journal, which no bank has: delete that file" in said


def test_an_index_that_somebody_else_sealed_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, state = tmp_path / "chroma", "state"
    index.mkdir()
    (index / "chroma.sqlite3").write_text("a parser reads it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "theirs"))
    seal(index, state)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "ours"))
    assert not break_seal(index, state)
    seal(index, state)
    assert break_seal(index, state) and not break_seal(index, state)
    seal(index, state)
    (index / "chroma.sqlite3-journal").write_text("deletes what it names")
    assert not break_seal(index, state)


@pytest.mark.parametrize("exists", [True, False])
def test_an_index_that_is_a_link_is_neither_written_nor_removed(bank: Path, tmp_path: Path, exists: bool) -> None:
    victim = tmp_path / "victim"
    if exists:
        victim.mkdir()
        (victim / "seal.json").write_text("precious")
    (bank / "chroma").symlink_to(victim)
    with (
        StrategyBank(bank, hashed_words) as opened,
        pytest.raises(BankError, match="chroma is a link, which would be written through"),
    ):
        opened._store.index.query(hashed_words(["a"]), 1)
    assert victim.exists() == exists and (not exists or (victim / "seal.json").read_text() == "precious")
