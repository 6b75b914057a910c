"""The record of the bank: one SQLite file, from which everything else is derived."""

import json
import os
import re
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BankError, BankStorageError
from ..files import durable_replace, unfinished_file
from .neighbourhood import TEXT_LIMIT
from .stored import FIELDS, to_embeddings, to_execution, to_fingerprint, to_strategy, to_text
from .strategy import UNVERIFIED, Execution, Strategy


SCHEMA_VERSION = 3

_PLAIN_COUNTS = " plain_problems INTEGER NOT NULL, plain_solved REAL NOT NULL, plain_baseline REAL NOT NULL,"
_PLAIN_EXECUTIONS = " plain_trials INTEGER NOT NULL, plain_successes REAL NOT NULL, plain_baseline REAL NOT NULL,"
_TABLES = f"""
CREATE TABLE strategies (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, text TEXT NOT NULL, problem_class TEXT NOT NULL,
    source_problems TEXT NOT NULL, parents TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL,
    step INTEGER NOT NULL, origin TEXT NOT NULL, trust TEXT NOT NULL, successes REAL NOT NULL, trials INTEGER NOT NULL,
    problems INTEGER NOT NULL, solved REAL NOT NULL, baseline REAL NOT NULL,{_PLAIN_COUNTS} shown INTEGER NOT NULL,
    checksum TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS embeddings (number INTEGER PRIMARY KEY, embedding BLOB NOT NULL);
CREATE TABLE executions (
    strategy_id TEXT NOT NULL, problem TEXT NOT NULL, problem_class TEXT NOT NULL, trials INTEGER NOT NULL,
    successes REAL NOT NULL, baseline REAL NOT NULL,{_PLAIN_EXECUTIONS} PRIMARY KEY (strategy_id, problem)
) WITHOUT ROWID;
"""
# Banks of earlier versions have no table of texts: it is made when the first one is written
_TEXTS = "CREATE TABLE IF NOT EXISTS problems (id TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;"
_META = "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);"
_SCHEMA = f"""
BEGIN;
{_TABLES}
{_TEXTS}
{_META}
INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}');
COMMIT;
"""
# Version 1 had the lift at admission and no executions: the lift becomes an execution on one problem
_TABLES_1 = """
CREATE TABLE strategies (
    id TEXT PRIMARY KEY, text TEXT NOT NULL, problem_class TEXT NOT NULL, source_problems TEXT NOT NULL,
    parents TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL, step INTEGER NOT NULL, origin TEXT NOT NULL,
    trust TEXT NOT NULL, successes REAL NOT NULL, trials INTEGER NOT NULL, lift REAL NOT NULL, embedding BLOB NOT NULL
);
"""
# Version 2 compared with no plain answers
_TABLES_2 = _TABLES.replace(_PLAIN_COUNTS, "").replace(_PLAIN_EXECUTIONS, "")
_MIGRATE_1 = f"""
ALTER TABLE strategies RENAME TO version_1;
{_TABLES_2}
INSERT INTO strategies
    SELECT rowid, id, text, problem_class, source_problems, parents, model, run, step, origin, trust, successes,
        trials, trials > 0, (trials > 0) * max(lift, 0), (trials > 0) * max(-lift, 0), 0, ''
    FROM version_1 ORDER BY rowid;
INSERT INTO embeddings SELECT rowid, embedding FROM version_1 ORDER BY rowid;
INSERT INTO executions
    SELECT id, '', problem_class, 1, max(lift, 0), max(-lift, 0) FROM version_1 WHERE trials > 0;
DROP TABLE version_1;
"""
_MIGRATE_2 = f"""
ALTER TABLE strategies RENAME TO strategies_2;
ALTER TABLE executions RENAME TO executions_2;
{_TABLES}
INSERT INTO strategies
    SELECT number, id, text, problem_class, source_problems, parents, model, run, step, origin, trust, successes,
        trials, problems, solved, baseline, 0, 0, 0, shown, checksum
    FROM strategies_2 ORDER BY number;
INSERT INTO executions
    SELECT strategy_id, problem, problem_class, trials, successes, baseline, 0, 0, 0 FROM executions_2;
DROP TABLE strategies_2;
DROP TABLE executions_2;
"""


