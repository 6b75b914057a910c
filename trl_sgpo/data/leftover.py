"""Columns that a problem leaves out, and which of them look like a part of it: rules on names and values."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ..method.prompts import problem_text
from .choices import option_letters
from .columns import Columns, answer_sources, find_column, prompt_sources


if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 200  # rows that are looked at
MIN_WORDS = 4  # median words of a text that may be a part of a problem
MIN_FILLED = 0.5  # share of rows with a value
MIN_VARIED = 3  # different values
_READ = ("worked_solution", "problem_class", "subject", "entry")
_SOLUTION = re.compile(
    r"solution|answer|rationale|explanation|reason|thought|cot|response|completion|output|generat|chosen|rejected"
    r"|equation|formula|label|target|result|grade|program|code|strateg",
    re.IGNORECASE,
)
_PART = re.compile(r"choices?|options?|opt?(ion)?_?[a-e1-5]|[a-e]|body|context|passage|input", re.IGNORECASE)
_ANSWER = re.compile(r"answer|correct|target|label|gold|result", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Leftover:
    """
    Columns that neither problem nor answer is read from.

    Args:
        texts (`tuple[str, ...]`):
            Those with texts or lists of texts.
        parts (`tuple[str, ...]`):
            Those among them that look like a part of the problem.
        wholes (`tuple[str, ...]`):
            Those among the parts that contain the problem as it is read, without an answer at their end.
        answers (`tuple[str, ...]`):
            Columns that by their names may hold answers.
    """

    texts: tuple[str, ...]
    parts: tuple[str, ...]
    wholes: tuple[str, ...]
    answers: tuple[str, ...]


def leftover(rows: "Dataset", problems: "Dataset", columns: Columns) -> Leftover:
    """
    Finds the columns that are left out.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows as they are in the file.
        problems ([`~datasets.Dataset`]):
            The same rows as problems, see [`~trl_sgpo.data.tasks.to_problems`].
        columns ([`~trl_sgpo.data.columns.Columns`]):
            What problems and answers are read from.

    Returns:
        [`Leftover`]
    """
    names = rows.column_names
    used = {*prompt_sources(columns, names), *answer_sources(columns, names)}
    used |= {column for name in (*_READ, "solution") if (column := find_column(name, names)) is not None}
    prompts = [problem_text(prompt) for prompt in problems[:SAMPLE]["prompt"]]
    sample = rows[:SAMPLE]
    others = [name for name in names if name not in used]
    texts = [name for name in others if any(isinstance(value, str | list | dict) for value in sample[name])]
    parts = [name for name in texts if is_part(name, sample[name], prompts)]
    answers = problems[:SAMPLE]["solution"] if "solution" in problems.column_names else [None] * len(prompts)
    wholes = [
        name
        for name in parts
        if _mostly(prompt in _flat(value) for value, prompt in zip(sample[name], prompts, strict=True))
    ]
    solved = [
        name
        for name in wholes
        if _mostly(
            answer is not None and _flat(value).rstrip().endswith(answer)
            for value, answer in zip(sample[name], answers, strict=True)
        )
    ]
    return Leftover(
        texts=tuple(texts),
        parts=tuple(name for name in parts if name not in solved),
        wholes=tuple(name for name in wholes if name not in solved),
        answers=tuple(name for name in others if _ANSWER.search(name)),
    )


def _mostly(found: Iterable[bool]) -> bool:
    found = list(found)
    return 2 * sum(found) > len(found)


def is_part(name: str, values: Sequence[Any], prompts: Sequence[str]) -> bool:
    """
    Whether a column looks like a part of the problem.

    It does if at least half of the rows have a value, at least three values differ, most values are not in the problem
    already, and it is named like a part (`choices`, `options`, `body`, `context`, …), holds lists of two texts or
    more, or holds texts of four words or more in the median. It does not if it is named like a solution (`rationale`,
    `equation`, …) or holds worked solutions with a marked answer.

    Args:
        name (`str`):
            Its name.
        values (`Sequence[Any]`):
            Its values.
        prompts (`Sequence[str]`):
            The problems of the same rows.

    Returns:
        `bool`
    """
    filled = [(value, prompt) for value, prompt in zip(values, prompts, strict=True) if value]
    if not filled or len(filled) < MIN_FILLED * len(values):
        return False
    texts = [_flat(value) for value, _ in filled]
    news = [text for text, (_, prompt) in zip(texts, filled, strict=True) if text.strip() not in prompt]
    if len(set(texts)) < min(MIN_VARIED, len(values)) or 2 * len(news) < len(texts):
        return False
    if _PART.fullmatch(name):
        return True
    if _SOLUTION.search(name) or 2 * sum("####" in text or "\\boxed{" in text for text in texts) > len(texts):
        return False
    if any(isinstance(value, list | dict) for value, _ in filled):
        lists = [value for value, _ in filled if isinstance(value, list)]
        of_texts = all(isinstance(item, str) for value in lists for item in value)
        return len(lists) == len(filled) and of_texts and median(map(len, lists)) >= 2
    return median(len(_WORD.findall(text)) for text in texts) >= MIN_WORDS


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def suggest_template(names: Sequence[str], source: str, left: Leftover, row: dict[str, Any]) -> str:
    """
    A template of the problem and the columns that look like parts of it, in the order of the file, with choices last
    and a letter before each column of one choice.

    Args:
        names (`Sequence[str]`):
            All columns, in their order.
        source (`str`):
            The column that the problem is read from.
        left ([`Leftover`]):
            The columns that are left out.
        row (`dict[str, Any]`):
            A row, which tells texts from choices.

    Returns:
        `str`
    """
    if left.wholes:
        return f"{{{left.wholes[0]}}}"
    letters = option_letters(names)
    last = max((place for place, name in enumerate(letters) if name in left.parts), default=-1)
    options = {name: letter for place, (name, letter) in enumerate(letters.items()) if place <= last}
    chosen = [name for name in names if (name == source or name in left.parts) and name not in options]
    texts = [f"{{{name}}}" for name in chosen if not isinstance(row[name], list | dict)]
    texts += [f"{letter}. {{{name}}}" for name, letter in options.items()]
    choices = [name for name in chosen if isinstance(row[name], list | dict)]
    return " ".join(texts) + "".join(f"{{{name}}}" for name in choices)


def in_short(value: Any, width: int = 60) -> str:
    """A value of a column in one line."""
    text = " ".join((value if isinstance(value, str) else str(value)).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
