"""
Two-phase generation through TRL's own: strategies first, then every strategy of a block on every problem of the block.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): the `rollout_func` hook, `_tokenize_prompts`,
`_generate_single_turn`, `generation_config.max_new_tokens` and `vllm_generation.max_completion_length`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trl.data_utils import is_conversational

from ..bank.strategy import Strategy
from ..speed.trainer import SharedPromptGRPOTrainer
from .problem import Problem
from .prompts import ParsedStrategy, chat_bridge, parse_strategy, plain_bridge, strategy_prompt
from .transfer import BlockGeometry


@contextmanager
def rollout_func_accepted() -> Iterator[None]:
    """Keeps TRL from warning that `rollout_func` is experimental, which it does unless this variable is set."""
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
class RolloutBatch:
    """
    What one rank generates at a time.

    Args:
        problems (`list[Problem]`):
            Problems in block order.
        geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
            Shape of the blocks.
        bank (`list[list[Strategy]]`):
            Strategies each block executes as they are, at most b.
    """

    problems: list[Problem]
    geometry: BlockGeometry
    bank: list[list[Strategy]] = field(default_factory=list)

    @classmethod
    def without_bank(cls, problems: list[Problem], geometry: BlockGeometry) -> "RolloutBatch":
        """A batch that executes no strategy of a bank."""
        return cls(problems, geometry, [[] for _ in range(len(problems) // geometry.problems)])

    def written_for(self) -> list[Problem]:
        """The problem of each written strategy, in the order in which strategies are written."""
        return [problem for problem in self.problems for _ in range(self.geometry.own)]


@dataclass(frozen=True)
class Rollout:
    """
    One row: a strategy and its execution on a problem. Reward functions receive it as `rollout`.

    Args:
        source (`str`):
            `"own"` (written for this problem), `"borrowed"` (for another problem of the block) or `"bank"`.
        strategy ([`~trl_sgpo.method.prompts.ParsedStrategy`]):
            The strategy.
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
class _Written:
    """A strategy as generated: its tokens (end token included), their log-probabilities and its parsed text."""

    ids: list[int]
    logprobs: list[float] | None
    parsed: ParsedStrategy


def written_strategies(rollouts: Sequence[Rollout]) -> list[ParsedStrategy]:
    """The strategies that were written, problem by problem: own rows come in the order of their strategies."""
    return [rollout.strategy for rollout in rollouts if rollout.source == "own"]


