"""Kills a process that writes to the bank, over and over, and looks at what is left each time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_sgpo.bank import Outcome, Strategy, StrategyBank, contents
from trl_sgpo.bank import index as chroma

from .synthetic import Clusters, made_up


CLASSES = 10
PER_STEP = 32


def _strategy(number: int) -> Strategy:
    return made_up(number, f"class {number % CLASSES}")


def _open(directory: Path) -> StrategyBank:
    return StrategyBank(directory / "bank", Clusters(8 * CLASSES), capacity_per_class=150)


def _search(bank: StrategyBank) -> None:
    """A search that brings the index up to date, as training across classes makes it."""
    bank.retrieve(["a problem like #0"], trust=("candidate",))


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # unbuffered, so that the parent reads it before the kill


def write(directory: Path) -> None:
    """
    The process that is killed: it opens the bank, checks it against what was acknowledged, and writes until killed.

    Every step stores strategies and an outcome of each, and is acknowledged once it is durable.
    Lines on stdout tell the parent what is happening.
    """
    # The bank has an index whatever its size, and each step makes Chroma write all of it, which by default it does
    # every few thousand strategies
    contents.EXACT = 0
    chroma.SYNC_THRESHOLD = PER_STEP
    add = chroma.Index.add

    def announced(index: chroma.Index, *args: Any) -> None:
        _say("indexing")
        add(index, *args)
        _say("indexed")

    chroma.Index.add = announced  # type: ignore[method-assign, assignment]
    start = time.perf_counter()
    bank = _open(directory)
    opened = time.perf_counter() - start
    acknowledged = json.loads((directory / "acknowledged.json").read_text())
    durable = acknowledged
    while bank.get(_strategy((durable + 1) * PER_STEP).id) is not None:  # written, and killed before it said so
        durable += 1
    found = _check(bank, durable) | {"open_seconds": opened}
    _say("checked " + json.dumps(found))
    step = durable + 1
    while True:
        new = [_strategy(number) for number in range(step * PER_STEP, (step + 1) * PER_STEP)]
        bank.record(new, [Outcome(strategy.id, f"step {step}", 1.0) for strategy in new])
        _say(f"acknowledged {step}")
        _search(bank)
        step += 1


def _check(bank: StrategyBank, durable: int) -> dict[str, int]:
    """Strategies and outcomes that are missing or there twice. Steps count from 1."""
    lost = duplicated = 0
    for number in range(PER_STEP, (durable + 1) * PER_STEP):
        strategy = bank.get(_strategy(number).id)
        lost += strategy is None
        trials = sum(execution.trials for execution in bank.executions(_strategy(number).id))
        lost += trials == 0
        duplicated += trials > 1
    live = [strategy.id for strategy in bank.strategies()]
    if live:
        _search(bank)
    indexed = bank._store.index.ids() if live else []
    duplicated += len(indexed) - len(set(indexed))
    lost += len(set(live) - set(indexed))
    return {"lost": lost, "duplicated": duplicated, "damage": len(bank.damage()), "strategies": len(live)}


def measure(kills: int, directory: Path) -> dict[str, Any]:
    """
    Kills the writing process again and again: odd times at any moment, even times while Chroma adds to its index.

    Args:
        kills (`int`):
            How often.
        directory (`Path`):
            An empty directory.

    Returns:
        `dict`: `kills`, `kills_while_indexing`, and over all openings `lost`, `duplicated` and `unopenable`.
    """
    draw = random.Random(0)
    (directory / "acknowledged.json").write_text("0")
    figures: dict[str, Any] = {"kills": 0, "kills_while_indexing": 0, "lost": 0, "duplicated": 0, "unopenable": 0}
    opens: list[float] = []
    acknowledged = 0
    for turn in tqdm(range(kills + 1), desc="Kills"):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills", str(directory)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])},
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        checked, indexing, seen = None, False, 0
        deadline = draw.uniform(0, 0.5)
        wait_for = draw.randint(1, 4)
        for line in process.stdout:
            word, _, rest = line.strip().partition(" ")
            indexing = word == "indexing" if word in ("indexing", "indexed") else indexing
            if word == "checked":
                checked = json.loads(rest)
            elif word == "acknowledged":
                acknowledged = int(rest)
                (directory / "acknowledged.json").write_text(rest)
            if checked is None:
                continue
            if turn == kills:
                break
            seen += word == ("indexing" if turn % 2 == 0 else "acknowledged")
            if seen >= wait_for:
                time.sleep(deadline / 10 if turn % 2 == 0 else deadline)
                break
        os.kill(process.pid, signal.SIGKILL)
        for line in process.stdout:  # what was said and not heard before the kill
            word, _, rest = line.strip().partition(" ")
            indexing = word == "indexing" if word in ("indexing", "indexed") else indexing
            acknowledged = int(rest) if word == "acknowledged" else acknowledged
        process.wait()
        if checked is None:
            figures["unopenable"] += 1
            break
        (directory / "acknowledged.json").write_text(str(acknowledged))
        opens.append(checked["open_seconds"])
        figures["lost"] += checked["lost"]
        figures["duplicated"] += checked["duplicated"]
        figures["unopenable"] += checked["damage"] > 0
        if turn < kills:
            figures["kills"] += 1
            figures["kills_while_indexing"] += indexing
    figures["steps_acknowledged"] = acknowledged
    figures["open_after_kill_seconds"] = max(opens, default=0.0)
    return figures


if __name__ == "__main__":
    write(Path(sys.argv[1]))
