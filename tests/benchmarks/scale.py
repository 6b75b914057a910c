"""Times of the bank by the number of strategies in it, beside plain Chroma and an exact matrix in the same run."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_sgpo.bank import Outcome, Strategy, StrategyBank
from trl_sgpo.bank.index import Index
from trl_sgpo.bank.strategy import Execution

from .synthetic import Clusters, made_up


ROUNDS = 20
PROBLEMS = 32
CHANGES = 64
EXECUTIONS = 20  # of each strategy
STATES = ("trusted", "candidate", "trusted", "quarantine")


def measure(sizes: list[int], directory: Path) -> dict[str, Any]:
    """
    Fills banks of made-up strategies, 250 a class, half of them trusted, and takes times.

    Retrieval is for 32 problems with filters on class and trust. A commit stores 64 strategies and 64 outcomes; at
    capacity it also retires as many. The next search brings the index up to date. With evidence, each strategy has 20
    executions on record; the first of these figures is that of all 20 rounds, which read the executions. Embeddings
    are given, so that the time of the embedding model is not in it.

    Args:
        sizes (`list[int]`):
            Numbers of strategies.
        directory (`Path`):
            An empty directory.

    Returns:
        `dict`: Milliseconds by size.
    """
    by_figure: dict[str, dict[str, Any]] = defaultdict(dict)
    for size in sizes:
        for name, value in _measure(size, directory / str(size)).items():
            by_figure[name][str(size)] = value
    return dict(by_figure)


def _measure(size: int, directory: Path) -> dict[str, Any]:
    classes = size // 250
    embedder = Clusters(8 * classes)
    embedder.prepare(range(size + 2 * ROUNDS * CHANGES))
    draw = np.random.default_rng(size)
    strategies = [made_up(n, f"class {n % classes}", trust=STATES[n // classes % 4]) for n in range(size)]

    def open_bank() -> StrategyBank:
        return StrategyBank(directory / "bank", embedder, capacity_per_class=1_000)

    bank = open_bank()
    for start in tqdm(range(0, size, 5_000), desc=f"Storing {size} strategies"):
        bank.add(strategies[start : start + 5_000])
    assert len(bank) == size, "made-up strategies count as near-copies of each other"
    some = embedder(["#0"])
    bank._store.index.query(some, 1)  # which builds the index, also of a bank that is small enough to need none
    bank.close()
    found: dict[str, Any] = {}
    found["open_ms"], bank = _timed(open_bank)
    found["index_open_ms"], _ = _timed(lambda: bank._store.index.query(some, 1))

    rounds = [draw.integers(size, size=PROBLEMS).tolist() for _ in range(ROUNDS)]
    texts = [[f"problem {n} like #{n}" for n in numbers] for numbers in rounds]
    wanted = [[f"class {n % classes}" for n in numbers] for numbers in rounds]
    for problems in texts:
        bank.embed(problems)
    asked = list(zip(texts, wanted, strict=True))
    retrieve = [_timed(partial(bank.retrieve, p, k=8, classes=c)) for p, c in asked]
    anywhere = [_timed(partial(bank.retrieve, p, k=8)) for p in texts]
    both = ("trusted", "candidate")
    explore = [_timed(partial(bank.retrieve, p, k=8, classes=c, trust=both, explore=1)) for p, c in asked]
    found["retrieve_p50_ms"] = _p50(retrieve)
    found["retrieve_max_ms"] = max(ms for ms, _ in retrieve)
    _record_executions(bank, strategies, draw)
    found["retrieve_first_with_evidence_ms"], _ = _timed(lambda: [bank.retrieve(p, k=8, classes=c) for p, c in asked])
    found["retrieve_with_evidence_p50_ms"] = _p50(_timed(partial(bank.retrieve, p, k=8, classes=c)) for p, c in asked)
    found["retrieve_any_class_p50_ms"] = _p50(anywhere)
    found["retrieve_exploring_p50_ms"] = _p50(explore)
    queries = [bank.embed(problems) for problems in texts]
    found |= _beside(bank, strategies, queries, wanted)
    found["recall_at_8"] = min(found.pop("recall_in_class"), found.pop("recall_any_class"))

    live = [strategy.id for strategy in strategies]
    for name, first in (("commit", size), ("commit_at_capacity", size + ROUNDS * CHANGES)):
        commits, catching_up = [], []
        for turn in range(ROUNDS):
            numbers = range(first + turn * CHANGES, first + (turn + 1) * CHANGES)
            new = [made_up(n, f"class {n % classes}") for n in numbers]
            tried = [
                Outcome(live[n], f"{first} {turn} {n}", 1.0, baseline=0.5)
                for n in draw.integers(size, size=CHANGES).tolist()
            ]
            commits.append(_timed(partial(bank.record, new, tried)))
            catching_up.append(_timed(partial(bank._store.index.query, queries[0][:1], 1)))
        found[f"{name}_p50_ms"] = _p50(commits)
        found[f"{name}_max_ms"] = max(ms for ms, _ in commits)
        found["index_catches_up_p50_ms"] = _p50(catching_up)
        bank.capacity_per_class = 250  # from now on every class is full
    found["snapshot_ms"] = _p50([_timed(lambda: bank.snapshot(directory / "snapshot")) for _ in range(3)])
    found["close_ms"], _ = _timed(bank.close)
    (directory / "bank" / "chroma" / "seal.json").unlink()
    bank = open_bank()
    found["rebuild_index_ms"], _ = _timed(lambda: bank._store.index.query(some, 1))
    bank.close()
    return found


def _record_executions(bank: StrategyBank, strategies: list[Strategy], draw: np.random.Generator) -> None:
    """Records executions on problems of about 40 words, a tenth of them wrong where others are right."""
    words = [f"{consonant}{vowel}{end}" for consonant in "bdfgklmnprst" for vowel in "aeiou" for end in "lmnrst"]
    texts = {
        f"{problem_class} {n}": " ".join([*draw.choice(words, 40), str(draw.integers(1_000))])
        for problem_class in {strategy.problem_class for strategy in strategies}
        for n in range(200)
    }
    executions = [
        Execution(s.id, f"{s.problem_class} {n}", s.problem_class, 1, float(draw.random() < 0.9), 0.9)
        for s in strategies
        for n in draw.choice(200, EXECUTIONS, replace=False)
    ]
    bank._store.ledger.commit(executions=executions, index_changes=False, texts=texts)
    bank._store.contents.neighbourhoods.clear()


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _p50(timed: Iterable[tuple[float, Any]]) -> float:
    return statistics.median(ms for ms, _ in timed)


def _beside(
    bank: StrategyBank, strategies: list[Any], queries: list[np.ndarray], wanted: list[list[str]]
) -> dict[str, float]:
    """The same searches by plain Chroma and by an exact matrix, and how much of what it finds the bank does too."""
    bank._store.index.query(queries[0], 1)
    index = bank._store.index._index
    assert index is not None
    embeddings = np.array([bank._store.contents.embedding(strategy.id) for strategy in strategies])
    names = np.array([strategy.problem_class for strategy in strategies])
    trusted = np.array([strategy.trust == "trusted" for strategy in strategies])
    ids = np.array([strategy.id for strategy in strategies])

    def exact(query: np.ndarray, classes: list[str] | None) -> list[set[str]]:
        similarities = np.where(trusted, query @ embeddings.T, -2)
        if classes is not None:
            similarities = np.where(names == np.array(classes)[:, None], similarities, -2)
        return [set(ids[row]) for row in np.argpartition(-similarities, 8, axis=1)[:, :8]]

    def recall(found: list[list[tuple[str, float]]], truth: list[set[str]]) -> list[float]:
        return [len({key for key, _ in hits[:8]} & best) / 8 for hits, best in zip(found, truth, strict=True)]

    asked = list(zip(queries, wanted, strict=True))
    plain = [_timed(partial(index.query, query, 8)) for query in queries]
    filtered = [_timed(partial(_plain_chroma, index, query, classes)) for query, classes in asked]
    matrix = [_timed(partial(exact, query, classes)) for query, classes in asked]
    in_class, any_class = [], []
    for (query, classes), (_, truth) in zip(asked, matrix, strict=True):
        for row, name in enumerate(classes):
            parts = bank._store.contents._parts(name, ("trusted",))
            hits = bank._store.contents._nearest(query[row : row + 1], parts, ("trusted",), 8, bank._store.index.query)
            in_class += recall(hits, [truth[row]])
        parts = bank._store.contents._parts(None, ("trusted",))
        hits = bank._store.contents._nearest(query, parts, ("trusted",), 8, bank._store.index.query)
        any_class += recall(hits, exact(query, None))
    return {
        "plain_chroma_p50_ms": _p50(plain),
        "plain_chroma_by_class_p50_ms": _p50(filtered),
        "exact_matrix_p50_ms": _p50(matrix),
        "recall_in_class": float(np.mean(in_class)),
        "recall_any_class": float(np.mean(any_class)),
    }


def _plain_chroma(index: Index, query: np.ndarray, classes: list[str]) -> None:
    """One query a class, since a filter holds for a whole query."""
    for name in set(classes):
        rows = [row for row, each in enumerate(classes) if each == name]
        index._collection.query(query_embeddings=query[rows], n_results=8, where={"problem_class": name}, include=[])
