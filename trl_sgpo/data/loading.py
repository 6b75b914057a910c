"""Loads the data and reward functions that a recipe names."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, DatasetDict

from ..errors import ConfigError, DataError, refuse
from ..inference.pretrained import load_tokenizer
from ..method.prompts import check_prompts, problem_text, with_system_prompt
from ..method.reward_functions import check_function
from ..recipe import Recipe, SGPOScriptArguments
from .columns import stands_for_none
from .mixture import ProblemMixtureConfig
from .tasks import answer_reward, load_mixture, load_problems


def load_data(recipe: Recipe) -> DatasetDict:
    """
    Loads the recipe's dataset or mixture.

    Returns:
        [`~datasets.DatasetDict`]: With the split to train on and, where the recipe evaluates or reports, the one to
        evaluate on.
    """
    script = recipe.script
    train, test = script.dataset_train_split, script.dataset_test_split
    splits = [train]
    if recipe.training.eval_strategy != "no" or script.report_problems > 0:
        splits.append(test)
    if script.dataset_streaming or recipe.mixture.streaming:
        raise DataError("SGPO sorts problems into classes and cannot stream: leave `streaming` out.")
    if recipe.mixture.datasets and recipe.mixture.test_split_size is not None:
        data = load_mixture(recipe.mixture)
    elif recipe.mixture.datasets:
        # A mixture of families with a test split of their own: the same mixture of both
        data = DatasetDict({split: load_mixture(_with_split(recipe.mixture, split))["train"] for split in splits})
    elif script.dataset_name:
        data = DatasetDict(
            {
                split: load_problems(script.dataset_name, split, script.dataset_config, recipe.columns)
                for split in splits
            }
        )
    else:
        raise ConfigError("Name the training problems: set `dataset_name`, or `datasets` for a mixture.")
    for split in data.values():
        check_prompts(split["prompt"])
    _check_answers(data, script.reward_funcs or [])
    if script.system_prompt is not None:
        data = data.map(_add_system_prompt, fn_kwargs={"system_prompt": script.system_prompt}, desc="System prompt")
    return data


def _check_answers(data: DatasetDict, rewards: list[str]) -> None:
    """Raises an error for a split without answers, where `answer_reward` needs them."""
    for split, problems in data.items():
        answers = problems["solution"][:] if "solution" in problems.column_names else []
        has_answers = not all(map(stands_for_none, answers))
        if "answer_reward" in rewards and not has_answers:
            raise DataError(
                f"No problem of the split `{split}` has an answer, which `answer_reward` compares with: name the "
                f"column with the answers as `answer_column` (the columns are {', '.join(problems.column_names)}), or "
                "another reward function."
            )


def _with_split(mixture: ProblemMixtureConfig, split: str) -> ProblemMixtureConfig:
    return replace(mixture, datasets=[replace(part, **{"split": split}) for part in mixture.datasets])


def _add_system_prompt(row: dict[str, Any], system_prompt: str) -> dict[str, Any]:
    return {"prompt": with_system_prompt(row["prompt"], system_prompt)}


def _known_rewards() -> dict[str, Callable[..., Any]]:
    import trl.rewards

    return {
        "answer_reward": answer_reward,
        "accuracy_reward": trl.rewards.accuracy_reward,
        "reasoning_accuracy_reward": trl.rewards.reasoning_accuracy_reward,
        "think_format_reward": trl.rewards.think_format_reward,
        "get_soft_overlong_punishment": trl.rewards.get_soft_overlong_punishment(
            max_completion_len=1280, soft_punish_cache=256
        ),
    }


def reward_problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """
    Finds wrong reward functions in a recipe, as far as they are known without importing modules.

    Args:
        values (`Mapping`):
            The values of all keys.

    Returns:
        `list[tuple[str, str]]`: Keys, and what is wrong with their values.
    """
    known, names = _known_rewards(), values["reward_funcs"] or []
    problems = [
        ("reward_funcs", f"Unknown reward function {name!r}: use one of {', '.join(known)}, or a dotted path.")
        for name in names
        if name not in known and not ("." in name and all(name.split(".")))
    ]
    count = len(names) + (values["reward_model_name_or_path"] is not None)
    weights = values["reward_weights"]
    if count == 0:
        text = "Name at least one reward function: set `reward_funcs`, for example to [answer_reward]."
        problems.append(("reward_funcs", text))
    elif weights is not None and len(weights) != count:
        text = f"`reward_weights` has {len(weights)} weights for {count} reward functions: write one for each."
        problems.append(("reward_weights", text))
    return problems


def load_rewards(script: SGPOScriptArguments) -> list[Any]:
    """
    Resolves reward functions and the reward model.

    Returns:
        `list`: What [`~trl.GRPOTrainer`] takes as `reward_funcs`.

    Raises:
        [`ConfigError`]: A name that is neither known nor importable, or that of no function that takes all columns.
    """
    known = _known_rewards()
    problems = reward_problems(vars(script) | {"reward_weights": None})
    refuse("`reward_funcs`", [text for _, text in problems])
    rewards: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or []:
        if name in known:
            rewards.append(known[name])
            continue
        module_name, _, function = name.rpartition(".")
        print(f"reward function {name}: importing {module_name}")
        sys.path.insert(0, os.getcwd())
        try:
            rewards.append(vars(importlib.import_module(module_name))[function])
        except (ImportError, KeyError) as error:
            raise ConfigError(f"The reward function {name!r} cannot be imported: {error}.") from error
        check_function(rewards[-1])
    return rewards


def without_long_problems(dataset: Dataset, limit: int | None, model: str) -> Dataset:
    """
    Drops problems with more than `limit` tokens and prints how many.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems.
        limit (`int`, *optional*):
            Tokens of a problem's text. If `None`, all problems are kept.
        model (`str`):
            Model whose tokenizer counts the tokens.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        [`DataError`]: If no problem is left.
    """
    if limit is None:
        return dataset
    tokenizer = load_tokenizer(model)
    lengths = [len(tokenizer(problem_text(prompt))["input_ids"]) for prompt in dataset["prompt"]]
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise DataError(f"All problems have more than {limit} tokens: set `max_problem_tokens` to {max(lengths)}.")
    if len(kept) < len(dataset):
        print(f"{len(dataset) - len(kept)} of {len(dataset)} problems have more than {limit} tokens and are left out.")
    return dataset.select(kept)
