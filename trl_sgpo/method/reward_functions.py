"""Checks of reward functions: their names, what they return, and the columns they log."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable

from ..data.classes import CLASS_COLUMN
from ..data.columns import GIVEN
from ..errors import ConfigError, DataError, RewardError
from .metrics import COLUMNS
from .prompts import Prompt, problem_text


_TAKEN = ("step", "prompt", "completion", "advantage", *COLUMNS)
_EXCERPT = 80


def check_functions(reward_funcs: Any) -> None:
    """
    Checks that reward functions can be called as TRL calls them, and that each has a column of its own in the
    completions table.

    Args:
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            TRL reward functions or reward models.

    Raises:
        [`ConfigError`]: One is no function or takes no `**kwargs`, or a name is that of another column, or of two
            functions.
    """
    functions = _as_list(reward_funcs)
    for function in functions:
        check_function(function)
    names = [_name(function) for function in functions]
    for name, count in Counter(names).items():
        if name in _TAKEN:
            raise ConfigError(
                f"The reward function `{name}` would share the column `{name}` of the completions table: give it "
                "another name."
            )
        if count > 1:
            raise ConfigError(
                f"Two reward functions are named `{name}`, so their metrics would be mixed: define a function with a "
                "name of its own for each."
            )


def check_function(function: Any) -> None:
    """Raises [`ConfigError`] if a reward function cannot be called, or does not take all columns."""
    if isinstance(function, str | torch.nn.Module):
        return
    if not callable(function):
        is_module = isinstance(function, ModuleType)
        kind = "is a module" if is_module else f"is of the type {type(function).__name__}"
        shown = function.__name__ if is_module else _excerpt(repr(function))
        raise ConfigError(f"The reward function {shown} {kind}: name a function, as in `my_rewards.reward`.")
    parameters = _parameters(function)
    if parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        raise ConfigError(
            f"The reward function `{_name(function)}` takes no `**kwargs`, and it gets every column of the dataset: "
            "add `**kwargs` to its arguments."
        )


def check_columns_read(reward_funcs: Any, columns: Sequence[str]) -> None:
    """
    Checks that a dataset has the columns that reward functions need.

    Args:
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            TRL reward functions or reward models.
        columns (`Sequence[str]`):
            Names of the dataset's columns.

    Raises:
        [`DataError`]: An argument without a default is no column.
    """
    for function in _as_list(reward_funcs):
        if isinstance(function, str | torch.nn.Module):
            continue
        for each in _parameters(function):
            named = each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.default is each.empty
            if named and each.name not in (*GIVEN, CLASS_COLUMN, *columns):
                raise DataError(
                    f"The reward function `{_name(function)}` needs the column `{each.name}`, which the dataset does "
                    f"not have (the columns are {', '.join(columns)}): add it, or use another reward function."
                )


def _as_list(reward_funcs: Any) -> list[Any]:
    return reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function, none if they cannot be known, as of some in C."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return []


def _name(function: Any) -> str:
    """The name that TRL gives a reward function."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, torch.nn.Module):
        return (get_config_model_id(function.config) or "").split("/")[-1]
    return get_callable_name(function)


def checked(reward_funcs: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """
    Reward functions that raise [`RewardError`] where the given ones return no list of rewards, or log a column of a
    name that is taken. Reward models stay as they are.

    Args:
        reward_funcs (`Sequence[RewardFunc]`):
            TRL reward functions or reward models.
        names (`Sequence[str]`):
            Their names.
    """
    return [
        function if isinstance(function, torch.nn.Module) else _checked(function, name, (*_TAKEN, *names))
        for function, name in zip(reward_funcs, names, strict=True)
    ]


def _checked(function: Callable[..., Any], name: str, taken: Sequence[str]) -> Callable[..., Any]:
    def logging(log_extra: Callable[[str, list[Any]], None]) -> Callable[[str, list[Any]], None]:
        def log(column: str, values: list[Any]) -> None:
            if column in taken:
                raise RewardError(
                    f"The reward function `{name}` logs a column `{column}`, which the completions table has already: "
                    "give the column another name."
                )
            log_extra(column, values)

        return log

    if is_async_callable(function):

        @wraps(function, updated=())
        async def call_async(*, log_extra: Any, **kwargs: Any) -> Any:
            returned = await function(log_extra=logging(log_extra), **kwargs)
            return as_rewards(returned, name, len(kwargs["completions"]))

        return call_async

    @wraps(function, updated=())
    def call(*, log_extra: Any, **kwargs: Any) -> Any:
        returned = function(log_extra=logging(log_extra), **kwargs)
        return as_rewards(returned, name, len(kwargs["completions"]))

    return call


def as_rewards(returned: Any, name: str, rows: int) -> list[Any]:
    """
    Reads what a reward function returned.

    Args:
        returned (`Any`):
            What it returned.
        name (`str`):
            Its name.
        rows (`int`):
            Number of completions.

    Returns:
        `list`: Rewards, NaN for `None`.

    Raises:
        [`RewardError`]: It is no list of one number for each completion.
    """
    try:
        if isinstance(returned, Mapping | Set):  # their keys and items are no rewards, and sets have no order
            raise TypeError
        rewards = [torch.nan if reward is None else reward for reward in returned]
        right = torch.tensor(rewards, dtype=torch.float32).shape == (rows,)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        right = False
    if not right:
        raise RewardError(
            f"The reward function `{name}` returned {_excerpt(repr(returned))}: it must return a list with one "
            f"number, or `None`, for each of the {rows} completions."
        )
    return rewards


def check_finite(rewards: torch.Tensor, names: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """
    Checks the rewards of all ranks, on all ranks, so that all of them end.

    Args:
        rewards (`torch.Tensor` of shape `(world size * B, number of reward functions)`):
            Rewards of all rows.
        names (`Sequence[str]`):
            Names of the reward functions.
        prompts (`Sequence[str | list[dict]]` of length B):
            Problems of the local rows.

    Raises:
        [`RewardError`]: A reward, or the square of one that a standard deviation sums, is beyond float32.
    """
    endless = torch.isinf(rewards.square()).nonzero()
    if len(endless) == 0:
        return
    row, column = endless[0].tolist()
    problem = _excerpt(" ".join(problem_text(gather_object(list(prompts))[row]).split()))
    raise RewardError(
        f"The reward function `{names[column]}` returned {rewards[row, column]:g} for the problem {problem!r}. "
        "Rewards must be below 1e19 in size, because larger ones overflow float32. No step was taken with it: correct "
        "the function and resume from the last checkpoint."
    )


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"
