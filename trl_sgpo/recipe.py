"""Recipes: YAML files and command-line overrides, read into dataclasses the way `trl` does."""

import os
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from accelerate.commands.launch import launch_command_parser
from trl import ModelConfig, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.grpo import GRPOScriptArguments

from .checks.json_text import parse_json
from .checks.old_names import unknown_key
from .checks.origin import what_to_mend
from .checks.patterns import pattern_problems
from .checks.ranges import RECIPE_RANGES, not_finite, out_of_range
from .checks.remote_code import remote_code_problems
from .checks.terminal import printable
from .checks.values import check_mixture, read_value
from .data.columns import Columns
from .data.mixture import ProblemMixtureConfig
from .errors import ConfigError, SettingsError, refuse
from .run.directory import is_complete, last_checkpoint
from .sgpo_config import SGPOConfig
from .yaml_files import read_mapping, read_texts, split_config


@dataclass
class SGPOScriptArguments(GRPOScriptArguments):
    """
    Script arguments of `trl-sgpo`, on top of those of `trl grpo`.

    Args:
        dataset_name (`str`, *optional*):
            A Hub id, a local `.jsonl`, `.json`, `.parquet` or `.csv` file, or reasoning-gym families such as
            `reasoning_gym/lcm+gcd?size=400`.
        reward_funcs (`list[str]`, *optional*):
            Names of TRL's reward functions, `answer_reward` (reads the final answer and compares it as text, number,
            list or mathematics, or with the problem family's own verifier), or dotted import paths.
        prompt_column (`str`, *optional*):
            Column with the problem, whatever its case. If `None`, the first of `prompt`, `question` and `problem` that
            a row has. Its answer is in `answer_column`; if that is not set, in `answer`, else in `solution`.
        prompt_template (`str`, *optional*):
            Text of the problem with names of columns in braces, like `"{Body} {Question}"`, instead of one column.
        system_prompt (`str`, *optional*):
            System message put before conversational prompts that have none.
        warmstart_traces (`int`, *optional*, defaults to `0`):
            Number of two-phase traces to fine-tune on before training. `0` starts from the model as it is. An adapter
            is trained where the recipe sets `use_peft`, else the whole model.
        warmstart_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of that fine-tuning.
        warmstart_batch_size (`int`, *optional*, defaults to `4`):
            Traces an optimizer step of that fine-tuning.
        warmstart_plain_share (`float`, *optional*, defaults to `0.0`):
            Share of traces written as one plain answer to the problem, so that the model can answer at once, too.
        warmstart_file (`str`, *optional*):
            File of traces, as `trl-sgpo bootstrap` writes it, to fine-tune on instead of worked ones: on all of them,
            or on `warmstart_traces` of them.
        report_problems (`int`, *optional*, defaults to `0`):
            Unseen problems on which accuracy and transfer are measured before and after training. `0` measures none.
        max_problem_tokens (`int`, *optional*):
            Problems with more tokens are left out of training: a single long one can need more memory than all others.
        vram_gb (`float`, *optional*):
            Memory in GB that the recipe is made for. Training does not start where more is estimated than this or than
            the GPU has.
        check_memory (`bool`, *optional*, defaults to `True`):
            Whether to estimate memory before weights are loaded, if there is a GPU or the recipe states `vram_gb`.
    """

    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the problem. By default `prompt`, `question` or `problem`."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Text of the problem with names of columns in braces, like '{Body} {Question}'."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before conversational prompts that have none."}
    )
    warmstart_traces: int = field(
        default=0,
        metadata={"help": "Number of two-phase traces to fine-tune on before training. 0 starts from the model."},
    )
    warmstart_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of that fine-tuning."})
    warmstart_batch_size: int = field(default=4, metadata={"help": "Traces an optimizer step of that fine-tuning."})
    warmstart_plain_share: float = field(
        default=0.0, metadata={"help": "Share of traces written as one plain answer to the problem."}
    )
    warmstart_file: str | None = field(
        default=None,
        metadata={
            "help": "File of traces, as `trl-sgpo bootstrap` writes it, to fine-tune on: all, or `warmstart_traces`."
        },
    )
    report_problems: int = field(
        default=0,
        metadata={"help": "Unseen problems on which accuracy and transfer are measured before and after training."},
    )
    max_problem_tokens: int | None = field(
        default=None, metadata={"help": "Problems with more tokens than this are left out of training."}
    )
    vram_gb: float | None = field(
        default=None,
        metadata={"help": "Memory in GB that the recipe is made for. Training refuses to start where it needs more."},
    )
    check_memory: bool = field(
        default=True,
        metadata={"help": "Whether to estimate memory before weights are loaded, on a GPU or with `vram_gb`."},
    )

    def __post_init__(self) -> None:
        Columns(self.prompt_column, self.prompt_template)  # raises errors


