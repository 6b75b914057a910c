"""Strategy transfer score of a two-phase model on unseen problems, with the conditions to compare it with."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..bank.strategy import problem_id
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.retrieval import with_retrieved
from ..inference.verifier import Verifier, verify
from ..method.problem import as_problem
from ..method.prompts import ParsedStrategy
from .chunks import Chunk, RunChunk, run_now
from .statistics import Estimate, class_mean_estimate, derived_seed
from .stored import executions_chunk, strategies_chunk
from .transfer_plan import CONDITIONS, WITH_BANK, PlannedExecution, TransferPlan, plan_transfer


if TYPE_CHECKING:
    from ..bank import StrategyBank

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
class TransferReport:
    """
    Strategy transfer score of a model and the conditions to compare it with.

    Args:
        classes (`list[str]`):
            Classes measured.
        left_out (`list[str]`):
            Classes not measured.
        executions (`list[dict]`):
            Every verified execution: its `condition`, `problem` and `class`, the `written_for` and
            `written_class` of its strategy, and its `outcome`. Intervals are computed from these.
        unverified (`int`):
            Executions without a verdict of the verifier.
        strategies (`int`):
            Strategies written.
        flawed_strategies (`int`):
            Strategies that are empty, truncated or malformed.
        generated_tokens (`int`):
            Tokens generated.
    """

    classes: list[str]
    left_out: list[str]
    executions: list[dict[str, Any]]
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
        by_problem = defaultdict(list)
        for execution in self.executions:
            if execution["condition"] == condition:
                by_problem[execution["problem"]].append(execution["outcome"])
        return {problem: math.fsum(values) / len(values) for problem, values in by_problem.items()}

    def estimate(self, condition: str) -> Estimate | None:
        """Mean over classes of a condition's outcomes, `None` if it was not measured."""
        return self._over_classes(self.outcomes(condition))

    def difference(self, first: str, second: str) -> Estimate | None:
        """Mean over classes of the difference between two conditions on the same problems."""
        ours, theirs = self.outcomes(first), self.outcomes(second)
        differences = {problem: ours[problem] - theirs[problem] for problem in ours if problem in theirs}
        return self._over_classes(differences, least=-1.0)

    def _over_classes(self, values: dict[str, float], least: float = 0.0) -> Estimate | None:
        names = self.problem_classes
        return class_mean_estimate(list(values.values()), [names[problem] for problem in values], least)

    @property
    def relative(self) -> float | None:
        """Transfer divided by the outcome on the problem that the strategy was written for."""
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
    Measures a model's strategies on problems that they were not written for.

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
            Problems of each class to write strategies for, and the same number to execute them on.
        transfers (`int`, *optional*, defaults to `2`):
            Strategies of the same class, and of others, executed on each problem.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw and of sampling.
        decoding ([`~trl_sgpo.inference.model.Decoding`], *optional*):
            How to decode, greedily by default. Its seed is not used.
        bank ([`~trl_sgpo.bank.StrategyBank`], *optional*):
            If given, `transfer` and `own` are also measured with its trusted strategies in the request.
        max_classes (`int`, *optional*):
            Number of classes, the largest ones.
        pairs_per_cell (`int`, *optional*, defaults to `8`):
            Pairs for each cell of the transfer matrix.

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
    Runs a plan of [`~trl_sgpo.evaluation.transfer_plan.plan_transfer`] in chunks, see [`transfer_report`].

    Args:
        run (`Callable`, *optional*):
            Runs a chunk, see [`~trl_sgpo.evaluation.chunks.ChunkLog`].
        chunk_size (`int`, *optional*, defaults to `32`):
            Texts a chunk.
        name (`str`, *optional*):
            Prefix of the chunks' names.

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
            chunks.append(run(key, len(part), compute, strategies_chunk(len(part))))
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
            strategies = ["" if e.writer is None else _written(written[e.writer, with_bank]) for e in group]
            compute = partial(
                _execute,
                model,
                [rows[e.problem] for e in group],
                class_column,
                None if condition == "none" else strategies,
                verifier,
                chosen,
                bank if with_bank else None,
            )
            chunks.append(run(key, len(group), compute, executions_chunk(len(group))))
            for execution, outcome in zip(group, chunks[-1]["outcomes"], strict=True):
                unverified += outcome is None
                if outcome is not None:
                    executions.append(_record(rows, class_column, execution, outcome))
    return TransferReport(
        classes=plan.classes,
        left_out=plan.left_out,
        executions=executions,
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
    problems = with_retrieved(problems, bank, model.settings.num_retrieved, merged=model.settings.merged_classes)
    strategies = model.write_strategies(problems, decoding)
    return {
        "strategies": [
            {
                "problem": problem_id(problem.prompt),
                "text": strategy.as_written,
                "flaw": strategy.flaw,
                "sampled": strategy.sampled,
            }
            for problem, strategy in zip(problems, strategies, strict=True)
        ],
        "tokens": model.generated_tokens - before,
    }


def _written(strategy: dict[str, Any]) -> ParsedStrategy:
    """A strategy of a chunk. Those of earlier versions hold no sampled tokens."""
    return ParsedStrategy(strategy["text"], sampled=strategy.get("sampled"))


def _execute(
    model: TwoPhaseModel,
    rows: Sequence[dict[str, Any]],
    class_column: str,
    strategies: Sequence[str | ParsedStrategy] | None,
    verifier: Verifier,
    decoding: Decoding,
    bank: "StrategyBank | None",
) -> Chunk:
    before = model.generated_tokens
    problems = [as_problem(row, class_column) for row in rows]
    problems = with_retrieved(problems, bank, model.settings.num_retrieved, merged=model.settings.merged_classes)
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
