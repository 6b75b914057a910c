"""The index in a thread of its own, so that no step waits for it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .index import Index


class BackgroundIndex:
    """
    Opens and changes an index in a thread, in the order it was told to. A query sees all changes before it.

    A change that fails is reported by the next call. Nothing is lost: the index holds nothing that the ledger does
    not, and one that failed is not sealed but rebuilt.

    Args:
        open_index (`Callable[[], Index]`):
            Opens the index, be it by rebuilding it.
    """

    def __init__(self, open_index: Callable[[], Index]):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="strategy-index")
        self._opened = self._thread.submit(open_index)
        self._changes: list[Future[None]] = []

    def _report(self) -> None:
        if self._opened.done():
            self._opened.result()
        while self._changes and self._changes[0].done():
            self._changes[0].result()  # stays in the list if it failed
            self._changes.pop(0)

    def change(
        self, removed: Sequence[str], ids: Sequence[str], embeddings: np.ndarray, metadatas: list[dict[str, str]]
    ) -> None:
        """
        Removes entries and adds others. The arguments are those of [`Index.delete`] and [`Index.add`].

        Raises:
            [`~trl_sgpo.errors.BankError`]: If an earlier change failed.
        """
        self._report()

        def apply() -> None:
            index = self._opened.result()
            index.delete(removed)
            index.add(ids, embeddings, metadatas)

        self._changes.append(self._thread.submit(apply))

    def _now(self, call: Callable[[Index], Any]) -> Any:
        result = self._thread.submit(lambda: call(self._opened.result())).result()
        self._report()
        return result

    def query(self, embeddings: np.ndarray, n: int) -> list[list[tuple[str, float]]]:
        """Nearest entries, by [`Index.query`]."""
        return self._now(lambda index: index.query(embeddings, n))

    def ids(self) -> list[str]:
        """Ids of all entries."""
        return self._now(Index.ids)

    def close(self) -> bool:
        """Finish all changes and close the index. Returns whether all of them succeeded."""
        self._thread.shutdown(wait=True)
        if self._opened.exception() is not None:
            return False
        self._opened.result().close()
        return all(change.exception() is None for change in self._changes)
