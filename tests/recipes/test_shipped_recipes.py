"""Every shipped recipe parses, has a possible geometry, fits its card and takes a step on a tiny model of its kind."""

import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from models import hash_embedder, save_tiny_model
from trl import get_peft_config, get_quantization_config

from trl_sgpo import SGPOTrainer, StrategyBank
from trl_sgpo.cli.train import with_classes
from trl_sgpo.compare.arm_run import arm_recipe
from trl_sgpo.compare.config import read_comparison
from trl_sgpo.data.loading import load_data, load_rewards
from trl_sgpo.data.tasks import to_problems
from trl_sgpo.recipe import Recipe, model_init_kwargs, read_recipe
from trl_sgpo.vram.architectures import architectures
from trl_sgpo.vram.check import estimate_recipe
from trl_sgpo.vram.estimate import GIB


ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in ROOT.joinpath("recipes").rglob("*.yaml") if path.parent.name != "accelerate")
COMPARISONS = [path for path in FILES if "arms" in yaml.safe_load(path.read_text())]
RECIPES = [path for path in FILES if path not in COMPARISONS]
BY_MEMORY = [path for path in RECIPES if path.parent.name == "sgpo"]

SUMS = [(f"What is {i} + {i % 5}?", str(i + i % 5)) for i in range(8)]
ROWS = {  # as the datasets of the recipes have them
    "openai/gsm8k": [{"question": q, "answer": f"{a} it is.\n#### {a}"} for q, a in SUMS],
    "DigitalLearningGmbH/MATH-lighteval": [
        {"problem": q, "solution": f"It is $\\boxed{{{a}}}$.", "level": "Level 1", "type": f"kind {len(a)}"}
        for q, a in SUMS
    ],
    "problems.jsonl": [{"prompt": q, "solution": a} for q, a in SUMS],
    "runs/paper-strategies/traces.jsonl": [
        {"prompt": q, "strategy": f"Add. {a}", "execution": f"#### {a}", "problem_class": "sums"} for q, a in SUMS
    ],
}


def data_of(recipe: Recipe) -> DatasetDict:
    rows = ROWS.get(recipe.script.dataset_name or "")
    if rows is not None:
        return DatasetDict({"train": to_problems(Dataset.from_list(rows), recipe.columns)})
    if (recipe.script.dataset_name or "").startswith("reasoning_gym/"):
        recipe.script.dataset_name = re.sub(r"size=\d+", "size=8", recipe.script.dataset_name or "")
    return load_data(recipe)


def test_there_are_recipes() -> None:
    assert any(path.name == "quickstart.yaml" for path in RECIPES)
    assert any(path.name == "compare.yaml" for path in COMPARISONS)
    assert {yaml.safe_load(path.read_text())["vram_gb"] for path in BY_MEMORY} == {8, 12, 16, 24}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_comparison_has_possible_arms(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comparison = read_comparison(str(path))
    assert comparison.parsed_suites
    for arm in comparison.arms:
        recipe = arm_recipe(comparison, arm, seed=1)
        assert not recipe.launch


@pytest.mark.parametrize("path", BY_MEMORY, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_recipe_names_its_card_and_its_command(path: Path) -> None:
    recipe = read_recipe(["--config", str(path)], "test")
    text = path.read_text()
    assert f"_{recipe.script.vram_gb:g}gb" in path.stem
    assert recipe.model.model_name_or_path.endswith(f"/{path.parts[-3]}")
    assert f"trl-sgpo train --config {path.relative_to(ROOT)}\n" in text
    assert "estimated, not measured" in text
    assert recipe.model.lora_dropout == 0.0 or not recipe.model.use_peft
    assert recipe.model.load_in_4bit == ("qlora" in path.stem)
    assert recipe.training.output_dir not in {
        yaml.safe_load(other.read_text())["output_dir"] for other in BY_MEMORY if other != path
    }


@pytest.mark.parametrize("path", BY_MEMORY, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_recipe_fits_its_card(path: Path) -> None:
    recipe = read_recipe(["--config", str(path)], "test")
    result = estimate_recipe(recipe, str(path), recipe.script.vram_gb, "cuda")
    assert result["fits"]
    stated = re.search(r"Expected peak: ([\d.]+) GB", path.read_text())
    assert stated is not None
    assert float(stated[1]) == pytest.approx(result["peak"] / GIB, abs=0.15)


@pytest.mark.parametrize("path", BY_MEMORY, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_recipe_says_whether_plain_answers_can_be_taught(path: Path) -> None:
    stated = re.search(r"`internalize` \(distill, contrast or kl\): at most ([\d.]+) GB", path.read_text())
    assert stated is not None
    keys = ["--internalize", "kl", "--num_plain_rollouts", "2"]
    recipe = read_recipe(["--config", str(path), *keys], "test")
    result = estimate_recipe(recipe, str(path), recipe.script.vram_gb, "cuda")
    assert result["fits"]
    assert float(stated[1]) == pytest.approx(result["peak"] / GIB, abs=0.15)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_recipe_takes_a_step(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--save_strategy", "no"]
    if "strategy_column" not in yaml.safe_load(path.read_text()):
        overrides += ["--num_generations", "4", "--per_device_train_batch_size", "8"]
    overrides += ["--gradient_accumulation_steps", "1"]
    recipe = read_recipe(["--config", str(path), *overrides], "test")
    assert not recipe.launch
    recipe.training.max_strategy_length = recipe.training.max_completion_length = 4
    recipe.training.num_clusters = 2
    recipe.training.model_init_kwargs = model_init_kwargs(recipe) | {"revision": None}
    data = data_of(recipe)
    assert recipe.script.dataset_test_split in data or recipe.script.report_problems == 0
    known = architectures().get(recipe.model.model_name_or_path, {"model_type": "llama"})
    bank = StrategyBank(tmp_path / "bank", embedding_model=hash_embedder)
    trainer = SGPOTrainer(
        save_tiny_model(tmp_path / "model", known["model_type"]),
        load_rewards(recipe.script),
        recipe.training,
        train_dataset=with_classes(data[recipe.script.dataset_train_split], recipe.training, bank),
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
        strategy_bank=bank,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert {"sgpo/transfer", "sgpo/lift"} & trainer.state.log_history[0].keys()
