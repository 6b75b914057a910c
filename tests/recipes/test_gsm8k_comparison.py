"""`recipes/compare/gsm8k_24gb.yaml` fits its card, and its arms run on a tiny model and data of the same columns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import save_tiny_model

from trl_sgpo.compare.arm_run import arm_recipe, check, run_arm
from trl_sgpo.compare.config import Comparison, read_comparison
from trl_sgpo.vram.check import estimate_recipe
from trl_sgpo.vram.estimate import GIB


ROOT = Path(__file__).parents[2]
FILE = ROOT / "recipes" / "compare" / "gsm8k_24gb.yaml"
SUMS = [(f"What is {i} + {i % 5}?", i + i % 5, f"{i}+{i % 5}") for i in range(12)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": q, "answer": f"It is {s} = <<{s}={a}>>{a}.\n#### {a}"} for q, a, s in SUMS],
    "gsm_plus": [
        {"question": f"Now: {q}", "solution": f"It is {a}.", "answer": str(a), "perturbation_type": "distraction"}
        for q, a, _ in SUMS
    ],
    "math500": [
        {
            "problem": f"Find it: {q}",
            "solution": f"$\\boxed{{{a}}}$",
            "answer": str(a),
            "subject": "small" if a < 7 else "large",
        }
        for q, a, _ in SUMS
    ],
}
STEP = 8 * 8  # rows and tokens of a plain step


@pytest.fixture
def small(tmp_path: Path) -> Comparison:
    """The comparison with a tiny model, short answers and few problems."""
    long = {"question": "and " * 300 + "now?", "answer": "#### 1"}  # longer than `max_problem_tokens`
    for name, rows in (ROWS | {"train": [*ROWS["gsm8k"], long]}).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = read_comparison(str(FILE))
    suites = [
        {"name": suite.name, "path": f"{tmp_path}/{suite.name}.jsonl", "class_column": suite.class_column}
        | {"prompt_column": suite.prompt_column, "kind": suite.kind}
        for suite in whole.parsed_suites
    ]
    overrides = {
        "model_name_or_path": save_tiny_model(tmp_path / "model", "qwen2", hidden_size=64, head_dim=16),
        "dataset_name": f"{tmp_path}/train.jsonl",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_strategy_length": 4,
        "max_completion_length": 4,
        "warmstart_batch_size": 4,
        "num_clusters": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    changes = {"suites": suites, "overrides": overrides, "output_dir": str(tmp_path / "runs"), "budget": 3 * STEP}
    changes |= {"transfer": whole.transfer | {"problems": 2, "executions": 1}, "curve_points": 1, "curve_problems": 2}
    return read_comparison(str(FILE), changes)


def test_all_arms_fit_the_card() -> None:
    comparison = read_comparison(str(FILE))
    assert [arm.name for arm in comparison.arms] == ["base", "sft", "prm", "grpo", "sgpo"]
    assert [suite.name for suite in comparison.parsed_suites] == ["gsm8k", "gsm_plus", "math500"]
    text = FILE.read_text()
    stated = re.search(r"Expected peak: ([\d.]+) GB .*?with PRM's reward model ([\d.]+) GB", text.replace("\n# ", " "))
    assert stated is not None and "has not been run on such a card" in text
    for arm in comparison.arms:
        recipe = arm_recipe(comparison, arm, seed=1)
        result = estimate_recipe(recipe, str(FILE), recipe.script.vram_gb, "cuda")
        assert recipe.script.vram_gb == 24 and recipe.model.load_in_4bit and result["fits"]
        assert float(stated[1]) == pytest.approx(result["peak"] / GIB, abs=0.15)
        # The reward model in float32, and the policy in bfloat16 that has sampled its labels
        with_reward_model = (result["peak"] + (4 + 2) * result["parameters"]) / GIB
        assert float(stated[2]) == pytest.approx(with_reward_model, abs=0.15)
        assert with_reward_model < 0.95 * 24


@pytest.mark.parametrize("name", ["base", "sft", "prm", "grpo", "sgpo"])
def test_an_arm_takes_two_steps(name: str, small: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    check(small)
    arm = next(arm for arm in small.arms if arm.name == name)
    result = run_arm(small, arm, small.seeds[0])
    assert "1 of 13 problems have more than 256 tokens and are left out" in capsys.readouterr().out
    assert list(result["suites"]) == ["gsm8k", "gsm_plus", "math500"]
    assert all(suite["accuracy"]["problems"] == 12 for suite in result["suites"].values())
    if name == "base":
        assert result["tokens"] == {"generated": 0, "labels": 0, "trained": 0}
    elif name == "sft":
        assert result["tokens"]["trained"] >= small.budget and result["details"]["traces"] > 4
    else:
        assert result["details"]["steps"] >= 2 and result["tokens"]["generated"] >= small.budget
        assert (result["tokens"]["labels"] > 0) == (name == "prm")
    if name == "sgpo":  # whose bank trusts nothing yet
        assert all(suite[key] == value for suite in result["suites"].values() for key, value in suite["own"].items())
