"""Problems: loading them, reading final answers, and the reward function that checks an answer."""

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.lab import list_functions
from ..errors import DataError
from .columns import (
    Columns,
    answer_sources,
    as_answer,
    fill_template,
    find_column,
    is_missing,
    missing_answers,
    prompt_sources,
)
from .generated import GYM, LISTS, gym, materialise
from .leftover import leftover


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .mixture import ProblemMixtureConfig, ProblemsConfig

logger = logging.getLogger(__name__)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_MATH_MARK = re.compile(r"\\?\$|(?<!\\)\\[()]")
_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?")


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
        `DataError`: If there is no such source, or it has no prompts or not the columns named.
    """
    return _to_problems_of(path, load_rows(path, split, name), columns or Columns())


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
    return _to_problems_of(part.path, dataset, part.chosen)


def _to_problems_of(path: str, rows: "Dataset", columns: Columns) -> "Dataset":
    """Problems of a file, with a line in the log for columns that look like parts of them and are left out."""
    problems = to_problems(rows, columns, path)
    if columns.prompt_column is None and columns.prompt_template is None:
        for name in leftover(rows, problems, columns).parts:
            logger.warning(
                f"{path}: the column `{name}` looks like a part of the problem and is not read. Name all parts in "
                "`prompt_template`, or the column that is the problem as `prompt_column`."
            )
    return problems


def load_rows(
    path: str, split: str, name: str | None = None, data_dir: str | None = None, data_files: Any = None
) -> "Dataset":
    """Loads rows as they are, from what [`load_problems`] takes. The other arguments are those of `datasets`."""
    from datasets import load_dataset

    builder, own_files = _source(path, split)
    try:
        return load_dataset(builder, name=name, data_dir=data_dir, data_files=own_files or data_files, split=split)
    except OSError as error:
        raise _unreachable(path, error) from error


def to_problems(dataset: "Dataset", columns: Columns | None = None, source: str = "The dataset") -> "Dataset":
    """
    Gives every row a conversational `prompt` and a short `solution`, keeping the other columns.

    The prompt is what `columns` names, else the first of `prompt`, `question` and `problem` that the row has. The
    solution is the answer column that `columns` names, else `answer`, else `solution`; if that is a worked text with
    `#### 42` (GSM8K) or a boxed answer, or there is a `solution` beside the `answer` (MATH), the text goes to
    `worked_solution`. A `subject` becomes the `problem_class` unless there is one. Names match whatever their case.
    Rows whose answer is missing, or written as `None`, are named in one line of the log.

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
        `DataError`: If there is no prompt column or not the column named, a row has no prompt, or the answer column
            that is named has no answer.
    """
    from datasets import Value

    chosen, names = columns or Columns(), dataset.column_names
    sources = prompt_sources(chosen, names)
    answers = answer_sources(chosen, names)
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
            prompt = next((row[column] for column in sources if row[column] is not None), None)
            prompt = as_answer(prompt) if isinstance(prompt, int | float) else prompt
        if prompt is None:
            raise DataError(f"A row has no prompt: remove rows with an empty {', '.join(sources)}.")
        new: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        if answers:
            new["solution"], new["worked_solution"] = _answer_of(row, answers, worked_column, solution_column)
        if class_sources:
            problem_class = next((row[column] for column in class_sources if row[column] is not None), None)
            new["problem_class"] = None if problem_class is None else str(problem_class)
        return new

    problems = dataset.map(convert, features=features, desc="Reading problems")
    if not answers:
        return problems
    missing = missing_answers(problems["solution"])
    if missing is not None:
        if chosen.answer_column is not None and not any(value is not None for value in problems["solution"]):
            raise DataError(f"{source} has no answer in the column `{answers[0]}`: name another `answer_column`.")
        logger.warning(f"{source}: {missing}")
    if not any(value is not None for value in problems["worked_solution"]):
        problems = problems.remove_columns("worked_solution")
    return problems


def _answer_of(
    row: dict[str, Any], answers: list[str], worked_column: str | None, solution_column: str | None
) -> tuple[str | None, str | None]:
    """The short answer of a row and its worked solution."""
    worked = None if worked_column is None else row[worked_column]
    in_order = answers if worked is None else answers[::-1]  # a `solution` beside a worked one is the short one
    short = next((row[column] for column in in_order if not is_missing(row[column])), None)
    if worked is None and isinstance(short, str) and ("####" in short or "\\boxed{" in short):
        short, worked = final_answer(short), short
    elif worked is None and solution_column is not None and not is_missing(row[solution_column]):
        worked = row[solution_column] if as_answer(row[solution_column]) != as_answer(short) else None
    return None if is_missing(short) else as_answer(short), None if worked is None else str(worked)


def final_answer(text: str) -> str | None:
    r"""
    Extracts the final answer of a solution.

    Args:
        text (`str`):
            A solution.

    Returns:
        `str` or `None`: What follows the last `####` on its line (or, if that is empty, on the lines after it), else
        the content of the last `\boxed{...}`, else what follows the last "answer is" or "Answer:" on its line, else
        `None`.
    """
    _, mark, rest = text.rpartition("####")
    if mark and (answer := rest.split("\n", 1)[0].strip() or rest.strip()):
        return answer
    _, mark, rest = text.rpartition("\\boxed{")
    if mark:
        depth = 1
        for position, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[:position].strip() or None
    phrases = list(re.finditer(r"answer(?: is)?:|answer is", text, re.IGNORECASE))
    if phrases:
        return text[phrases[-1].end() :].split("\n", 1)[0].strip(" \t*").rstrip(" .*") or None
    return None


def answer_reward(
    completions: list[str | list[dict[str, Any]]],
    solution: list[str | None],
    entry: list[str | None] | None = None,
    problem_class: list[str | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    TRL reward function: 1.0 where the final answer of a completion is right, else 0.0.

    An answer is right if it is the solution, the same number, what the reasoning-gym family of the row accepts, or,
    for rows without an `entry`, mathematically equal (by math-verify).

    Args:
        completions (`list[str | list[dict[str, Any]]]`):
            Completions, as text or messages, read by [`final_answer`].
        solution (`list[str | None]`):
            Short answers.
        entry (`list[str | None]`, *optional*):
            reasoning-gym entries as JSON.
        problem_class (`list[str | None]`, *optional*):
            Not used, a column of most datasets.
        **kwargs:
            Not used, the dataset's other columns.

    Returns:
        `list[float | None]`: `None` where the solution is `None`.

    Raises:
        `DataError`: If the package that checks the answer is not installed.
    """
    rewards: list[float | None] = []
    for completion, gold, raw in zip(completions, solution, entry or [None] * len(solution), strict=True):
        answer = final_answer(completion if isinstance(completion, str) else completion[-1]["content"])
        if gold is None:
            rewards.append(None)
        else:
            rewards.append(float(answer is not None and _is_right(answer, gold, raw)))
    return rewards


