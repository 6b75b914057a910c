"""The files of a bank and their contents in memory, which change together."""

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..errors import BankError, BankStorageError
from ..files import durable_replace, unfinished_file
from .changes import Changes
from .contents import Contents
from .embedding import SAME_MODEL, EmbeddingModel
from .files import INDEX, LEDGER, SNAPSHOT_MANIFEST, file_identity
from .index import BankIndex
from .ledger import SCHEMA_VERSION, Ledger
from .lock import BankLock
from .manifest import copy_verified, is_snapshot, snapshot_damage, write_manifest


logger = logging.getLogger(__name__)


class Store:
    """
    The ledger, the contents and the index of a bank, locked while they are open.

    Args:
        path (`Path`):
            Directory of the bank. It is created if it does not exist.
        max_share (`float`):
            Share of what training shows of a class that one strategy may make up while there are others.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the record is damaged, is no strategy bank, or was written by a newer
            version, or if another process has the bank open.
    """

    ledger: Ledger
    contents: Contents
    index: BankIndex
    dimension: int | None  # of the embeddings, once there are any

    def __init__(self, path: Path, max_share: float):
        self.path, self._max_share = path.absolute(), max_share
        path.mkdir(parents=True, exist_ok=True)
        self._lock = BankLock(path)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        intact_snapshot = is_snapshot(self.path) and not snapshot_damage(self.path)
        self._open_ledger()
        self.dimension = None
        self._load_contents()
        if intact_snapshot and self.ledger.migrated:
            model, _ = self.ledger.embedder or ("", None)
            self._write_manifest(self.path, model)

    def _open_ledger(self) -> None:
        self.ledger = Ledger(self.path / LEDGER)
        self._file = file_identity(self.path / LEDGER)

    def _load_contents(self) -> None:
        embeddings, strategies = self.ledger.embeddings(), self.ledger.all()
        changed = [s for s in strategies if s.trust != "retired" and s.id not in embeddings]
        if changed:
            raise BankError(
                f"{self.ledger.path} was changed by something else: {len(changed)} strategies, as {changed[0].id}, "
                "do not have the ids of their texts. `trl-sgpo bank verify` lists them; restore a checkpoint's copy "
                "(`trl-sgpo train --resume_from_checkpoint true`)."
            )
        self.contents = Contents(strategies, embeddings, self._max_share)
        self.index = BankIndex(self.path / INDEX, self.contents, self.ledger)
        if embeddings:
            self.dimension = len(next(iter(embeddings.values())))

    def close(self) -> None:
        """Close the files and let other processes open them, also if the files are lost."""
        with ExitStack() as last_first:
            last_first.callback(self._lock.release)
            last_first.callback(self.ledger.close)
            self.index.close()

    # Writing

    def restore_files(self) -> None:
        """
        Write the record again if its file was deleted or moved while it was open. The open file still has all of it.

        Raises:
            [`~trl_sgpo.errors.BankStorageError`]: If it cannot be written, or if there is another file in its place.
        """
        ledger = self.path / LEDGER
        found = file_identity(ledger)
        if found == self._file:
            return
        if found is not None:
            raise BankStorageError(
                f"{ledger} was replaced by another file while the bank was open, which is not overwritten: move it "
                "away and the bank is written there again."
            )
        self.index.discard()
        self._lock.release()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = BankLock(self.path)
            self.ledger.snapshot(ledger)
        except (OSError, BankError) as error:
            raise BankStorageError(f"{ledger} was deleted or moved, and cannot be written again: {error}.") from error
        self.ledger.close()  # before the new file is opened, because SQLite removes files beside it by their names
        self._open_ledger()
        self.index = BankIndex(self.path / INDEX, self.contents, self.ledger)
        logger.warning("%s was deleted or moved while the bank was open. It was written again.", ledger)

    def _remove_manifest(self) -> None:
        """Removes the manifest of a snapshot that is about to change, because its checksum will not fit any more."""
        try:
            (self.path / SNAPSHOT_MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise BankStorageError(f"The bank in {self.path} cannot be changed: {error}.") from error

    def _remove_index(self) -> None:
        self.index.discard()
        if (self.path / INDEX).exists():
            shutil.rmtree(self.path / INDEX)

    def write(self, changes: Changes, embedding_model: str, fingerprint: np.ndarray | None) -> None:
        """Write changes in one transaction. The embedding model must be known when the bank is empty."""
        self.restore_files()
        self._remove_manifest()
        stored = self.contents.strategies
        if not stored:
            assert fingerprint is not None
            self.ledger.set_embeddings(embedding_model, fingerprint, {})
        index_changes = [*changes.added, *changes.removed]
        self.ledger.commit(
            [(s, changes.embeddings[key]) for key, s in changes.strategies.items() if key not in stored],
            [s for key, s in changes.strategies.items() if key in stored],
            changes.executions.values(),
            index_changes=bool(index_changes),
            texts=changes.texts,
        )
        for key, strategy in changes.strategies.items():
            self.contents.put(strategy, changes.embeddings.get(key))
        self.contents.judged |= changes.judged_all
        if changes.executions:
            self.contents.neighbourhoods.clear()
        self.index.change(index_changes)

    def use_model(self, embed: EmbeddingModel) -> np.ndarray:
        """
        Embed all strategies again if the model embeds differently from the one the bank was made with. Returns its
        fingerprint.
        """
        fingerprint = embed.fingerprint()
        strategies = self.contents.strategies
        if strategies and (made_with := self.ledger.embedder) is not None:
            model, stored = made_with
            if not self._is_same_model(model, stored, embed.name, fingerprint):
                logger.warning(
                    "The bank in %s was made with %s, and %s embeds differently: embedding it anew.",
                    self.path,
                    model,
                    embed.name,
                )
                embeddings = embed([strategy.text for strategy in strategies.values()])
                self._remove_index()
                self._remove_manifest()
                self.ledger.set_embeddings(embed.name, fingerprint, dict(zip(strategies, embeddings, strict=True)))
                self._load_contents()
        if self.dimension is None:
            self.dimension = len(fingerprint)
        return fingerprint

    def _is_same_model(self, made_with: str, stored: np.ndarray, model: str, fingerprint: np.ndarray) -> bool:
        """Compares fingerprints or, in a ledger of the first version, which has none, names and dimensions."""
        if len(stored) == 0:
            return made_with == model and len(fingerprint) == self.dimension
        return stored.shape == fingerprint.shape and bool(stored @ fingerprint >= SAME_MODEL)

    def set_note(self, key: str, value: str) -> None:
        """Store a short text under a key."""
        self.restore_files()
        self._remove_manifest()
        self.ledger.set_note(key, value)

    # Snapshots

    def snapshot(self, directory: Path, embedding_model: str) -> None:
        """Write a complete copy of the record with a manifest. A copy in the directory is replaced."""
        if directory.resolve() == self.path.resolve():
            raise BankError(
                f"A snapshot cannot replace the bank it is taken of ({self.path}): name another directory."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self.ledger.snapshot(directory / LEDGER)
        self._write_manifest(directory, embedding_model)

    def _write_manifest(self, directory: Path, embedding_model: str) -> None:
        write_manifest(
            directory,
            schema_version=SCHEMA_VERSION,
            count=self.ledger.count(),
            embedding_model=embedding_model,
            dimension=self.dimension,
        )

    def load_snapshot(self, snapshot: Path) -> None:
        """Replace the record by that of a snapshot, which is not changed, or leave it if the snapshot is damaged."""
        self.restore_files()
        with unfinished_file(self.path / LEDGER) as copy:
            copy_verified(snapshot, copy)
            Ledger(copy).close()
            self._replace_ledger(copy)

    def clear(self) -> None:
        """Remove all strategies."""
        self.restore_files()
        self._replace_ledger(None)

    def _replace_ledger(self, ledger: Path | None) -> None:
        """Continues with another ledger, an empty one if `None`."""
        self._remove_index()
        self.ledger.close()
        self._remove_manifest()
        for name in (f"{LEDGER}-wal", f"{LEDGER}-shm"):
            (self.path / name).unlink(missing_ok=True)
        if ledger is None:
            (self.path / LEDGER).unlink(missing_ok=True)
        else:
            durable_replace(ledger, self.path / LEDGER)
        self._open()
