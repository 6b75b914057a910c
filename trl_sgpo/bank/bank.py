"""The strategy bank: the ledger as its record, the index for finding strategies, and the policy that joins them."""

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import BankError
from . import policy
from .embedder import Embedder, load_embedder
from .index import Index, break_seal, seal
from .ledger import SCHEMA_VERSION, Ledger, durable_replace
from .lock import BankLock
from .strategy import Outcome, Retrieved, Strategy, problem_id


logger = logging.getLogger(__name__)

LEDGER = "ledger.sqlite"
INDEX = "chroma"
MANIFEST = "manifest.json"
CACHED_PROBLEMS = 100_000
DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StrategyBank:
    """
    Strategies that proved themselves, kept in a directory and found again by the problems they may help.

    The directory holds `ledger.sqlite`, the record, and `chroma/`, an index that is rebuilt from the record unless it
    is, bit by bit, what the bank left when it was closed. One process may have it open at a time.

    Args:
        path (`str` or `Path`):
            Directory of the bank. It is created if it does not exist.
        embedding_model (`str` or `Callable`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Name or path of a sentence-transformers model, or a function from `n` texts to an array of shape `(n, d)`.
            It is loaded when first needed. A bank made with another one is embedded anew when opened. Functions are
            told apart by their `__name__`.
        capacity_per_class (`int`, *optional*, defaults to `256`):
            Maximum number of strategies of each problem class.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the record is damaged, is no strategy bank, or was written by a newer
            version, or if another process has the bank open.
    """

    def __init__(
        self,
        path: str | Path,
        embedding_model: str | Embedder = DEFAULT_EMBEDDING_MODEL,
        capacity_per_class: int = 256,
    ):
        self.path = Path(path)
        self.capacity_per_class = capacity_per_class
        self.dimension: int | None = None
        self._embedder: Embedder | None = None
        if isinstance(embedding_model, str):
            self.embedding_model = embedding_model
        else:
            self.embedding_model = embedding_model.__name__
            self._embedder = embedding_model
        self._problem_embeddings: dict[str, np.ndarray] = {}
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = BankLock(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    # Opening and closing

    def _open(self) -> None:
        self._ledger = Ledger(self.path / LEDGER)
        self._strategies = {strategy.id: strategy for strategy in self._ledger.all()}
        self._index: Index | None = None
        self._indexed = ""  # state of the ledger that the index holds
        stored = self._ledger.embedder
        if stored is not None and self._strategies:
            model, dimension = stored
            if model == self.embedding_model:
                self.dimension = dimension
            else:
                self._embed_anew(model)
        self._embeddings = self._ledger.embeddings()
        if self._embeddings:
            self._index = self._open_index()

    def _embed_anew(self, model: str) -> None:
        logger.warning(
            "The bank in %s was made with %s: embedding it with %s.", self.path, model, self.embedding_model
        )
        embeddings = self._encode([strategy.text for strategy in self._strategies.values()])
        # Removed first: after a crash in between, ids alone would not tell that its embeddings are of another model
        self._remove_index()
        self._ledger.set_embeddings(
            self.embedding_model, embeddings.shape[1], dict(zip(self._strategies, embeddings, strict=True))
        )

    def _open_index(self) -> Index:
        """Open the index if it is as the ledger left it, and rebuild it from the ledger if it is not."""
        assert self.dimension is not None
        directory = self.path / INDEX
        self._indexed = self._ledger.state
        if directory.exists():
            if break_seal(directory, self._ledger.state):
                return Index(directory, self.dimension)
            logger.warning("%s was not closed or has changed since: rebuilding it from the ledger.", directory)
        return Index.rebuild(directory, self.dimension, *self._entries(list(self._embeddings)))

    def _remove_index(self) -> None:
        if (self.path / INDEX).exists():
            shutil.rmtree(self.path / INDEX)

    def _entries(self, ids: Sequence[str]) -> tuple[Sequence[str], np.ndarray, list[dict[str, str]]]:
        embeddings = np.array([self._embeddings[key] for key in ids], dtype=np.float32)
        return ids, embeddings, [{"problem_class": self._strategies[key].problem_class} for key in ids]

    def close(self) -> None:
        """Close the bank's files and let other processes open it."""
        had_index = self._index is not None
        self._close_files()
        if had_index and self._indexed:
            seal(self.path / INDEX, self._indexed)
        self._lock.release()

    def _close_files(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
        self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Embedding

    def _encode(self, texts: list[str]) -> np.ndarray:
        if self._embedder is None:
            self._embedder = load_embedder(self.embedding_model)
        embeddings = np.asarray(self._embedder(texts), dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(texts) or not np.isfinite(embeddings).all():
            raise BankError(
                f"The embedding model {self.embedding_model} gave an array of shape {embeddings.shape} for "
                f"{len(texts)} texts: it must give one finite vector a text."
            )
        if self.dimension is None:
            self.dimension = embeddings.shape[1]
        if embeddings.shape[1] != self.dimension:
            raise BankError(
                f"The embedding model {self.embedding_model} gives vectors of dimension {embeddings.shape[1]} and the "
                f"bank in {self.path} holds dimension {self.dimension}: use the model it was made with, or give a "
                "changed model another name, so that the bank is embedded anew."
            )
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def embed(self, texts: list[str]) -> np.ndarray:
        """
        Embeddings of problem texts. They are remembered, so that an epoch over the same problems costs nothing.

        Args:
            texts (`list[str]` of length `n`):
                The texts.

        Returns:
            `np.ndarray` of shape `(n, d)`: Embeddings of norm 1, `float32`.
        """
        cache = self._problem_embeddings
        if missing := [text for text in dict.fromkeys(texts) if text not in cache]:
            cache.update(zip(missing, self._encode(missing), strict=True))
        if not texts:
            return np.zeros((0, self.dimension or 0), dtype=np.float32)
        embeddings = np.stack([cache[text] for text in texts])
        while len(cache) > CACHED_PROBLEMS:
            del cache[next(iter(cache))]
        return embeddings

    # Writing

    def add(self, strategies: Iterable[Strategy]) -> list[str]:
        """
        Store strategies.

        One whose id is stored already adds its source problems to it and nothing else. One that is a near-copy of a
        stored strategy of its class is skipped. A class that exceeds its capacity loses its least useful strategies.

        Args:
            strategies (`Iterable[Strategy]`):
                The strategies.

        Returns:
            `list[str]`: Ids of the strategies that are new in the bank.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text.
        """
        return self.record(strategies, ())

    def update(self, outcomes: Iterable[Outcome]) -> None:
        """
        Add the outcomes of verified executions to the counts of their strategies.

        Args:
            outcomes (`Iterable[Outcome]`):
                The outcomes. Those of strategies that are not in the bank are ignored.
        """
        self.record((), outcomes)

    def record(self, strategies: Iterable[Strategy], outcomes: Iterable[Outcome]) -> list[str]:
        """
        Store strategies, as `add` does, and outcomes, as `update` does, in one transaction: all of it or nothing.

        Args:
            strategies (`Iterable[Strategy]`):
                Strategies to store.
            outcomes (`Iterable[Outcome]`):
                Outcomes, of these strategies or of those in the bank.

        Returns:
            `list[str]`: Ids of the strategies that are new in the bank.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text.
        """
        strategies, outcomes = list(strategies), list(outcomes)
        changed, embeddings = self._admit(strategies)
        new = [key for key in changed if key not in self._embeddings]
        retired = self._evict(changed, new, outcomes)
        if not changed and not outcomes:
            return []
        if self._index is None and new:
            assert self.dimension is not None
            self._ledger.set_embeddings(self.embedding_model, self.dimension, {})
            self._index = self._open_index()
        self._ledger.commit([(changed[key], embeddings[key]) for key in changed], outcomes, retired)

        touched = dict.fromkeys([*changed, *(outcome.strategy_id for outcome in outcomes), *retired])
        self._strategies.update((strategy.id, strategy) for strategy in self._ledger.get(touched))
        added = [key for key in new if key not in retired]
        self._embeddings.update((key, embeddings[key]) for key in added)
        removed = [key for key in retired if self._embeddings.pop(key, None) is not None]
        if self._index is not None:
            self._indexed = ""  # until both are done: an index that failed halfway must not be sealed
            self._index.delete(removed)
            self._index.add(*self._entries(added))
            self._indexed = self._ledger.state
        return added

    def _admit(self, strategies: list[Strategy]) -> tuple[dict[str, Strategy], dict[str, np.ndarray]]:
        """Strategies to write, by id, and their embeddings: new ones, and stored ones with more source problems."""
        for strategy in strategies:
            if not strategy.text.strip():
                raise BankError("A strategy without text cannot be stored: drop it before it gets to the bank.")
        unseen = {strategy.id: strategy.text for strategy in strategies if strategy.id not in self._embeddings}
        encoded = self._encode(list(unseen.values())) if unseen else ()
        embeddings = self._embeddings | dict(zip(unseen, encoded, strict=True))
        peers: dict[str, list[np.ndarray]] = defaultdict(list)
        for strategy in self.strategies() if unseen else ():
            if strategy.trust != "quarantine":
                peers[strategy.problem_class].append(self._embeddings[strategy.id])

        changed: dict[str, Strategy] = {}
        for strategy in strategies:
            key, vector = strategy.id, embeddings[strategy.id]
            known = changed.get(key) or self._strategies.get(key)
            if key not in changed and key not in self._embeddings:
                if policy.near_copy(vector, np.array(peers[strategy.problem_class])) is not None:
                    continue
                if strategy.trust != "quarantine":
                    peers[strategy.problem_class].append(vector)
            if known is None:
                changed[key] = strategy
                continue
            changed[key] = replace(
                known,
                source_problems=tuple(dict.fromkeys(known.source_problems + strategy.source_problems)),
                trust=strategy.trust if known.trust == "retired" else known.trust,
            )
        return changed, embeddings

    def _evict(self, changed: dict[str, Strategy], new: list[str], outcomes: list[Outcome]) -> list[str]:
        classes = {changed[key].problem_class for key in new}
        stored = {strategy.id: strategy for strategy in self.strategies() if strategy.problem_class in classes}
        pool = stored | {key: strategy for key, strategy in changed.items() if strategy.problem_class in classes}
        for outcome in outcomes:
            if (strategy := pool.get(outcome.strategy_id)) is not None:
                pool[outcome.strategy_id] = replace(
                    strategy,
                    successes=strategy.successes + outcome.successes,
                    trials=strategy.trials + outcome.trials,
                )
        return policy.evict(pool.values(), self.capacity_per_class)

    def clear(self) -> None:
        """Remove all strategies. Take a [`~StrategyBank.snapshot`] first to keep them."""
        self._close_files()
        for name in (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm"):
            (self.path / name).unlink(missing_ok=True)
        self._remove_index()
        self._open()

    # Reading

    def __len__(self) -> int:
        return len(self._embeddings)

    def strategies(self) -> list[Strategy]:
        """All strategies but the retired ones."""
        return [self._strategies[key] for key in self._embeddings]

    def get(self, strategy_id: str) -> Strategy | None:
        """The strategy with this id, be it retired, or `None`."""
        return self._strategies.get(strategy_id)

    def best(self, n: int) -> list[Strategy]:
        """
        The most useful strategies, of those that problems may be shown.

        Args:
            n (`int`):
                How many. Of two equally useful ones, the one tried more often comes first.
        """
        shown = [strategy for strategy in self.strategies() if strategy.trust != "quarantine"]
        return sorted(shown, key=lambda s: (-policy.utility(s.successes, s.trials), -s.trials, s.id))[:n]

    def retrieve(
        self,
        problems: list[str],
        k: int = 3,
        classes: Sequence[str | None] | None = None,
        exclude: list[set[str]] | None = None,
        cross_class: bool = False,
    ) -> list[list[Retrieved]]:
        """
        Strategies to show with problems: similar, useful, different from each other, and not written for the problem.

        Args:
            problems (`list[str]` of length `m`):
                Texts of the problems.
            k (`int`, *optional*, defaults to `3`):
                Number of strategies a problem. There are fewer if the bank holds fewer that fit.
            classes (`list[str]` of length `m`, *optional*):
                Class of each problem, to which its strategies must belong. If `None`, they may be of any class.
            exclude (`list[set[str]]` of length `m`, *optional*):
                For each problem the ids, by [`problem_id`], of problems whose strategies it must not see. If `None`,
                those written for a problem of the same text.
            cross_class (`bool`, *optional*, defaults to `False`):
                Whether strategies of other classes than `classes` are welcome too.

        Returns:
            `list[list[Retrieved]]`: A list for each problem, the best first.
        """
        if self._index is None or not self._embeddings or not problems:
            return [[] for _ in problems]
        wanted = [None] * len(problems) if classes is None or cross_class else classes
        hidden = [{problem_id(problem)} for problem in problems] if exclude is None else exclude
        embeddings = self.embed(problems)
        hits = self._index.query(embeddings, 4 * k + 16)
        return [self._select(*row, k) for row in zip(embeddings, hits, wanted, hidden, strict=True)]

    def _select(
        self, embedding: np.ndarray, hits: list[tuple[str, float]], wanted: str | None, hidden: set[str], k: int
    ) -> list[Retrieved]:
        def fits(key: str) -> bool:
            strategy = self._strategies[key]
            return (
                strategy.trust != "quarantine"
                and (wanted is None or strategy.problem_class == wanted)
                and hidden.isdisjoint(strategy.source_problems)
            )

        near = [(key, similarity) for key, similarity in hits if fits(key)]
        selected = self._rank(near, k)
        if len(selected) < k:
            # The index knows neither trust nor sources, so its nearest entries may be the wrong ones: look at all
            keys = [key for key in self._embeddings if fits(key)]
            if len(keys) > len(near):
                similarities = np.array([self._embeddings[key] for key in keys]) @ embedding
                selected = self._rank(list(zip(keys, similarities.tolist(), strict=True)), k)
        return selected

    def _rank(self, hits: list[tuple[str, float]], k: int) -> list[Retrieved]:
        found = []
        for key, similarity in hits:
            strategy = self._strategies[key]
            score = max(similarity, 0.0) * policy.utility(strategy.successes, strategy.trials)
            found.append(Retrieved(strategy, similarity, score))
        found.sort(key=lambda hit: (-hit.score, -hit.similarity, hit.strategy.id))
        embeddings = np.array([self._embeddings[hit.strategy.id] for hit in found])
        return [found[row] for row in policy.diversify([hit.score for hit in found], embeddings, k)]

    def sample(self, problem_class: str, k: int, seed: int, exclude: set[str] | None = None) -> list[Strategy]:
        """
        Strategies of a class to execute as they are, by Thompson sampling: good ones often, untried ones sometimes.

        Quarantined strategies take part, since verified executions are what decides about them.

        Args:
            problem_class (`str`):
                The class.
            k (`int`):
                How many. There are fewer if the class has fewer.
            seed (`int`):
                Seed of the draw.
            exclude (`set[str]`, *optional*):
                Ids, by [`problem_id`], of problems whose strategies are left out.
        """
        hidden = exclude or set()
        members = sorted(
            (
                s
                for s in self.strategies()
                if s.problem_class == problem_class and hidden.isdisjoint(s.source_problems)
            ),
            key=lambda s: s.id,
        )
        successes = np.array([s.successes for s in members], dtype=float)
        trials = np.array([s.trials for s in members], dtype=float)
        draws = np.random.default_rng(seed).beta(successes + 1, trials - successes + 1)
        return [members[row] for row in np.argsort(-draws, kind="stable")[:k]]

    # Snapshots

    def snapshot(self, path: str | Path) -> None:
        """
        Write a complete copy of the record, with a manifest by which damage is found.

        Args:
            path (`str` or `Path`):
                Directory of the copy, for instance in a checkpoint. A copy in it is replaced.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the directory is the bank's own.
        """
        directory = Path(path)
        if directory.resolve() == self.path.resolve():
            raise BankError(
                f"A snapshot cannot replace the bank it is taken of ({self.path}): name another directory."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._ledger.snapshot(directory / LEDGER)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "count": self._ledger.count(),
            "sha256": _sha256(directory / LEDGER),
            "embedding_model": self.embedding_model,
            "dimension": self.dimension,
        }
        temporary = directory / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(manifest, indent=2))
        durable_replace(temporary, directory / MANIFEST)

    def load_snapshot(self, snapshot_path: str | Path) -> None:
        """
        Replace the content of this bank by that of a snapshot.

        Args:
            snapshot_path (`str` or `Path`):
                Directory that `snapshot` wrote. It is not changed.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the snapshot is incomplete or damaged. The bank then stays as it is.
        """
        source = Path(snapshot_path)
        copy = self.path / (LEDGER + ".tmp")
        try:
            try:
                shutil.copyfile(source / LEDGER, copy)
                intact = json.loads((source / MANIFEST).read_text())["sha256"] == _sha256(copy)
            except (OSError, ValueError, KeyError) as error:
                raise BankError(
                    f"{source} is no complete snapshot of a strategy bank: {error}. Resume from another checkpoint."
                ) from error
            if not intact:
                raise BankError(
                    f"The snapshot in {source} was damaged or changed after it was written: its checksum is not the "
                    "one in its manifest. Resume from another checkpoint."
                )
            Ledger(copy).close()
            self._close_files()
            self._remove_index()
            for suffix in ("-wal", "-shm"):
                (self.path / (LEDGER + suffix)).unlink(missing_ok=True)
            durable_replace(copy, self.path / LEDGER)
        finally:
            copy.unlink(missing_ok=True)
        self._open()

    @classmethod
    def restore(
        cls,
        path: str | Path,
        embedding_model: str | Embedder = DEFAULT_EMBEDDING_MODEL,
        capacity_per_class: int = 256,
    ) -> Self:
        """
        Open a bank that must exist already. The arguments are those of the constructor.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If there is no bank.
        """
        if not (Path(path) / LEDGER).is_file():
            raise BankError(
                f"{path} holds no strategy bank: name the directory that has a {LEDGER}, or create an empty bank with "
                "`StrategyBank(path)`."
            )
        return cls(path, embedding_model, capacity_per_class)