def same_answer(first: str, second: str) -> bool:
    """
    Whether two final answers are the same text, the same number or mathematically equal.

    Args:
        first (`str`):
            A final answer, as [`final_answer`] reads it.
        second (`str`):
            Another one.

    Raises:
        `DataError`: If math-verify is needed and not installed.
    """
    return _is_right(first, second, None)


def same_answer_text(first: str, second: str) -> bool:
    """
    Whether two final answers are the same text or number, without checking mathematical equality.

    Args:
        first (`str`):
            A final answer.
        second (`str`):
            Another one.
    """
    number = _number(first)
    return _plain(first) == _plain(second) or (number is not None and number == _number(second))


def _is_right(answer: str, gold: str, entry: str | None) -> bool:
    if answer == gold.strip():
        return True
    number, gold_number = _number(answer), _number(gold)
    if number is not None and number == gold_number:
        return True
    if entry is not None:
        parsed = json.loads(entry)
        if parsed["metadata"]["source_dataset"] == list_functions.FAMILY:
            return False  # the solution, which was compared above, is its only right answer
        try:
            return _scorer(parsed["metadata"]["source_dataset"])(answer, parsed) >= 0.99
        except (ArithmeticError, LookupError, TypeError, ValueError):  # raised by some families for malformed answers
            return False
    if number is not None and gold_number is not None:
        return False
    return _plain(answer) == _plain(gold) or _verify(answer, gold)


def _plain(text: str) -> str:
    """Text without math and emphasis marks, a trailing period, and spaces other than those between digits."""
    text = _MATH_MARK.sub("", text).strip().strip("*").removesuffix(".")
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _number(text: str) -> Decimal | None:
    text = _plain(text)
    if not _NUMBER.fullmatch(text) or not any(character.isdecimal() for character in text):
        return None
    return Decimal(text.replace(",", ""))


def _verify(answer: str, gold: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise DataError("Checking answers that are not plain numbers needs `pip install 'trl-sgpo[math]'`.") from error

    # its time limit is an alarm signal, which only the main thread can set
    seconds = 2 if threading.current_thread() is threading.main_thread() else None
    expressions = [parse(f"${_plain(text)}$", parsing_timeout=seconds) for text in (gold, answer)]
    return verify(*expressions, timeout_seconds=seconds)


@cache
def _scorer(family: str) -> Callable[[str, dict[str, Any]], float]:
    return gym().get_score_answer_fn(family)


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
    reason = str(error).splitlines()[0]
    return DataError(
        f"Cannot load {paths} ({reason}): check the name and the network, or use a local .jsonl, .parquet or .csv "
        "file or `reasoning_gym/<family>`."
    )
