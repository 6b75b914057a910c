"""Rows of exports: written from strategies, and read with full checks because they are untrusted."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, TypeVar

from ..errors import BankError
from .strategy import Execution, Strategy


MAX_ROW_BYTES = 16 * 2**20  # of a line of JSON: its values take about twenty times as much memory
MAX_TEXT = 4_000  # characters: prompts quote strategies
MAX_NAME = 200  # characters of a class, a model, a run, an origin
MAX_ITEMS = 100_000  # of one strategy's problems, parents or executions
MAX_COUNT = 2**53  # up to here floats represent all whole numbers, and SQLite's integers are large enough

FIELDS = (
    "id",
    "text",
    "problem_class",
    "source_problems",
    "parents",
    "model",
    "run",
    "step",
    "origin",
    "trust",
    "successes",
    "trials",
    "problems",
    "solved",
    "baseline",
    "plain_problems",
    "plain_solved",
    "plain_baseline",
    "shown",
    "executions",
)
EXECUTION_FIELDS = (
    "problem",
    "problem_class",
    "trials",
    "successes",
    "baseline",
    "plain_trials",
    "plain_successes",
    "plain_baseline",
)

_STRATEGY_ID = re.compile(r"[0-9a-f]{16}")
_PROBLEM_ID = re.compile(r"[\w.:/-]{0,64}", re.ASCII)  # `problem_id` gives 16 digits, but a bank may use other names
_NOT_TEXT = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_ONE_LINE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_DIGITS = 20

T = TypeVar("T")


def to_row(strategy: Strategy, executions: Iterable[Execution]) -> dict[str, Any]:
    """
    The row of a strategy.

    Args:
        strategy ([`Strategy`]):
            The strategy.
        executions (`Iterable[Execution]`):
            Its executions.

    Returns:
        `dict[str, Any]`: JSON values by the names in `FIELDS`.
    """
    return {
        "id": strategy.id,
        **{field: vars(strategy)[field] for field in FIELDS[1:-1]},
        "source_problems": list(strategy.source_problems),
        "parents": list(strategy.parents),
        "executions": [{field: vars(each)[field] for field in EXECUTION_FIELDS} for each in executions],
    }


def from_row(row: Any, with_plain: bool = True) -> tuple[Strategy, list[Execution]]:
    """
    The strategy of a row and its executions.

    Args:
        row (`Any`):
            A value that was read as a row.
        with_plain (`bool`, *optional*, defaults to `True`):
            Whether it has counts beside plain answers. Rows of the first format version have none.

    Returns:
        `tuple[Strategy, list[Execution]]`: Strategy and executions, with trust state and counts as they are there.

    Raises:
        `ValueError`: If anything in it is not as `to_row` writes it. The message is a clause without a full stop.
    """
    row = _completed(row, FIELDS, with_plain, "the row")
    try:
        strategy = Strategy(
            text=_text(row["text"]),
            problem_class=_class(row["problem_class"]),
            source_problems=tuple(items(row["source_problems"], "source_problems", _problem)),
            parents=tuple(items(row["parents"], "parents", _parent)),
            model=line(row["model"], "model"),
            run=line(row["run"], "run"),
            step=count(row["step"], "step"),
            origin=line(row["origin"], "origin"),
            trust=line(row["trust"], "trust"),
            successes=_total(row["successes"], "successes"),
            trials=count(row["trials"], "trials"),
            problems=count(row["problems"], "problems"),
            solved=_total(row["solved"], "solved"),
            baseline=_total(row["baseline"], "baseline"),
            plain_problems=count(row["plain_problems"], "plain_problems"),
            plain_solved=_total(row["plain_solved"], "plain_solved"),
            plain_baseline=_total(row["plain_baseline"], "plain_baseline"),
            shown=count(row["shown"], "shown"),
        )
    except BankError as error:
        raise ValueError(str(error).rstrip(".")) from error
    if row["id"] != strategy.id:
        raise ValueError("its id is not that of its text and class")
    executions = items(row["executions"], "executions", lambda each: _execution(strategy.id, each, with_plain))
    _expect_consistent(strategy, executions)
    return strategy, executions


def _completed(row: Any, names: Sequence[str], with_plain: bool, what: str) -> dict[str, Any]:
    """A row with exactly these keys, or, with counts of 0, all of them but those of plain answers."""
    absent = [] if with_plain else [name for name in names if name.startswith("plain_")]
    expect_keys(row, set(names) - {*absent}, what)
    return row | dict.fromkeys(absent, 0)


def _execution(strategy_id: str, row: Any, with_plain: bool) -> Execution:
    row = _completed(row, EXECUTION_FIELDS, with_plain, "an execution")
    execution = Execution(
        strategy_id,
        problem=_problem(row["problem"]),
        problem_class=_class(row["problem_class"]),
        trials=count(row["trials"], "trials of an execution"),
        successes=_total(row["successes"], "successes of an execution"),
        baseline=_total(row["baseline"], "baseline of an execution"),
        plain_trials=count(row["plain_trials"], "plain_trials of an execution"),
        plain_successes=_total(row["plain_successes"], "plain_successes of an execution"),
        plain_baseline=_total(row["plain_baseline"], "plain_baseline of an execution"),
    )
    expect_possible(execution)
    return execution


def expect_possible(execution: Execution) -> None:
    """Raises a `ValueError` if the counts of an execution contradict each other."""
    if not (0 < execution.trials <= MAX_COUNT and 0 <= execution.plain_trials <= execution.trials):
        raise ValueError("an execution has no trial, more than 2**53, or fewer than beside plain answers")
    for trials, sums in (
        (execution.trials, (execution.successes, execution.baseline)),
        (execution.plain_trials, (execution.plain_successes, execution.plain_baseline)),
    ):
        if not all(0 <= each <= trials for each in sums):
            raise ValueError("an execution has more successes than trials, or fewer than none")


def _expect_consistent(strategy: Strategy, executions: list[Execution]) -> None:
    if len({execution.problem for execution in executions}) < len(executions):
        raise ValueError("two of its executions are on the same problem")
    written_for = set(strategy.source_problems)
    others = [execution for execution in executions if execution.problem not in written_for]
    beside_plain = [execution for execution in others if execution.plain_trials]
    for known, claimed in (
        (strategy.trials, sum(each.trials for each in executions)),
        (strategy.successes, sum(each.successes for each in executions)),
        (strategy.problems, len(others)),
        (strategy.solved, sum(each.successes / each.trials for each in others)),
        (strategy.baseline, sum(each.baseline / each.trials for each in others)),
        (strategy.plain_problems, len(beside_plain)),
        (strategy.plain_solved, sum(each.plain_successes / each.plain_trials for each in beside_plain)),
        (strategy.plain_baseline, sum(each.plain_baseline / each.plain_trials for each in beside_plain)),
    ):
        if claimed > known + 1e-6 * (1 + known):  # sums of floats are rounded
            raise ValueError("its executions add up to more than its counts")


# Values


def _quoted(value: Any) -> str:
    """A value in the form in which messages quote it: short and on one line."""
    shown = ascii(value[:40] if isinstance(value, str) else value) if isinstance(value, str | int | float) else "..."
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def expect_keys(value: Any, names: Iterable[str], what: str) -> None:
    """Raises a `ValueError` if a value is not a `dict` with exactly these keys."""
    if type(value) is not dict:
        raise ValueError(f"{what} must be an object")
    expected = set(names)
    if missing := sorted(expected - value.keys()):
        raise ValueError(f"{what} lacks {missing[0]!r}")
    if unknown := sorted(value.keys() - expected):
        raise ValueError(f"{what} has {_quoted(unknown[0])}, which this format does not know")


def items(value: Any, what: str, parse: Callable[[Any], T]) -> list[T]:
    """The parsed elements of a list, or a `ValueError`."""
    if type(value) is not list or len(value) > MAX_ITEMS:
        raise ValueError(f"{what} must be a list of at most {MAX_ITEMS} elements")
    return [parse(each) for each in value]


def count(value: Any, what: str) -> int:
    """A whole number that is not negative, or a `ValueError`."""
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{what} must be a whole number from 0 to 2**53, not {_quoted(value)}")
    return value


def line(value: Any, what: str) -> str:
    """A short text on one line, or a `ValueError`."""
    if type(value) is not str or len(value) > MAX_NAME or _NOT_ONE_LINE.search(value):
        raise ValueError(f"{what} must be a line of at most {MAX_NAME} characters, not {_quoted(value)}")
    return value


def _total(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{what} must be a number from 0 to 2**53, not {_quoted(value)}")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT or not value.strip():
        raise ValueError(f"text must have at least one and at most {MAX_TEXT} characters")
    if found := _NOT_TEXT.search(value):
        raise ValueError(f"text has the control character {found[0]!a}")
    return value


def _class(value: Any) -> str:
    return line(value, "problem_class")


def _problem(value: Any) -> str:
    if type(value) is not str or not _PROBLEM_ID.fullmatch(value):
        raise ValueError(f"a problem's id must be at most 64 letters, digits or ._:/-, not {_quoted(value)}")
    return value


def _parent(value: Any) -> str:
    if type(value) is not str or not _STRATEGY_ID.fullmatch(value):
        raise ValueError(f"a parent must be 16 hexadecimal digits, not {_quoted(value)}")
    return value


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number has more than {_MAX_DIGITS} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)


def from_json(data: bytes) -> Any:
    """
    The value of a JSON document in UTF-8.

    Args:
        data (`bytes`):
            The document.

    Returns:
        `Any`: Its value.

    Raises:
        `ValueError`: If it is not strictly JSON, repeats a key, or has very large numbers or very deep nesting.
    """
    try:
        return _DECODER.decode(data.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """
    Rows as JSON, a line each.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            The rows.

    Returns:
        `bytes`: UTF-8, the same for the same rows.
    """
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def from_jsonl(data: bytes, expected: int) -> Iterator[Any]:
    """
    The values of lines of JSON, read when asked for.

    Args:
        data (`bytes`):
            The lines.
        expected (`int`):
            Number of lines.

    Returns:
        `Iterator[Any]`: A value a line.

    Raises:
        `ValueError`: If there are more or fewer lines, or one is too long, unfinished, or not strictly JSON.
    """
    if (lines := data.count(b"\n")) != expected:
        raise ValueError(f"it has {lines} lines, where its manifest counts {expected}")
    if data and not data.endswith(b"\n"):
        raise ValueError("its last line is cut off")
    for number, each in enumerate(BytesIO(data), 1):
        if len(each) > MAX_ROW_BYTES:
            raise ValueError(f"row {number}: it is longer than {MAX_ROW_BYTES >> 20} MiB")
        try:
            yield from_json(each)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
