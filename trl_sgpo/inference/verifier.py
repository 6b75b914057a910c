"""Checking texts with a TRL reward function."""

from collections.abc import Callable, Sequence
from typing import Any

from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name

from ..method.prompts import Prompt
from ..method.reward_functions import as_rewards


Verifier = Callable[..., list[float | None]]


def as_completions(prompt: Prompt, texts: Sequence[str]) -> list[Any]:
    """Returns texts in the form in which TRL hands completions of such a prompt to reward functions."""
    if is_conversational({"prompt": prompt}):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return list(texts)


def verify(verifier: Verifier, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[float]:
    """
    Checks texts with a TRL reward function.

    Args:
        verifier (`Callable`):
            Reward function, such as [`~trl_sgpo.data.answers.answer_reward`].
        rows (`Sequence[dict]`):
            The problems' rows, of equal columns.
        texts (`Sequence[str]`):
            A completion for each.

    Returns:
        `list[float]`: Outcomes in [0, 1], NaN where the verifier cannot tell.

    Raises:
        [`RewardError`]: The verifier returned no list of numbers.
    """
    if not rows:
        return []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    completions = as_completions(prompts[0], texts)
    returned = verifier(prompts=prompts, completions=completions, completion_ids=[[]] * len(rows), **columns)
    outcomes = as_rewards(returned, get_callable_name(verifier), len(rows))
    return [min(max(float(outcome), 0.0), 1.0) for outcome in outcomes]
