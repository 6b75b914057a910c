"""Settings of plain answers that would teach nothing, or be ignored, are refused."""

from typing import Any

import pytest

from trl_sgpo import SGPOConfig
from trl_sgpo.errors import ConfigError


PLAIN = {"num_plain_rollouts": 4, "num_generations": 4, "use_bank": False}
GIVEN = {"strategy_column": "strategy", "use_bank": False, "transfer_block_size": 1, "num_generations": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"internalize": "contrast"}, "set `num_plain_rollouts` to at least 2"),
        ({"internalize": "contrast", "num_plain_rollouts": 1, "num_generations": 5}, "one alone has no advantage"),
        ({"internalize": "contrast", "num_plain_rollouts": 2, "transfer_block_size": 1}, "block_size` to at"),
        ({"internalize": "contrast"} | PLAIN, "below `num_generations`"),
        ({"internalize": "distill"} | PLAIN, "no row writes one.*lower `num_plain_rollouts`"),
        ({"internalize": "distill", "num_bank_rollouts": 2, "num_plain_rollouts": 2} | GIVEN, "set `internalize: kl`"),
        ({"internalize": "kl"} | PLAIN, "below `num_generations`"),
        ({"internalize_weight": 0.1}, "`internalize` is `none`"),
        ({"internalize": "kl", "internalize_weight": 0}, "`internalize_weight` must be above 0"),
        ({"internalize": "kl", "internalize_weight": -1}, "`internalize_weight` must be above 0"),
        ({"internalize_contrasts": 0}, "`internalize_contrasts` must be at least 1"),
        ({"internalize_snapshot_steps": 0}, "`internalize_snapshot_steps` must be at least 1"),
        ({"num_plain_rollouts": 4} | GIVEN, "`num_bank_rollouts` to the number of its executions"),
    ],
)
def test_settings_without_effect(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SGPOConfig("out", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"internalize": "distill"},
        {"internalize": "kl"},
        {"internalize": "contrast", "num_plain_rollouts": 4, "internalize_weight": 0.2},
        {"internalize": "kl", "num_bank_rollouts": 2, "num_plain_rollouts": 2} | GIVEN,
        PLAIN,
    ],
)
def test_settings_with_effect(settings: dict[str, Any]) -> None:
    assert SGPOConfig("out", **settings).internalize == settings.get("internalize", "none")
