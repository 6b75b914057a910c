"""Bootstrap of strategies without labels: writes, executes and verifies them by block, and records each block."""

import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from tqdm.auto import tqdm

from ..bank.strategy import problem_id
from ..checks.json_text import parse_json, read_lines
from ..checks.shapes import count, listing, record
from ..checks.shapes import text as is_text
from ..errors import ConfigError, DataError, SGPOError
from ..evaluation.digest import changes
from ..files import append_file
from ..inference.model import Decoding
from ..inference.verifier import Verifier, verify
from ..method.problem import Problem
from ..method.prompts import ParsedStrategy, Prompt, parse_strategy, problem_text
from ..method.transfer import block_order
from .acceptance import Executed, Tried, find_flaw
from .annotations import strategy_from_annotations, worked_execution
from .worked import worked_traces


ANSWER_PROMPT = "Solve it step by step and end with #### and the answer."
WORKED_HEADER = "A worked solution of this one problem:"
_SEEDS_A_BLOCK = 10_000

Row = dict[str, Any]
Pair = tuple[ParsedStrategy, str]  # strategy and execution


class Writer(Protocol):
    """
    A model that writes strategies and executes them: [`~trl_sgpo.inference.model.TwoPhaseModel`] or
    [`~trl_sgpo.inference.server.ServerModel`].
    """

    generated_tokens: int

    def write_strategies(
        self, problems: Sequence[Problem], decoding: Decoding | None = None
    ) -> list[ParsedStrategy]: ...

    def execute(
        self, problems: Sequence[Problem], strategies: Sequence[str | ParsedStrategy], decoding: Decoding | None = None
    ) -> list[str]: ...

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding | None = None) -> list[str]: ...


@dataclass(frozen=True)
class Plan:
    """
    Number of texts generated for a block.

    Args:
        decoding ([`~trl_sgpo.inference.model.Decoding`]):
            How to decode, with the seed of the first block.
        num_strategies (`int`, *optional*, defaults to `4`):
            Strategies written for each problem.
        num_answers (`int`, *optional*, defaults to `4`):
            Answers without a strategy to each problem.
        answer_prompt (`str`, *optional*):
            Added to a problem to be answered without a strategy.
    """

    decoding: Decoding
    num_strategies: int = 4
    num_answers: int = 4
    answer_prompt: str = ANSWER_PROMPT

    def decoding_of(self, number: int) -> Decoding:
        """The decoding of a block's number."""
        return replace(self.decoding, seed=self.decoding.seed + _SEEDS_A_BLOCK * number)


_BLOCK = record({"problems": listing(is_text), "tried": listing(record({})), "tokens": count})


@dataclass(frozen=True)
class Block:
    """
    A finished block.

    Args:
        problems (`list[str]`):
            Ids of its problems.
        tried (`list[Tried]`):
            The strategies written for them.
        tokens (`int`):
            Tokens generated.
    """

    problems: list[str]
    tried: list[Tried]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        tried = [one.to_dict() for one in self.tried]
        return {"problems": self.problems, "tried": tried, "tokens": self.tokens}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Block":
        """Reads a record, which somebody else may have written. Raises a `ValueError` at values that none has."""
        _BLOCK(row, "block")
        block = cls(row["problems"], [Tried.from_dict(one) for one in row["tried"]], row["tokens"])
        named = {key for one in block.tried for key in (*one.sources, *(each.problem for each in one.executions))}
        if others := named - {*block.problems}:
            raise ValueError(f"it names the problem {min(others)!r}, which is of another block")
        return block


def cut_blocks(classes: Sequence[str], answers: Sequence[str] | None, size: int, seed: int) -> list[list[int]]:
    """
    Cuts problems into blocks of one class each; the blocks of all classes are mixed evenly.

    Args:
        classes (`Sequence[str]`):
            Class of each problem, each class with at least `size` problems.
        answers (`Sequence[str]`):
            Answer of each. Problems of a block have different answers if possible.
        size (`int`):
            Problems a block.
        seed (`int`):
            Seed of the order.

    Returns:
        `list[list[int]]`: Indices of each block's problems, all of one class.
    """
    order = block_order(classes, size, seed, answers=answers)
    return [order[start : start + size] for start in range(0, len(order), size)]


# A block


