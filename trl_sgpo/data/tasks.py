"""Problems: loading them."""

import logging
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..method.prompts import check_none_empty, is_conversation
from .answers import answer_reward, same_answer
from .choices import as_letters, check_letters_shown, index_base, shown_choices
from .columns import (
    Columns,
    answer_sources,
    as_answer,
    check_answer_not_shown,
    check_column_names,
    check_entries,
    copied_problems,
    doubtful_answers,
    fill_template,
    find_column,
    is_missing,
    missing_answers,
    prompt_sources,
    read_answer,
)
from .final_answers import final_answer
from .leftover import in_short, leftover, suggest_template
from .rows import Rows
from .sources import load_rows


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .mixture import ProblemMixtureConfig, ProblemsConfig

logger = logging.getLogger(__name__)

__all__ = ["answer_reward", "final_answer", "load_mixture", "load_problems", "same_answer", "to_problems"]


def load_problems(
    path: str, split: str = "train", name: str | None = None, columns: Columns | None = None
) -> "Dataset":
    """
    Loads problems as rows with a conversational `prompt` and, where the source has answers, a `solution`.

    Args:
        path (`str`):
            `reasoning_gym/<family>[+<family>...][?key=value&size=400&seed=42]`,
            `list_functions/<seen|held_out|longer>[?size=320&seed=42&shortcuts=0.5]`,
            `word_programs/<seen|held_out|longer|reworded>[?size=300&seed=42&family=lists]`, a local `.jsonl`, `.json`,
            `.parquet` or `.csv` file, or a Hub id. `size` is the number of training problems (of each family), the
            other keys are settings of the families that have them.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. reasoning-gym families have `train` and `test`, which share no question.
        name (`str`, *optional*):
            Configuration of a Hub dataset, like `main` of `openai/gsm8k`.
        columns ([`~trl_sgpo.data.columns.Columns`], *optional*):
            Columns of problems and answers. If `None`, they are found by their usual names.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        `DataError`: If there is no such source, it has no prompts or not the columns named, or a column that looks
            like a part of the problem would not be read.
    """
    rows = load_rows(path, split, name)
    whole = partial(load_rows, path, split.partition("[")[0], name)
    problems = _problems_of(path, rows, columns or Columns(), whole)
    name_copies(path, problems)
    return problems


def load_mixture(mixture: "ProblemMixtureConfig") -> "DatasetDict":
    """
    Loads a TRL dataset mixture whose paths may also be reasoning-gym paths and local files, see [`load_problems`].

    Args:
        mixture ([`~trl_sgpo.data.mixture.ProblemMixtureConfig`]):
            The mixture. It is not changed.

    Returns:
        [`~datasets.DatasetDict`]: With a `train` split, and a `test` split if `test_split_size` is set.

    Raises:
        `DataError`: If a source is missing, the sources' columns do not fit together or `streaming` is set.
    """
    from datasets import DatasetDict, concatenate_datasets

    if mixture.streaming:
        raise DataError("Problems are grouped by class, which needs the whole dataset: set `streaming: false`.")
    parts = [_load_part(part) for part in mixture.datasets]
    shares = [part.fraction for part in mixture.datasets if part.fraction is not None]
    if shares:
        if len(shares) < len(parts):
            raise DataError("`fraction` is set for some datasets of the mixture: set it for all of them, or for none.")
        # As in TRL: the largest mixture with these shares that repeats no row
        weights = [share / sum(shares) for share in shares]
        total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight > 0)
        parts = [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]
    try:
        combined = concatenate_datasets(parts)
    except ValueError as error:
        if "aligned" not in str(error):
            raise
        raise DataError(
            f"The datasets {', '.join(part.path for part in mixture.datasets)} have a column of the same name and "
            f"different types ({error}): leave it out with `columns:` in each dataset of the mixture."
        ) from error
    name_copies("The mixture", combined)
    if mixture.test_split_size is None:
        return DatasetDict({"train": combined})
    return combined.train_test_split(test_size=mixture.test_split_size)


def _load_part(part: "ProblemsConfig") -> "Dataset":
    rows = load_rows(part.path, part.split, part.name, part.data_dir, part.data_files)
    rows = rows if part.columns is None else rows.select_columns(part.columns)
    whole = partial(load_rows, part.path, part.split.partition("[")[0], part.name, part.data_dir, part.data_files)
    return _problems_of(part.path, rows, part.chosen, whole)