def _spelling(statement: str) -> str:
    """A statement without white space, and without the quotes that SQLite puts around a table's new name."""
    return re.sub(r'[\s"]|IF NOT EXISTS', "", statement)


_KNOWN = {_spelling(statement) for statement in f"{_TABLES}{_TEXTS}{_META}{_TABLES_1}{_TABLES_2}".split(";")}
_MAX_VALUE, _MAX_STATEMENT = 2**28, 2**16  # bytes
_CHANGING = ("source_problems", *UNVERIFIED)
_SELECT = f"SELECT {', '.join(FIELDS)} FROM strategies"
_INSERT = f"INSERT INTO strategies VALUES (NULL, {', '.join('?' * (len(FIELDS) + 2))})"
_UPDATE = f"UPDATE strategies SET {', '.join(f'{name} = ?' for name in _CHANGING)} WHERE id = ?"


def _blob(embedding: np.ndarray) -> bytes:
    return embedding.astype("<f4").tobytes()


_all_values, _changing_values = attrgetter(*FIELDS), attrgetter(*_CHANGING)


def _row(values: tuple[Any, ...]) -> list[Any]:
    return [(json.dumps(value) if value else "[]") if isinstance(value, tuple) else value for value in values]


class Ledger:
    """
    Strategies with their embeddings and counts in an SQLite file, written in one durable transaction a commit.

    Args:
        path (`str` or `Path`):
            The file. It is created if it does not exist.

    Attributes:
        migrated (`bool`): Whether an earlier version wrote the file.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the file is damaged, is no ledger, or was written by a newer version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._reading():
            self._expect_no_journal()
            self._connection = sqlite3.connect(self.path)
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _MAX_STATEMENT)
            self._connection.execute("PRAGMA page_size=2048")  # small, because a step changes rows all over the file
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA wal_autocheckpoint=4000")
            self._connection.execute("PRAGMA cache_size=-65536")
            self._connection.execute("PRAGMA trusted_schema=OFF")
            self._expect_known_tables()
            if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._connection.executescript(_SCHEMA)
            if (damage := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(damage)
            stored = str(self._meta("schema_version") or 0)
            if not (stored.isdecimal() and len(stored) <= 9):
                raise sqlite3.DatabaseError("its schema version is no number")
            version = int(stored)
        if version > SCHEMA_VERSION:
            self.close()
            raise BankError(
                f"{self.path} has schema version {version} and this version of trl-sgpo reads up to {SCHEMA_VERSION}: "
                "upgrade trl-sgpo, restore a checkpoint's copy (`trl-sgpo train --resume_from_checkpoint true`), or "
                "remove the directory to start an empty bank."
            )
        self.migrated = version in (1, 2)
        if self.migrated:
            self._migrate(version)

    def _expect_no_journal(self) -> None:
        """SQLite plays back a journal and deletes what it names. A bank has a write-ahead log instead."""
        journal = self.path.with_name(f"{self.path.name}-journal")
        if os.path.lexists(journal) and self.path.is_file() and self.path.stat().st_size > 0:
            raise sqlite3.DatabaseError(f"beside it is {journal.name}, which no bank has: delete that file")

    def _expect_known_tables(self) -> None:
        """Constraints, views, triggers, computed columns and indices of expressions compute, and may never end."""
        # SQLite's own indices have no statement
        for kind, name, statement in self._connection.execute("SELECT type, name, sql FROM sqlite_master"):
            if _spelling(str(statement)) not in _KNOWN and (kind, statement) != ("index", None):
                raise sqlite3.DatabaseError(f"its {kind} {name} has a form which no bank has")

    def _migrate(self, version: int) -> None:
        """Brings a ledger of an earlier version to this one, in one transaction."""
        with self._readable_errors(), self._connection:
            self._connection.executescript(f"BEGIN; {_MIGRATE_1 if version == 1 else ''} {_MIGRATE_2}")
            if version == 1:
                for strategy in self.all():
                    self._connection.execute(
                        "UPDATE strategies SET checksum = ? WHERE id = ?", (strategy.checksum, strategy.id)
                    )
                self._new_state()
            self._set_meta("schema_version", str(SCHEMA_VERSION))
        with self._readable_errors():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # for the checksum of a snapshot's file

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise BankStorageError(
                f"{self.path} cannot be read or written: {error}. Check that it is a strategy bank, that the disk is "
                "writable and not full, and that no other process has the bank open."
            ) from error
        except sqlite3.DatabaseError as error:
            raise BankError(
                f"{self.path} is damaged or no strategy bank: {error}. Restore a checkpoint's copy (`trl-sgpo train "
                "--resume_from_checkpoint true`), or remove the directory to start an empty bank."
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._readable_errors():
                yield
        except ValueError as error:
            raise BankError(
                f"{self.path} has a value that cannot be: {error}. Restore a checkpoint's copy (`trl-sgpo train "
                "--resume_from_checkpoint true`)."
            ) from error

    def _meta(self, key: str) -> str | None:
        row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row and to_text(row[0], "a value of meta")

    def _set_meta(self, key: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def embedder(self) -> tuple[str, np.ndarray] | None:
        """
        Name of the model the embeddings come from and its fingerprint, `None` before the first one is stored. The
        fingerprint is an empty array where it was not kept.
        """
        with self._reading():
            model, fingerprint = self._meta("embedding_model"), self._meta("fingerprint")
            return None if model is None else (model, to_fingerprint(fingerprint or "[]"))

    def note(self, key: str) -> str | None:
        """The text stored under a key, or `None`."""
        with self._reading():
            return self._meta(f"note/{key}")

    def set_note(self, key: str, value: str) -> None:
        """Store a short text under a key, in a transaction of its own."""
        with self._readable_errors(), self._connection:
            self._set_meta(f"note/{key}", value)

    @property
    def state(self) -> str:
        """Identifier of the entries of an index: each transaction that adds or removes some makes a new one."""
        with self._reading():
            return self._meta("state") or ""

    def _new_state(self) -> None:
        self._set_meta("state", uuid.uuid4().hex)

    def commit(
        self,
        inserts: Sequence[tuple[Strategy, np.ndarray]] = (),
        updates: Iterable[Strategy] = (),
        executions: Iterable[Execution] = (),
        index_changes: bool = True,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """
        Write one transaction.

        Args:
            inserts (`Sequence[tuple[Strategy, np.ndarray]]`, *optional*):
                New strategies and their embeddings of shape `(d,)`.
            updates (`Iterable[Strategy]`, *optional*):
                Stored strategies whose source problems, trust or counts are new.
            executions (`Iterable[Execution]`, *optional*):
                Executions. Those of a strategy on a problem replace the ones stored for both.
            index_changes (`bool`, *optional*, defaults to `True`):
                Whether the strategies that are not retired are others than before.
            texts (`Mapping[str, str]`, *optional*):
                Texts of problems, by their ids. A problem keeps the text it has.
        """
        with self._readable_errors(), self._connection:
            if texts:
                self._connection.execute("BEGIN")  # which Python does not do before a table is made
                self._connection.execute(_TEXTS)
                self._connection.executemany("INSERT OR IGNORE INTO problems VALUES (?, ?)", texts.items())
            if index_changes:
                self._new_state()
            self._connection.executemany(
                _INSERT,
                [(s.id, *_row(_all_values(s)), s.checksum) for s, _ in inserts],
            )
            self._write_embeddings({s.id: embedding for s, embedding in inserts})
            self._connection.executemany(_UPDATE, [(*_row(_changing_values(s)), s.id) for s in updates])
            self._connection.executemany(
                f"INSERT OR REPLACE INTO executions VALUES ({', '.join('?' * len(fields(Execution)))})",
                [tuple(vars(execution).values()) for execution in executions],
            )

    def set_embeddings(self, model: str, fingerprint: np.ndarray, embeddings: dict[str, np.ndarray]) -> None:
        """
        Write one transaction: the embedding model, and embeddings by it of strategies already stored.

        Args:
            model (`str`):
                Name of the embedding model.
            fingerprint (`np.ndarray`):
                Embedding of a fixed text, by which models are told apart.
            embeddings (`dict[str, np.ndarray]`):
                Strategy id → embedding of shape `(d,)`. Must cover all strategies when the model changes.
        """
        with self._readable_errors(), self._connection:
            self._new_state()
            self._set_meta("embedding_model", model)
            self._set_meta("fingerprint", json.dumps(fingerprint.tolist()))
            self._write_embeddings(embeddings)

    def _write_embeddings(self, embeddings: dict[str, np.ndarray]) -> None:
        # In a table of their own, because SQLite writes a whole row when a count in it changes
        rows = [(_blob(embedding), key) for key, embedding in embeddings.items()]
        self._connection.executemany(
            "INSERT OR REPLACE INTO embeddings SELECT number, ? FROM strategies WHERE id = ?", rows
        )

    def executions_on(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Execution]:
        """The stored executions of strategies on problems, by the ids of both."""
        wanted = json.dumps(list(pairs))
        query = (
            "SELECT executions.* FROM json_each(?) JOIN executions "
            "ON strategy_id = json_extract(value, '$[0]') AND problem = json_extract(value, '$[1]')"
        )
        with self._reading():
            rows = self._connection.execute(query, (wanted,))
            return {row[:2]: to_execution(row) for row in rows}

    def executions(self, strategy_id: str) -> list[Execution]:
        """All executions of a strategy, one entry a problem."""
        with self._reading():
            rows = self._connection.execute("SELECT * FROM executions WHERE strategy_id = ?", (strategy_id,))
            return [to_execution(row) for row in rows]

    def executions_with_texts(self, problem_class: str) -> list[tuple[Execution, str]]:
        """
        Executions of the candidates and trusted strategies of a class on problems whose texts are stored, with the
        text. Those of other strategies, which others wrote and which have not earned trust, are no evidence.
        """
        # CROSS keeps the order of the tables: SQLite would read the executions of all classes
        query = (
            "SELECT executions.*, problems.text FROM strategies CROSS JOIN executions ON strategy_id = strategies.id "
            "CROSS JOIN problems ON problems.id = problem WHERE strategies.problem_class = ? "
            "AND strategies.trust IN ('candidate', 'trusted')"
        )
        with self._reading():
            if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'problems'").fetchone():
                return []
            rows = self._connection.execute(query, (problem_class,))
            return [(to_execution(row[:-1]), to_text(row[-1], "a problem")[:TEXT_LIMIT]) for row in rows]

    def damage(self) -> list[str]:
        """
        Everything that is wrong with the file: what SQLite finds in a full check, and strategies whose text or
        provenance is not what was written.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a value is of another type than the bank writes, or counts contradict
                each other.
        """
        with self._readable_errors():
            faults = [row[0] for row in self._connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            stored = dict(self._connection.execute("SELECT id, checksum FROM strategies"))
        for strategy in self.all():
            if stored.get(strategy.id) != strategy.checksum:
                faults.append(f"strategy {strategy.id} ({strategy.text[:40]!r}) is not what was written")
        _ = self.embedder, self.embeddings()
        with self._reading():
            for row in self._connection.execute("SELECT * FROM executions"):
                to_execution(row)
        return faults

    def all(self) -> list[Strategy]:
        """All strategies, retired ones too, in the order they were stored."""
        with self._reading():
            return [to_strategy(row) for row in self._connection.execute(f"{_SELECT} ORDER BY number")]

    def count(self) -> int:
        """Number of strategies, retired ones too."""
        with self._readable_errors():
            return self._connection.execute("SELECT count(*) FROM strategies").fetchone()[0]

    def embeddings(self) -> dict[str, np.ndarray]:
        """Strategy id → embedding, without the retired ones, in the order they were stored."""
        query = (
            "SELECT id, embedding FROM strategies JOIN embeddings USING (number) WHERE trust != 'retired' "
            "ORDER BY number"
        )
        with self._reading():
            return to_embeddings(self._connection.execute(query))

    def snapshot(self, path: str | Path) -> None:
        """
        Write a complete copy, atomically.

        Args:
            path (`str` or `Path`):
                The file to write or replace.
        """
        target = Path(path)
        with unfinished_file(target) as temporary:
            with self._readable_errors():
                self._connection.execute("VACUUM INTO ?", (str(temporary),))
                # Opening a ledger turns WAL on, which changes the file's header: done here, reading a snapshot in
                # place does not change its checksum
                with closing(sqlite3.connect(temporary)) as copy:
                    copy.execute("PRAGMA journal_mode=WAL")
            durable_replace(temporary, target)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
