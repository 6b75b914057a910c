"""
Two-phase generation: strategies first, then every strategy of a block on every problem of the block, and plain rows.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): the `rollout_func` hook.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..bank.strategy import Strategy
from ..speed.trainer import SharedPromptGRPOTrainer
from .conversation import Conversation
from .problem import Problem
from .prompts import ParsedStrategy, parse_strategy
from .transfer import BlockGeometry


@contextmanager
def without_experimental_warning() -> Iterator[None]:
    """Silences TRL's warning that `rollout_func` is experimental."""
    name = "TRL_EXPERIMENTAL_SILENCE"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class Answer:
    """
    What was generated after a context.

    Args:
        ids (`list[int]`):
            Its tokens.
        logprobs (`list[float]` or `None`):
            Their log-probabilities, where the backend returns them.
    """

    ids: list[int]
    logprobs: list[float] | None


@dataclass(frozen=True)
class RolloutBatch:
    """
    Problems and bank strategies of the rows that a rank generates at a time.

    Args:
        problems (`list[Problem]`):
            Problems in block order.
        geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
            Shape of the blocks.
        bank (`list[list[Strategy]]`):
            Strategies of the bank that each block executes, at most b.
        answered (`list[Answer]`):
            Plain answers that exist already, m for each problem, or none.
    """

    problems: list[Problem]
    geometry: BlockGeometry
    bank: list[list[Strategy]] = field(default_factory=list)
    answered: list[Answer] = field(default_factory=list)

    @classmethod
    def without_bank(
        cls, problems: list[Problem], geometry: BlockGeometry, texts: Sequence[str] = ()
    ) -> "RolloutBatch":
        """A batch that executes no strategy of a bank, but those of `texts`, one a problem, if there are any."""
        if not texts:
            return cls(problems, geometry, [[] for _ in range(len(problems) // geometry.problems)])
        strategies = [Strategy(text, problem.problem_class, ()) for text, problem in zip(texts, problems, strict=True)]
        return cls(problems, geometry, [[strategy] * geometry.bank for strategy in strategies])

    def written_for(self) -> list[Problem]:
        """The problem of each written strategy, in the order in which strategies are written."""
        return [problem for problem in self.problems for _ in range(self.geometry.own)]


def given(rows: Sequence[dict[str, Any]], column: str | None, geometry: BlockGeometry) -> list[str]:
    """The strategies that a dataset gives the problems of its rows, none without such a column or rows for them."""
    return [] if column is None or not geometry.bank else [row[column] for row in rows[:: geometry.executions]]


@dataclass(frozen=True)
class Rollout:
    """
    One row: a strategy and its execution on a problem. Reward functions receive it as `rollout`.

    Args:
        source (`str`):
            `"own"` (written for this problem), `"borrowed"` (for another problem of the block), `"bank"`, or
            `"plain"` (the problem is answered without a strategy).
        strategy ([`~trl_sgpo.method.prompts.ParsedStrategy`]):
            The strategy, empty in a plain row.
        execution (`str`):
            Text of the execution.
        execution_ids (`list[int]`):
            Its tokens.
        strategy_length (`int`):
            Trained strategy tokens at the start of the row's completion: 0 unless `source` is `"own"`.
        strategy_id (`str` or `None`):
            Bank id of the strategy, if it comes from the bank.
    """

    source: str
    strategy: ParsedStrategy
    execution: str
    execution_ids: list[int]
    strategy_length: int
    strategy_id: str | None = None


@dataclass(frozen=True)
class _Source:
    """Strategy of a row, if it has one. Own and borrowed ones have the tokens and log-probabilities of generation."""

    kind: str
    ids: list[int]
    parsed: ParsedStrategy
    logprobs: list[float] | None = None
    strategy_id: str | None = None


_NO_STRATEGY = _Source("plain", [], ParsedStrategy(""))


def written_strategies(rollouts: Sequence[Rollout]) -> list[ParsedStrategy]:
    """The strategies that were written, problem by problem: own rows come in the order of their strategies."""
    return [rollout.strategy for rollout in rollouts if rollout.source == "own"]


def two_phase_rollout(
    batch: RolloutBatch, trainer: SharedPromptGRPOTrainer, conversation: Conversation
) -> dict[str, Any]:
    """
    Writes the strategies of a batch, executes them and returns one row each, as a TRL `rollout_func` does.

    A row is the request, then strategy + turn + execution; a plain row is the problem, then its answer. `env_mask`
    leaves out the turn and, unless the strategy is the problem's own, the strategy, so that no token is trained twice.
    With `mask_truncated_completions` it leaves out a strategy that was cut off, and an execution that was. Borrowed
    strategies are not made a part of the prompt, because own and borrowed rows would then need padding on both sides.

    Args:
        batch ([`RolloutBatch`]):
            Problems and bank strategies.
        trainer ([`~trl_sgpo.speed.trainer.SharedPromptGRPOTrainer`]):
            Trainer that generates.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens.

    Returns:
        `dict` with `prompt_ids`, `completion_ids`, `logprobs`, `env_mask` and `rollout`, one entry a row.
    """
    args, geometry = trainer.args, batch.geometry
    turn = conversation.turn(batch.problems[0].prompt)
    guided, plain = _requests(batch, conversation)
    answers = batch.answered
    calls = [geometry.own > 0, geometry.strategies > 0, geometry.plain > 0 and not answers]
    with trainer.fast_generation([*guided, *plain], calls=sum(calls)):
        written = _write_strategies(batch, guided, trainer, conversation) if geometry.own else []
        if calls[2]:
            answers = answer_plainly(plain, geometry, trainer)

        plan = _plan(len(batch.problems), geometry)
        sources = [_source(batch, written, *entry, conversation) for entry in plan]
        turns = [[] if source is _NO_STRATEGY else turn.after(source.ids) for source in sources]
        requests = [
            plain[position] if source is _NO_STRATEGY else guided[position]
            for (position, _), source in zip(plan, sources, strict=True)
        ]
        contexts = [
            request + source.ids + between for request, source, between in zip(requests, sources, turns, strict=True)
        ]
        waiting = [each for each, source in zip(contexts, sources, strict=True) if source is not _NO_STRATEGY]
        executed: list[Answer] = []
        if waiting:
            executed = _answers(trainer.generate(waiting, args.max_completion_length, "executions"))

    following = {True: iter(answers), False: iter(executed)}
    outputs = [next(following[source is _NO_STRATEGY]) for source in sources]
    executions, logprobs = [output.ids for output in outputs], [output.logprobs for output in outputs]
    executions = [ids or [turn.end] for ids in executions]
    texts = [conversation.text(ids) for ids in executions]
    rows = list(zip(sources, turns, executions, strict=True))

    def trained(ids: list[int]) -> bool:
        return not args.mask_truncated_completions or not _is_cut_off(ids, trainer.eos_token_ids)

    return {
        "prompt_ids": requests,
        "completion_ids": [source.ids + between + execution for source, between, execution in rows],
        "logprobs": None
        if None in logprobs
        else [_row_logprobs(*row, sampled) for row, sampled in zip(rows, logprobs, strict=True)],
        "env_mask": [
            [int(source.kind == "own" and trained(source.ids))] * len(source.ids)
            + [0] * len(between)
            + [int(trained(execution))] * len(execution)
            for source, between, execution in rows
        ],
        "rollout": [
            Rollout(
                source.kind,
                source.parsed,
                text,
                execution,
                len(source.ids) if source.kind == "own" else 0,
                source.strategy_id,
            )
            for (source, _, execution), text in zip(rows, texts, strict=True)
        ],
    }


def answer_plainly(
    requests: Sequence[list[int]], geometry: BlockGeometry, trainer: SharedPromptGRPOTrainer
) -> list[Answer]:
    """
    Generates the plain rows of problems, which may be as long as strategy and execution together.

    Args:
        requests (`Sequence[list[int]]`):
            Tokens of the bare problems.
        geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
            Shape of the blocks.
        trainer ([`~trl_sgpo.speed.trainer.SharedPromptGRPOTrainer`]):
            Trainer that generates.

    Returns:
        `list[Answer]`: m for each problem.
    """
    asked = [request for request in requests for _ in range(geometry.plain)]
    return _answers(trainer.generate(asked, trainer.args.max_plain_length, "plain answers"))


def _answers(generated: tuple[list[list[int]], list[list[float]] | None]) -> list[Answer]:
    ids, logprobs = generated
    return [Answer(row, None if logprobs is None else logprobs[place]) for place, row in enumerate(ids)]


def _is_cut_off(ids: Sequence[int], eos_token_ids: list[int]) -> bool:
    return len(ids) > 0 and ids[-1] not in eos_token_ids


def _requests(batch: RolloutBatch, conversation: Conversation) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens that ask for a strategy, and those of the bare problem, where rows need them."""
    geometry, problems = batch.geometry, batch.problems
    return (
        [conversation.request(problem.prompt, problem.shown) for problem in problems] if geometry.strategies else [],
        [conversation.plain_request(problem.prompt) for problem in problems] if geometry.plain else [],
    )


def _write_strategies(
    batch: RolloutBatch, requests: list[list[int]], trainer: SharedPromptGRPOTrainer, conversation: Conversation
) -> list[_Source]:
    own = [request for request in requests for _ in range(batch.geometry.own)]
    generated, logprobs = trainer.generate(own, trainer.args.max_strategy_length, "strategies")
    written = []
    for index, ids in enumerate(generated):
        truncated = _is_cut_off(ids, trainer.eos_token_ids)
        problem = batch.problems[index // batch.geometry.own]
        parsed = conversation.parse(problem.prompt, ids, truncated)
        written.append(_Source("own", ids, parsed, None if logprobs is None else logprobs[index]))
    return written


def _plan(problems: int, geometry: BlockGeometry) -> list[tuple[int, int]]:
    """
    Problem and strategy of each row. The order is problem by problem, strategy by strategy:
    `transfer.outcome_matrix` relies on it.
    """
    return [(position, strategy) for position in range(problems) for strategy in range(geometry.executions)]


def _source(
    batch: RolloutBatch, written: list[_Source], position: int, strategy: int, conversation: Conversation
) -> _Source:
    """Strategy of a row, given its problem and the number of the strategy in the block."""
    geometry = batch.geometry
    if strategy >= geometry.strategies:
        return _NO_STRATEGY
    block, local = divmod(position, geometry.problems)
    writer = geometry.writer(strategy)
    if writer is None:
        slot = strategy - geometry.written
        if slot < len(batch.bank[block]):
            entry = batch.bank[block][slot]
            ids = conversation.reply(batch.problems[position].prompt, entry.text, reasoning=False)
            return _Source("bank", ids, parse_strategy(entry.text), strategy_id=entry.id)
        strategy = slot % geometry.written
    own = written[block * geometry.written + strategy]
    return own if writer == local else replace(own, kind="borrowed")


def _row_logprobs(
    source: _Source, between: list[int], execution: list[int], sampled: list[float] | None
) -> list[float]:
    """Log-probabilities of a row's trained tokens, 0 for the others."""
    own = source.logprobs if source.kind == "own" else None
    before = own or [0.0] * len(source.ids)
    return [*before, *[0.0] * len(between), *(sampled or [0.0] * len(execution))]
