"""Rewards that tell nothing of an answer."""

from statistics import fmean

import yaml
from models import save_tiny_model

from trl_sgpo.cli.main import main
from trl_sgpo.compare.controls import random_reward


def test_a_coin_for_each_row() -> None:
    prompts = [[{"role": "user", "content": f"{n} + 1?"}] for n in range(400)]
    completions = [[{"role": "assistant", "content": "2"}]] * 400
    rewards = random_reward(completions=completions, prompts=prompts, solution=["2"] * 400)
    assert set(rewards) == {0.0, 1.0} and 0.4 < fmean(rewards) < 0.6
    assert rewards == random_reward(completions=completions, prompts=prompts)
    same = random_reward(completions=completions, prompts=prompts[:1] * 400)
    assert 0.4 < fmean(same) < 0.6  # rows that are alike are not all right or all wrong


def test_an_arm_with_random_rewards_is_measured_by_the_verifier(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "psutil.py").write_text("open('ran', 'w').close()\n")  # the folder may be of somebody else
    recipe = {
        "model_name_or_path": save_tiny_model(tmp_path / "model"), "bf16": False, "use_peft": False,
        "dtype": "float32", "dataset_name": "list_functions/seen?size=64", "reward_funcs": ["models.evenness"],
        "num_generations": 4, "max_strategy_length": 4, "max_completion_length": 4, "per_device_train_batch_size": 8,
        "use_bank": False, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    comparison = {
        "recipe": str(tmp_path / "recipe.yaml"), "output_dir": str(tmp_path / "runs"), "seeds": [1], "budget": 100,
        "suites": [{"name": "seen", "path": "list_functions/seen?size=64", "kind": "in_distribution"}],
        "transfer": {"suite": "seen", "problems": 1, "executions": 1, "classes": 2}, "curve_problems": 8,
        "curve_points": 1, "samples": 1, "reference": "coin",
        "arms": {"coin": {"method": "grpo", "reward_funcs": ["trl_sgpo.compare.controls.random_reward"]}},
    }  # fmt: skip
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    assert main(["compare", "--config", str(tmp_path / "comparison.yaml")]) == 0
    depends = (tmp_path / "runs" / "coin" / "seed-1" / "depends_on.json").read_text()
    assert "random_reward" in depends and not (tmp_path / "ran").exists()
