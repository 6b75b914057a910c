"""`recipes/lab/smollm2.yaml`: arms run on a tiny model from one warm start, and every arm has a swept rate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.learning_rates import KEYS, LIKE, best_rates
from models import save_tiny_model

from trl_sgpo.compare.arm_run import check, run_arm
from trl_sgpo.compare.config import Comparison, read_comparison
from trl_sgpo.compare.table import figures_of


LAB = Path(__file__).parents[2] / "recipes" / "lab"
FILE, RATES = LAB / "smollm2.yaml", LAB / "smollm2_rates.yaml"
ARMS = [arm.name for arm in read_comparison(str(FILE)).arms]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The comparison with a tiny model, short answers and few problems."""
    folder = tmp_path_factory.mktemp("smollm2")
    suites = [suite | {"limit": 6} for suite in yaml.safe_load(FILE.read_text())["suites"]]
    next(suite for suite in suites if suite["name"] == "held_out")["limit"] = 72  # two of each class
    overrides = {
        "model_name_or_path": save_tiny_model(folder / "model"),
        "dtype": "float32",
        "bf16": False,
        "lora_r": 2,
        "warmstart_traces": 12,
        "max_strategy_length": 4,
        "max_completion_length": 4,
        "reward_funcs": ["models.evenness"],  # random text is sometimes right
    }
    changes: dict[str, Any] = {"suites": suites, "overrides": overrides, "output_dir": str(folder / "runs")}
    changes |= {"budget": 600, "seeds": [1], "pass_samples": 2, "samples": 1, "curve_points": 1, "curve_problems": 3}
    changes["transfer"] = {"suite": "held_out", "classes": 2, "problems": 2, "executions": 1}
    return replace(read_comparison(str(FILE), changes), recipe=str(LAB / "smollm2_sgpo.yaml"))  # from any directory


@pytest.mark.parametrize("name", ["base", "rft", "sgpo", "wrong"])  # `test_cli_compare.py` runs every method
def test_an_arm_runs(name: str, small: Comparison) -> None:
    check(small)
    arm = next(arm for arm in small.arms if arm.name == name)
    result = run_arm(small, arm, 1)
    figures = figures_of(result)
    assert {f"{suite.name} accuracy" for suite in small.parsed_suites} <= figures.keys()
    assert {"held_out pass@2", "longer plain tokens an answer"} <= figures.keys() and "longer pass@2" not in figures
    families = {place.split("-")[0] for place in result["suites"]["held_out"]["classes"]}
    assert families == {"lists", "words", "stories"}
    spent = result["tokens"]
    assert name == "base" or spent["generated"] + spent["trained"] > 400


def test_arms_differ_only_in_their_rates_from_those_of_the_sweep() -> None:
    whole, sweep = read_comparison(str(FILE)), read_comparison(str(RATES))
    assert sweep.seeds[0] not in whole.seeds and sweep.recipe == whole.recipe
    swept: dict[str, set[float]] = {}
    for arm in sweep.arms:
        name, rest = arm.name.partition("-")[0], arm.overrides | arm.settings
        key = next(key for key in reversed(KEYS) if key in rest)
        swept.setdefault(name, set()).add(rest.pop(key))
        (own,) = [other for other in whole.arms if other.name == name]
        assert arm.method == own.method
        assert rest == {key: value for key, value in (own.overrides | own.settings).items() if key not in KEYS}
    assert set(swept) == {name for name in ARMS if name != "base" and name not in LIKE}
    assert all(rates == {3e-4, 1e-3} for rates in swept.values())


def test_the_best_rate_of_an_arm_is_chosen() -> None:
    arms = {
        "sft-1": {"method": "sft", "sft_learning_rate": 0.1},
        "sft-2": {"method": "sft", "sft_learning_rate": 0.2},
        "grpo-1": {"method": "grpo", "learning_rate": 0.1},
        "grpo-2": {"method": "grpo", "learning_rate": 0.2},
    }
    found = {"sft-1": 0.5, "sft-2": 0.5, "grpo-1": 0.5, "grpo-2": 0.6}
    summary = {
        "settings": {"transfer": {"suite": "validation"}, "arms": arms},
        "arms": {name: {"validation accuracy": {"mean": mean}} for name, mean in found.items()},
    }
    assert best_rates(json.loads(json.dumps(summary))) == {
        "sft": {"sft_learning_rate": 0.1},
        "grpo": {"learning_rate": 0.2},
    }
