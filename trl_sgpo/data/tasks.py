"""Problems: loading them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .answers import answer_reward, same_answer
from .final_answers import final_answer
from .generated import GYM, LISTS, materialise


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import DatasetMixtureConfig

__all__ = ["answer_reward", "final_answer", "load_mixture", "load_problems", "same_answer", "to_problems"]


_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_PROMPT_COLUMNS = ("prompt", "question", "problem")


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
