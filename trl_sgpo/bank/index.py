"""
The index of a large bank: ids and embeddings in Chroma. All of it is in the ledger too.

It is opened by the first search among more strategies than are compared exactly, so most banks have none.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import BankError, BankStorageError
from .contents import Contents
from .ledger import Ledger
from .seal import break_seal, seal


logger = logging.getLogger(__name__)

PAGE = 5_000  # Chroma refuses batches above 5,461
_ADDED_AT_A_TIME = 1_000  # a second or so, so that the progress bar moves
COLLECTION = "strategies"
SYNC_THRESHOLD = 5_000  # changes after which Chroma writes its whole index to disk, which need not survive a crash


class Index:
    """
    Nearest-neighbour index by cosine similarity, persisted in a directory.

    Opening it runs one query, which finds some kinds of damage. [`break_seal`] must find the others before.

    Args:
        directory (`str` or `Path`):
            Where it lives. It is created if it does not exist. Only one process may have it open.
        dimension (`int`):
            Dimension of the embeddings.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If Chroma cannot open it or its embeddings have another dimension.
    """

    def __init__(self, directory: str | Path, dimension: int):
        import chromadb
        from chromadb.api.shared_system_client import SharedSystemClient

        self.directory = Path(directory).resolve()
        with self._readable_errors():
            try:
                self._client = chromadb.PersistentClient(
                    str(self.directory),
                    # Not `.env` where the command runs, which could name a server, or modules
                    chromadb.Settings(_env_file=None, anonymized_telemetry=False),
                )
            except chromadb.errors.ChromaError:
                # Chroma caches a client that failed to start and would return it again for the same path
                SharedSystemClient.clear_system_cache()
                raise
            try:
                self._collection = self._client.get_or_create_collection(
                    COLLECTION,
                    embedding_function=None,
                    configuration={
                        "hnsw": {
                            "space": "cosine",
                            "sync_threshold": SYNC_THRESHOLD,
                            "batch_size": min(SYNC_THRESHOLD, 100),
                        }
                    },
                )
                self.query(np.ones((1, dimension), dtype=np.float32), 1)
            except (chromadb.errors.ChromaError, BankError):
                self.close()
                raise

    @classmethod
    def rebuild(
        cls,
        directory: str | Path,
        dimension: int,
        ids: Sequence[str],
        embeddings: np.ndarray,
        metadatas: Sequence[dict[str, str]],
    ) -> "Index":
        """
        Remove the directory and fill a new index there. The arguments are those of the constructor and of `add`.
        """
        if Path(directory).exists():
            shutil.rmtree(directory)
        index = cls(directory, dimension)
        try:
            index.add(ids, embeddings, metadatas)
        except BankError:
            index.close()
            raise
        return index

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        from chromadb.errors import ChromaError

        try:
            yield
        except ChromaError as error:
            raise BankError(
                f"The index in {self.directory} failed: {error}. End other processes that use it and remove this "
                "directory: it is rebuilt from the ledger when the bank is opened."
            ) from error

    def add(self, ids: Sequence[str], embeddings: np.ndarray, metadatas: Sequence[dict[str, str]]) -> None:
        """
        Add entries.

        Args:
            ids (`Sequence[str]` of length `n`):
                Ids that the index does not hold yet.
            embeddings (`np.ndarray` of shape `(n, dimension)`):
                Their embeddings.
            metadatas (`Sequence[dict[str, str]]` of length `n`):
                Values that never change. Those that do are in the ledger only.
        """
        with (
            self._readable_errors(),
            tqdm(total=len(ids), desc="Indexing strategies", unit="strategy", disable=len(ids) <= PAGE) as bar,
        ):
            for start in range(0, len(ids), _ADDED_AT_A_TIME):
                part = slice(start, start + _ADDED_AT_A_TIME)
                self._collection.add(ids=list(ids[part]), embeddings=embeddings[part], metadatas=list(metadatas[part]))
                bar.update(len(ids[part]))

    def query(self, embeddings: np.ndarray, n: int) -> list[list[tuple[str, float]]]:
        """
        Nearest entries.

        Args:
            embeddings (`np.ndarray` of shape `(m, dimension)`):
                The queries.
            n (`int`):
                Number of entries a query. There are fewer if the index holds fewer.

        Returns:
            `list[list[tuple[str, float]]]`: `m` lists of id and cosine similarity, the nearest first.
        """
        if len(embeddings) == 0:
            return []
        with self._readable_errors():
            answer: Any = self._collection.query(query_embeddings=embeddings, n_results=n, include=["distances"])
        return [
            [(key, 1.0 - distance) for key, distance in zip(ids, distances, strict=True)]
            for ids, distances in zip(answer["ids"], answer["distances"], strict=True)
        ]

    def ids(self) -> list[str]:
        """Ids of all entries."""
        ids: list[str] = []
        with self._readable_errors():
            for start in range(0, self._collection.count(), PAGE):
                ids += self._collection.get(limit=PAGE, offset=start, include=[])["ids"]
        return ids

    def delete(self, ids: Sequence[str]) -> None:
        """Remove entries."""
        with self._readable_errors():
            for start in range(0, len(ids), PAGE):
                self._collection.delete(ids=list(ids[start : start + PAGE]))

    def close(self) -> None:
        """Close the index."""
        self._client.close()


class BankIndex:
    """
    The index of a bank, opened by its first search and brought up to date before each one.

    It is opened as it is only if its seal fits the ledger, and otherwise rebuilt from what the bank holds. One that
    fails is rebuilt too, so that training continues.

    Args:
        directory (`Path`):
            Where it lives.
        contents ([`Contents`]):
            What the bank holds.
        ledger ([`Ledger`]):
            The record of the bank.
    """

    def __init__(self, directory: Path, contents: Contents, ledger: Ledger):
        self._directory, self._contents, self._ledger = directory, contents, ledger
        self._index: Index | None = None
        self._outdated: dict[str, None] = {}  # ids added or removed since the last search, in order

    def change(self, ids: Iterable[str]) -> None:
        """Note that strategies were added to the contents of the bank or removed from them."""
        if self._index is not None:
            self._outdated.update(dict.fromkeys(ids))

    def query(self, embeddings: np.ndarray, n: int) -> list[list[tuple[str, float]]]:
        """Nearest entries, by [`Index.query`]."""
        try:
            return self._up_to_date().query(embeddings, n)
        except BankError as error:
            logger.warning("Rebuilding the index from the ledger. %s", error)
            self.discard()
            return self._up_to_date().query(embeddings, n)

    def ids(self) -> list[str]:
        """Ids of all entries."""
        return self._up_to_date().ids()

    def discard(self) -> None:
        """Close the index without a seal, so that the next search rebuilds it."""
        index, self._index = self._index, None
        self._outdated.clear()
        if index is not None:
            index.close()

    def close(self) -> None:
        """Close the index and seal it, if it was opened and works."""
        if self._index is None:
            return
        try:
            self._up_to_date()
            self.discard()
            seal(self._directory, self._ledger.state)
        except (BankError, OSError) as error:
            logger.warning("%s is not sealed, so that the next search rebuilds it: %s", self._directory, error)
            self.discard()

    def _up_to_date(self) -> Index:
        live = self._contents.live
        if self._index is None:
            self._index = self._open()
        elif self._outdated:
            self._index.delete([key for key in self._outdated if key not in live])
            self._index.add(*self._entries([key for key in self._outdated if key in live]))
            self._outdated.clear()
        return self._index

    def _open(self) -> Index:
        ids = list(self._contents.live)
        dimension = len(self._contents.embedding(ids[0]))
        if self._directory.is_symlink():
            raise BankStorageError(f"{self._directory} is a link, which would be written through: remove it.")
        if self._directory.exists():
            if break_seal(self._directory, self._ledger.state):
                return Index(self._directory, dimension)
            logger.warning("%s was not closed or has changed since: rebuilding it from the ledger.", self._directory)
        return Index.rebuild(self._directory, dimension, *self._entries(ids))

    def _entries(self, ids: list[str]) -> tuple[list[str], np.ndarray, list[dict[str, str]]]:
        contents = self._contents
        embeddings = np.array([contents.embedding(key) for key in ids], dtype=np.float32)
        return ids, embeddings, [{"problem_class": contents.strategies[key].problem_class} for key in ids]