def _problems_of(path: str, rows: Rows, columns: Columns, whole: Callable[[], Rows]) -> "Dataset":
    """Problems of a file, unless columns that look like parts of them would be left out and none is named."""
    problems = read_problems(rows, columns, path, whole)
    if columns.prompt_column is None and columns.prompt_template is None:
        left = leftover(rows.dataset, problems, columns)
        if left.parts:
            names = rows.dataset.column_names
            source = prompt_sources(columns, names)[0]
            template = suggest_template(names, source, left, rows.dataset[0])
            parts = " and ".join(f"`{name}`" for name in left.parts)
            raise DataError(
                f"{path}: {parts} would not be read and may be a part of the problem. If so, set `prompt_template` to "
                f"{template!r}; if `{source}` alone is the problem, set `prompt_column` to {source}."
            )
    return problems


def name_copies(source: str, problems: "Dataset") -> None:
    """Says in one line of the log which problems are copies of others."""
    answers = problems["solution"][:] if "solution" in problems.column_names else [None] * len(problems)
    copies = copied_problems(problems["prompt"][:], answers)
    if copies is not None:
        logger.warning(f"{source}: {copies}")


def to_problems(dataset: "Dataset", columns: Columns | None = None, source: str = "The dataset") -> "Dataset":
    """
    Gives every row a conversational `prompt` and a short `solution`, keeping the other columns.

    The prompt is what `columns` names, else the first of `prompt`, `question` and `problem` that the row has. The
    solution is the answer column that `columns` names, else `answer`, else `solution`; if that is a worked text with
    `#### 42` (GSM8K) or a boxed answer, or there is a `solution` beside the `answer` (MATH), the text goes to
    `worked_solution`. A `subject` becomes the `problem_class` unless there is one. Names match whatever their case.
    Where a template shows choices with letters, an answer that is the text or index of a choice becomes its letter.
    Rows whose answer is missing are named in one line of the log, and those with an answer such as `None`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset of problems.
        columns ([`~trl_sgpo.data.columns.Columns`], *optional*):
            Columns of problems and answers. If `None`, they are found by their usual names.
        source (`str`, *optional*, defaults to `"The dataset"`):
            Name of the dataset in messages.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        `DataError`: If there is no prompt column or not the column named, problems are empty or show their answer, or
            the answer column that is named has no answer, or others than texts and numbers.
    """
    return read_problems(Rows(dataset), columns or Columns(), source)


