"""Embeddings of one problem class in memory, searched exactly."""

from collections.abc import Collection, Iterable
from functools import lru_cache

import numpy as np

from .policy import evict, retention_score
from .strategy import TRUST_STATES, Strategy


ROOM = 20  # initial rows: doubled four times, they hold a full class of the default capacity and new strategies

_TRUSTED, _QUARANTINE, _RETIRED = (TRUST_STATES.index(state) for state in ("trusted", "quarantine", "retired"))


@lru_cache
def _is_in(trust: tuple[str, ...]) -> np.ndarray:
    return np.array([state in trust for state in TRUST_STATES])


class ClassVectors:
    """
    Embeddings, trust states, retention scores and steps of the strategies of a class, in arrays.

    A class is small enough to compare a problem with all of its strategies, which is faster and more exact than an
    approximate index that filters by class.

    Args:
        dimension (`int`):
            Dimension of the embeddings.
    """

    def __init__(self, dimension: int):
        self.ids: list[str] = []
        self.rows: dict[str, int] = {}
        self._columns: dict[str, np.ndarray] = {
            "matrix": np.zeros((ROOM, dimension), dtype=np.float32),
            "trust": np.zeros(ROOM, dtype=np.uint8),
            "score": np.zeros(ROOM),
            "step": np.zeros(ROOM, dtype=np.int64),
        }

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> np.ndarray:
        """
        `"matrix"` (embeddings of norm 1, shape `(n, d)`), `"trust"` (positions in `TRUST_STATES`), `"score"` or
        `"step"`, in the order of `ids`. It is a view: copy it before changing the class.
        """
        return self._columns[name][: len(self.ids)]

    def put(self, strategy: Strategy, embedding: np.ndarray | None = None) -> None:
        """Add a strategy with its embedding, or update the values of a known one."""
        row = self.rows.get(strategy.id)
        if row is None:
            row = len(self.ids)
            if row == len(self._columns["step"]):
                self._columns = {
                    name: np.concatenate([values, np.zeros_like(values)]) for name, values in self._columns.items()
                }
            self.ids.append(strategy.id)
            self.rows[strategy.id] = row
        if embedding is not None:
            self._columns["matrix"][row] = embedding
        self._columns["trust"][row] = TRUST_STATES.index(strategy.trust)
        self._columns["score"][row] = retention_score(strategy)
        self._columns["step"][row] = strategy.step

    def remove(self, strategy_id: str) -> None:
        """Remove a strategy. The last one takes its place."""
        row = self.rows.pop(strategy_id)
        last = self.ids.pop()
        if last != strategy_id:
            self.ids[row] = last
            self.rows[last] = row
            for values in self._columns.values():
                values[row] = values[len(self.ids)]

    def embedding(self, strategy_id: str) -> np.ndarray:
        """Embedding of a strategy, shape `(d,)`."""
        return self._columns["matrix"][self.rows[strategy_id]]

    def with_trust(self, trust: Collection[str]) -> np.ndarray:
        """Rows of the strategies in one of these trust states."""
        return np.flatnonzero(_is_in(tuple(trust))[self.column("trust")])

    def over_capacity(self, capacity: int, changed: Iterable[Strategy]) -> list[str]:
        """
        Ids of the strategies to evict, after changes, to keep a capacity.

        Args:
            capacity (`int`):
                How many stay.
            changed (`Iterable[Strategy]`):
                Changed strategies of the class, including new and retired ones.
        """
        strategies = list(changed)
        new = [s for s in strategies if s.id not in self.rows and s.trust != "retired"]
        ids = self.ids + [s.id for s in new]
        trust = np.concatenate([self.column("trust"), [TRUST_STATES.index(s.trust) for s in new]])
        scores = np.concatenate([self.column("score"), [retention_score(s) for s in new]])
        steps = np.concatenate([self.column("step"), [s.step for s in new]])
        for strategy in strategies:
            if (row := self.rows.get(strategy.id)) is not None:
                trust[row], scores[row] = TRUST_STATES.index(strategy.trust), retention_score(strategy)
        live = np.flatnonzero(trust != _RETIRED)
        evicted = evict(trust[live] == _TRUSTED, trust[live] == _QUARANTINE, scores[live], steps[live], capacity)
        return [ids[row] for row in live[evicted].tolist()]


def nearest(
    embeddings: np.ndarray, parts: list[tuple[ClassVectors, np.ndarray]], n: int
) -> list[list[tuple[str, float]]]:
    """
    The nearest strategies, found by comparing with all of them (exact search).

    Args:
        embeddings (`np.ndarray` of shape `(m, d)`):
            The queries.
        parts (`list[tuple[ClassVectors, np.ndarray]]`):
            Classes, and the rows of each to compare with.
        n (`int`):
            Number of strategies a query.

    Returns:
        `list[list[tuple[str, float]]]`: `m` lists of id and cosine similarity, the nearest first.
    """
    if not parts:
        return [[] for _ in embeddings]
    similarities = np.concatenate(
        [(embeddings @ vectors.column("matrix").T)[:, rows] for vectors, rows in parts], axis=1
    )
    if n < similarities.shape[1]:
        picked = np.argpartition(-similarities, n - 1, axis=1)[:, :n]
    else:
        picked = np.broadcast_to(np.arange(similarities.shape[1]), similarities.shape)
    values = np.take_along_axis(similarities, picked, axis=1).astype(float).round(6)
    starts = np.cumsum([0, *(len(rows) for _, rows in parts)])
    part_of = np.searchsorted(starts, picked, side="right") - 1
    all_hits = []
    for columns, belongs, row in zip(picked.tolist(), part_of.tolist(), values.tolist(), strict=True):
        hits = [
            (parts[part][0].ids[parts[part][1][column - starts[part]]], value)
            for column, part, value in zip(columns, belongs, row, strict=True)
        ]
        all_hits.append(sorted(hits, key=lambda hit: (-hit[1], hit[0])))
    return all_hits
