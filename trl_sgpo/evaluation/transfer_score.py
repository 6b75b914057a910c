"""Accuracy and transfer on unseen problems: of a trainer's blocks, and of any two-phase model."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..bank.strategy import problem_id
from ..errors import DataError
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.retrieval import with_retrieved
from ..inference.verifier import Verifier, verify
from ..method.problem import as_problem
from ..method.transfer import BlockGeometry, block_order, outcome_matrix
from .chunks import Chunk, RunChunk, run_now
from .statistics import Estimate, class_mean_estimate, derived_seed, wilson_interval


if TYPE_CHECKING:
    from datasets import Dataset

    from ..bank import StrategyBank
    from ..sgpo_trainer import SGPOTrainer

__all__ = [
    "TransferPlan",
    "TransferReport",
    "TransferScore",
    "measure_plan",
    "measure_transfer",
    "plan_transfer",
    "select_blocks",
    "transfer_report",
    "wilson_interval",
]

CONDITIONS = ("transfer", "own", "other", "empty", "none")
WITH_BANK = ("transfer_with_bank", "own_with_bank")
DIFFERENCES = (
    ("transfer", "none"),
    ("own", "other"),
    ("own", "none"),
    ("transfer", "empty"),
    ("transfer", "other"),
    ("transfer_with_bank", "transfer"),
    ("own_with_bank", "own"),
)


@dataclass(frozen=True)
class TransferScore:
    """
    How well a model's strategies do.

    Args:
        accuracy (`float`):
            Mean outcome of strategies executed on the problem they were written for.
        transfer (`float`):
            Strategy transfer score: mean outcome of strategies executed on the other problems of their block.
        problems (`int`):
            Problems measured.
        transfers (`int`):
            Executions behind `transfer`.
    """

    accuracy: float
    transfer: float
    problems: int
    transfers: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def select_blocks(dataset: "Dataset", class_column: str, size: int, limit: int, seed: int) -> list[int]:
    """
    Draws blocks of unseen problems, as evenly from all classes as they allow.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems.
        class_column (`str`):
            Column with their class. If it is missing they count as one class.
        size (`int`):
            K, problems a block. Classes with fewer are left out.
        limit (`int`):
            Number of problems wanted.
        seed (`int`):
            Seed of the draw.

    Returns:
        `list[int]`: Indices in block order, at most `limit` of them.
    """
    named = class_column in dataset.column_names
    classes = [str(name) for name in dataset[class_column]] if named else [""] * len(dataset)
    by_class = defaultdict(list)
    for index, name in enumerate(classes):
        by_class[name].append(index)
    usable = [index for members in by_class.values() if len(members) >= size for index in members]
    order = [usable[i] for i in block_order([classes[index] for index in usable], size, seed)]
    queues: dict[str, list[list[int]]] = defaultdict(list)
    seen: set[int] = set()
    for start in range(0, len(order), size):
        block = order[start : start + size]
        if seen.isdisjoint(block):  # the filled-up last block of a class would count some problems twice
            queues[classes[block[0]]].append(block)
            seen.update(block)
    chosen: list[int] = []
    while any(queues.values()) and len(chosen) + size <= limit:
        for name in sorted(queues):
            if queues[name] and len(chosen) + size <= limit:
                chosen += queues[name].pop()
    return chosen


def measure_transfer(
    trainer: "SGPOTrainer", dataset: "Dataset", num_problems: int, greedy: bool = True
) -> TransferScore:
    """
    Writes one strategy a problem and executes it on every problem of its block.

    Args:
        trainer ([`SGPOTrainer`]):
            Trainer with the model, its bank and its verifier.
        dataset ([`~datasets.Dataset`]):
            Problems not trained on.
        num_problems (`int`):
            How many to measure.
        greedy (`bool`, *optional*, defaults to `True`):
            Whether to decode greedily. If `False`, as in training, which is what training optimises.

    Returns:
        [`TransferScore`]
    """
    K = max(2, trainer.geometry.problems)
    geometry = BlockGeometry(problems=K, own=1)
    column = trainer.args.class_column or "problem_class"
    chosen = select_blocks(dataset, column, K, num_problems, trainer.args.seed)
    at_once = max(K, trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation // K // K * K)
    on_own, on_siblings = [], []
    for start in range(0, len(chosen), at_once):
        rows = [dataset[index] for index in chosen[start : start + at_once]]
        _, outcomes = trainer.execute_blocks(rows, geometry, greedy)
        for matrix in outcome_matrix(outcomes, geometry).nan_to_num(0.0).clamp(0, 1).tolist():
            on_own += [matrix[i][i] for i in range(K)]
            on_siblings += [matrix[s][x] for s in range(K) for x in range(K) if s != x]
    return TransferScore(
        accuracy=sum(on_own) / max(len(on_own), 1),
        transfer=sum(on_siblings) / max(len(on_siblings), 1),
        problems=len(on_own),
        transfers=len(on_siblings),
    )


@dataclass(frozen=True)
class PlannedExecution:
    """
    One execution of a transfer report.

    Args:
        condition (`str`):
            What it is for: one of `CONDITIONS` and `WITH_BANK`, or `"matrix"`.
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
    What a transfer report measures.

    Args:
        classes (`list[str]`):
            The classes.
        left_out (`list[str]`):
            Classes that are not measured: too small, or more than wanted.
        written_on (`dict[str, list[int]]`):
            A_c, rows of each class that the strategies to transfer are written on.
        unseen (`dict[str, list[int]]`):
            B_c, rows of each class that they are executed on.
        executions (`list[PlannedExecution]`):
            What is executed.
    """

    classes: list[str]
    left_out: list[str]
    written_on: dict[str, list[int]]
    unseen: dict[str, list[int]]
    executions: list[PlannedExecution]

    def writers(self, with_bank: bool) -> list[int]:
        """Rows that strategies are written for, with or without those of the bank in view."""
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

    Strategies of problems that have the same answer as the one they are executed on are left out where there are
    others, so that an answer written into a strategy does not help.

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
            Pairs that each cell of the transfer matrix rests on, as far as there are so many.
        bank (`bool`, *optional*, defaults to `False`):
            Whether to measure with strategies of a bank in view too.

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
    for name in classes:
        others = [other for other in classes if other != name]
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
                other = others[(position * transfers + turn) % len(others)]
                sources.append((other, rng.choice(writers(other, problem))))
                executions.append(PlannedExecution("other", sources[-1][1], problem))
            for source, w in sources:
                used[source, name].add((w, problem))
    for source in classes:
        for name in classes:
            pairs = [(w, x) for x in unseen[name] for w in writers(source, x) if (w, x) not in used[source, name]]
            missing = max(0, pairs_per_cell - len(used[source, name]))
            executions += [PlannedExecution("matrix", w, x) for w, x in rng.sample(pairs, min(missing, len(pairs)))]
    return TransferPlan(classes, sorted(set(by_class) - set(classes)), written_on, unseen, executions)


@dataclass(frozen=True)
class TransferReport:
    """
    Strategy transfer score of a model, and what to compare it with.

    Args:
        classes (`list[str]`):
            Classes measured.
        left_out (`list[str]`):
            Classes not measured.
        executions (`list[dict]`):
            Every verified execution: `condition`, `problem` and `class` that it is of, `written_for` and
            `written_class` of its strategy, and its `outcome`. Intervals are computed from these.
        seed (`int`):
            Seed of the intervals' resampling.
        unverified (`int`):
            Executions that the verifier could not tell about.
        strategies (`int`):
            Strategies written.
        flawed_strategies (`int`):
            Those that are empty, cut off or not of the format.
        generated_tokens (`int`):
            Tokens generated.
    """

    classes: list[str]
    left_out: list[str]
    executions: list[dict[str, Any]]
    seed: int
    unverified: int = 0
    strategies: int = 0
    flawed_strategies: int = 0
    generated_tokens: int = 0

    @property
    def problem_classes(self) -> dict[str, str]:
        """Class of each measured problem, by its id."""
        return {execution["problem"]: execution["class"] for execution in self.executions}

    def outcomes(self, condition: str) -> dict[str, float]:
        """Mean outcome of a condition on each problem, by its id. Problems without any are not in it."""
        found = defaultdict(list)
        for execution in self.executions:
            if execution["condition"] == condition:
                found[execution["problem"]].append(execution["outcome"])
        return {problem: math.fsum(values) / len(values) for problem, values in found.items()}

    def estimate(self, condition: str) -> Estimate | None:
        """Mean over classes of a condition's outcomes, `None` if it was not measured."""
        return self._over_classes(self.outcomes(condition))

    def difference(self, first: str, second: str) -> Estimate | None:
        """Mean over classes of what the first condition has over the second on the same problems."""
        ours, theirs = self.outcomes(first), self.outcomes(second)
        return self._over_classes({problem: ours[problem] - theirs[problem] for problem in ours if problem in theirs})

    def _over_classes(self, values: dict[str, float]) -> Estimate | None:
        names = self.problem_classes
        return class_mean_estimate(list(values.values()), [names[problem] for problem in values], self.seed)

    @property
    def relative(self) -> float | None:
        """Transfer as a part of what strategies achieve on the problem they are written for."""
        transfer, own = self.estimate("transfer"), self.estimate("own")
        return transfer.value / own.value if transfer is not None and own is not None and own.value > 0 else None

    def matrix(self) -> list[list[float | None]]:
        """Mean outcome by class of the strategy (rows) and class of the problem (columns)."""
        cells = defaultdict(list)
        for execution in self.executions:
            if execution["condition"] in ("transfer", "other", "matrix"):
                cells[execution["written_class"], execution["class"]].append(execution["outcome"])
        return [
            [
                math.fsum(cells[row, column]) / len(cells[row, column]) if cells[row, column] else None
                for column in self.classes
            ]
            for row in self.classes
        ]

    def to_dict(self) -> dict[str, Any]:
        names = self.problem_classes
        estimates = {condition: self.estimate(condition) for condition in (*CONDITIONS, *WITH_BANK)}
        differences = {f"{first} - {second}": self.difference(first, second) for first, second in DIFFERENCES}
        by_class: dict[str, dict[str, float]] = {name: {} for name in self.classes}
        by_problem: dict[str, dict[str, Any]] = {problem: {"class": name} for problem, name in names.items()}
        for condition in (*CONDITIONS, *WITH_BANK):
            outcomes = self.outcomes(condition)
            for name in self.classes:
                values = [value for problem, value in outcomes.items() if names[problem] == name]
                if values:
                    by_class[name][condition] = math.fsum(values) / len(values)
            for problem, value in outcomes.items():
                by_problem[problem][condition] = value
        return {
            "classes": self.classes,
            "left_out_classes": self.left_out,
            "conditions": {key: value.to_dict() for key, value in estimates.items() if value is not None},
            "differences": {key: value.to_dict() for key, value in differences.items() if value is not None},
            "relative": self.relative,
            "by_class": by_class,
            "matrix": self.matrix(),
            "unverified": self.unverified,
            "strategies": self.strategies,
            "flawed_strategies": self.flawed_strategies,
            "generated_tokens": self.generated_tokens,
            "problems": by_problem,
        }


