"""Problems: loading them."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
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
    fill_template,
    find_column,
    is_missing,
    missing_answers,
    prompt_sources,
    read_answer,
)
from .final_answers import final_answer
from .generated import GYM, LISTS, materialise
from .leftover import in_short, leftover, suggest_template
from .own_files import check_own_files, columns_of_files


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .mixture import ProblemMixtureConfig, ProblemsConfig

logger = logging.getLogger(__name__)

__all__ = ["answer_reward", "final_answer", "load_mixture", "load_problems", "same_answer", "to_problems"]


_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_problems(
    path: str, split: str = "train", name: str | None = None, columns: Columns | None = None
) -> "Dataset":
    """
    Loads problems as rows with a conversational `prompt` and, where the source has answers, a `solution`.

    Args:
        path (`str`):
            `reasoning_gym/<family>[+<family>...][?key=value&size=400&seed=42]`,
            `list_functions/<seen|held_out|longer>[?size=320&seed=42&shortcuts=0.5]`, a local `.jsonl`, `.json`,
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
    return _to_problems_of(path, rows, columns or Columns(), lambda: load_rows(path, split.partition("[")[0], name))


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
    if mixture.test_split_size is None:
        return DatasetDict({"train": combined})
    return combined.train_test_split(test_size=mixture.test_split_size)


def _load_part(part: "ProblemsConfig") -> "Dataset":
    dataset = load_rows(part.path, part.split, part.name, part.data_dir, part.data_files)
    dataset = dataset if part.columns is None else dataset.select_columns(part.columns)
    base = part.split.partition("[")[0]
    return _to_problems_of(
        part.path, dataset, part.chosen, lambda: load_rows(part.path, base, part.name, part.data_dir, part.data_files)
    )


def _to_problems_of(path: str, rows: "Dataset", columns: Columns, whole: Callable[[], "Dataset"]) -> "Dataset":
    """Problems of a file, unless columns that look like parts of them would be left out and none is named."""
    problems = to_problems(rows, columns, path, whole)
    if columns.prompt_column is None and columns.prompt_template is None:
        left = leftover(rows, problems, columns)
        if left.parts:
            source = prompt_sources(columns, rows.column_names)[0]
            template = suggest_template(rows.column_names, source, left, rows[0])
            names = " and ".join(f"`{name}`" for name in left.parts)
            raise DataError(
                f"{path}: {names} would not be read and may be a part of the problem. If so, set `prompt_template` to "
                f"{template!r}; if `{source}` alone is the problem, set `prompt_column` to {source}."
            )
    return problems


