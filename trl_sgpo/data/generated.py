"""Generated problems: reasoning-gym families, and the laboratory's list functions and word programs."""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from filelock import FileLock

from ..checks.process import CHECKS
from ..compare.lab import list_functions, word_programs
from ..errors import DataError
from ..inference.weights import LAB_VERSION
from .families import GYM, Reference, setting


logger = logging.getLogger(__name__)

ENTRY_VERSION = 3  # of the column `entry` and the problems
_MOST_FAILED = 10
_MOST_WORDS = 6_000  # problems of a file: a row of words or a story is seldom drawn twice among so many
LISTS = f"{list_functions.FAMILY}/"
WORDS = f"{word_programs.FAMILY}/"


def gym() -> Any:
    """The reasoning-gym package, or an error that names what to install."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError("reasoning_gym/... problems need `pip install 'trl-sgpo[gym]'`.") from error
    return reasoning_gym


def materialise(path: str, split: str) -> str:
    """
    Writes a split of generated problems to a parquet file in the datasets cache, once.

    Args:
        path (`str`):
            A `reasoning_gym/...`, `list_functions/...` or `word_programs/...` path, see
            [`~trl_sgpo.data.tasks.load_problems`].
        split (`str`):
            `"train"` or `"test"`.

    Returns:
        `str`: The file, with the columns `prompt`, `solution`, `problem_class` (the family) and `entry`, which
        refers to the problem.

    Raises:
        `DataError`: If the path names an unknown family or setting, or has no such split.
    """
    import datasets

    if split not in ("train", "test"):
        raise DataError(f"'{path}' has no split '{split}': use `train` or `test`.")
    if path.startswith(LISTS):
        generate, made_by = _generate_lists, str(LAB_VERSION)
    elif path.startswith(WORDS):
        generate, made_by = _generate_words, str(word_programs.VERSION)
    else:
        generate, made_by = _generate, f"{_gym_version()} {ENTRY_VERSION}"
    key = hashlib.sha256(f"{path} {split} {made_by}".encode()).hexdigest()[:24]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "trl_sgpo" / f"{key}.parquet"
    if file.is_file():
        return str(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # the processes of a run have the same problems
        if file.is_file():
            return str(file)
        rows = generate(path, split)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            datasets.Dataset.from_list(rows).to_parquet(Path(temporary) / file.name)
            os.replace(Path(temporary) / file.name, file)
    return str(file)


def _gym_version() -> str:
    from importlib.metadata import version

    gym()
    return version("reasoning-gym")


def _generate_lists(path: str, split: str) -> list[dict[str, Any]]:
    part, _, query = path.removeprefix(LISTS).partition("?")
    settings: dict[str, Any] = {"size": 320, "seed": 42, "shortcuts": 0.0, "strategies": False}
    given = {key: setting(value) for key, value in parse_qsl(query)}
    if part not in list_functions.PARTS or set(given) - set(settings):
        raise DataError(
            f"'{path}' is not `list_functions/<{'|'.join(list_functions.PARTS)}>?size=320&seed=42&shortcuts=0.5"
            "&strategies=true`: correct the part or the setting."
        )
    settings |= given
    if not isinstance(settings["size"], int) or settings["size"] < 1 or not 0 <= settings["shortcuts"] <= 1:
        raise DataError(f"`size` of '{path}' must be at least 1 and `shortcuts` between 0 and 1.")
    if type(settings["strategies"]) is not bool:
        raise DataError(f"`strategies` of '{path}' must be true or false.")
    return list_functions.problems(part, split, **settings)


def _generate_words(path: str, split: str) -> list[dict[str, Any]]:
    part, _, query = path.removeprefix(WORDS).partition("?")
    given = {key: setting(value) for key, value in parse_qsl(query)}
    settings = {"size": 300, "seed": 42, "family": ""} | given
    families = tuple(word_programs.FAMILIES)
    if part not in word_programs.PARTS or len(settings) > 3 or settings["family"] not in ("", *families):
        raise DataError(
            f"'{path}' is not `word_programs/<{'|'.join(word_programs.PARTS)}>?size=300&seed=42"
            f"&family=<{'|'.join(families)}>`: correct the part or the setting."
        )
    size, seed = settings["size"], settings["seed"]
    if type(size) is not int or type(seed) is not int or not 0 < size <= _MOST_WORDS:
        raise DataError(f"`size` of '{path}' must be between 1 and {_MOST_WORDS:,}, and `seed` a whole number.")
    return word_programs.problems(part, split, size, seed, (settings["family"],) if settings["family"] else families)


def _generate(path: str, split: str) -> list[dict[str, Any]]:
    names, _, query = path.removeprefix(GYM).partition("?")
    families = names.split("+")
    settings: dict[str, Any] = {key: setting(value) for key, value in parse_qsl(query)}
    size, seed = settings.pop("size", 400), settings.pop("seed", 42)
    if not isinstance(size, int) or not isinstance(seed, int) or size < 1:
        raise DataError(f"`size` and `seed` of '{path}' must be whole numbers, and `size` at least 1.")
    valid = {family: _settings(family) for family in families}
    for key in settings:
        if not any(key in keys for keys in valid.values()):
            keys = "; ".join(f"{family}: {', '.join(keys)}" for family, keys in valid.items())
            raise DataError(f"Unknown setting '{key}' in '{path}': use size, seed or one of {keys}.")
    rows = []
    for family in families:
        own = {key: value for key, value in settings.items() if key in valid[family]}
        rows += _generate_family(family, split, size, seed, own)
    return rows


def _generate_family(family: str, split: str, size: int, seed: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    count = size if split == "train" else max(size // 4, 32)
    limit = 10 * max(size, 64)  # for families with fewer distinct questions
    settings = {"size": limit, "seed": seed, **settings}
    try:
        gym().create_dataset(family, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"The reasoning-gym family '{family}' refuses its settings {settings}: {error}.") from error
    rows: dict[str, dict[str, Any]] = {}
    failed = 0
    for index in range(limit):
        if len(rows) == count:
            break
        # In the process that generates them again for a check: problems of some families depend on its hash seed
        entry = CHECKS.ask("entry", family, json.dumps(settings), index)
        if entry is None:
            failed += 1
            if failed > _MOST_FAILED:
                raise DataError(
                    f"Problems of the reasoning-gym family '{family}' take more than 5 seconds or 3 GiB each: use "
                    "easier settings, or another family."
                )
            continue
        question, answer = entry["question"], entry["answer"]
        in_test = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 5 == 0
        if answer is None or question in rows or in_test != (split == "test"):
            continue
        rows[question] = {
            "prompt": [{"role": "user", "content": question}],
            "solution": str(answer),
            "problem_class": family,
            "entry": str(Reference(family, json.dumps(settings), index)),
        }
    if not rows:
        raise DataError(f"The reasoning-gym family '{family}' gives no problems with an answer: use another family.")
    if len(rows) < count:
        logger.warning(f"{family}: {len(rows)} distinct {split} problems instead of {count}")
    return list(rows.values())


def _settings(family: str) -> list[str]:
    gym()
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        close = get_close_matches(family, DATASETS, n=3)
        if not close:
            raise DataError(
                f"'{family}' is no reasoning-gym family, and files need the ending .jsonl, .json, .parquet or .csv: "
                "correct the name."
            )
        raise DataError(f"No reasoning-gym family '{family}': did you mean {', '.join(close)}?")
    return [field.name for field in fields(DATASETS[family][1]) if field.name not in ("size", "seed")]
