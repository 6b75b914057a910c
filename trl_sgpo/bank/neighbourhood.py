"""
Evidence of harm near a problem (pure functions).

A strategy may be right on most problems, and so be trusted, and mislead on those with a trigger. Its executions show
this where it was wrong and other strategies were right, if such problems have something in common that a text shows.

Regions of problems are those whose texts contain a word or sign, whose first, second, third or fourth number ends in
a digit, and where such a number lies in an eighth of the problems' numbers. Embeddings of problems are not used,
since those of problems that end in the same digit, or whose numbers are in one range, are not more similar than
others.

The hypotheses, for sleepers as `make bench-bank ARGS="--sections sleepers"` makes them. Both constants below were
chosen by the trigger "a digit" alone:

1. On triggers that a region contains or covers (a word, a range of a number, a form of the question), at most 25% of
   the problems with the trigger are shown a sleeper.
2. At most 1% of the harmless strategies are left out where they would be retrieved without the rule.
3. On a trigger that no region describes (a number is divisible by 9), the rule changes little.

Measured, 1 does not hold for a range of a number. The figures are in `docs/bank.md`.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from .strategy import Execution


logger = logging.getLogger(__name__)

AFFECTED = 0.2  # prior probability that a strategy has another error rate in a suspect region
BY_CHANCE = 10  # bound of the expected number of regions of a class that are suspect by chance
TEXT_LIMIT = 2_000  # characters of a problem that are read

_WORDS = re.compile(r"[^\W\d]+|[^\w\s]")
_NUMBERS = re.compile(r"\d{1,15}")
_NUMBERS_READ = 4
_PARTS = 8
_MAX_PAIRS = 10_000_000  # of an execution and a region, which take about a gigabyte; earlier executions do not count

Region = Hashable
Cuts = list[list[np.ndarray]]  # for each number of a text, the bounds of its ranges, in two divisions


def _numbers(text: str) -> list[str]:
    return _NUMBERS.findall(text)[:_NUMBERS_READ]


def number_cuts(texts: Iterable[str]) -> Cuts:
    """
    Bounds of the ranges that hold an eighth of the first, second, third and fourth number of problems each. A second
    division is moved by half a range.

    Args:
        texts (`Iterable[str]`):
            Texts of the problems.
    """
    values: list[list[float]] = [[] for _ in range(_NUMBERS_READ)]
    for text in texts:
        for position, number in enumerate(_numbers(text)):
            values[position].append(float(number))
    divisions = np.arange(1, _PARTS) / _PARTS, (np.arange(_PARTS) + 0.5) / _PARTS
    return [[np.quantile(found, shares) for shares in divisions] for found in values if found]


def regions(text: str, cuts: Cuts) -> set[Region]:
    """
    The regions that a problem lies in.

    Args:
        text (`str`):
            Text of the problem.
        cuts (`list`):
            What [`number_cuts`] gives.
    """
    found: set[Region] = set(_WORDS.findall(text))
    for position, number in enumerate(_numbers(text)):
        found.add((position, number[-1]))
        if position < len(cuts):
            for division, bounds in enumerate(cuts[position]):
                found.add((position, division, int(np.searchsorted(bounds, float(number), side="right"))))
    return found


def evidence_of_harm(
    wrong: np.ndarray, executed: np.ndarray, all_wrong: np.ndarray, all_executed: np.ndarray
) -> np.ndarray:
    """
    Logarithm of the evidence that strategies err more often in a region than elsewhere: the Bayes factor of two error
    rates against one, with uniform priors, mixed with 1 because not every strategy is affected.

    Args:
        wrong, executed (`np.ndarray` of shape `(n,)`):
            Number of problems in the region on which each strategy was wrong, and on which it was executed.
        all_wrong, all_executed (`np.ndarray` of shape `(n,)`):
            The same for all problems.

    Returns:
        `np.ndarray` of shape `(n,)`: To be summed over the strategies of a region.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, all_executed.max(initial=0) + 2)))])

    def log_marginal(failures: np.ndarray, trials: np.ndarray) -> np.ndarray:
        return log_factorial[failures] + log_factorial[trials - failures] - log_factorial[trials + 1]

    ratio = (
        log_marginal(wrong, executed)
        + log_marginal(all_wrong - wrong, all_executed - executed)
        - log_marginal(all_wrong, all_executed)
    )
    worse = wrong * all_executed > all_wrong * executed
    ratio = np.where(worse, ratio, np.minimum(ratio, 0.0))
    return np.log1p(AFFECTED * np.expm1(ratio))