def try_block(writer: Writer, rows: list[Row], classes: list[str], verifier: Verifier, plan: Plan) -> Block:
    """
    Writes strategies for the problems of a block, executes those without a flaw on all of them, and answers them
    without a strategy.

    Args:
        writer ([`Writer`]):
            The model.
        rows (`list[dict]`):
            The problems' rows.
        classes (`list[str]`):
            Their classes.
        verifier (`Callable`):
            TRL reward function.
        plan ([`Plan`]):
            Number of texts to generate.

    Returns:
        [`Block`]
    """
    before = writer.generated_tokens
    seed = plan.decoding.seed
    problems = [
        Problem(row["prompt"], problem_class, row.get("solution"))
        for row, problem_class in zip(rows, classes, strict=True)
    ]
    ids = [problem_id(problem.prompt) for problem in problems]
    asked = [position for position in range(len(rows)) for _ in range(plan.num_strategies)]
    written = writer.write_strategies([problems[i] for i in asked], plan.decoding)
    tried = []
    for position, strategy in zip(asked, written, strict=True):
        flaw = find_flaw(strategy, problems[position].text, problems[position].answer)
        tried.append(Tried(strategy.text, problems[position].problem_class, (ids[position],), flaw))
    sound = [position for position, one in enumerate(tried) if one.flaw is None]
    if sound:
        baselines = _baselines(writer, rows, verifier, replace(plan, decoding=replace(plan.decoding, seed=seed + 1)))
        pairs = [(position, target) for position in sound for target in range(len(rows))]
        texts = writer.execute(
            [problems[target] for _, target in pairs],
            [tried[position].strategy for position, _ in pairs],
            replace(plan.decoding, seed=seed + 2),
        )
        outcomes = _known(verify(verifier, [rows[target] for _, target in pairs], texts))
        executions: dict[int, list[Executed]] = defaultdict(list)
        for (position, target), text, outcome in zip(pairs, texts, outcomes, strict=True):
            sibling = ids[target] not in tried[position].sources
            executions[position].append(Executed(ids[target], text.strip(), outcome, baselines[target], sibling))
        for position in sound:
            tried[position] = replace(tried[position], executions=tuple(executions[position]))
    return Block(ids, tried, writer.generated_tokens - before)


def _baselines(writer: Writer, rows: list[Row], verifier: Verifier, plan: Plan) -> list[float | None]:
    """Mean outcome of answers to each problem without a strategy."""
    asked = [row for row in rows for _ in range(plan.num_answers)]
    texts = writer.answer([_with_text(row["prompt"], plan.answer_prompt) for row in asked], plan.decoding)
    outcomes = _known(verify(verifier, asked, texts))
    groups = [outcomes[start : start + plan.num_answers] for start in range(0, len(outcomes), plan.num_answers)]
    verified = [[outcome for outcome in group if outcome is not None] for group in groups]
    return [fmean(group) if group else None for group in verified]


def work_block(
    write: Callable[[list[Row], list[str], int], list[list[Pair]]],
    rows: list[Row],
    classes: list[str],
    verifier: Verifier,
    fits: Callable[[str, str], bool],
    number: int,
) -> Block:
    """
    Pairs worked solutions with strategies that describe them.

    Args:
        write (`Callable`):
            Returns strategies and executions for each row, given rows, classes and the block's number.
        rows (`list[dict]`):
            The problems' rows.
        classes (`list[str]`):
            Their classes.
        verifier (`Callable`):
            TRL reward function, which the executions must satisfy.
        fits (`Callable[[str, str], bool]`):
            Whether strategy and execution are short enough.
        number (`int`):
            Number of the block.

    Returns:
        [`Block`]: Without the tokens.
    """
    ids = [problem_id(row["prompt"]) for row in rows]
    pairs = write(rows, classes, number)
    written = [(position, *pair) for position, own in enumerate(pairs) for pair in own]
    outcomes = _known(
        verify(verifier, [rows[position] for position, _, _ in written], [text for _, _, text in written])
    )
    tried = []
    for (position, strategy, text), outcome in zip(written, outcomes, strict=True):
        flaw = find_flaw(strategy, problem_text(rows[position]["prompt"]), rows[position].get("solution"))
        if flaw is None and not fits(strategy.text, text):
            flaw = "too long"
        execution = Executed(ids[position], text, outcome)
        tried.append(Tried(strategy.text, classes[position], (ids[position],), flaw, (execution,)))
    return Block(ids, tried, 0)


def by_rule(rows: list[Row], classes: list[str], draws: int, seed: int) -> list[list[Pair]]:
    """
    Strategies and executions by rules: for covered reasoning-gym families and for worked solutions with calculator
    annotations.

    Args:
        rows (`list[dict]`):
            The problems' rows.
        classes (`list[str]`):
            Their classes.
        draws (`int`):
            Strategies drawn for a problem of a reasoning-gym family. Distinct ones are returned.
        seed (`int`):
            Seed of the draws.

    Returns:
        `list[list[tuple[ParsedStrategy, str]]]`: For each row, empty where there is no rule.
    """
    rng = random.Random(seed)
    by_row: list[list[Pair]] = []
    for row, problem_class in zip(rows, classes, strict=True):
        pairs: dict[str, Pair] = {}
        if row.get("entry") is not None:
            for _ in range(draws):
                trace = worked_traces({**row, "problem_class": problem_class}, rng)
                if trace is not None:
                    pairs[trace.strategy] = (parse_strategy(trace.strategy), trace.execution)
        elif (worked := row.get("worked_solution")) is not None:
            strategy = strategy_from_annotations(worked, problem_text(row["prompt"]))
            execution = worked_execution(worked, row.get("solution"))
            if strategy is not None and execution is not None:
                pairs[strategy] = (parse_strategy(strategy), execution)
        by_row.append(list(pairs.values()))
    return by_row