@dataclass
class Recipe:
    """
    A parsed recipe.

    Args:
        script ([`SGPOScriptArguments`]), training ([`SGPOConfig`]), model ([`~trl.ModelConfig`]),
        mixture ([`~trl_sgpo.data.mixture.ProblemMixtureConfig`]):
            The parts of a recipe.
        path (`str` or `None`):
            The YAML file.
        launch (`list[str]`):
            Arguments for `accelerate launch`.
        own (`list[str]`):
            The command line without them.
        columns ([`~trl_sgpo.data.columns.Columns`]):
            Columns of `dataset_name` that problems and answers are read from.
    """

    script: SGPOScriptArguments
    training: SGPOConfig
    model: ModelConfig
    mixture: ProblemMixtureConfig
    path: str | None
    launch: list[str]
    own: list[str]
    columns: Columns


_NEEDED = (
    "model_name_or_path",
    "dataset_name",
    "datasets",
    "reward_funcs",
    "output_dir",
    "max_steps",
    "learning_rate",
)
_PARTS = (SGPOScriptArguments, SGPOConfig, ModelConfig, ProblemMixtureConfig)


class _Parser(TrlParser):
    """TRL's parser, which raises errors instead of ending the process with a page of options."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")


def _parser(prog: str, all_keys: bool) -> _Parser:
    """The parser of recipes, whose help lists all keys, or those that this package adds, sets otherwise, or needs."""
    parser = _Parser(
        _PARTS,
        prog=prog,
        usage=f"{prog} --config RECIPE [--KEY VALUE ...]",
        description="Keys of recipes, which the command line overrides."
        + ("" if all_keys else " Those of TRL, transformers and `accelerate launch` are left out: see `--help_all`."),
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action="help", help="list all keys, also those of TRL and transformers")
    shown = {"help", "help_all", *_NEEDED, *(key for part in _PARTS[:2] for key in part.__annotations__)}
    for action in parser._actions:
        if not all_keys and action.dest not in shown:
            action.help = SUPPRESS
    return parser


def known_keys() -> set[str]:
    """Keys that a recipe may have, with those of `accelerate launch`."""
    launch = [option for action in launch_command_parser()._actions for option in action.option_strings]
    return {
        *(
            action.dest
            for action in _parser("trl-sgpo", all_keys=True)._actions
            if action.dest not in ("help", "help_all")
        ),
        *(option.lstrip("-").replace("-", "_") for option in launch if option.startswith("--") and option != "--help"),
        "accelerate_config",
        "env",
    }


def _no_problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return []


def read_recipe(
    argv: list[str], prog: str, check: Callable[[Mapping[str, Any]], list[tuple[str, str]]] = _no_problems
) -> Recipe:
    """
    Reads `--config recipe.yaml` and the overrides of its keys.

    Args:
        argv (`list[str]`):
            The command line.
        prog (`str`):
            Name shown by `--help`, which lists the keys of this package, and `--help_all`, which lists all.
        check (`Callable`, *optional*):
            Finds further problems in the values of all keys, as [`~trl_sgpo.checks.setup.setup_problems`] does, each a
            key and a message.

    Returns:
        [`Recipe`]

    Raises:
        [`ConfigError`]: A file that cannot be read, unknown keys or invalid values. The message names all of them.
    """
    path, overrides = split_config(argv)
    parser = _parser(prog, "--help_all" in overrides)
    hints = {key: hint for part in _PARTS for key, hint in get_type_hints(part).items()}
    content, refused = ({}, []) if path is None else _read_file(path, parser, hints)
    from_file = parser.set_defaults_with_config(**content)
    values, from_command_line, wrong = _read_command_line(overrides, parser, hints)
    # Of older recipes, which TRL reads the same way
    values["scale_rewards"] = {"true": "group", "false": "none"}.get(
        str(values["scale_rewards"]).lower(), values["scale_rewards"]
    )
    given = {_key(argument) for argument in overrides if argument.startswith("--")}
    refused = [(key, text) for key, text in refused if key not in given] + wrong + check(values)
    launch, problems = _split_launch(from_file + from_command_line, parser)
    problems += [text for _, text in refused]
    parts: list[Any] = []
    keys = {key for key, _ in refused}
    for part in _PARTS:
        names = {item.name for item in fields(part) if item.init} - keys
        try:
            parts.append(part(**{name: values[name] for name in names}))
        except Exception as error:
            message = what_to_mend(error)
            if message is None:
                raise
            found = error.problems if isinstance(error, SettingsError) else [message]
            # What follows from a value that is refused is not told twice
            problems += [text for text in found if not any(key in text for key in keys)]
    problems += [*remote_code_problems(values), *pattern_problems(values)]
    problems += [*not_finite(values), *out_of_range(values, RECIPE_RANGES)]
    own_columns = [key for key in ("prompt_column", "prompt_template") if values[key] is not None]
    own_columns += [key for key in ("answer_column",) if key in given | content.keys()]
    if own_columns and values["datasets"] and "dataset_name" not in given:
        named = " and ".join(f"`{key}`" for key in own_columns)
        problems.append(f"{named} are for `dataset_name`: in a mixture, set them in each entry of `datasets`.")
    refuse(path or "The command line", list(dict.fromkeys(problems)))
    script, training, model, mixture = parts
    target = model.lora_target_modules
    if isinstance(target, str) and target != "all-linear" and target.isidentifier():
        model.lora_target_modules = [target]  # TRL makes text of a list of one, which peft takes for a pattern
    if "dataset_name" in given:
        mixture.datasets = []  # the command line overrides the recipe's mixture
    leftover = list(from_command_line)
    own = [argument for argument in overrides if not (leftover and argument == leftover[0] and leftover.pop(0))]
    own = [*(["--config", path] if path else []), *own]
    answers = training.answer_column if "answer_column" in given | content.keys() else None
    training.answer_column = "solution"  # answers are loaded into this column
    columns = Columns(script.prompt_column, script.prompt_template, answers)
    return Recipe(script, training, model, mixture, path, launch, own, columns)


def _key(option: str) -> str:
    """The key that an option such as `--learning-rate=1e-4` names."""
    return option.lstrip("-").partition("=")[0].replace("-", "_")


def _read_file(path: str, parser: TrlParser, hints: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The values in a recipe, and the problems of those that are refused. Sets the environment variables it names."""
    content, texts = read_mapping(path), read_texts(path)
    values, refused = {}, []
    actions = {action.dest: action for action in reversed(parser._actions)}
    environment = content.pop("env", None) or {}
    if isinstance(environment, dict):
        for name, value in environment.items():
            if not str(name) or "=" in str(name):
                refused.append(("env", f"`env` names a variable {str(name)!r}: a name is not empty and has no `=`."))
                continue
            print(f"{path} sets the environment variable {printable(str(name), kept='')}")  # its value may be a token
            os.environ[str(name)] = str(value)
    else:
        refused.append(("env", "`env` must be a mapping from environment variables to values."))
    for key, value in content.items():
        if key not in hints:
            values[str(key)] = value  # for `accelerate launch`, or unknown
            continue
        try:
            if key == "datasets":
                check_mixture(value)
            values[key] = read_value(key, hints[key], actions[key].choices, value, texts.get(key, value))
        except ConfigError as error:
            found = error.problems if isinstance(error, SettingsError) else [str(error)]
            refused += [(key, text) for text in found]
    return values, refused