class Neighbourhoods:
    """
    The suspect regions of a class, and how its strategies did in them.

    Only executions on problems that other strategies solved mostly count. A region is suspect if the evidence of all
    strategies of the class reaches the number of regions divided by 10.

    Args:
        executions (`Iterable[tuple[Execution, str]]`):
            Executions of the strategies of a class, each with the text of its problem.
    """

    def __init__(self, executions: Iterable[tuple[Execution, str]]):
        told = [(each, text) for each, text in executions if each.baseline > 0.5 * each.trials]
        texts = {each.problem: text for each, text in told}
        self._cuts = number_cuts(texts.values())
        self._counts: dict[Region, dict[str, tuple[int, int]]] = {}  # region → strategy id → (wrong, executed)
        if told:
            self._count([each for each, _ in told], texts)

    def _count(self, executions: list[Execution], texts: dict[str, str]) -> None:
        number: dict[Region, int] = {}
        regions_of = {
            problem: np.array([number.setdefault(r, len(number)) for r in regions(text, self._cuts)], dtype=np.int64)
            for problem, text in texts.items()
        }
        pairs_after = np.cumsum([len(regions_of[each.problem]) for each in reversed(executions)])[::-1]
        left_out = int((pairs_after > _MAX_PAIRS).sum())
        if left_out:
            logger.warning(
                f"{left_out:,} executions of a class are no evidence of harm: only the last {_MAX_PAIRS:,} words of "
                "problems with their executions are compared."
            )
        executions = executions[left_out:]
        lists = [regions_of[each.problem] for each in executions]
        lengths = np.array([len(each) for each in lists])
        strategies, strategy_of = np.unique([each.strategy_id for each in executions], return_inverse=True)
        wrong = np.array([each.successes < 0.5 * each.trials for each in executions])
        pairs, pair_of = np.unique(
            np.repeat(strategy_of, lengths) * len(number) + np.concatenate(lists), return_inverse=True
        )
        executed_there = np.bincount(pair_of, minlength=len(pairs))
        wrong_there = np.bincount(pair_of, weights=np.repeat(wrong, lengths), minlength=len(pairs)).astype(int)
        strategy, region = pairs // max(len(number), 1), pairs % max(len(number), 1)
        all_executed = np.bincount(strategy_of)[strategy]
        all_wrong = np.bincount(strategy_of, weights=wrong).astype(int)[strategy]
        evidence = np.bincount(
            region,
            weights=evidence_of_harm(wrong_there, executed_there, all_wrong, all_executed),
            minlength=len(number),
        )
        names = list(number)
        counts: dict[Region, dict[str, tuple[int, int]]] = defaultdict(dict)
        for pair in np.flatnonzero((evidence > math.log(max(len(number), 1) / BY_CHANCE))[region]).tolist():
            found = int(wrong_there[pair]), int(executed_there[pair])
            counts[names[region[pair]]][str(strategies[strategy[pair]])] = found
        self._counts = dict(counts)

    @property
    def suspect(self) -> set[Region]:
        """The suspect regions."""
        return set(self._counts)

    def near(self, text: str) -> list[dict[str, tuple[int, int]]]:
        """
        Counts of strategies in the suspect regions that a problem lies in: strategy id → number of problems on which
        it was wrong, and on which it was executed.
        """
        if not self._counts:
            return []
        return [self._counts[region] for region in regions(text[:TEXT_LIMIT], self._cuts) if region in self._counts]


def withheld(strategy_id: str, near: list[dict[str, tuple[int, int]]]) -> bool:
    """Whether a strategy was wrong on at least half of its problems in a suspect region."""
    return any(2 * counts[strategy_id][0] >= counts[strategy_id][1] for counts in near if strategy_id in counts)


def unproven(strategy_id: str, near: list[dict[str, tuple[int, int]]]) -> bool:
    """Whether a strategy was not executed in a suspect region."""
    return any(strategy_id not in counts for counts in near)
