"""A bank's ledger that someone else wrote computes nothing when it is opened, and its values are those of a bank."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from bank_helpers import hashed_words, make

from trl_sgpo import StrategyBank
from trl_sgpo.errors import BankError


LEDGER = "ledger.sqlite"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add(make(name) for name in "abc")
    return bank.path


def change(bank: Path, *statements: str) -> None:
    with closing(sqlite3.connect(bank / LEDGER)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


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
