"""Controls of a comparison: rewards that tell nothing of an answer."""

import hashlib
import json
from typing import Any


def random_reward(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    """
    A fair coin for each row, whatever it answers. What an arm gains with it does not come from its rewards.

    An arm of a comparison takes it by `reward_funcs: [trl_sgpo.compare.controls.random_reward]`. Answers are verified
    by the recipe's own reward function all the same.

    Args:
        completions (`list`), prompts (`list`):
            The rows. With their place they are the seed of the coin, so that a resumed run tosses the same ones.

    Returns:
        `list[float]`: 0 or 1 for each row.
    """
    rows = enumerate(zip(prompts, completions, strict=True))
    return [float(hashlib.sha256(json.dumps(row).encode()).digest()[0] & 1) for row in rows]
