"""The index of the bank: ids and embeddings in Chroma. It holds nothing that the ledger does not."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import BankError


PAGE = 5_000  # Chroma refuses batches above 5,461
COLLECTION = "strategies"
SEAL = "seal.json"
SYNC_THRESHOLD = 5_000  # changes after which Chroma writes its whole index to disk, which need not survive a crash


def _digests(directory: Path) -> dict[str, str]:
    """Path and SHA-256 of every file but the seal."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                digests[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def seal(directory: Path, state: str) -> None:
    """
    Certifies that a closed index holds what the ledger does.

    Args:
        directory (`Path`):
            The index.
        state (`str`):
            State of the ledger, by [`Ledger.state`].
    """
    (directory / SEAL).write_text(json.dumps({"state": state, "files": _digests(directory)}))


def break_seal(directory: Path, state: str) -> bool:
    """
    Removes the seal, since an index in use may be torn any time, and says whether it was intact.

    Opening a torn index can end the process or fill the disk, so it has to be known before Chroma touches it.

    Args:
        directory (`Path`):
            The index.
        state (`str`):
            State of the ledger, by [`Ledger.state`].

    Returns:
        `bool`: Whether the files are, bit by bit, those that were sealed for this state of the ledger.
    """
    path = directory / SEAL
    try:
        sealed = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    path.unlink()
    return sealed == {"state": state, "files": _digests(directory)}


class Index:
    """
    Nearest-neighbour index by cosine similarity, persisted in a directory.

    Opening it runs one query, which finds some kinds of damage. [`break_seal`] finds the others before it is opened.

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
                    str(self.directory), chromadb.Settings(anonymized_telemetry=False)
                )
            except chromadb.errors.ChromaError:
                # Chroma remembers a client that failed to start and would hand it out again for the same path
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
                What is fixed about them. What changes belongs in the ledger.
        """
        with self._readable_errors():
            for start in tqdm(range(0, len(ids), PAGE), desc="Indexing strategies", disable=len(ids) <= PAGE):
                page = slice(start, start + PAGE)
                self._collection.add(ids=list(ids[page]), embeddings=embeddings[page], metadatas=list(metadatas[page]))

    def query(self, embeddings: np.ndarray, n: int) -> list[list[tuple[str, float]]]:
        """
        Nearest entries.

        Args:
            embeddings (`np.ndarray` of shape `(m, dimension)`):
                What to look for.
            n (`int`):
                How many entries to find for each. There are fewer if the index holds fewer.

        Returns:
            `list[list[tuple[str, float]]]`: `m` lists of id and cosine similarity, the nearest first.
        """
        if len(embeddings) == 0:
            return []
        with self._readable_errors():
            found: Any = self._collection.query(query_embeddings=embeddings, n_results=n, include=["distances"])
        return [
            [(key, 1.0 - distance) for key, distance in zip(ids, distances, strict=True)]
            for ids, distances in zip(found["ids"], found["distances"], strict=True)
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