def load_rows(
    path: str, split: str, name: str | None = None, data_dir: str | None = None, data_files: Any = None
) -> "Dataset":
    """Loads rows as they are, from what [`load_problems`] takes. The other arguments are those of `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    builder, own_files = _source(path, split)
    no_rows = f"{path} has no rows for the split `{split}`: name a source with problems."
    try:
        if own_files is None and data_files is None:
            check_own_files(path, name, data_dir)
        rows = load_dataset(builder, name=name, data_dir=data_dir, data_files=own_files or data_files, split=split)
    except OSError as error:
        raise _unreachable(path, error) from error
    except (DatasetGenerationError, ArrowInvalid) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DataError(f"{path} cannot be read: {reason}. Correct the file, and save texts in UTF-8.") from error
    except StopIteration as error:  # an empty file
        raise DataError(no_rows) from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise DataError(no_rows) from error
    if len(rows) == 0:
        raise DataError(no_rows)
    files = columns_of_files(rows.features)
    if files:
        names = ", ".join(f"`{name}`" for name in files)
        logger.warning(f"{path}: {names} hold pictures, sounds or other files, which are not read.")
    return rows.remove_columns(files)


def to_problems(
    dataset: "Dataset",
    columns: Columns | None = None,
    source: str = "The dataset",
    whole: Callable[[], "Dataset"] | None = None,
) -> "Dataset":
    """
    Gives every row a conversational `prompt` and a short `solution`, keeping the other columns.

    The prompt is what `columns` names, else the first of `prompt`, `question` and `problem` that the row has. The
    solution is the answer column that `columns` names, else `answer`, else `solution`; if that is a worked text with
    `#### 42` (GSM8K) or a boxed answer, or there is a `solution` beside the `answer` (MATH), the text goes to
    `worked_solution`. A `subject` becomes the `problem_class` unless there is one. Names match whatever their case.
    Where a template shows choices with letters, an answer that is the text or index of a choice becomes its letter.
    Rows whose answer is missing, or written as `None`, are named in one line of the log.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset of problems.
        columns ([`~trl_sgpo.data.columns.Columns`], *optional*):
            Columns of problems and answers. If `None`, they are found by their usual names.
        source (`str`, *optional*, defaults to `"The dataset"`):
            Name of the dataset in messages.
        whole (`Callable[[], Dataset]`, *optional*):
            Returns all rows of which these are a part, in case these do not tell whether indices count from 0 or 1.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        `DataError`: If there is no prompt column or not the column named, problems are empty or show their answer, or
            the answer column that is named has no answer, or others than texts and numbers.
    """
    from datasets import Value

    chosen, names = columns or Columns(), dataset.column_names
    check_column_names(names)
    sources = prompt_sources(chosen, names)
    answers = answer_sources(chosen, names)
    check_answer_not_shown(chosen, sources, answers)
    worked_column, solution_column = find_column("worked_solution", names), find_column("solution", names)
    class_sources = [found for name in ("problem_class", "subject") if (found := find_column(name, names)) is not None]
    text = Value("string")
    features = dataset.features.copy()
    features["prompt"] = [{"role": text, "content": text}]
    if chosen.prompt_template is None and not isinstance(dataset.features[sources[0]], Value):  # messages
        features["prompt"] = dataset.features[sources[0]]
    if answers:
        features["solution"] = features["worked_solution"] = text
    if class_sources:
        features["problem_class"] = text

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if chosen.prompt_template is not None:
            prompt = fill_template(chosen.prompt_template, row, sources)
        else:
            source = next((column for column in sources if row[column] is not None), sources[0])
            prompt = as_answer(row[source]) if isinstance(row[source], int | float) else row[source]
            if not (prompt is None or isinstance(prompt, str) or is_conversation(prompt)):
                raise DataError(
                    f"The column `{source}` holds neither text nor messages: name another `prompt_column`."
                )
        new: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        if answers:
            new["solution"], new["worked_solution"] = _answer_of(row, answers, worked_column, solution_column)
        if class_sources:
            problem_class = next((row[column] for column in class_sources if row[column] is not None), None)
            new["problem_class"] = None if problem_class is None else str(problem_class)
        return new

    def whole_base() -> int | None:
        rows = [] if whole is None else whole().to_list()
        given = [_answer_of(row, answers, worked_column, solution_column)[0] for row in rows]
        return index_base(given, [shown_choices(chosen.prompt_template or "", row, sources) for row in rows])

    problems = dataset.map(convert, features=features, desc="Reading problems")
    check_none_empty(problems["prompt"][:])
    if not answers:
        return problems
    missing = missing_answers(problems["solution"])
    if missing is not None:
        if chosen.answer_column is not None and not any(value is not None for value in problems["solution"]):
            raise DataError(f"{source} has no answer in the column `{answers[0]}`: name another `answer_column`.")
        logger.warning(f"{source}: {missing}")
    if not any(value is not None for value in problems["worked_solution"]):
        problems = problems.remove_columns("worked_solution")
    if chosen.prompt_template is None:
        return problems
    return _with_letters(problems, dataset, chosen.prompt_template, sources, source, whole_base)


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


def _source(path: str, split: str) -> tuple[str, dict[str, str] | None]:
    """Arguments `path` and `data_files` of `datasets.load_dataset`. The split may be a slice, like `train[:100]`."""
    base = split.partition("[")[0]
    if path.startswith((GYM, LISTS)):
        return "parquet", {base: materialise(path, base)}
    builder = _BUILDERS.get(Path(path).suffix)
    if builder is None:
        return path, None
    if not os.path.isfile(path):
        raise DataError(f"There is no file '{path}': check the path, relative to {os.getcwd()}.")
    if base != "train":
        raise DataError(
            f"'{path}' is one file and has no split '{base}': cut one off, like `dataset_train_split: train[:90%]` "
            "and `dataset_test_split: train[90%:]`."
        )
    return builder, {base: path}


def _unreachable(paths: str, error: OSError) -> DataError:
    reason = str(error).splitlines()[0][:300]
    return DataError(
        f"Cannot load {paths} ({reason}): check the name and the network, or use a local .jsonl, .parquet or .csv "
        "file or `reasoning_gym/<family>`."
    )
