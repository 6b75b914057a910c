"""Recipes: YAML files and command-line overrides, read into dataclasses the way `trl` does."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.commands.launch import launch_command_parser
from datasets import DatasetDict
from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.grpo import GRPOScriptArguments

from .data.tasks import answer_reward, load_mixture, load_problems
from .errors import ConfigError, DataError
from .method.prompts import with_system_prompt
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
            Names of TRL's reward functions, `answer_reward` (reads the final answer and checks it with the problem
            family's own verifier or math-verify), or dotted import paths.
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


@dataclass
class Recipe:
    """
    A parsed recipe.

    Args:
        script ([`SGPOScriptArguments`]), training ([`SGPOConfig`]), model ([`~trl.ModelConfig`]),
        mixture ([`~trl.DatasetMixtureConfig`]):
            The parts of a recipe.
        path (`str` or `None`):
            The YAML file.
        launch (`list[str]`):
            Arguments for `accelerate launch`.
        own (`list[str]`):
            The command line without them.
    """

    script: SGPOScriptArguments
    training: SGPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    path: str | None
    launch: list[str]
    own: list[str]


_PARTS = (SGPOScriptArguments, SGPOConfig, ModelConfig, DatasetMixtureConfig)


def read_recipe(argv: list[str], prog: str) -> Recipe:
    """
    Reads `--config recipe.yaml` and overrides, which win.

    Args:
        argv (`list[str]`):
            The command line.
        prog (`str`):
            Name shown by `--help`.

    Returns:
        [`Recipe`]

    Raises:
        [`ConfigError`]: A file that cannot be read, an unknown key, a value that cannot be.
    """
    argv = [  # TRL's parser knows `--config FILE` only as two words
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
        mixture.datasets = []  # overrides win, also over a recipe's mixture
    if training.trust_remote_code:
        raise ConfigError("`trust_remote_code` is refused: it would run code from the model's repository.")
    leftover = list(from_command_line)
    own = [argument for argument in argv if not (leftover and argument == leftover[0] and leftover.pop(0))]
    return Recipe(script, training, model, mixture, path, launch, own)


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
    """Returns what is left for `accelerate launch`, or names the first key nobody knows."""
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


def load_data(recipe: Recipe) -> DatasetDict:
    """
    Loads the recipe's dataset or mixture.

    Returns:
        [`~datasets.DatasetDict`]: With the split to train on and, where the recipe evaluates or reports, the one to
        evaluate on.
    """
    script = recipe.script
    train, test = script.dataset_train_split, script.dataset_test_split
    wanted = [train]
    if recipe.training.eval_strategy != "no" or script.report_problems > 0:
        wanted.append(test)
    if script.dataset_streaming or recipe.mixture.streaming:
        raise DataError("SGPO sorts problems into classes and cannot stream: leave `streaming` out.")
    if recipe.mixture.datasets and recipe.mixture.test_split_size is not None:
        data = load_mixture(recipe.mixture)
    elif recipe.mixture.datasets:
        # A mixture of families with a test split of their own: the same mixture of both
        data = DatasetDict({split: load_mixture(_with_split(recipe.mixture, split))["train"] for split in wanted})
    elif script.dataset_name:
        data = DatasetDict(
            {split: load_problems(script.dataset_name, split, script.dataset_config) for split in wanted}
        )
    else:
        raise ConfigError("Name the training problems: set `dataset_name`, or `datasets` for a mixture.")
    if script.system_prompt is not None:
        data = data.map(_add_system_prompt, fn_kwargs={"system_prompt": script.system_prompt}, desc="System prompt")
    return data


def _with_split(mixture: DatasetMixtureConfig, split: str) -> DatasetMixtureConfig:
    return replace(mixture, datasets=[replace(part, split=split) for part in mixture.datasets])


def _add_system_prompt(row: dict[str, Any], system_prompt: str) -> dict[str, Any]:
    return {"prompt": with_system_prompt(row["prompt"], system_prompt)}


def load_rewards(script: SGPOScriptArguments) -> list[Any]:
    """
    Resolves reward functions and the reward model.

    Returns:
        `list`: What [`~trl.GRPOTrainer`] takes as `reward_funcs`.

    Raises:
        [`ConfigError`]: A name that is neither known nor importable.
    """
    import trl.rewards

    known: dict[str, Callable[..., Any]] = {
        "answer_reward": answer_reward,
        "accuracy_reward": trl.rewards.accuracy_reward,
        "reasoning_accuracy_reward": trl.rewards.reasoning_accuracy_reward,
        "think_format_reward": trl.rewards.think_format_reward,
        "get_soft_overlong_punishment": trl.rewards.get_soft_overlong_punishment(
            max_completion_len=1280, soft_punish_cache=256
        ),
    }
    rewards: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or []:
        if name in known:
            rewards.append(known[name])
            continue
        module_name, _, function = name.rpartition(".")
        if not module_name:
            raise ConfigError(f"Unknown reward function {name!r}: use one of {', '.join(known)}, or a dotted path.")
        print(f"reward function {name}: importing {module_name}")
        sys.path.insert(0, os.getcwd())
        try:
            rewards.append(vars(importlib.import_module(module_name))[function])
        except (ImportError, KeyError) as error:
            raise ConfigError(f"The reward function {name!r} cannot be imported: {error}.") from error
    if not rewards:
        raise ConfigError("Name at least one reward function: set `reward_funcs`, for example to [answer_reward].")
    return rewards


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments for loading the recipe's model, the recipe's own `model_init_kwargs` winning."""
    return {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **(recipe.training.model_init_kwargs or {}),
    }
