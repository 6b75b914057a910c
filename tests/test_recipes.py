"""Every shipped recipe parses, has a possible geometry, and takes a step on a tiny model."""

from pathlib import Path

import pytest
import yaml
from models import hash_embedder, save_tiny_model

from trl_sgpo import SGPOTrainer, StrategyBank
from trl_sgpo.cli.recipe import load_data, load_rewards, read_recipe
from trl_sgpo.cli.train import get_peft_config, with_classes
from trl_sgpo.compare.config import read_comparison
from trl_sgpo.compare.run import arm_recipe
from trl_sgpo.evaluation.suites import Suite


FILES = sorted(
    path for path in Path(__file__).parents[1].joinpath("recipes").rglob("*.yaml") if path.parent.name != "accelerate"
)
COMPARISONS = [path for path in FILES if "arms" in yaml.safe_load(path.read_text())]
RECIPES = [path for path in FILES if path not in COMPARISONS]


def test_there_are_recipes() -> None:
    assert any(path.name == "quickstart.yaml" for path in RECIPES)
    assert any(path.name == "compare.yaml" for path in COMPARISONS)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_comparison_has_possible_arms(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[2])
    comparison = read_comparison(str(path))
    assert [Suite(**suite).kind for suite in comparison.suites]
    for arm in comparison.arms:
        recipe = arm_recipe(comparison, arm, seed=1)
        assert not recipe.launch


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step(path: Path, tmp_path: Path) -> None:
    overrides = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--save_strategy", "no", "--bf16", "false"]
    recipe = read_recipe(["--config", str(path), *overrides], "test")
    assert not recipe.launch
    recipe.training.max_strategy_length = recipe.training.max_completion_length = 8
    data = load_data(recipe)
    assert recipe.script.dataset_test_split in data or recipe.script.report_problems == 0
    trainer = SGPOTrainer(
        save_tiny_model(tmp_path / "model"),
        load_rewards(recipe.script),
        recipe.training,
        train_dataset=with_classes(data[recipe.script.dataset_train_split], recipe.training),
        peft_config=get_peft_config(recipe.model),
        strategy_bank=StrategyBank(tmp_path / "bank", embedding_model=hash_embedder),
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert "sgpo/transfer" in trainer.state.log_history[0]
