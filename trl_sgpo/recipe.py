"""Recipes: YAML files and command-line overrides, read into dataclasses the way `trl` does."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.grpo import GRPOScriptArguments

from .data.columns import Columns
from .data.mixture import ProblemMixtureConfig
from .errors import ConfigError
from .sgpo_config import SGPOConfig
from .yaml_files import read_mapping


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


_PARTS = (SGPOScriptArguments, SGPOConfig, ModelConfig, ProblemMixtureConfig)


def read_recipe(argv: list[str], prog: str) -> Recipe:
    """
    Reads `--config recipe.yaml` and the overrides of its keys.

    Args:
        argv (`list[str]`):
            The command line.
        prog (`str`):
            Name shown by `--help`.

    Returns:
        [`Recipe`]

    Raises:
        [`ConfigError`]: A file that cannot be read, an unknown key or an invalid value.
    """
    argv = [  # TRL's parser accepts `--config FILE` only as two words
        part
        for argument in argv
        for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
    ]
    path = _check_file(argv)
    parser = TrlParser(_PARTS, prog=prog)
    try:
        *parts, from_file, from_command_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    launch = _check_launch(from_file + from_command_line, parser)
    script, training, model, mixture = parts
    if "--dataset_name" in argv:
        mixture.datasets = []  # the command line overrides the recipe's mixture
    if training.trust_remote_code:
        raise ConfigError("`trust_remote_code` is refused: it would run code from the model's repository.")
    leftover = list(from_command_line)
    own = [argument for argument in argv if not (leftover and argument == leftover[0] and leftover.pop(0))]
    columns = _columns(script, training, mixture, _is_set("answer_column", argv, path))
    training.answer_column = "solution"  # answers are loaded into this column
    return Recipe(script, training, model, mixture, path, launch, own, columns)


def _is_set(key: str, argv: list[str], path: str | None) -> bool:
    given = any(argument.split("=", 1)[0] == f"--{key}" for argument in argv)
    return given or (path is not None and key in read_mapping(path))


def _columns(
    script: SGPOScriptArguments, training: SGPOConfig, mixture: ProblemMixtureConfig, answers: bool
) -> Columns:
    columns = Columns(script.prompt_column, script.prompt_template, training.answer_column if answers else None)
    if mixture.datasets and columns != Columns():
        raise ConfigError(
            "`prompt_column`, `prompt_template` and `answer_column` are those of `dataset_name`: in a mixture, set "
            "them in each entry of `datasets`."
        )
    return columns


def _check_file(argv: list[str]) -> str | None:
    if "--config" not in argv:
        return None
    position = argv.index("--config") + 1
    if position == len(argv):
        raise ConfigError("`--config` needs the path of a recipe: `trl-sgpo init` writes one.")
    path = argv[position]
    content = read_mapping(path)
    for name in content.get("env") or {}:
        print(f"{path} sets the environment variable {name}")  # its value may be a token
    return path


def _check_launch(remaining: list[str], parser: TrlParser) -> list[str]:
    """Returns the arguments for `accelerate launch`; raises an error for the first unknown key."""
    try:
        arguments = resolve_accelerate_config_argument(remaining)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    unknown = [argument for argument in arguments if argument.startswith("--") and argument.split("=")[0] not in known]
    if unknown or (arguments and not arguments[0].startswith("-")):
        name = (unknown or arguments)[0].lstrip("-").split("=")[0]
        names = [action.dest for action in parser._actions]
        close = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {', '.join(f'--{match}' for match in close)}?" if close else ""
        raise ConfigError(f"Unknown key `{name}`.{hint} `trl-sgpo train --help` lists all keys.")
    return arguments


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments for loading the recipe's model, overridden by its `model_init_kwargs`."""
    return {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **(recipe.training.model_init_kwargs or {}),
    }


def resume_point(training: SGPOConfig) -> str | None:
    """
    Finds the checkpoint to resume from.

    Args:
        training ([`SGPOConfig`]):
            Its `resume_from_checkpoint` is a directory, or true for the last complete checkpoint in `output_dir`.

    Returns:
        `str` or `None`: A directory, or `None` to start anew.

    Raises:
        [`ConfigError`]: The directory named is no complete checkpoint.
    """
    setting = training.resume_from_checkpoint
    if setting is None or str(setting).casefold() in ("false", "no", "none", ""):
        return None
    if str(setting).casefold() not in ("true", "yes"):
        if not _is_complete(Path(setting)):
            raise ConfigError(
                f"{setting} is no complete checkpoint: set `resume_from_checkpoint` to true for the last complete one "
                f"in {training.output_dir}."
            )
        return str(setting)
    checkpoints = sorted(
        (int(path.name.rsplit("-", 1)[1]), str(path))
        for path in Path(training.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rsplit("-", 1)[1].isdigit() and _is_complete(path)
    )
    if not checkpoints:
        print(f"{training.output_dir} holds no complete checkpoint: training starts anew.")
        return None
    print(f"Resuming from {checkpoints[-1][1]}.")
    return checkpoints[-1][1]


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer state, which is written last, can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
