"""What a Chroma index costs a bank that is small enough for exact search."""

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trl_sgpo.bank import Outcome, StrategyBank, contents

from .synthetic import Clusters, made_up


STEPS = 20
PROBLEMS = 32
CHANGES = 64
TIME_IMPORT = "import time; start = time.perf_counter(); import chromadb; print(time.perf_counter() - start)"


def measure(sizes: list[int], directory: Path) -> dict[str, Any]:
    """
    Times banks of made-up strategies that search exactly and banks that search an index of Chroma's.

    A step retrieves 8 strategies of any class for each of 32 problems, and stores 64 strategies and 64 outcomes.
    Embeddings are given, so that the time of the embedding model is not in it. No bank evicts strategies.

    Args:
        sizes (`list[int]`):
            Numbers of strategies.
        directory (`Path`):
            An empty directory.

    Returns:
        `dict`: Milliseconds by size, with and without the index, and those that importing Chroma takes.
    """
    by_figure: dict[str, dict[str, Any]] = defaultdict(dict)
    for size in sizes:
        for name, exact in (("index", 0), ("exact", sys.maxsize)):
            with patch.object(contents, "EXACT", exact):
                for figure, value in _measure(size, directory / f"{size}-{name}").items():
                    by_figure[figure][f"{size} {name}"] = value
    imported = subprocess.run([sys.executable, "-c", TIME_IMPORT], capture_output=True, text=True, check=True).stdout
    return {"import_chromadb_ms": float(imported) * 1e3, **by_figure}


def _measure(size: int, directory: Path) -> dict[str, float]:
    classes = max(size // 250, 4)
    embedder = Clusters(8 * classes)
    embedder.prepare(range(size + STEPS * CHANGES))
    strategies = [made_up(n, f"class {n % classes}", trust="trusted") for n in range(size + STEPS * CHANGES)]
    texts = [[f"problem {n} like #{n}" for n in range(turn, turn + PROBLEMS)] for turn in range(STEPS + 1)]

    def open_bank() -> StrategyBank:
        bank = StrategyBank(directory, embedder, capacity_per_class=size + STEPS * CHANGES)
        for problems in texts:
            bank.embed(problems)
        return bank

    def step(bank: StrategyBank, turn: int) -> None:
        bank.retrieve(texts[turn], k=8)
        new = strategies[size + turn * CHANGES : size + (turn + 1) * CHANGES]
        bank.record(new, [Outcome(strategy.id, f"problem {turn}", 1.0) for strategy in new])

    bank = open_bank()
    bank.add(strategies[:size])
    figures = {"first_search_ms": _timed(partial(bank.retrieve, texts[0], k=8)), "close_filled_ms": _timed(bank.close)}
    start = time.perf_counter()
    bank = open_bank()
    figures["open_ms"] = (time.perf_counter() - start) * 1e3
    figures["first_search_after_opening_ms"] = _timed(partial(bank.retrieve, texts[0], k=8))
    steps = [_timed(partial(step, bank, turn)) for turn in range(STEPS)]
    figures["step_p50_ms"], figures["step_max_ms"] = statistics.median(steps), max(steps)
    figures["close_ms"] = _timed(bank.close)
    figures["files_kib"] = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 2**10
    return figures


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