def _read_command_line(
    overrides: list[str], parser: TrlParser, hints: dict[str, Any]
) -> tuple[dict[str, Any], list[str], list[tuple[str, str]]]:
    """The values of all keys, what the parser does not know, and the problems of values that are refused."""
    groups: list[list[str]] = [[]]
    for argument in overrides:
        if argument.startswith("--") or argument == "-h":
            groups.append([])
        groups[-1].append(argument)
    namespace, unknown = parser.parse_known_args([])
    refused = []
    for group in groups:
        try:
            namespace, rest = parser.parse_known_args(group, namespace)
            unknown += rest
        except ConfigError as error:
            refused.append((_key(group[0]), str(error)))
    values = vars(namespace)
    for key, value in values.items():
        kinds = [get_origin(kind) or kind for kind in get_args(hints[key])]
        if value == "None" and NoneType in kinds:
            values[key] = None
        elif isinstance(value, str) and value.startswith("{") and dict in kinds:
            try:
                values[key] = parse_json(value)
            except ValueError as error:
                refused.append((key, f"`{key}` is no valid JSON: {error}."))
    values["report_to"] = values["report_to"] or "none"  # transformers takes an empty value for a name
    return values, unknown, refused


def _split_launch(remaining: list[str], parser: TrlParser) -> tuple[list[str], list[str]]:
    """The arguments for `accelerate launch`, and the problems of those that it does not know either."""
    try:
        arguments = resolve_accelerate_config_argument(remaining)
    except ValueError as error:
        return [], [str(error)]
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    unknown = [argument for argument in arguments if argument.startswith("--") and argument.split("=")[0] not in known]
    if not unknown and arguments and not arguments[0].startswith("-"):
        unknown = arguments[:1]
    names = [action.dest for action in parser._actions]
    problems = [unknown_key(argument.lstrip("-").split("=")[0], names) for argument in unknown]
    problems += [] if problems else _launch_problems(arguments)
    if len(problems) == 1 and problems[0].startswith("Unknown"):
        problems[0] += " `trl-sgpo train --help_all` lists all keys."
    return arguments, problems


