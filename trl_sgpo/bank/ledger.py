"""The record of the bank: one SQLite file. All else is derived from it."""

import json
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BankError
from .strategy import Outcome, Strategy


SCHEMA_VERSION = 1

_SCHEMA = f"""
BEGIN;
CREATE TABLE strategies (
    id TEXT PRIMARY KEY, text TEXT NOT NULL, problem_class TEXT NOT NULL, source_problems TEXT NOT NULL,
    parents TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL, step INTEGER NOT NULL, origin TEXT NOT NULL,
    trust TEXT NOT NULL, successes REAL NOT NULL, trials INTEGER NOT NULL, lift REAL NOT NULL, embedding BLOB NOT NULL
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}');
COMMIT;
"""

_FIELDS = [field.name for field in fields(Strategy)]
_SELECT = f"SELECT {', '.join(_FIELDS)} FROM strategies"
_UPSERT = f"INSERT OR REPLACE INTO strategies VALUES ({', '.join('?' * (len(_FIELDS) + 2))})"


def durable_replace(temporary: Path, target: Path) -> None:
    """Move a file over another one so that a crash leaves either the old or the new content."""
    for path, move in ((temporary, True), (target.parent, False)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if move:
            os.replace(temporary, target)


def _blob(embedding: np.ndarray) -> bytes:
    return embedding.astype("<f4").tobytes()


def _to_row(strategy: Strategy, embedding: np.ndarray) -> tuple[Any, ...]:
    values = [vars(strategy)[name] for name in _FIELDS]
    row = [json.dumps(value) if isinstance(value, tuple) else value for value in values]
    return (strategy.id, *row, _blob(embedding))


def _to_strategy(row: tuple[Any, ...]) -> Strategy:
    values = dict(zip(_FIELDS, row, strict=True))
    for name in ("source_problems", "parents"):
        values[name] = tuple(json.loads(values[name]))
    return Strategy(**values)


class Ledger:
    """
    Strategies with their embeddings and counts in an SQLite file, written in one durable transaction a commit.

    Args:
        path (`str` or `Path`):
            The file. It is created if it does not exist.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the file is damaged, is no ledger, or was written by a newer version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._readable_errors():
            self._connection = sqlite3.connect(self.path)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._connection.executescript(_SCHEMA)
            if (damage := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(damage)
            version = int(self._meta("schema_version") or 0)
        if version > SCHEMA_VERSION:
            self.close()
            raise BankError(
                f"{self.path} has schema version {version} and this version of trl-sgpo reads up to {SCHEMA_VERSION}: "
                "upgrade trl-sgpo, restore a checkpoint's copy (`trl-sgpo train --resume_from_checkpoint true`), or "
                "remove the directory to start an empty bank."
            )

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise BankError(
                f"{self.path} cannot be read or written: {error}. Check that it is a strategy bank, that the disk is "
                "writable and not full, and that no other process has the bank open."
            ) from error
        except sqlite3.DatabaseError as error:
            raise BankError(
                f"{self.path} is damaged or no strategy bank: {error}. Restore a checkpoint's copy (`trl-sgpo train "
                "--resume_from_checkpoint true`), or remove the directory to start an empty bank."
            ) from error

    def _meta(self, key: str) -> str | None:
        row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    @property
    def embedder(self) -> tuple[str, int] | None:
        """Name of the model the embeddings come from and their dimension, `None` before the first one is stored."""
        with self._readable_errors():
            model, dimension = self._meta("embedding_model"), self._meta("dimension")
        return None if model is None or dimension is None else (model, int(dimension))

    @property
    def state(self) -> str:
        """A name for what the ledger holds: every transaction that writes gives it a new one."""
        with self._readable_errors():
            return self._meta("state") or ""

    def _new_state(self) -> None:
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (uuid.uuid4().hex,))

    def commit(
        self, inserts: Iterable[tuple[Strategy, np.ndarray]], outcomes: Iterable[Outcome], retire: Iterable[str]
    ) -> None:
        """
        Write one transaction: inserts, then outcomes, then retirements.

        Args:
            inserts (`Iterable[tuple[Strategy, np.ndarray]]`):
                Strategies and their embeddings of shape `(d,)`. One whose id exists replaces it.
            outcomes (`Iterable[Outcome]`):
                Counts to add. Those of unknown strategies are ignored.
            retire (`Iterable[str]`):
                Ids of strategies to retire.
        """
        with self._readable_errors(), self._connection:
            self._new_state()
            self._connection.executemany(_UPSERT, [_to_row(*insert) for insert in inserts])
            self._connection.executemany(
                "UPDATE strategies SET successes = successes + ?, trials = trials + ?, lift = coalesce(?, lift) "
                "WHERE id = ?",
                [(outcome.successes, outcome.trials, outcome.lift, outcome.strategy_id) for outcome in outcomes],
            )
            self._connection.executemany(
                "UPDATE strategies SET trust = 'retired' WHERE id = ?", [(strategy_id,) for strategy_id in retire]
            )

    def set_embeddings(self, model: str, dimension: int, embeddings: dict[str, np.ndarray]) -> None:
        """
        Write one transaction: the embedding model, and embeddings by it of strategies already stored.

        Args:
            model (`str`):
                Name of the embedding model.
            dimension (`int`):
                Dimension of its embeddings.
            embeddings (`dict[str, np.ndarray]`):
                Strategy id → embedding of shape `(dimension,)`. Must cover all strategies when the model changes.
        """
        with self._readable_errors(), self._connection:
            self._new_state()
            self._connection.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [("embedding_model", model), ("dimension", str(dimension))],
            )
            self._connection.executemany(
                "UPDATE strategies SET embedding = ? WHERE id = ?",
                [(_blob(embedding), strategy_id) for strategy_id, embedding in embeddings.items()],
            )

    def all(self) -> list[Strategy]:
        """All strategies, retired ones too, in the order they were stored."""
        with self._readable_errors():
            return [_to_strategy(row) for row in self._connection.execute(f"{_SELECT} ORDER BY rowid")]

    def get(self, ids: Iterable[str]) -> list[Strategy]:
        """The strategies with these ids, in their order. Unknown ids are left out."""
        with self._readable_errors():
            rows = [self._connection.execute(f"{_SELECT} WHERE id = ?", (key,)).fetchone() for key in ids]
        return [_to_strategy(row) for row in rows if row is not None]

    def count(self) -> int:
        """Number of strategies, retired ones too."""
        with self._readable_errors():
            return self._connection.execute("SELECT count(*) FROM strategies").fetchone()[0]

    def embeddings(self) -> dict[str, np.ndarray]:
        """Strategy id → embedding, without the retired ones, in the order they were stored."""
        query = "SELECT id, embedding FROM strategies WHERE trust != 'retired' ORDER BY rowid"
        with self._readable_errors():
            return {key: np.frombuffer(blob, dtype="<f4") for key, blob in self._connection.execute(query)}

    def snapshot(self, path: str | Path) -> None:
        """
        Write a complete copy, atomically.

        Args:
            path (`str` or `Path`):
                The file to write or replace.
        """
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with self._readable_errors():
            self._connection.execute("VACUUM INTO ?", (str(temporary),))
            # Opening a ledger turns WAL on, which changes the file's header: done here, reading a snapshot in place
            # does not change its checksum
            with closing(sqlite3.connect(temporary)) as copy:
                copy.execute("PRAGMA journal_mode=WAL")
        durable_replace(temporary, target)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
