"""
Transfer blocks: their problems and rows, their order in an epoch, and the outcome matrix.

A block is K problems of one class. Each writes n strategies, numbered so that strategy `s` belongs to problem
`s // n`; the b strategies from `n * K` on come from the bank. Row `s` of every problem executes strategy `s`, and the
m rows after them answer without a strategy, so the rows of a block, problem by problem, are its outcome matrix read
column by column.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


@dataclass(frozen=True)
class BlockGeometry:
    """
    Shape of a transfer block.

    Args:
        problems (`int`):
            K, problems a block.
        own (`int`):
            n, strategies each problem writes.
        bank (`int`, *optional*, defaults to `0`):
            b, strategies taken from the bank.
        plain (`int`, *optional*, defaults to `0`):
            m, rows of each problem that answer without a strategy.
    """

    problems: int
    own: int
    bank: int = 0
    plain: int = 0

    @property
    def written(self) -> int:
        """n * K, strategies written in a block."""
        return self.own * self.problems

    @property
    def strategies(self) -> int:
        """S = n * K + b, strategies that a block executes on each of its problems."""
        return self.written + self.bank

    @property
    def executions(self) -> int:
        """G = S + m, rows of each problem."""
        return self.strategies + self.plain

    @property
    def rows(self) -> int:
        """K * G, rows of a block."""
        return self.problems * self.executions

    @property
    def evaluated(self) -> "BlockGeometry":
        """Shape of evaluation: a problem executes its own strategy, or answers plainly if none are trained."""
        return BlockGeometry(problems=1, own=1) if self.own else BlockGeometry(problems=1, own=0, plain=1)

    def writer(self, strategy: int) -> int | None:
        """Returns which problem of the block wrote a strategy, `None` for one from the bank."""
        return strategy // self.own if strategy < self.written else None

    def by_form(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits `(N, G, K)` into the rows that execute a strategy, `(N, S, K)`, and the plain ones, `(N, m, K)`."""
        return matrix[:, : self.strategies], matrix[:, self.strategies :]


def outcome_matrix(outcomes: torch.Tensor, geometry: BlockGeometry) -> torch.Tensor:
    """
    Arranges the outcomes of rows by block, strategy and problem. Plain rows come after the strategies.

    Args:
        outcomes (`torch.Tensor` of shape `(N * K * G,)`):
            One value a row, rows in block order, NaN where no reward applies.
        geometry ([`BlockGeometry`]):
            Shape of the blocks.

    Returns:
        `torch.Tensor` of shape `(N, G, K)`: `[block, strategy, problem]`.
    """
    return outcomes.view(-1, geometry.problems, geometry.executions).transpose(1, 2)


