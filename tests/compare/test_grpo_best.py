"""GRPO with the weights that were best on validation problems."""

from pathlib import Path
from typing import Any

import torch
from models import problems, save_tiny_model
from transformers import AutoModelForCausalLM

from trl_sgpo.compare.config import Arm
from trl_sgpo.compare.methods import Task, train_arm
from trl_sgpo.data.classes import with_classes
from trl_sgpo.recipe import read_recipe


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    recipe = read_recipe(
        [
            *("--model_name_or_path", save_tiny_model(tmp_path / "model"), "--dtype", "float32", "--bf16", "false"),
            *("--reward_funcs", "models.evenness", "--use_bank", "false", "--output_dir", str(tmp_path / "run")),
            *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "4"),
            *("--max_strategy_length", "4", "--gradient_accumulation_steps", "1", "--use_peft", "false"),
            *("--learning_rate", "0.1", "--lr_scheduler_type", "constant", "--max_steps", "1000000"),
            *("--report_to", "none", "--save_strategy", "no", "--gradient_checkpointing", "false"),
        ],
        "test",
    )
    accuracies, weights = [0.25, 0.75, 0.75, 0.5], []

    def measure(trainer: Any) -> float:
        weights.append(trainer.model.get_output_embeddings().weight.detach().clone())
        return accuracies[len(weights) - 1]

    points = [50, 100, 150, 200]
    arm = Arm("best", "grpo_best", {}, {"validation": "any", "validation_points": 4})
    dataset = with_classes(problems(), recipe.training)
    task = Task(arm, recipe, recipe.model.model_name_or_path, dataset, 200, points, measure, keep_best=True)
    trained = train_arm(task)
    kept = AutoModelForCausalLM.from_pretrained(trained.model).get_output_embeddings().weight
    assert [torch.equal(kept, each) for each in weights] == [False, True, False, False]
    assert [point["accuracy"] for point in trained.curve] == accuracies
