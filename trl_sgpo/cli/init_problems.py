"""The problems of `trl-sgpo init`: which columns they are read from, and how the model will see one."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checks.terminal import printable
from ..data.columns import ANSWER_COLUMNS, Columns, answer_sources, prompt_sources, read_answer, require_column
from ..errors import ConfigError, DataError


if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.leftover import Leftover
    from ..data.rows import Rows

Ask = Callable[[str, str | None, Callable[[str], Columns]], Columns]
LONG = 10  # words of an answer that is hardly a short one
_MOST_SHOWN = 10_000  # characters


def choose_columns(
    rows: "Rows", given: Columns, source: str, ask: Ask | None, answers: bool
) -> tuple[Columns, "Dataset"]:
    """
    Finds out what problems and answers are read from, shows one of each, and names what is left out.

    Args:
        rows ([`~trl_sgpo.data.rows.Rows`]):
            Rows as they are in the file.
        given ([`~trl_sgpo.data.columns.Columns`]):
            What options name.
        source (`str`):
            The file, for messages.
        ask (`Callable`, *optional*):
            Asks a question, with a default, until the answer passes a check. `None` without a terminal.
        answers (`bool`):
            Whether answers are needed, because no reward function is given.

    Returns:
        `tuple[Columns, Dataset]`: The columns, and the problems read from them.

    Raises:
        [`ConfigError`]: There is no terminal to ask in, and a column looks like a part of the problem, or the answers
            may be in a column that is not named like one. The message names the option.
        [`DataError`]: There is no such column.
    """
    from ..data.leftover import leftover
    from ..data.tasks import name_copies, read_problems

    dataset = rows.dataset
    columns = _with_prompt(dataset.column_names, given, ask)
    problems = read_problems(rows, columns, source)
    left = leftover(dataset, problems, columns)
    if left.parts and columns.prompt_column is None and columns.prompt_template is None:
        columns = _with_parts(dataset, columns, left, ask)
        problems = read_problems(rows, columns, source)
        left = leftover(dataset, problems, columns)
    if answers and left.answers and columns.answer_column is None and not has_answers(problems):
        columns = _with_answers(dataset.column_names, columns, left, ask)
        problems = read_problems(rows, columns, source)
        left = leftover(dataset, problems, columns)
    name_copies(source, problems)
    _show(problems, left, lambda index: _written(rows.texts, columns, index))
    return columns, problems


def has_answers(problems: "Dataset") -> bool:
    """Whether some problem has an answer."""
    return "solution" in problems.column_names and any(value is not None for value in problems["solution"])


def _with_prompt(names: list[str], columns: Columns, ask: Ask | None) -> Columns:
    def check(answer: str) -> Columns:
        return replace(columns, prompt_column=require_column("prompt_column", answer, names))

    try:
        prompt_sources(columns, names)
    except DataError:
        if ask is None or columns.prompt_column is not None or columns.prompt_template is not None:
            raise
        return ask(f"Column with the problems, of {', '.join(names)}", None, check)
    return columns


def _with_parts(rows: "Dataset", columns: Columns, left: "Leftover", ask: Ask | None) -> Columns:
    from ..data.leftover import in_short, suggest_template

    (source, *_) = prompt_sources(columns, rows.column_names)
    template = suggest_template(rows.column_names, source, left, rows[0])
    names = " and ".join(f"`{name}`" for name in left.parts)
    looks = "looks like a part of the problem" if len(left.parts) == 1 else "look like parts of the problem"
    if ask is None:
        raise ConfigError(
            f"{names} {looks} ({printable(in_short(rows[0][left.parts[0]]))!r}), and only `{source}` would be read: "
            f"add `--prompt_template {shlex.quote(template)}`, or `--prompt_column {shlex.quote(source)}` for that "
            "column alone."
        )

    def check(answer: str) -> Columns:
        chosen = replace(columns, prompt_template=answer)
        prompt_sources(chosen, rows.column_names)
        return chosen

    for name in left.parts:
        print(f"`{name}` looks like a part of the problem: {printable(in_short(rows[0][name]))}")
    return ask(f"Text of the problem ({{{source}}} for that column alone)", template, check)


def _with_answers(names: list[str], columns: Columns, left: "Leftover", ask: Ask | None) -> Columns:
    found = ", ".join(f"`{name}`" for name in left.answers)
    if ask is None:
        raise ConfigError(
            f"There is no answer in a column {' or '.join(f'`{name}`' for name in ANSWER_COLUMNS)}, and there is "
            f"{found}: add `--answer_column {shlex.quote(left.answers[0])}`, or `--reward_file my_rewards.py` to "
            "check answers in another way."
        )

    def check(answer: str) -> Columns:
        if answer == "-":
            return columns
        return replace(columns, answer_column=require_column("answer_column", answer, names))

    return ask("Column with the answers, - for none", left.answers[0], check)


def _written(rows: "Dataset", columns: Columns, index: int) -> str | None:
    """The answer of a row as it is in the file, where its problem shows choices with letters."""
    from ..data.choices import shown_choices

    row, names = rows[index], rows.column_names
    if columns.prompt_template is None:
        return None
    if not shown_choices(columns.prompt_template, row, prompt_sources(columns, names)):
        return None
    answers = (read_answer(row[name], name) for name in answer_sources(columns, names))
    return next((answer for answer in answers if answer is not None), None)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} … ({len(text):,} characters)"


def _show(problems: "Dataset", left: "Leftover", written: Callable[[int], str | None]) -> None:
    from ..data.leftover import in_short
    from ..method.prompts import problem_text

    answers: list[str | None] = problems["solution"][:] if has_answers(problems) else [None] * len(problems)
    shown, answer = next(((index, each) for index, each in enumerate(answers) if each is not None), (0, None))
    text = _cut(printable(problem_text(problems[shown]["prompt"])))
    print(f"Problem {shown + 1} of {len(problems)}, as the model will see it:\n")
    print("\n".join(f"  {line}" for line in text.splitlines()))
    print(f"\nIts answer: {'none' if answer is None else _cut(printable(answer))}")
    given = written(shown)
    if answer is not None and given is not None and given != answer:
        print(f"Answers are the letters of the choices: this one is {printable(in_short(given))} in the file.")
    if left.texts:
        print(f"Text columns that are left out: {', '.join(map(printable, left.texts))}")
    long = sum(each is not None and len(each.split()) > LONG for each in answers)
    if 2 * long > len(answers):
        print(f"Most answers have more than {LONG} words: name a column with short ones by `--answer_column`.")
    print()
