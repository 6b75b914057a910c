"""Classes come one after the other, each with more strategies than it may keep: does the bank forget?"""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_sgpo.bank import Outcome, Strategy, StrategyBank
from trl_sgpo.bank.policy import wilson

from .synthetic import Clusters, made_up


CLASSES = 20
CAPACITY = 32
PRESSURE = 5
PER_STEP = 4
BASELINE = 0.5
BEST = 8


def measure(seeds: int, directory: Path) -> dict[str, Any]:
    """
    Simulates training on 20 classes in sequence. Each brings 5 times its capacity in strategies of success rates
    between 0 and 1, which are tried as bank rows, and then no more is heard of it.

    Args:
        seeds (`int`):
            Repetitions.
        directory (`Path`):
            An empty directory.

    Returns:
        `dict`: Over all repetitions the share of `classes_retained`, which hold at the end the 8 best strategies they
        had when the next class began, how good these are, and before and after all others came the precision of
        retrieval for the first class: the part of what its problems are shown, when any class may be, that is of this
        class and truly solves 70% or more.
    """
    rows = [_simulate(seed, directory / str(seed)) for seed in tqdm(range(seeds), desc="Retention")]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | {"retention_rows": rows}


def _simulate(seed: int, directory: Path) -> dict[str, float]:
    draw = np.random.default_rng(seed)
    embedder = Clusters(CLASSES, noise=2.0)
    with StrategyBank(directory, embedder, capacity_per_class=CAPACITY) as bank:
        best: dict[int, set[str]] = {}
        truly: list[float] = []
        before, good = 0.0, set[str]()
        for number in range(CLASSES):
            rates = _one_class(bank, number, draw)
            kept = [s for s in bank.strategies() if s.problem_class == f"class {number}" and s.trust == "trusted"]
            kept.sort(key=lambda s: -wilson(s.successes, s.trials)[0])
            best[number] = {strategy.id for strategy in kept[:BEST]}
            offered = sorted(rates.values(), reverse=True)[:BEST]
            truly.append(float(np.mean([rates[key] for key in best[number]]) / np.mean(offered)))
            if number == 0:
                good = {key for key, rate in rates.items() if rate >= 0.7}
                before = _precision(bank, good)
        after = _precision(bank, good)
        live = {strategy.id for strategy in bank.strategies() if strategy.trust == "trusted"}
        retained = [len(keys) == BEST and keys <= live for keys in best.values()]
        return {
            "classes_retained": float(np.mean(retained)),
            "best_kept_by_true_rate": float(np.mean(truly)),
            "first_class_precision_before": before,
            "first_class_precision_after": after,
        }


def _one_class(bank: StrategyBank, number: int, draw: np.random.Generator) -> dict[str, float]:
    """Brings the strategies of a class a few a step and tries as many. Returns the true success rate of each."""
    name = f"class {number}"
    rates: dict[str, float] = {}
    problem = 0
    for step in range(PRESSURE * CAPACITY // PER_STEP):
        numbers = range(step * PER_STEP, (step + 1) * PER_STEP)
        new: list[Strategy] = [made_up(number + CLASSES * each, name) for each in numbers]
        rates |= {strategy.id: float(draw.uniform()) for strategy in new}
        tried = new + [s for turn in range(8) for s in bank.sample(name, PER_STEP, seed=100 * step + turn)]
        outcomes = []
        for strategy in tried:
            problem += 1
            solved = float(draw.random() < rates[strategy.id])
            outcomes.append(Outcome(strategy.id, f"{name} {problem}", solved, baseline=BASELINE))
        bank.record(new, outcomes)
    return rates


def _precision(bank: StrategyBank, good: set[str]) -> float:
    problems = [f"problem {n} like #{CLASSES * n}" for n in range(10_000, 10_200)]
    hits = [hit for found in bank.retrieve(problems, k=3) for hit in found]
    return sum(hit.strategy.id in good for hit in hits) / (3 * len(problems))