def by_writer(writer: Writer, rows: list[Row], classes: list[str], plan: Plan) -> list[list[Pair]]:
    """
    Strategies that a model writes for worked solutions, which are the executions.

    Args:
        writer ([`Writer`]):
            The model.
        rows (`list[dict]`):
            The problems' rows.
        classes (`list[str]`):
            Their classes.
        plan ([`Plan`]):
            How many strategies, and how to decode.

    Returns:
        `list[list[tuple[ParsedStrategy, str]]]`: For each row, empty without a worked solution.
    """
    worked = worked_prompts(rows)
    problems = [
        Problem(prompt, classes[position], rows[position].get("solution"))
        for position, (prompt, _) in worked.items()
        for _ in range(plan.num_strategies)
    ]
    written = writer.write_strategies(problems, plan.decoding) if problems else []
    by_row: list[list[Pair]] = [[] for _ in rows]
    for order, (position, (_, execution)) in enumerate(worked.items()):
        own = written[order * plan.num_strategies : (order + 1) * plan.num_strategies]
        by_row[position] = [(strategy, execution) for strategy in {one.text: one for one in own}.values()]
    return by_row


def worked_prompts(rows: list[Row]) -> dict[int, tuple[Prompt, str]]:
    """The prompt for a strategy of a worked solution, and the solution as execution, by the places of their rows."""
    found: dict[int, tuple[Prompt, str]] = {}
    for position, row in enumerate(rows):
        worked = row.get("worked_solution")
        execution = None if worked is None else worked_execution(worked, row.get("solution"))
        if execution is not None:
            found[position] = (_with_text(row["prompt"], f"{WORKED_HEADER}\n{execution}"), execution)
    return found


def _with_text(prompt: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """A prompt with a text added to its last message."""
    return [*prompt[:-1], {**prompt[-1], "content": f"{problem_text(prompt)}\n\n{text}"}]


def _known(outcomes: list[float]) -> list[float | None]:
    return [None if math.isnan(outcome) else outcome for outcome in outcomes]


# The record


def open_record(path: Path, settings: dict[str, Any]) -> list[Block]:
    """
    Reads the blocks that an earlier run finished, or creates an empty record. An incomplete last line is removed.

    Args:
        path (`Path`):
            The record.
        settings (`dict`):
            Everything the blocks depend on.

    Returns:
        `list[Block]`: In order.

    Raises:
        [`~trl_sgpo.errors.ConfigError`]: The record was made with other settings.
        [`~trl_sgpo.errors.DataError`]: It is damaged.
    """
    settings = json.loads(json.dumps(settings))
    try:
        lines = list(read_lines(path)) if path.exists() else []
        if not lines:
            _append(path, {"settings": settings}, 0)
            return []
        whole = sum(map(len, lines))
        if whole < path.stat().st_size:
            append_file(path, whole).close()
        recorded = parse_json(lines[0])["settings"]
        changed = changes(recorded, settings)
        blocks = [] if changed else [Block.from_dict(parse_json(line)) for line in lines[1:]]
    except SGPOError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): move it away to start anew.") from error
    if changed:
        raise ConfigError(
            f"{path} was made with other settings ({changed}): name another `--output_dir`, or use the same settings "
            "to continue it."
        )
    return blocks


def _append(path: Path, row: dict[str, Any], length: int | None = None) -> None:
    with append_file(path, length) as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_blocks(
    path: Path,
    settings: dict[str, Any],
    blocks: list[list[int]],
    ids: Sequence[str],
    do: Callable[[list[int], int], Block],
) -> list[Block]:
    """
    Runs the blocks that are not in the record, and records each.

    Args:
        path (`Path`):
            The record, see [`open_record`].
        settings (`dict`):
            Everything the blocks depend on.
        blocks (`list[list[int]]`):
            Indices of each block's problems.
        ids (`Sequence[str]`):
            Id of each problem.
        do (`Callable[[list[int], int], Block]`):
            Runs a block, given its problems and its number.

    Returns:
        `list[Block]`: All blocks, including those of earlier runs.

    Raises:
        [`~trl_sgpo.errors.DataError`]: The record has blocks of other problems.
    """
    done = open_record(path, settings)[: len(blocks)]
    for number, block in enumerate(done):
        if block.problems != [ids[index] for index in blocks[number]]:
            raise DataError(f"{path} is damaged (block {number} is of other problems): move it away to start anew.")
    with tqdm(total=len(blocks), initial=len(done), desc="Bootstrap", unit="block") as bar:
        for number in range(len(done), len(blocks)):
            block = do(blocks[number], number)
            _append(path, block.to_dict())
            done.append(block)
            bar.update()
    return done
