"""Checking texts with a TRL reward function."""

from collections.abc import Callable, Sequence
from typing import Any

from trl.data_utils import is_conversational


Verifier = Callable[..., list[float | None]]


def verify(verifier: Verifier, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[float]:
    """
    Checks texts with a TRL reward function.

    Args:
        verifier (`Callable`):
            Reward function, such as [`~trl_sgpo.data.tasks.answer_reward`].
        rows (`Sequence[dict]`):
            The problems' rows, of equal columns.
        texts (`Sequence[str]`):
            A completion for each.

    Returns:
        `list[float]`: Outcomes in [0, 1], NaN where the verifier cannot tell.
    """
    if not rows:
        return []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    completions: list[Any] = list(texts)
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    outcomes = verifier(prompts=prompts, completions=completions, completion_ids=[[]] * len(rows), **columns)
    return [float("nan") if outcome is None else min(max(float(outcome), 0.0), 1.0) for outcome in outcomes]
