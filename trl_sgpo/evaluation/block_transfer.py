"""Accuracy and transfer of a trainer's model on blocks of unseen problems."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..method.transfer import BlockGeometry, block_order, outcome_matrix


if TYPE_CHECKING:
    from datasets import Dataset

    from ..sgpo_config import SGPOConfig
    from ..sgpo_trainer import SGPOTrainer


@dataclass(frozen=True)
class TransferScore:
    """
    Accuracy and transfer of a model's strategies, and accuracy of its plain answers.

    Args:
        accuracy (`float`):
            Mean outcome of strategies executed on the problem they were written for, with the bank's in view.
        transfer (`float`):
            Strategy transfer score: mean outcome of strategies executed on the other problems of their block.
        problems (`int`):
            Problems measured, all of which the verifier judged.
        transfers (`int`):
            Executions behind `transfer`.
        plain (`float`, *optional*):
            Mean outcome of plain answers to the problems, at up to the length of both phases.
        own (`float`, *optional*):
            As `accuracy`, with no strategies of the bank in view. `None` if there were none to show.
        unverified (`int`, *optional*, defaults to `0`):
            Problems left out, because the verifier did not judge all of their outcomes.
    """

    accuracy: float
    transfer: float
    problems: int
    transfers: int
    plain: float | None = None
    own: float | None = None
    unverified: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def select_blocks(dataset: "Dataset", class_column: str, size: int, limit: int, seed: int) -> list[int]:
    """
    Draws blocks of unseen problems, spread over the classes as evenly as possible.

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
        if seen.isdisjoint(block):  # the last block of a class may be padded with problems of earlier blocks
            queues[classes[block[0]]].append(block)
            seen.update(block)
    chosen: list[int] = []
    while any(queues.values()) and len(chosen) + size <= limit:
        for name in sorted(queues):
            if queues[name] and len(chosen) + size <= limit:
                chosen += queues[name].pop()
    return chosen


def chosen_problems(trainer: "SGPOTrainer", dataset: "Dataset", num_problems: int) -> list[int]:
    """Indices of the problems that [`measure_transfer`] measures, in block order."""
    column = trainer.args.class_column or "problem_class"
    return select_blocks(dataset, column, _block_size(trainer), num_problems, trainer.args.seed)


def _block_size(trainer: "SGPOTrainer") -> int:
    return max(2, trainer.geometry.problems)


def measure_transfer(
    trainer: "SGPOTrainer",
    dataset: "Dataset",
    num_problems: int,
    greedy: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> TransferScore:
    """
    Writes one strategy a problem and executes it on every problem of its block, and answers the problems plainly.

    Args:
        trainer ([`SGPOTrainer`]):
            Trainer with the model, its bank and its verifier.
        dataset ([`~datasets.Dataset`]):
            Problems not trained on.
        num_problems (`int`):
            How many to measure.
        greedy (`bool`, *optional*, defaults to `True`):
            Whether to decode greedily. If `False`, executions are sampled as in training.
        progress (`Callable`, *optional*):
            Called with the number of problems that are measured, and that of all.

    Returns:
        [`TransferScore`]
    """
    K = _block_size(trainer)
    geometry, args, bank = BlockGeometry(problems=K, own=1), trainer.args, trainer.strategy_bank
    shown = bank is not None and args.num_retrieved > 0 and any(one.trust == "trusted" for one in bank.strategies())
    chosen = chosen_problems(trainer, dataset, num_problems)
    at_once = max(K, trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation // K // K * K)
    on_own: list[float] = []
    on_siblings: list[float] = []
    plain: list[float] = []
    alone: list[float] = []
    for start in range(0, len(chosen), at_once):
        rows = [dataset[index] for index in chosen[start : start + at_once]]
        # One row a problem, with the outcomes of all strategies of its block on it
        guided = [
            outcomes for matrix in _outcomes(trainer, rows, geometry, greedy) for outcomes in zip(*matrix, strict=True)
        ]
        bare = _of_each(_outcomes(trainer, rows, BlockGeometry(problems=1, own=0, plain=1), greedy))
        with _changed(args, num_retrieved=0):
            own = _of_each(_outcomes(trainer, rows, BlockGeometry(problems=1, own=1), greedy)) if shown else []
        for x, outcomes in enumerate(guided):
            if any(map(math.isnan, (*outcomes, bare[x], *own[x : x + 1]))):
                continue
            on_own.append(outcomes[x % K])
            on_siblings += [outcome for s, outcome in enumerate(outcomes) if s != x % K]
            plain.append(bare[x])
            alone += own[x : x + 1]
        if progress is not None:
            progress(min(start + at_once, len(chosen)), len(chosen))
    return TransferScore(
        accuracy=sum(on_own) / max(len(on_own), 1),
        transfer=sum(on_siblings) / max(len(on_siblings), 1),
        problems=len(on_own),
        transfers=len(on_siblings),
        plain=sum(plain) / max(len(plain), 1),
        own=sum(alone) / len(alone) if alone else None,
        unverified=len(chosen) - len(on_own),
    )


def _outcomes(
    trainer: "SGPOTrainer", rows: list[dict[str, Any]], geometry: BlockGeometry, greedy: bool
) -> list[list[list[float]]]:
    _, outcomes = trainer.execute_blocks(rows, geometry, greedy)
    return outcome_matrix(outcomes, geometry).clamp(0, 1).tolist()


def _of_each(matrices: list[list[list[float]]]) -> list[float]:
    """Outcomes of blocks of one problem and one row."""
    return [matrix[0][0] for matrix in matrices]


@contextmanager
def _changed(args: "SGPOConfig", **values: Any) -> Iterator[None]:
    before = dict(vars(args))
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name in values:
            setattr(args, name, before[name])