def _launch_problems(arguments: list[str]) -> list[str]:
    """What is wrong with arguments for `accelerate launch`. A value that no option takes would be run as a program."""
    parser = launch_command_parser()
    messages: list[str] = []

    def error(message: str) -> NoReturn:
        messages.append(f"`accelerate launch`: {message}.")
        raise SystemExit

    parser.error = error  # type: ignore[method-assign]
    try:
        parsed = parser.parse_args([*arguments, "--module", "trl_sgpo"])
    except SystemExit:
        return messages
    if parsed.training_script == "trl_sgpo" and not parsed.no_python:
        return []
    return [f"{parsed.training_script!r} is the value of no key of `accelerate launch`: leave it out."]


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments for loading the recipe's model, overridden by its `model_init_kwargs`."""
    return {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **(recipe.training.model_init_kwargs or {}),
        "use_safetensors": True,
    }


def resume_point(training: SGPOConfig) -> str | None:
    """
    Finds the checkpoint to resume from.

    Args:
        training ([`SGPOConfig`]):
            Its `resume_from_checkpoint` is a directory, or true for the last complete checkpoint of the
            run that `output_dir` belongs to.

    Returns:
        `str` or `None`: A directory, or `None` to start anew.

    Raises:
        [`ConfigError`]: The directory named is no complete checkpoint, or it is unknown which is of the last run.
    """
    setting = training.resume_from_checkpoint
    if setting is None or str(setting).casefold() in ("false", "no", "none", ""):
        return None
    if str(setting).casefold() not in ("true", "yes"):
        if not is_complete(Path(setting)):
            raise ConfigError(
                f"{setting} is no complete checkpoint: set `resume_from_checkpoint` to true for the last complete one "
                f"in {training.output_dir}."
            )
        return str(setting)
    checkpoint = last_checkpoint(training.output_dir)
    if checkpoint is None:
        print(f"{training.output_dir} holds no complete checkpoint of its run: training starts anew.")
        return None
    print(f"Resuming from {checkpoint}.")
    return checkpoint