def two_phase_rollout(batch: RolloutBatch, trainer: SharedPromptGRPOTrainer) -> dict[str, Any]:
    """
    Writes the strategies of a batch, executes them and returns one row for each execution.

    A row is the request, then strategy + turn + execution. `env_mask` leaves out the turn and, unless the strategy is
    the problem's own, the strategy, so that no token is trained twice. Counting a borrowed strategy to the prompt
    would do the same, but own and borrowed rows would then pad each other on both sides.

    Args:
        batch ([`RolloutBatch`]):
            Problems and strategies of the bank.
        trainer ([`~trl_sgpo.speed.trainer.SharedPromptGRPOTrainer`]):
            Trainer that generates.

    Returns:
        `dict` with `prompt_ids`, `completion_ids`, `logprobs`, `env_mask` and `rollout`, one entry a row.
    """
    geometry = batch.geometry
    tokenizer = trainer.processing_class
    chat = tokenizer.chat_template is not None
    args = trainer.args

    requests = [
        strategy_prompt(
            problem.prompt,
            args.strategy_prompt,
            [(strategy.problem_class, strategy.text) for strategy in problem.retrieved],
            chat,
        )
        for problem in batch.problems
    ]
    request_ids = trainer._tokenize_prompts(requests)[0]
    is_chat = is_conversational({"prompt": requests[0]})
    bridge = (
        chat_bridge(tokenizer, args.execution_prompt, **trainer.chat_template_kwargs)
        if is_chat
        else plain_bridge(args.execution_prompt)
    )
    bridge_ids = tokenizer(bridge, add_special_tokens=False)["input_ids"]

    with trainer.fast_generation(request_ids, calls=2):
        phase_one = [ids for ids in request_ids for _ in range(geometry.own)]
        generated, logprobs = trainer.generate(phase_one, args.max_strategy_length, "strategies")
        written = _read_strategies(generated, logprobs, trainer)

        # Row order is problem by problem, strategy by strategy: `transfer.outcome_matrix` relies on it
        plan = [
            (position, strategy)
            for block in range(len(batch.problems) // geometry.problems)
            for position in range(block * geometry.problems, (block + 1) * geometry.problems)
            for strategy in range(geometry.executions)
        ]
        sources = [_strategy_for(batch, written, position, strategy, tokenizer) for position, strategy in plan]
        contexts = [
            request_ids[position] + ids + _turn(ids, bridge_ids)
            for (position, _), (_, ids, _, _, _) in zip(plan, sources, strict=True)
        ]
        executions, execution_logprobs = trainer.generate(contexts, args.max_completion_length, "executions")

    executions = [ids or [tokenizer.eos_token_id] for ids in executions]
    texts = tokenizer.batch_decode(executions, skip_special_tokens=True)
    rows: dict[str, list[Any]] = {
        key: [] for key in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "rollout")
    }
    for row, ((position, _), (source, ids, strategy_logprobs, parsed, strategy_id)) in enumerate(
        zip(plan, sources, strict=True)
    ):
        execution, turn = executions[row], _turn(ids, bridge_ids)
        trained = source == "own"
        rows["prompt_ids"].append(request_ids[position])
        rows["completion_ids"].append(ids + turn + execution)
        rows["env_mask"].append([int(trained)] * len(ids) + [0] * len(turn) + [1] * len(execution))
        if execution_logprobs is not None:
            before = strategy_logprobs if trained and strategy_logprobs else [0.0] * len(ids)
            after = execution_logprobs[row] or [0.0] * len(execution)
            rows["logprobs"].append([*before, *[0.0] * len(turn), *after])
        rows["rollout"].append(
            Rollout(source, parsed, texts[row].strip(), execution, len(ids) if trained else 0, strategy_id)
        )
    return {**rows, "logprobs": None if execution_logprobs is None else rows["logprobs"]}


def _read_strategies(
    generated: list[list[int]], logprobs: list[list[float]] | None, trainer: SharedPromptGRPOTrainer
) -> list[_Written]:
    texts = trainer.processing_class.batch_decode(generated, skip_special_tokens=True)
    written = []
    for index, (ids, text) in enumerate(zip(generated, texts, strict=True)):
        truncated = not ids or ids[-1] not in trainer.eos_token_ids
        parsed = parse_strategy(text, trainer.args.strategy_format, truncated and len(ids) > 0)
        written.append(_Written(ids, None if logprobs is None else logprobs[index], parsed))
    return written


def _strategy_for(
    batch: RolloutBatch, written: list[_Written], position: int, strategy: int, tokenizer: Any
) -> tuple[str, list[int], list[float] | None, ParsedStrategy, str | None]:
    """Returns source, tokens, log-probabilities, text and bank id of a block's strategy, as seen by one problem."""
    geometry = batch.geometry
    block, local = divmod(position, geometry.problems)
    writer = geometry.writer(strategy)
    if writer is None:
        slot = strategy - geometry.written
        if slot < len(batch.bank[block]):
            entry = batch.bank[block][slot]
            ids = [*tokenizer(entry.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            return "bank", ids, None, parse_strategy(entry.text), entry.id
        strategy = slot % geometry.written
    text = written[block * geometry.written + strategy]
    return "own" if writer == local else "borrowed", text.ids, text.logprobs, text.parsed, None


def _turn(strategy_ids: list[int], bridge_ids: list[int]) -> list[int]:
    """The bridge without its first token where the strategy already ended with it."""
    return bridge_ids[1:] if strategy_ids and strategy_ids[-1] == bridge_ids[0] else bridge_ids
