"""The index in a thread of its own, so that no step waits for it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .index import Index


class BackgroundIndex:
    """
    Opens and changes an index in a thread, in the order it was told to. A query sees all changes before it.

    A change that fails loses nothing, since the index holds nothing that the ledger does not: [`failure`] tells, and
    an index that failed is not sealed but rebuilt.

    Args:
        open_index (`Callable[[], Index]`):
            Opens the index, be it by rebuilding it.
    """

    def __init__(self, open_index: Callable[[], Index]):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="strategy-index")
        self._opened = self._thread.submit(open_index)
        self._changes: list[Future[None]] = []

    def failure(self) -> BaseException | None:
        """Why the index is not what it should be, as far as is known, or `None`."""
        while self._changes and self._changes[0].done():
            if (error := self._changes[0].exception()) is not None:
                return error  # and stays in the list
            self._changes.pop(0)
        return self._opened.exception() if self._opened.done() else None

    def change(
        self, removed: Sequence[str], ids: Sequence[str], embeddings: np.ndarray, metadatas: list[dict[str, str]]
    ) -> None:
        """Removes entries and adds others. The arguments are those of [`Index.delete`] and [`Index.add`]."""

        def apply() -> None:
            index = self._opened.result()
            index.delete(removed)
            index.add(ids, embeddings, metadatas)

        self._changes.append(self._thread.submit(apply))

    def _now(self, call: Callable[[Index], Any]) -> Any:
        result = self._thread.submit(lambda: call(self._opened.result())).result()
        if (error := self.failure()) is not None:
            raise error
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
