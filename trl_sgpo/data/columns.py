"""Columns of a dataset that hold problems and answers: found by name or named, and read as text."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter, ascii_uppercase
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError


if TYPE_CHECKING:
    from datasets import Features

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
NO_ANSWER = ("none", "null", "nan", "na", "n/a")  # texts that other programs write for a missing answer
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "rollout")
"""What reward functions get beside the columns of the dataset."""
_SHOWN = 5
_TEXTS = ("string", "large_string", "null")  # types of Arrow
_NUMBERS = ("int", "uint", "float")


@dataclass(frozen=True)
class Columns:
    """
    Where the problems and the answers of a dataset are. Names match columns whatever their case.

    Args:
        prompt_column (`str`, *optional*):
            Column with the problem. If `None`, the first of `prompt`, `question` and `problem` that a row has.
        prompt_template (`str`, *optional*):
            Text of the problem with column names in braces, like `"{Body} {Question}"`, instead of a column. Literal
            braces are written `{{` and `}}`.
        answer_column (`str`, *optional*):
            Column with the answer. If `None`, `answer`, else `solution`.
    """

    prompt_column: str | None = None
    prompt_template: str | None = None
    answer_column: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_column is not None and self.prompt_template is not None:
            raise ConfigError("`prompt_column` and `prompt_template` both name the problem: set one of them.")
        if self.prompt_template is not None:
            template_parts(self.prompt_template)


def find_column(name: str, columns: Sequence[str]) -> str | None:
    """
    Finds a column by its name, whatever its case.

    Args:
        name (`str`):
            The name. A column that is written exactly so is preferred.
        columns (`Sequence[str]`):
            Names of all columns.

    Returns:
        `str` or `None`: The column, `None` if there is none.

    Raises:
        [`DataError`]: Several columns differ from the name in case only.
    """
    if name in columns:
        return name
    matches = [column for column in columns if column.casefold() == name.casefold()]
    if len(matches) > 1:
        raise DataError(
            f"`{name}` may be each of the columns {', '.join(matches)}: write it as the column is written."
        )
    return matches[0] if matches else None


def require_column(key: str, name: str, columns: Sequence[str]) -> str:
    """The column that a key names, or a [`DataError`] that lists the columns."""
    found = find_column(name, columns)
    if found is None:
        raise DataError(f"`{key}` names no column {name!r}: the columns are {', '.join(columns)}.")
    return found


def check_column_names(columns: Sequence[str]) -> None:
    """Raises [`DataError`] for a column that reward functions would not get, because its name is taken."""
    for name in columns:
        if name in GIVEN:
            raise DataError(
                f"The dataset has a column `{name}`, whose name is that of another argument of reward functions: "
                "rename it."
            )


def check_entries(features: "Features") -> None:
    """Raises [`DataError`] for a column `entry` of other values than texts, which refer to generated problems."""
    if "entry" in features and not _holds(features["entry"], _TEXTS):
        raise DataError(
            "The dataset has a column `entry` without texts, and a column of this name refers to generated problems: "
            "rename it, or leave it out."
        )


def check_solutions(features: "Features") -> None:
    """Raises [`DataError`] for a column `solution` of other values than texts and numbers."""
    if "solution" in features and not _holds(features["solution"], _TEXTS + _NUMBERS):
        raise DataError(
            "The column `solution` holds neither texts nor numbers, and `answer_reward` compares with these: write "
            "each answer as one short text."
        )


def _holds(feature: Any, kinds: tuple[str, ...]) -> bool:
    """Whether a feature is one of single values of some types."""
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype.startswith(kinds)


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """
    Splits a template into pairs of literal text and the column name that follows it, `None` at the end.

    Raises:
        [`ConfigError`]: Braces that do not match, or hold something else than a column name.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"`prompt_template` {template!r} cannot be read ({error}): write column names in braces, and literal "
            "braces as {{ and }}."
        ) from error
    for _, name, form, conversion in parsed:
        if name is not None and (not name.strip() or form or conversion):
            raise ConfigError(
                f"`prompt_template` {template!r} has more or less than a column name in braces: write it like "
                "{Body}, and literal braces as {{ and }}."
            )
    if not any(name for _, name, _, _ in parsed):
        raise ConfigError(f"`prompt_template` {template!r} names no column: write it like '{{Body}} {{Question}}'.")
    return [(text, name) for text, name, _, _ in parsed]