def transfer_report(
    model: TwoPhaseModel,
    rows: Sequence[dict[str, Any]],
    class_column: str,
    verifier: Verifier,
    problems_per_class: int = 16,
    transfers: int = 2,
    seed: int = 42,
    decoding: Decoding | None = None,
    bank: "StrategyBank | None" = None,
    max_classes: int | None = None,
    pairs_per_cell: int = 8,
) -> TransferReport:
    """
    Measures how well a model's strategies do on problems that they were not written for.

    Args:
        model ([`~trl_sgpo.inference.model.TwoPhaseModel`]):
            The model.
        rows (`Sequence[dict]`):
            Problems not trained on.
        class_column (`str`):
            Column with their class.
        verifier (`Callable`):
            Reward function that checks executions.
        problems_per_class (`int`, *optional*, defaults to `16`):
            Problems of each class that strategies are written on, and as many that they are executed on.
        transfers (`int`, *optional*, defaults to `2`):
            Strategies of the same class, and of others, executed on each problem.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw, of sampling and of the intervals.
        decoding ([`~trl_sgpo.inference.model.Decoding`], *optional*):
            How to decode, greedily by default. Its seed is not used.
        bank ([`~trl_sgpo.bank.StrategyBank`], *optional*):
            If given, transfer and own are also measured with its trusted strategies in view.
        max_classes (`int`, *optional*):
            Number of classes, the largest ones.
        pairs_per_cell (`int`, *optional*, defaults to `8`):
            Pairs that each cell of the transfer matrix rests on.

    Returns:
        [`TransferReport`]
    """
    plan = plan_transfer(
        rows, class_column, problems_per_class, transfers, seed, max_classes, pairs_per_cell, bank is not None
    )
    return measure_plan(model, rows, class_column, plan, verifier, seed, decoding, bank)


