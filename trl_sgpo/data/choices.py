"""Multiple choice: the choices that a problem shows with letters, and answers as the letters of their choices."""

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from ..errors import DataError
from .columns import as_text, choices_of, rows_in_short, template_parts


Choices = list[tuple[str, str]]
"""Labels and texts of the choices of a problem."""

MAX_DIGITS = 9  # of an index

_LABEL = re.compile(r"(?:\A|\W)(\w)[.):\]*]+\s*\Z")  # of a column in a template, as `A.` in `A. {option_a}`
_OPTION = re.compile(r"(op(?:t|tion)?s?|choice|ending|sol)?_?([a-e]|[0-5])", re.IGNORECASE)
_MEND = "write answers as letters"


def option_letters(names: Sequence[str]) -> dict[str, str]:
    """
    Finds columns that hold one choice each, such as `A` to `D` or `option1` and `option2`.

    Args:
        names (`Sequence[str]`):
            Names of all columns.

    Returns:
        `dict[str, str]`: The columns in order, and the letters to show them with.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        if (match := _OPTION.fullmatch(name)) is not None:
            groups.setdefault((match[1] or "").casefold(), {})[match[2].casefold()] = name
    letters: dict[str, str] = {}
    for group in groups.values():
        signs = sorted(group)
        run = [chr(ord(signs[0]) + place) for place in range(len(signs))]
        if len(signs) > 1 and signs == run and signs[0] in "a01":
            letters |= dict(zip((group[sign] for sign in signs), ascii_uppercase, strict=False))
    return letters


def shown_choices(template: str, row: Mapping[str, Any], sources: Sequence[str]) -> Choices:
    """
    The choices that a template shows with labels: a list, or columns with a letter before each.

    Args:
        template (`str`):
            Text with column names in braces.
        row (`Mapping[str, Any]`):
            Values of the columns.
        sources (`Sequence[str]`):
            The columns of the template.

    Returns:
        `list[tuple[str, str]]`: Labels and texts, empty if there are no choices or several lists.
    """
    texts = [text for text, name in template_parts(template) if name is not None]
    lists = [choices_of(row[column], column) for column in sources if isinstance(row[column], list | dict)]
    if lists:
        return [(str(label), as_text(item, "")) for label, item in lists[0]] if len(lists) == 1 else []
    run: Choices = []
    for text, column in zip(texts, sources, strict=True):
        match = _LABEL.search(text)
        if match is not None and (ord(match[1]) == ord(run[-1][0]) + 1 if run else match[1] in "Aa1"):
            run.append((match[1], as_text(row[column], column)))
    return run if len(run) > 1 else []


def as_letters(
    answers: Sequence[str | None], choices: Sequence[Choices], source: str, base: Callable[[], int | None]
) -> list[str | None]:
    """
    Writes answers as the labels of their choices, which is what a model can answer with.

    An answer may be a label, the text of a choice or its index: whatever fits all rows. Indices count from 0 where
    one is 0, and from 1 where one is the number of choices.

    Args:
        answers (`Sequence[str | None]`):
            Answers as they are in the file.
        choices (`Sequence[list[tuple[str, str]]]`):
            The choices of the same rows, see [`shown_choices`].
        source (`str`):
            Name of the dataset in messages.
        base (`Callable[[], int | None]`):
            Returns the first index if these rows do not tell it, `None` if it is not known.

    Returns:
        `list[str | None]`: Labels, or the answers as they are if they are none of these.

    Raises:
        [`DataError`]: Answers can be read in two ways, or some rows have an answer that is no choice.
    """
    rows = [row for row, answer in enumerate(answers) if answer is not None and choices[row]]
    pairs = [(answers[row] or "", choices[row]) for row in rows]
    if not pairs:
        return list(answers)
    readings = [[_by_label(*pair) for pair in pairs], [_by_text(*pair) for pair in pairs]]
    first = index_base(answers, choices)
    complete = [reading for reading in readings if None not in reading]
    if first is None and not complete and all(_in_list(*pair) for pair in pairs):
        first = base()
        if first is None:
            raise DataError(
                f"{source}: answers are indices of the choices, and no row tells whether they count from 0 or 1: "
                f"{_MEND}."
            )
    if first is not None:
        complete.append([each[int(answer) - first][0] for answer, each in pairs])
    if not complete:
        missed = min(
            ([row for row, label in zip(rows, reading, strict=True) if label is None] for reading in readings), key=len
        )
        if 2 * len(missed) < len(rows):
            raise DataError(
                f"{source}: {len(missed)} of {len(rows)} answers are none of the choices that the problem shows "
                f"({rows_in_short([row + 1 for row in missed])}): {_MEND}."
            )
        return list(answers)
    if any(reading != complete[0] for reading in complete):
        raise DataError(
            f"{source}: answers can be read as labels, texts or indices of the choices, which differ: {_MEND}."
        )
    letters = dict(zip(rows, complete[0], strict=True))
    return [letters.get(row, answer) for row, answer in enumerate(answers)]


def index_base(answers: Sequence[str | None], choices: Sequence[Choices]) -> int | None:
    """The first index if answers are indices of their choices and tell it, otherwise `None`."""
    pairs = [(answer, each) for answer, each in zip(answers, choices, strict=True) if answer is not None and each]
    if not pairs or not all(_is_index(answer) for answer, _ in pairs):
        return None
    if any(int(answer) == 0 for answer, _ in pairs):
        return 0 if all(int(answer) < len(each) for answer, each in pairs) else None
    if any(int(answer) == len(each) for answer, each in pairs):
        return 1 if all(int(answer) <= len(each) for answer, each in pairs) else None
    return None


def _is_index(answer: str) -> bool:
    return answer.isdecimal() and len(answer) <= MAX_DIGITS


def _in_list(answer: str, choices: Choices) -> bool:
    return _is_index(answer) and 1 <= int(answer) < len(choices)


def _by_label(answer: str, choices: Choices) -> str | None:
    return next((label for label, _ in choices if label.casefold() == answer.strip(" ().").casefold()), None)


def _by_text(answer: str, choices: Choices) -> str | None:
    wanted = " ".join(answer.split()).casefold()
    return next((label for label, text in choices if " ".join(text.split()).casefold() == wanted), None)


def check_letters_shown(
    template: str, rows: Sequence[Mapping[str, Any]], sources: Sequence[str], answers: Sequence[str | None]
) -> None:
    """
    Checks that choices are shown with letters where answers are letters or indices.

    Raises:
        [`DataError`]: A template shows columns of choices without letters. The message suggests one.
    """
    letters = {name: letter for name, letter in option_letters(sources).items() if name in sources}
    pairs = [
        (answer, [(letter, as_text(row[name], name)) for name, letter in letters.items()])
        for answer, row in zip(answers, rows, strict=True)
        if answer is not None
    ]
    if len(letters) < 2 or not pairs or all(_by_text(*pair) is not None for pair in pairs):
        return
    if all(_by_label(*pair) is not None or pair[0] == "0" or _in_list(*pair) for pair in pairs):
        fixed = template
        for name, letter in letters.items():
            fixed = fixed.replace(f"{{{name}}}", f"{letter}. {{{name}}}")
        raise DataError(
            f"`prompt_template` shows the choices {', '.join(letters)} without the letters that answers name: write "
            f"{fixed!r}."
        )
