"""Draws the executions that a transfer report measures."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bank.strategy import problem_id
from ..errors import DataError
from ..method.problem import as_problem


CONDITIONS = ("transfer", "own", "other", "empty", "none")
WITH_BANK = ("transfer_with_bank", "own_with_bank")


@dataclass(frozen=True)
class PlannedExecution:
    """
    One execution of a transfer report.

    Args:
        condition (`str`):
            Its condition: one of `CONDITIONS` and `WITH_BANK`, or `"matrix"`.
        writer (`int` or `None`):
            Row that the strategy is written for, `None` where there is none.
        problem (`int`):
            Row that it is executed on.
    """

    condition: str
    writer: int | None
    problem: int


@dataclass(frozen=True)
class TransferPlan:
    """
    The executions of a transfer report.

    Args:
        classes (`list[str]`):
            The classes.
        left_out (`list[str]`):
            Classes that are not measured: too small, or more than `max_classes`.
        written_on (`dict[str, list[int]]`):
            A_c, rows of each class that the strategies to transfer are written on.
        unseen (`dict[str, list[int]]`):
            B_c, rows of each class that they are executed on.
        executions (`list[PlannedExecution]`):
            The executions.
    """

    classes: list[str]
    left_out: list[str]
    written_on: dict[str, list[int]]
    unseen: dict[str, list[int]]
    executions: list[PlannedExecution]

    def writers(self, with_bank: bool) -> list[int]:
        """Rows that strategies are written for, with or without strategies of the bank in the request."""
        return sorted(
            {e.writer for e in self.executions if e.writer is not None and (e.condition in WITH_BANK) == with_bank}
        )

    @property
    def texts(self) -> int:
        """Texts that the report generates."""
        return len(self.writers(False)) + len(self.writers(True)) + len(self.executions)


def plan_transfer(
    rows: Sequence[dict[str, Any]],
    class_column: str,
    problems_per_class: int,
    transfers: int,
    seed: int,
    max_classes: int | None = None,
    pairs_per_cell: int = 8,
    bank: bool = False,
) -> TransferPlan:
    """
    Draws the problems and the pairs of strategy and problem for a transfer report.

    Strategies written for a problem with the same answer are not executed on a problem if there are others, so that an
    answer within a strategy does not count as transfer.

    Args:
        rows (`Sequence[dict]`):
            Problems.
        class_column (`str`):
            Column with their class. Rows without one count as one class.
        problems_per_class (`int`):
            Size of A_c and of B_c. Classes with fewer than twice as many problems are halved; those with fewer than
            four are left out.
        transfers (`int`):
            Strategies of the same class, and of others, executed on each problem.
        seed (`int`):
            Seed of the draw.
        max_classes (`int`, *optional*):
            Number of classes, the largest ones.
        pairs_per_cell (`int`, *optional*, defaults to `8`):
            Pairs for each cell of the transfer matrix; fewer if there are not enough.
        bank (`bool`, *optional*, defaults to `False`):
            Whether to measure with strategies of a bank in the request as well.

    Returns:
        [`TransferPlan`]

    Raises:
        [`DataError`]: If no class has four different problems.
    """
    rng = random.Random(f"transfer-{seed}")
    by_class: dict[str, dict[str, int]] = defaultdict(dict)
    for index, row in enumerate(rows):
        by_class[as_problem(row, class_column).problem_class].setdefault(problem_id(row["prompt"]), index)
    large = [name for name in by_class if len(by_class[name]) >= 4]
    if not large:
        raise DataError(
            f"No class of the column {class_column!r} has the 4 different problems that measuring transfer takes: "
            "name another class column, or more problems."
        )
    classes = sorted(sorted(large, key=lambda name: (-len(by_class[name]), name))[:max_classes])
    written_on: dict[str, list[int]] = {}
    unseen: dict[str, list[int]] = {}
    for name in classes:
        members = rng.sample(sorted(by_class[name].values()), len(by_class[name]))
        size = min(problems_per_class, len(members) // 2)
        written_on[name], unseen[name] = members[:size], members[size : 2 * size]

    def writers(name: str, problem: int) -> list[int]:
        answer = rows[problem].get("solution")
        return [w for w in written_on[name] if rows[w].get("solution") != answer] or written_on[name]

    executions: list[PlannedExecution] = []
    used: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for place, name in enumerate(classes):
        others = len(classes) - 1
        for position, problem in enumerate(unseen[name]):
            own_class = writers(name, problem)
            sources = [(name, w) for w in rng.sample(own_class, min(transfers, len(own_class)))]
            executions += [PlannedExecution("transfer", w, problem) for _, w in sources]
            executions.append(PlannedExecution("own", problem, problem))
            executions += [PlannedExecution("empty", None, problem), PlannedExecution("none", None, problem)]
            if bank:
                executions += [PlannedExecution("transfer_with_bank", w, problem) for _, w in sources]
                executions.append(PlannedExecution("own_with_bank", problem, problem))
            for turn in range(transfers if others else 0):
                drawn = (position * transfers + turn) % others
                other = classes[drawn + (drawn >= place)]
                sources.append((other, rng.choice(writers(other, problem))))
                executions.append(PlannedExecution("other", sources[-1][1], problem))
            for source, w in sources:
                used[source, name].add((w, problem))
    for source in classes if pairs_per_cell else ():
        for name in classes:
            pairs = [(w, x) for x in unseen[name] for w in writers(source, x) if (w, x) not in used[source, name]]
            missing = max(0, pairs_per_cell - len(used[source, name]))
            executions += [PlannedExecution("matrix", w, x) for w, x in rng.sample(pairs, min(missing, len(pairs)))]
    return TransferPlan(classes, sorted(set(by_class) - set(classes)), written_on, unseen, executions)