def rows_of(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of [`outcome_matrix`]: `(N, G, K)` to `(N * K * G,)`."""
    return matrix.transpose(1, 2).reshape(-1)


def _distribute(members: list[int], answers: Sequence[str] | None, size: int, rng: random.Random) -> list[list[int]]:
    """Distributes the problems of a class over blocks of `size`, those with equal answers over different ones."""
    members = rng.sample(members, len(members))
    if answers is not None:
        # Equal answers one after the other, distributed in turn: they share a block only if there are more than blocks
        groups = defaultdict(list)
        for index in members:
            groups[answers[index]].append(index)
        members = [index for group in sorted(groups.values(), key=len, reverse=True) for index in group]
    blocks: list[list[int]] = [[] for _ in range(-(-len(members) // size))]
    for position, index in enumerate(members):
        blocks[position % len(blocks)].append(index)
    for block in blocks:
        while len(block) < size:
            others = [index for index in members if index not in block]
            if answers is not None:
                taken = {answers[index] for index in block}
                others = [index for index in others if answers[index] not in taken] or others
            block.append(rng.choice(others))
    return blocks


def _cut(members: list[int], size: int) -> list[list[int]]:
    """Cuts the problems of a class into blocks of `size`. The last one is filled with the problems before it."""
    starts = range(0, len(members), size)
    return [members[min(start, len(members) - size) :][:size] for start in starts]


def block_order(
    classes: Sequence[str],
    size: int,
    seed: int,
    epoch: int = 0,
    answers: Sequence[str] | None = None,
    shuffle: bool = True,
) -> list[int]:
    """
    Orders problems so that every `size` consecutive ones form a block of one class.

    Every problem occurs at least once. Where a class is no multiple of `size`, its last blocks are filled with
    problems of the same class, fewer than `size` of them. The blocks of each class are spread evenly over the order;
    without shuffling, problems and blocks are in the order of the dataset.

    Args:
        classes (`Sequence[str]`):
            Class of each problem, each class with at least `size` problems.
        size (`int`):
            K, problems a block.
        seed (`int`):
            Seed of the shuffling.
        epoch (`int`, *optional*, defaults to `0`):
            Epochs differ in their blocks and in the order of blocks.
        answers (`Sequence[str]`, *optional*):
            Answer of each problem. With shuffling, problems of a block get different answers where the class allows
            it, so that an answer written into a strategy is of no use to its siblings.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle.

    Returns:
        `list[int]`: Problem indices, a multiple of `size` long.
    """
    rng = random.Random(f"{seed}-{epoch}")
    by_class = defaultdict(list)
    for index, problem_class in enumerate(classes):
        by_class[problem_class].append(index)
    if not shuffle:
        in_order = sorted(block for members in by_class.values() for block in _cut(members, size))
        return [index for block in in_order for index in block]
    placed = []
    for name in sorted(by_class):
        blocks = _distribute(by_class[name], answers, size, rng)
        rng.shuffle(blocks)
        # Spread evenly over the epoch, so that every generation batch sees the classes in proportion
        placed += [((position + rng.random()) / len(blocks), block) for position, block in enumerate(blocks)]
    return [index for _, block in sorted(placed) for index in block]


class TransferBlockSampler(Sampler[int]):
    """
    Samples transfer blocks in the order TRL's [`~trl.trainer.utils.RepeatSampler`] expects: each problem repeated
    `num_generations` times, each generation batch repeated for every time it is reused.

    The last generation batch of an epoch is filled up with blocks from the epoch's beginning, so that no problem is
    dropped. The order depends on seed and epoch only, so that a resumed run has the same problems.

    Args:
        classes (`Sequence[str]`):
            Class of each problem.
        geometry ([`BlockGeometry`]):
            Shape of the blocks.
        problems_per_batch (`int`):
            Problems in one generation batch over all ranks, a multiple of K.
        repeat_count (`int`):
            Times a generation batch is repeated.
        seed (`int`):
            Seed of the shuffling.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle, each epoch differently. Otherwise problems are in the order of the dataset within their
            classes, which makes a curriculum possible.
        epoch (`Callable[[], int]`, *optional*):
            Returns the current epoch. Asked at the start of each pass.
        answers (`Sequence[str]`, *optional*):
            Answer of each problem, see [`block_order`].
    """

    def __init__(
        self,
        classes: Sequence[str],
        geometry: BlockGeometry,
        problems_per_batch: int,
        repeat_count: int,
        seed: int,
        shuffle: bool = True,
        epoch: Callable[[], int] = lambda: 0,
        answers: Sequence[str] | None = None,
    ):
        self.classes = classes
        self.geometry = geometry
        self.problems_per_batch = problems_per_batch
        self.repeat_count = repeat_count
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = epoch
        self.answers = answers

    def _repeat_sampler(self, length: int) -> RepeatSampler:
        return RepeatSampler(
            data_source=range(length),
            mini_repeat_count=self.geometry.executions,
            batch_size=self.problems_per_batch,
            repeat_count=self.repeat_count,
            shuffle=False,
        )

    def _filled_length(self, length: int) -> int:
        return -(-length // self.problems_per_batch) * self.problems_per_batch

    def __iter__(self) -> Iterator[int]:
        order = block_order(self.classes, self.geometry.problems, self.seed, self.epoch(), self.answers, self.shuffle)
        length = self._filled_length(len(order))
        for position in self._repeat_sampler(length):
            yield order[position % len(order)]

    def __len__(self) -> int:
        sizes: dict[str, int] = defaultdict(int)
        for problem_class in self.classes:
            sizes[problem_class] += 1
        K = self.geometry.problems
        return len(self._repeat_sampler(self._filled_length(sum(-(-size // K) * K for size in sizes.values()))))
