"""Suites: the problems of an evaluation."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checks.json_text import parse_json
from ..checks.paths import problem_file
from ..data.columns import Columns
from ..errors import ConfigError, DataError
from ..method.prompts import with_system_prompt


UNKNOWN = "unknown"
KINDS = ("in_distribution", "out_of_distribution", "harder", UNKNOWN)


@dataclass(frozen=True)
class Suite:
    """
    Problems to evaluate on.

    Args:
        name (`str`):
            Name in results and file names.
        path (`str`):
            What [`~trl_sgpo.data.tasks.load_problems`] takes.
        split (`str`, *optional*):
            Split to load. If `None`, the whole of a local file and `test` of anything else.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        kind (`str`, *optional*, defaults to `"unknown"`):
            What the problems are, compared with those trained on: `"in_distribution"`, `"out_of_distribution"`,
            `"harder"` or `"unknown"`. It labels results and changes nothing else.
        limit (`int`, *optional*):
            Number of problems, drawn with a fixed seed if there are more.
        class_column (`str`, *optional*, defaults to `"problem_class"`):
            Column with the problems' classes.
        prompt_column (`str`, *optional*), prompt_template (`str`, *optional*), answer_column (`str`, *optional*):
            Columns of problems and answers, as in [`~trl_sgpo.data.columns.Columns`].
        hub_id (`str`, *optional*):
            Dataset on the Hub that these problems are, for results in the Hub's format.
        task_id (`str`, *optional*, defaults to `"default"`):
            Task of that dataset, as its `eval.yaml` on the Hub names it.
    """

    name: str
    path: str
    split: str | None = None
    config: str | None = None
    kind: str = UNKNOWN
    limit: int | None = None
    class_column: str = "problem_class"
    hub_id: str | None = None
    task_id: str = "default"
    prompt_column: str | None = None
    prompt_template: str | None = None
    answer_column: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(character.isalnum() or character in "._-" for character in self.name):
            raise ConfigError(f"The suite name {self.name!r} is no file name: use letters, digits, `.`, `_` and `-`.")
        if self.kind not in KINDS:
            raise ConfigError(f"The suite {self.name} is of kind {self.kind!r}: use one of {', '.join(KINDS)}.")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise ConfigError(f"The suite {self.name} is limited to {self.limit!r} problems: use at least 1.")


@dataclass(frozen=True)
class LoadedSuite:
    """
    A suite with its problems.

    Args:
        suite ([`Suite`]):
            The suite.
        rows (`list[dict]`):
            Problems to evaluate on.
        available (`int`):
            Number of problems without a limit.
    """

    suite: Suite
    rows: list[dict[str, Any]]
    available: int

    def with_system_prompt(self, system_prompt: str | None) -> "LoadedSuite":
        """The suite with a system message before the problems that have none."""
        rows = [row | {"prompt": with_system_prompt(row["prompt"], system_prompt)} for row in self.rows]
        return replace(self, rows=rows)


NAMED = {
    suite.name: suite
    for suite in (
        Suite("gsm8k", "openai/gsm8k", "test", "main", "in_distribution", hub_id="openai/gsm8k", task_id="gsm8k"),
        Suite(
            "gsm_plus",
            "qintongli/GSM-Plus",
            "test",
            kind="out_of_distribution",
            class_column="perturbation_type",
            prompt_column="question",
            hub_id="qintongli/GSM-Plus",
        ),
        Suite("math500", "HuggingFaceH4/MATH-500", "test", kind="harder", hub_id="HuggingFaceH4/MATH-500"),
        Suite("gsm_symbolic", "reasoning_gym/gsm_symbolic?size=1000", "test", kind="out_of_distribution"),
    )
}


def parse_suite(text: str) -> Suite:
    """
    Reads a suite as the command line names it.

    Args:
        text (`str`):
            The name of a known suite, `NAME=PATH`, `NAME=PATH@SPLIT`, or a JSON object with the fields of [`Suite`].
            Suites whose name is `id` or begins with `id_`, `ood` or `harder` are of that kind unless another one is
            given; the kind of others is unknown.

    Raises:
        [`ConfigError`]: An unknown suite or field.
    """
    if text.startswith("{"):
        try:
            given = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"The suite {text!r} is no JSON ({error}): correct it, or use NAME=PATH.") from error
        valid = [field.name for field in fields(Suite)]
        for key in given:
            if key not in valid:
                close = get_close_matches(key, valid, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"use {', '.join(valid)}."
                raise ConfigError(f"A suite has no `{key}`: {hint}")
        name = str(given.get("name", ""))
        if "path" in given:
            return Suite(**{"kind": _kind(name), **given})
        return replace(parse_suite(name), **given)
    name, equals, path = text.partition("=")
    if not equals:
        if text not in NAMED:
            close = get_close_matches(text, NAMED, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(NAMED)}, or NAME=PATH[@SPLIT]."
            raise ConfigError(f"There is no suite {text!r}: {hint}")
        return NAMED[text]
    before, at, split = path.rpartition("@")
    if not at or "/" in split:  # that of an address
        return Suite(name, path, kind=_kind(name))
    return Suite(name, before, split, kind=_kind(name))


def _kind(name: str) -> str:
    if name == "id" or name.startswith("id_"):
        return "in_distribution"
    return "out_of_distribution" if name.startswith("ood") else "harder" if name.startswith("harder") else UNKNOWN


def load_suites(suites: Sequence[Suite], data_dir: str | None = None, limit: int | None = None) -> list[LoadedSuite]:
    """
    Loads the problems of all suites, so that errors are raised before anything is generated.

    Args:
        suites (`Sequence[Suite]`):
            The suites.
        data_dir (`str`, *optional*):
            Directory with local copies `NAME/test.jsonl` of the known suites that are on the Hub.
        limit (`int`, *optional*):
            Number of problems of suites without a limit of their own.

    Returns:
        `list[LoadedSuite]`: In the order of the suites.

    Raises:
        [`ConfigError`]: Two suites have the same name.
        [`DataError`]: A suite cannot be loaded.
    """
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two suites are named {name}: give each a name of its own, like `{name}_2=PATH`.")
    return [_load(suite, data_dir, suite.limit or limit) for suite in suites]


def _load(suite: Suite, data_dir: str | None, limit: int | None) -> LoadedSuite:
    from ..data.tasks import load_problems

    path, split, config = suite.path, suite.split, suite.config
    if data_dir is not None and suite.hub_id is not None and suite.name in NAMED:
        path, split, config = str(Path(data_dir, suite.name, "test.jsonl")), "train", None
        if not Path(path).is_file():
            raise DataError(
                f"The suite {suite.name} cannot be loaded: there is no {path}. Put a copy there, or name the Hub's as "
                f"`{suite.name}={suite.path}@{suite.split}`."
            )
    if split is None:
        split = "test" if problem_file(path) is None else "train"
    try:
        columns = Columns(suite.prompt_column, suite.prompt_template, suite.answer_column)
        problems = load_problems(path, split, config, columns)
    except (ValueError, OSError) as error:
        raise DataError(f"The suite {suite.name} cannot be loaded from {path} ({split}): {error}") from error
    if suite.class_column not in problems.column_names and suite.class_column != "problem_class":
        raise DataError(
            f"The suite {suite.name} has no column {suite.class_column!r}: set its `class_column` to one of "
            f"{', '.join(problems.column_names)}."
        )
    if len(problems) == 0:
        raise DataError(f"The suite {suite.name} has no problems: check {path} ({split}).")
    available = len(problems)
    if limit is not None and limit < available:
        drawn = random.Random(suite.name).sample(range(available), limit)
        problems = problems.select(sorted(drawn))
    return LoadedSuite(suite, problems.to_list(), available)
