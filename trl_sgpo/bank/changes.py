"""What strategies, executions and outcomes change in a bank, computed before anything is written."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import BankError
from ..method.prompts import MAX_STRATEGY
from . import policy
from .contents import Contents
from .neighbourhood import TEXT_LIMIT
from .strategy import Execution, Outcome, Strategy
from .vectors import ClassVectors


_NO_EXECUTION = Execution("", "", "", 0, 0.0, 0.0)

ExecutionsOn = Callable[[Iterable[tuple[str, str]]], dict[tuple[str, str], Execution]]


def expect_storable(strategies: Iterable[Strategy]) -> None:
    """Raise a [`~trl_sgpo.errors.BankError`] if a strategy has no text, or one that is too long."""
    for strategy in strategies:
        if not strategy.text.strip():
            raise BankError("A strategy without text cannot be stored: drop it before it gets to the bank.")
        if len(strategy.text) > MAX_STRATEGY:
            raise BankError(f"A strategy of more than {MAX_STRATEGY:,} characters cannot be stored: drop it.")


_Sums = tuple[int, float, float]


def _moved(totals: _Sums, old: _Sums, new: _Sums) -> _Sums:
    """
    Number of problems, and sums over them of two means, when counts on one problem change: executions and two sums
    over them. The sums are clipped because differences of floats are rounded.
    """
    problems = totals[0] + (new[0] > 0) - (old[0] > 0)
    first, second = (
        min(max(total + after / (new[0] or 1) - before / (old[0] or 1), 0.0), problems)
        for total, before, after in zip(totals[1:], old[1:], new[1:], strict=True)
    )
    return problems, first, second


def with_execution(
    strategy: Strategy, before: Execution | None, after: Execution | None, all_counts: bool = True
) -> Strategy:
    """
    A strategy whose executions on one problem change from `before` to `after`, where `None` means no execution.

    Problems it was written for change only `trials` and `successes`, not the counts that lift and trust follow from.
    With `all_counts` false, `trials` and `successes` stay, and the other counts change whatever the problem is.
    """
    old, new = before or _NO_EXECUTION, after or _NO_EXECUTION
    changes: dict[str, Any] = {}
    if all_counts:
        trials = strategy.trials + new.trials - old.trials
        successes = strategy.successes + new.successes - old.successes
        changes = {"trials": trials, "successes": min(max(successes, 0.0), trials)}
    if not all_counts or new.problem not in strategy.source_problems:
        changes["problems"], changes["solved"], changes["baseline"] = _moved(
            (strategy.problems, strategy.solved, strategy.baseline),
            (old.trials, old.successes, old.baseline),
            (new.trials, new.successes, new.baseline),
        )
        changes["plain_problems"], changes["plain_solved"], changes["plain_baseline"] = _moved(
            (strategy.plain_problems, strategy.plain_solved, strategy.plain_baseline),
            (old.plain_trials, old.plain_successes, old.plain_baseline),
            (new.plain_trials, new.plain_successes, new.plain_baseline),
        )
    return strategy.updated(**changes)


class Changes:
    """
    Changes to the strategies of a bank, which its ledger writes in one transaction.

    Args:
        contents ([`Contents`]):
            What the bank holds. It is not changed.
        executions_on (`Callable`):
            Finds the stored executions of strategies on problems, as [`Ledger.executions_on`] does.
        embeddings (`dict[str, np.ndarray]`):
            Strategy id → embedding of shape `(d,)`, of strategies that are new or return from retirement.
    """

    def __init__(self, contents: Contents, executions_on: ExecutionsOn, embeddings: dict[str, np.ndarray]):
        self._contents = contents
        self._executions_on = executions_on
        self.embeddings = embeddings
        self.strategies: dict[str, Strategy] = {}  # as they will be, by id
        self.executions: dict[tuple[str, str], Execution] = {}  # by ids of strategy and problem
        self.texts: dict[str, str] = {}  # of problems, by id
        self.judged_all = False

    @property
    def added(self) -> list[str]:
        """Ids of strategies that enter the index."""
        live = self._contents.live
        return [key for key, s in self.strategies.items() if s.trust != "retired" and key not in live]

    @property
    def removed(self) -> list[str]:
        """Ids of strategies that leave the index."""
        live = self._contents.live
        return [key for key, s in self.strategies.items() if s.trust == "retired" and key in live]

    def _current(self, strategy_id: str) -> Strategy | None:
        return self.strategies.get(strategy_id) or self._contents.strategies.get(strategy_id)

    def admit(self, strategies: list[Strategy], near_copies: bool = False) -> None:
        """Add new strategies, and source problems of stored ones. Near-copies are skipped unless `near_copies`."""
        copies = set() if near_copies else self._near_copies(strategies)
        for strategy in strategies:
            key = strategy.id
            if key in copies:
                continue
            known = self._current(key)
            if known is None:
                self.strategies[key] = strategy
                continue
            problems = tuple(dict.fromkeys(known.source_problems + strategy.source_problems))
            trust = strategy.trust if known.trust == "retired" else known.trust
            if (problems, trust) != (known.source_problems, known.trust):
                new = set(problems) - set(known.source_problems)
                changed = known.updated(source_problems=problems, trust=trust)
                self.strategies[key] = self._without_executions_on(changed, new)

    def _near_copies(self, strategies: list[Strategy]) -> set[str]:
        """Ids of new strategies that are near-copies of one in the bank or of an earlier one."""
        new: dict[str, dict[str, Strategy]] = defaultdict(dict)
        for strategy in strategies:
            if strategy.id in self.embeddings:
                new[strategy.problem_class].setdefault(strategy.id, strategy)
        copies: set[str] = set()
        for problem_class, members in new.items():
            vectors = np.array([self.embeddings[key] for key in members])
            copied = policy.near_copies(
                np.array([s.trust != "quarantine" for s in members.values()]),
                vectors,
                self._contents.similarity_to(problem_class, vectors),
            )
            copies.update(key for key, copy in zip(members, copied, strict=True) if copy)
        return copies

    def _without_executions_on(self, strategy: Strategy, problems: set[str]) -> Strategy:
        """A strategy whose lift and trust no longer count problems that have become its source problems."""
        for execution in self._executions_on((strategy.id, problem) for problem in problems).values():
            strategy = with_execution(strategy, execution, None, all_counts=False)
        return strategy

    def count(self, outcomes: Iterable[Outcome]) -> None:
        """Add outcomes to the counts of their strategies. Those of unknown strategies are ignored."""
        known = [o for o in outcomes if o.trials and self._current(o.strategy_id) is not None]
        stored = self._executions_on((outcome.strategy_id, outcome.problem) for outcome in known)
        for outcome in known:
            key = (outcome.strategy_id, outcome.problem)
            strategy = self._current(outcome.strategy_id)
            assert strategy is not None
            before = self.executions.get(key) or stored.get(key) or _NO_EXECUTION
            beside_plain = outcome.plain is not None
            after = Execution(
                *key,
                outcome.problem_class or strategy.problem_class,
                outcome.trials + before.trials,
                outcome.successes + before.successes,
                outcome.trials * outcome.baseline + before.baseline,
                outcome.trials * beside_plain + before.plain_trials,
                outcome.successes * beside_plain + before.plain_successes,
                outcome.trials * (outcome.plain or 0.0) + before.plain_baseline,
            )
            self.executions[key] = after
            if outcome.text:
                self.texts[outcome.problem] = outcome.text[:TEXT_LIMIT]
            self.strategies[strategy.id] = with_execution(strategy, before, after)

    def merge(self, executions: Iterable[Execution]) -> None:
        """Take over executions of another bank: on each problem those of the bank with more of them count."""
        given = list(executions)
        stored = self._executions_on((execution.strategy_id, execution.problem) for execution in given)
        for execution in given:
            key, pair = execution.strategy_id, (execution.strategy_id, execution.problem)
            if key not in self._contents.strategies:  # a new strategy comes with counts that have them in already
                self.executions[pair] = execution
                continue
            before = stored.get(pair)
            if before is None or before.trials < execution.trials:
                self.executions[pair] = execution
                strategy = self._current(key)
                assert strategy is not None
                self.strategies[key] = with_execution(strategy, before, execution)

    def show(self, shown: Mapping[str, int]) -> None:
        """Add how often strategies were shown with a problem."""
        for key, times in shown.items():
            if (strategy := self._current(key)) is not None:
                self.strategies[key] = strategy.updated(shown=strategy.shown + times)

    def judge(self, min_problems: int, tolerance: float, unchanged: bool = False) -> None:
        """
        Give each strategy that changes the trust state that follows from its executions. With `unchanged` all others
        too, once, because an earlier version or other settings may have given them their states.
        """
        self.judged_all = unchanged and not self._contents.judged
        judged = self._contents.strategies | self.strategies if self.judged_all else self.strategies
        for key, strategy in list(judged.items()):
            trust = policy.trust(strategy, min_problems, tolerance)
            if trust != strategy.trust:
                self.strategies[key] = strategy.updated(trust=trust)

    def evict(self, capacity: int) -> None:
        """Retire the strategies that exceed the capacity of their class."""
        touched: dict[str, list[Strategy]] = defaultdict(list)
        for strategy in self.strategies.values():
            touched[strategy.problem_class].append(strategy)
        for name, strategies in touched.items():
            held = self._contents.classes.get(name) or ClassVectors(0)
            if len(held) + len(strategies) > capacity:
                for key in held.over_capacity(capacity, strategies):
                    evicted = self._current(key)
                    assert evicted is not None
                    self.strategies[key] = evicted.updated(trust="retired")