def prompt_sources(chosen: Columns, columns: Sequence[str]) -> list[str]:
    """
    Finds the columns that problems are read from.

    Args:
        chosen ([`Columns`]):
            What is named.
        columns (`Sequence[str]`):
            Names of all columns.

    Returns:
        `list[str]`: Columns of the template, the named column, or those of which each row has one.

    Raises:
        [`DataError`]: There is no such column.
    """
    if chosen.prompt_template is not None:
        names = [name for _, name in template_parts(chosen.prompt_template) if name is not None]
        return [require_column("prompt_template", name, columns) for name in names]
    if chosen.prompt_column is not None:
        return [require_column("prompt_column", chosen.prompt_column, columns)]
    found = [column for name in PROMPT_COLUMNS if (column := find_column(name, columns)) is not None]
    if not found:
        raise DataError(
            f"No prompts in the columns {', '.join(columns)}: name the one with the problems as `prompt_column`, or "
            "several in a `prompt_template` like '{Body} {Question}'. If the rows are a list within an object, as in "
            '{"data": [...]}, save that list as the file.'
        )
    return found


def answer_sources(chosen: Columns, columns: Sequence[str]) -> list[str]:
    """
    Finds the columns that answers are read from, the short one first.

    Args:
        chosen ([`Columns`]):
            What is named.
        columns (`Sequence[str]`):
            Names of all columns.

    Returns:
        `list[str]`: The named column, or `answer` and `solution` where they exist.

    Raises:
        [`DataError`]: There is no such column.
    """
    if chosen.answer_column is not None:
        return [require_column("answer_column", chosen.answer_column, columns)]
    return [column for name in ANSWER_COLUMNS if (column := find_column(name, columns)) is not None]


def fill_template(template: str, row: Mapping[str, Any], sources: Sequence[str]) -> str | None:
    """
    Writes a problem.

    Args:
        template (`str`):
            Text with column names in braces.
        row (`Mapping[str, Any]`):
            Values of the columns. A missing one is an empty text.
        sources (`Sequence[str]`):
            The columns of the template, see [`prompt_sources`].

    Returns:
        `str` or `None`: The text without surrounding white space, `None` if all values are missing.
    """
    values = [as_text(row[column], column) for column in sources]
    if not any(values):
        return None
    left = iter(values)
    return "".join(text + (next(left) if name else "") for text, name in template_parts(template)).strip()


