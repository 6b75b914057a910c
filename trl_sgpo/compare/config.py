"""A comparison as a YAML file: arms, seeds and a budget."""

import json
import os
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.suites import Suite, parse_suite
from ..yaml_files import check_keys, read_mapping


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OTHER_DIRECTORIES = ("warmstart", "logs")
_TRANSFER = ("suite", "classes", "problems", "executions", "pairs_per_cell")
METHODS = ("base", "sft", "rft", "rlhf", "prm", "grpo", "grpo_best", "sgpo", "joint", "internalize_wrong")
_OF_METHOD: dict[str, dict[str, float | int | str]] = {
    "sft": {"sft_learning_rate": 1e-4},
    "rft": {"sft_learning_rate": 1e-4},
    "grpo_best": {"validation": "", "validation_points": 10},
    "rlhf": {"label_share": 0.2, "reward_learning_rate": 1e-4, "reward_epochs": 1.0},
    "prm": {
        "label_share": 0.2,
        "reward_learning_rate": 1e-4,
        "reward_epochs": 1.0,
        "step_separator": "\n",
        "step_rollouts": 4,
        "step_aggregation": "min",
    },
}


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        name (`str`):
            Name in the table.
        method (`str`):
            `"base"` (the warm start as it is), `"sft"`, `"rft"` (supervised steps on its own right plain answers),
            `"rlhf"`, `"prm"`, `"grpo"`, `"grpo_best"` (GRPO's weights at the best accuracy on validation problems),
            `"sgpo"`, `"joint"` (SGPO's rollouts with one advantage a row), or `"internalize_wrong"` (SGPO whose plain
            answers learn from strategies of another class).
        overrides (`dict`):
            Keys of the recipe that this arm sets.
        settings (`dict`):
            Settings of the method: `sft_learning_rate` for SFT and RFT; for `grpo_best` `validation` (problems, of
            the split `train`) and `validation_points` (how often they are measured within the budget); for reward
            models `label_share` (part of the budget spent on labels), `reward_learning_rate`, `reward_epochs`; for
            step rewards `step_separator`, `step_rollouts` and `step_aggregation` (`"min"` or `"mean"`).
    """

    name: str
    method: str
    overrides: dict[str, Any]
    settings: dict[str, Any]

    @property
    def form(self) -> str:
        """How the trained model answers: `"two_phase"` or `"plain"`."""
        return "two_phase" if self.method in ("sgpo", "joint", "internalize_wrong") else "plain"


@dataclass(frozen=True)
class Comparison:
    """
    A comparison.

    Args:
        recipe (`str`):
            Recipe that all arms share: model, data, warm start, verifier, SGPO and training settings. A relative path
            is looked for in the directory of the comparison, in those above it, and in the working directory.
        output_dir (`str`):
            Directory of the runs. An interrupted comparison resumes from there.
        seeds (`list[int]`):
            Each arm is trained once with each.
        budget (`int`):
            Tokens an arm may generate in training; for SFT, tokens it is trained on. Labels for reward models count.
        arms (`list[Arm]`):
            The arms.
        suites (`list[str | dict]`):
            Suites of problems, as in `trl-sgpo eval`.
        transfer (`dict`):
            Strategy transfer score: `suite` (name of the suite), and optionally `classes`, `problems` a class,
            `executions` of each condition a problem, `pairs_per_cell` of the matrix.
        results (`str`, *optional*):
            Path without suffix where `.json`, `.md` and `.png` are written too.
        processes (`int`, *optional*, defaults to `1`):
            Runs at a time. On a CPU each gets its share of the cores.
        samples (`int`, *optional*, defaults to `2`):
            Sampled answers to each problem of a suite, beside the greedy one.
        pass_samples (`int`, *optional*):
            Sampled answers to each problem of the `transfer` suite in the form that the arm is trained in, for a
            pass@k of larger k. If `None`, as many as of other suites.
        curve_points (`int`, *optional*, defaults to `4`):
            Evaluations during training, evenly spread over the budget, on the `transfer` suite.
        curve_problems (`int`, *optional*, defaults to `96`):
            Problems of each.
        reference (`str`, *optional*, defaults to `"sgpo"`):
            Arm that the others are compared with.
    """

    recipe: str
    output_dir: str
    seeds: list[int]
    budget: int
    arms: list[Arm]
    suites: list[str | dict[str, Any]]
    transfer: dict[str, Any]
    results: str | None = None
    processes: int = 1
    samples: int = 2
    pass_samples: int | None = None
    curve_points: int = 4
    curve_problems: int = 96
    reference: str = "sgpo"
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def parsed_suites(self) -> list[Suite]:
        """The suites, known ones by name, others by their fields."""
        return [parse_suite(suite if isinstance(suite, str) else json.dumps(suite)) for suite in self.suites]

    def run_directory(self, arm: Arm, seed: int) -> Path:
        return Path(self.output_dir, arm.name, f"seed-{seed}")

    def warmstart_directory(self, seed: int) -> Path:
        return Path(self.output_dir, "warmstart", f"seed-{seed}")


def read_comparison(path: str, changes: dict[str, Any] | None = None) -> Comparison:
    """
    Reads a comparison.

    Args:
        path (`str`):
            YAML file with the keys of [`Comparison`]; `arms` is a mapping from names to a `method`, its settings and
            keys of the recipe, `overrides` a mapping of recipe keys that all arms set.
        changes (`dict`, *optional*):
            Keys that replace those of the file; `arms` is then a list of the names to keep.

    Returns:
        [`Comparison`]

    Raises:
        [`ConfigError`]: The file cannot be read, or has an unknown key or an invalid value.
    """
    changes = dict(changes or {})
    kept = changes.pop("arms", None)
    content = read_mapping(path)
    changes["overrides"] = content.get("overrides", {}) | changes.get("overrides", {})
    content = content | changes
    known = {item.name: item for item in fields(Comparison)}
    check_keys(content, list(known), path)
    required = [k for k, i in known.items() if i.default is MISSING and i.default_factory is MISSING]
    missing = [key for key in required if key not in content]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(f'`{key}`' for key in missing)}.")
    if not isinstance(content["arms"], dict):
        raise ConfigError(f"{path}: `arms` must be a mapping from names of arms to their keys.")
    arms = [_arm(name, values) for name, values in content["arms"].items()]
    if kept is not None:
        unknown = sorted(set(kept) - {arm.name for arm in arms})
        if unknown:
            raise ConfigError(f"{path} has no arm {unknown[0]!r}, only {', '.join(arm.name for arm in arms)}.")
        arms = [arm for arm in arms if arm.name in kept]
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"{path}: `seeds` must be a list of whole numbers.")
    for key in ("budget", "processes", "samples", "pass_samples"):
        value = content.get(key, 1)
        if type(value) is not int and not (key == "pass_samples" and value is None):
            raise ConfigError(f"{path}: `{key}` must be a whole number.")
    read = {"arms": arms, "recipe": _find(str(content["recipe"]), path)}
    comparison = Comparison(**(content | read | {"output_dir": os.path.expanduser(str(content["output_dir"]))}))
    more = 1 if comparison.pass_samples is None else comparison.pass_samples
    if min(comparison.budget, comparison.processes, comparison.samples, more) < 1:
        raise ConfigError(f"{path}: `budget`, `processes`, `samples` and `pass_samples` must be at least 1.")
    if not comparison.seeds or not arms:
        raise ConfigError(f"{path}: there must be a seed and an arm.")
    check_keys(comparison.transfer, _TRANSFER, f"`transfer` of {path}")
    names = [suite.name for suite in comparison.parsed_suites]
    if comparison.transfer.get("suite") not in names:
        raise ConfigError(f"{path}: `transfer.suite` must be the name of a suite: one of {', '.join(names)}.")
    return comparison


def _find(recipe: str, comparison: str) -> str:
    """The recipe of a comparison: named from the directory of its file, one above it, or the working directory."""
    places = [directory / recipe for directory in Path(comparison).absolute().parents]
    return next((os.path.relpath(place) for place in places if place.is_file()), recipe)


def _arm(name: Any, values: Any) -> Arm:
    if not isinstance(name, str):
        read = json.dumps(name, default=str)
        raise ConfigError(f'The arm {read} is no text, as YAML reads it: write its name in quotes: "{read}".')
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"The arm {name!r} must be a mapping of keys to values, got {values!r}.")
    if not _NAME.fullmatch(str(name)) or name in _OTHER_DIRECTORIES:
        raise ConfigError(
            f"The arm {name!r} cannot be the name of its directory: use letters, digits, `_`, `-` and `.`, a letter "
            f"or digit first, and not {' or '.join(_OTHER_DIRECTORIES)}."
        )
    values = dict(values or {})
    method = values.pop("method", name)
    if method not in METHODS:
        raise ConfigError(f"The arm {name!r} has the method {method!r}: set `method` to one of {', '.join(METHODS)}.")
    settings = dict(_OF_METHOD.get(method, {}))
    settings |= {key: values.pop(key) for key in list(values) if key in settings}
    if settings.get("step_aggregation", "min") not in ("min", "mean"):
        raise ConfigError(f"The arm {name!r}: `step_aggregation` must be min or mean.")
    points = settings.get("validation_points", 1)
    if method == "grpo_best" and not (isinstance(settings["validation"], str) and settings["validation"]):
        raise ConfigError(f"The arm {name!r}: name the problems that choose its weights as `validation`.")
    if type(points) is not int or points < 1:
        raise ConfigError(f"The arm {name!r}: `validation_points` must be a whole number of at least 1.")
    return Arm(name, method, overrides=values, settings=settings)