def measure_plan(
    model: TwoPhaseModel,
    rows: Sequence[dict[str, Any]],
    class_column: str,
    plan: TransferPlan,
    verifier: Verifier,
    seed: int,
    decoding: Decoding | None = None,
    bank: "StrategyBank | None" = None,
    run: RunChunk = run_now,
    chunk_size: int = 32,
    name: str = "",
) -> TransferReport:
    """
    Carries out a plan of [`plan_transfer`] in chunks, see [`transfer_report`].

    Args:
        run (`Callable`, *optional*):
            Runs a chunk, see [`~trl_sgpo.evaluation.chunks.ChunkLog`].
        chunk_size (`int`, *optional*, defaults to `32`):
            Texts a chunk.
        name (`str`, *optional*):
            What the chunks' names begin with.

    Returns:
        [`TransferReport`]
    """
    decoding = decoding or Decoding()
    chunks: list[Chunk] = []
    written: dict[tuple[int, bool], dict[str, Any]] = {}
    for with_bank in (False, True):
        writers = plan.writers(with_bank)
        for start in range(0, len(writers), chunk_size):
            part = writers[start : start + chunk_size]
            key = f"transfer/{name}/strategies{'_with_bank' if with_bank else ''}/{start}"
            chosen = replace(decoding, seed=derived_seed(seed, key))
            compute = partial(
                _write, model, [rows[i] for i in part], class_column, chosen, bank if with_bank else None
            )
            chunks.append(run(key, len(part), compute))
            for index, strategy in zip(part, chunks[-1]["strategies"], strict=True):
                written[index, with_bank] = strategy
    executions, unverified = [], 0
    for condition in sorted({execution.condition for execution in plan.executions}):
        planned = [execution for execution in plan.executions if execution.condition == condition]
        with_bank = condition in WITH_BANK
        for start in range(0, len(planned), chunk_size):
            group = planned[start : start + chunk_size]
            key = f"transfer/{name}/{condition}/{start}"
            chosen = replace(decoding, seed=derived_seed(seed, key))
            texts = ["" if e.writer is None else written[e.writer, with_bank]["text"] for e in group]
            compute = partial(
                _execute,
                model,
                [rows[e.problem] for e in group],
                class_column,
                None if condition == "none" else texts,
                verifier,
                chosen,
                bank if with_bank else None,
            )
            chunks.append(run(key, len(group), compute))
            for execution, outcome in zip(group, chunks[-1]["outcomes"], strict=True):
                unverified += outcome is None
                if outcome is not None:
                    executions.append(_record(rows, class_column, execution, outcome))
    return TransferReport(
        classes=plan.classes,
        left_out=plan.left_out,
        executions=executions,
        seed=seed,
        unverified=unverified,
        strategies=len(written),
        flawed_strategies=sum(strategy["flaw"] is not None for strategy in written.values()),
        generated_tokens=sum(chunk["tokens"] for chunk in chunks),
    )