def as_text(value: Any, column: str) -> str:
    """
    Writes a value in a problem: numbers without a needless `.0`, and choices on lines of their own, as `A. …`. Choices
    are a list, whose items are lettered, texts by their labels, or a list of texts beside one of labels.

    Raises:
        [`DataError`]: It is none of these.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float):
        return "" if is_missing(value) else as_answer(value)
    choices = choices_of(value, column)
    return "".join(f"\n{label}. {as_text(item, column)}" for label, item in choices if item is not None)


def choices_of(value: Any, column: str) -> list[tuple[Any, Any]]:
    """
    Reads choices as pairs of label and text.

    Raises:
        [`DataError`]: They are none.
    """
    if isinstance(value, list):
        choices: list[tuple[Any, Any]] = list(zip(ascii_uppercase, value, strict=False))
    elif isinstance(value, dict):
        labelled = value.keys() == {"label", "text"}
        choices = list(zip(value["label"], value["text"], strict=True)) if labelled else list(value.items())
    else:
        choices = []
    if not choices or any(isinstance(item, list | dict) for _, item in choices):
        raise DataError(f"The column `{column}` of `prompt_template` holds neither text nor choices: leave it out.")
    return choices


def as_answer(value: Any) -> str:
    """Writes an answer as text: `8` for the number 8.0, `true` for a truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def is_missing(value: Any) -> bool:
    """Whether a value is none: empty, or no finite number."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, str) and not value.strip())


def read_answer(value: Any, column: str) -> str | None:
    """
    Reads an answer as text, as [`~trl_sgpo.data.answers.answer_reward`] compares it: of a list of one, its item, and
    several numbers with commas between them.

    Args:
        value (`Any`):
            A value of the column.
        column (`str`):
            Its name, for messages.

    Returns:
        `str` or `None`: `None` if it is missing.

    Raises:
        [`DataError`]: It is a mapping, bytes, or a list of several texts.
    """
    if isinstance(value, list):
        if len(value) > 1 and all(isinstance(item, int | float) for item in value):
            return ", ".join(map(as_answer, value))
        if len(value) > 1:
            raise DataError(
                f"The column `{column}` holds lists of several texts, such as {value!r:.80}, of which one or all may "
                "be right: write each answer as one text, with commas between its parts."
            )
        return read_answer(value[0], column) if value else None
    if isinstance(value, dict | bytes):
        keys = f"mappings with the keys {', '.join(map(str, value))}" if isinstance(value, dict) else "bytes"
        raise DataError(f"The column `{column}` holds {keys}: write each answer as one text.")
    return None if is_missing(value) else as_answer(value)


def rows_in_short(numbers: Sequence[int]) -> str:
    """The first of some rows by their numbers, for messages."""
    first = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
    return f"row{'s' if len(numbers) > 1 else ''} {first}, counted from 1"


def check_answer_not_shown(chosen: Columns, sources: Sequence[str], answers: Sequence[str]) -> None:
    """Raises [`DataError`] if problems show the column that answers are read from."""
    shown = [name for name in (sources if chosen.prompt_template is not None else sources[:1]) if name in answers]
    if not shown:
        return
    key = "`prompt_column`" if chosen.prompt_column is not None else "the problem"
    key = "`prompt_template`" if chosen.prompt_template is not None else key
    raise DataError(
        f"{key} shows the column `{shown[0]}`, which the answer is read from: leave it out of the problem, or name "
        "another `answer_column`."
    )


def missing_answers(solutions: Sequence[str | None]) -> str | None:
    """One line that names the rows without an answer, `None` if all have one."""
    rows = [number for number, solution in enumerate(solutions, 1) if solution is None]
    if not rows:
        return None
    have = "has no answer" if len(rows) == 1 else "have no answer"
    return f"{len(rows)} of {len(solutions)} problems {have} and get no reward from it ({rows_in_short(rows)})."


def stands_for_none(answer: str | None) -> bool:
    """Whether an answer is missing, or a text that other programs write for a missing one, such as `None`."""
    return answer is None or answer.strip().casefold() in NO_ANSWER


def doubtful_answers(solutions: Sequence[str | None]) -> str | None:
    """One line that names the rows whose answer may stand for a missing one, `None` if there are none."""
    rows = [number for number, text in enumerate(solutions, 1) if text is not None and stands_for_none(text)]
    if not rows:
        return None
    are = "is a text" if len(rows) == 1 else "are texts"
    return (
        f"{len(rows)} of {len(solutions)} answers {are} such as `{solutions[rows[0] - 1]}` ({rows_in_short(rows)}): "
        "leave these fields empty if no answer is known."
    )


def copied_problems(prompts: Sequence[Any], solutions: Sequence[str | None]) -> str | None:
    """One line that names the rows whose problem an earlier row has, `None` if there are none."""
    first: dict[str, str | None] = {}
    rows, others = [], 0
    for number, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True), 1):
        key = json.dumps(prompt, default=str)
        if key in first:
            rows.append(number)
            others += None not in (solution, first[key]) and solution != first[key]
        else:
            first[key] = solution
    if not rows:
        return None
    are = "is a copy" if len(rows) == 1 else "are copies"
    differ = f", {others} of them with another answer" if others else ""
    return f"{len(rows)} of {len(prompts)} problems {are} of an earlier one{differ} ({rows_in_short(rows)})."
