"""Problems: loading them, reading final answers, and the reward function that checks an answer."""

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.lab import list_functions
from ..errors import DataError
from .generated import GYM, LISTS, gym, materialise


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import DatasetMixtureConfig

logger = logging.getLogger(__name__)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_PROMPT_COLUMNS = ("prompt", "question", "problem")
_MATH_MARK = re.compile(r"\\?\$|(?<!\\)\\[()]")
_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?")


def load_problems(path: str, split: str = "train", name: str | None = None) -> "Dataset":
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

    Returns:
        [`~datasets.Dataset`]

    Raises:
        `DataError`: If there is no such source, or it has no prompts.
    """
    from datasets import load_dataset

    builder, data_files = _source(path, split)
    try:
        return to_problems(load_dataset(builder, name=name, data_files=data_files, split=split))
    except OSError as error:
        raise _unreachable(path, error) from error


def load_mixture(mixture: "DatasetMixtureConfig") -> "DatasetDict":
    """
    Loads a TRL dataset mixture whose paths may also be reasoning-gym paths and local files, see [`load_problems`].

    Args:
        mixture ([`~trl.DatasetMixtureConfig`]):
            The mixture. It is not changed.

    Returns:
        [`~datasets.DatasetDict`]: With a `train` split, and a `test` split if `test_split_size` is set.

    Raises:
        `DataError`: If a source is missing, the sources' columns do not fit together or `streaming` is set.
    """
    from datasets import DatasetDict
    from trl import get_dataset

    if mixture.streaming:
        raise DataError("Problems are grouped by class, which needs the whole dataset: set `streaming: false`.")
    sources = []
    for config in mixture.datasets:
        builder, data_files = _source(config.path, config.split)
        sources.append(replace(config, path=builder, data_files=data_files or config.data_files))
    paths = ", ".join(config.path for config in mixture.datasets)
    try:
        combined = get_dataset(replace(mixture, datasets=sources))
    except OSError as error:
        raise _unreachable(paths, error) from error
    except ValueError as error:
        if "aligned" not in str(error):
            raise
        raise DataError(
            f"The datasets {paths} have a column of the same name and different types ({error}): leave it out with "
            "`columns:` in each dataset of the mixture."
        ) from error
    return DatasetDict({split: to_problems(dataset) for split, dataset in combined.items()})


def to_problems(dataset: "Dataset") -> "Dataset":
    """
    Gives every row a conversational `prompt` and a short `solution`, keeping the other columns.

    The prompt is the first of `prompt`, `question` and `problem` that the row has. The solution is `answer`, else
    `solution`; if that is a worked text with `#### 42` (GSM8K) or a boxed answer, or there is a `solution` beside the
    `answer` (MATH), the text goes to `worked_solution`. A `subject` becomes the `problem_class` unless there is one.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset of problems.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        `DataError`: If there is no prompt column, or a row without a prompt.
    """
    from datasets import Value

    columns = dataset.column_names
    if not set(_PROMPT_COLUMNS) & set(columns):
        raise DataError(
            f"No prompts in the columns {', '.join(columns)}: rename the one with the problems to `prompt`, "
            "`question` or `problem`."
        )
    text = Value("string")
    features = dataset.features.copy()
    if "prompt" not in features or features["prompt"] == text:
        features["prompt"] = [{"role": text, "content": text}]
    if "solution" in features or "answer" in features:
        features["solution"] = features["worked_solution"] = text
    if "problem_class" in features or "subject" in features:
        features["problem_class"] = text

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt = next((row[column] for column in _PROMPT_COLUMNS if row.get(column) is not None), None)
        if prompt is None:
            raise DataError("A row has no prompt: remove rows with an empty prompt, question or problem.")
        new = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        if "solution" in features:
            answer, solution, worked = row.get("answer"), row.get("solution"), row.get("worked_solution")
            if worked is None:
                if answer is not None:
                    solution, worked = answer, solution
                if isinstance(solution, str) and ("####" in solution or "\\boxed{" in solution):
                    solution, worked = final_answer(solution), solution
            new["solution"] = None if solution is None else str(solution)
            new["worked_solution"] = None if worked is None else str(worked)
        if "problem_class" in features:
            problem_class = row.get("problem_class")
            problem_class = row.get("subject") if problem_class is None else problem_class
            new["problem_class"] = None if problem_class is None else str(problem_class)
        return new

    problems = dataset.map(convert, features=features, desc="Reading problems")
    if "worked_solution" in features and set(problems["worked_solution"]) == {None}:
        problems = problems.remove_columns("worked_solution")
    return problems


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