def _write(
    model: TwoPhaseModel,
    rows: Sequence[dict[str, Any]],
    class_column: str,
    decoding: Decoding,
    bank: "StrategyBank | None",
) -> Chunk:
    before = model.generated_tokens
    problems = [as_problem(row, class_column) for row in rows]
    if bank is not None:
        problems = with_retrieved(problems, bank, model.settings.num_retrieved)
    strategies = model.write_strategies(problems, decoding)
    return {
        "strategies": [
            {"problem": problem_id(problem.prompt), "text": strategy.as_written, "flaw": strategy.flaw}
            for problem, strategy in zip(problems, strategies, strict=True)
        ],
        "tokens": model.generated_tokens - before,
    }


def _execute(
    model: TwoPhaseModel,
    rows: Sequence[dict[str, Any]],
    class_column: str,
    strategies: Sequence[str] | None,
    verifier: Verifier,
    decoding: Decoding,
    bank: "StrategyBank | None",
) -> Chunk:
    before = model.generated_tokens
    problems = [as_problem(row, class_column) for row in rows]
    if bank is not None:
        problems = with_retrieved(problems, bank, model.settings.num_retrieved)
    if strategies is None:
        texts = model.answer([problem.prompt for problem in problems], decoding)
    else:
        texts = model.execute(problems, strategies, decoding)
    outcomes = verify(verifier, rows, texts)
    return {
        "problems": [problem_id(problem.prompt) for problem in problems],
        "texts_written": texts,
        "outcomes": [None if math.isnan(outcome) else outcome for outcome in outcomes],
        "tokens": model.generated_tokens - before,
    }


def _record(
    rows: Sequence[dict[str, Any]], class_column: str, execution: PlannedExecution, outcome: float
) -> dict[str, Any]:
    problem = rows[execution.problem]
    writer = None if execution.writer is None else rows[execution.writer]
    return {
        "condition": execution.condition,
        "problem": problem_id(problem["prompt"]),
        "class": as_problem(problem, class_column).problem_class,
        "written_for": None if writer is None else problem_id(writer["prompt"]),
        "written_class": None if writer is None else as_problem(writer, class_column).problem_class,
        "outcome": outcome,
    }