def read_problems(rows: Rows, chosen: Columns, source: str, whole: Callable[[], Rows] | None = None) -> "Dataset":
    """
    [`to_problems`] for the rows of a file, whose prompts and answers are the texts that are written there.

    Args:
        rows ([`~trl_sgpo.data.rows.Rows`]):
            The rows.
        chosen ([`~trl_sgpo.data.columns.Columns`]):
            Columns of problems and answers.
        source (`str`):
            Name of the rows in messages.
        whole (`Callable[[], Rows]`, *optional*):
            Returns all rows of which these are a part, in case these do not tell whether indices count from 0 or 1.
    """
    from datasets import Features, Value, concatenate_datasets

    names = rows.dataset.column_names
    check_column_names(names)
    check_entries(rows.dataset.features)
    sources = prompt_sources(chosen, names)
    answers = answer_sources(chosen, names)
    check_answer_not_shown(chosen, sources, answers)
    worked_column, solution_column = find_column("worked_solution", names), find_column("solution", names)
    class_sources = [found for name in ("problem_class", "subject") if (found := find_column(name, names)) is not None]
    texts = rows.texts
    text = Value("string")
    features = Features({"prompt": [{"role": text, "content": text}]})
    if chosen.prompt_template is None and not isinstance(texts.features[sources[0]], Value):  # messages
        features["prompt"] = texts.features[sources[0]]
    if answers:
        features["solution"] = features["worked_solution"] = text
    if class_sources:
        features["problem_class"] = text

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if chosen.prompt_template is not None:
            prompt = fill_template(chosen.prompt_template, row, sources)
        else:
            column = next((column for column in sources if row[column] is not None), sources[0])
            prompt = row[column]
            if isinstance(prompt, int | float):
                prompt = None if is_missing(prompt) else as_answer(prompt)
            if not (prompt is None or isinstance(prompt, str) or is_conversation(prompt)):
                raise DataError(
                    f"The column `{column}` holds neither text nor messages: name another `prompt_column`."
                )
        new: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        if answers:
            new["solution"], new["worked_solution"] = _answer_of(row, answers, worked_column, solution_column)
        if class_sources:
            problem_class = next((row[column] for column in class_sources if row[column] is not None), None)
            new["problem_class"] = None if problem_class is None else as_answer(problem_class)
        return new

    def convert_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = [batch[name] for name in read]
        new = [convert(dict(zip(read, values, strict=True))) for values in zip(*columns, strict=True)]
        return {name: [row[name] for row in new] for name in features}

    def whole_base() -> int | None:
        every = [] if whole is None else whole().texts.to_list()
        given = [_answer_of(row, answers, worked_column, solution_column)[0] for row in every]
        return index_base(given, [shown_choices(chosen.prompt_template or "", row, sources) for row in every])

    optional = [column for column in (worked_column, solution_column) if column is not None]
    read = list(dict.fromkeys([*sources, *answers, *optional, *class_sources]))
    problems = texts.select_columns(read).map(
        convert_batch,
        batched=True,
        features=features,
        remove_columns=read,
        desc="Reading problems",
        # No cache file, whose name would be a hash of the function, which takes 0.07 s
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=secrets.token_hex(8),
    )
    check_none_empty(problems["prompt"][:])
    if answers:
        problems = _with_solutions(problems, chosen, answers[0], source)
        if chosen.prompt_template is not None:
            problems = _with_letters(problems, texts, chosen.prompt_template, sources, source, whole_base)
    replaced = [*problems.column_names, *(["worked_solution"] if answers else [])]
    if others := [name for name in names if name not in replaced]:
        problems = concatenate_datasets([problems, rows.dataset.select_columns(others)], axis=1)
    return problems.select_columns(sorted(problems.column_names, key=(names + problems.column_names).index))


def _with_solutions(problems: "Dataset", chosen: Columns, column: str, source: str) -> "Dataset":
    """Names the rows without an answer, and leaves out `worked_solution` if there is none."""
    solutions: list[str | None] = problems["solution"][:]
    if chosen.answer_column is not None and all(value is None for value in solutions):
        raise DataError(f"{source} has no answer in the column `{column}`: name another `answer_column`.")
    for line in (missing_answers(solutions), doubtful_answers(solutions)):
        if line is not None:
            logger.warning(f"{source}: {line}")
    if any(value is not None for value in problems["worked_solution"]):
        return problems
    return problems.remove_columns("worked_solution")


def _with_letters(
    problems: "Dataset",
    rows: "Dataset",
    template: str,
    sources: list[str],
    source: str,
    base: Callable[[], int | None],
) -> "Dataset":
    """The problems with the letters of choices as answers, where the template shows choices."""
    shown = rows.select_columns(sorted(set(sources))).to_list()
    choices = [shown_choices(template, row, sources) for row in shown]
    answers: list[str | None] = problems["solution"][:]
    if not any(choices):
        check_letters_shown(template, shown, sources, answers)
        return problems
    letters = as_letters(answers, choices, source, base)
    if letters == answers:
        return problems
    first = next(row for row, letter in enumerate(letters) if letter != answers[row])
    logger.warning(
        f"{source}: answers are read as letters of the choices, as {letters[first]} for {in_short(answers[first])}."
    )
    return problems.map(lambda row, index: {"solution": letters[index]}, with_indices=True, desc="Letters of choices")


def _answer_of(
    row: dict[str, Any], answers: list[str], worked_column: str | None, solution_column: str | None
) -> tuple[str | None, str | None]:
    """The short answer of a row and its worked solution."""
    worked = None if worked_column is None else row[worked_column]
    in_order = answers if worked is None else answers[::-1]  # a `solution` beside a worked one is the short one
    short = next((text for column in in_order if (text := read_answer(row[column], column)) is not None), None)
    if worked is None and short is not None and ("####" in short or "\\boxed{" in short):
        short, worked = final_answer(short), short
    elif worked is None and solution_column is not None and not is_missing(row[solution_column]):
        worked = row[solution_column] if as_answer(row[solution_column]) != short else None
    return None if is_missing(short) else short, None if worked is None else str(worked)
