"""`trl-sgpo warmstart`: only the supervised warm start of a recipe."""

from ..errors import ConfigError
from ..offline import require_model
from .recipe import load_data, read_recipe
from .train import warmstart_model


def main(argv: list[str]) -> int:
    """Fine-tunes the recipe's model on worked two-phase traces and saves it to `<output_dir>/warmstart`."""
    recipe = read_recipe(argv, "trl-sgpo warmstart")
    if recipe.script.warmstart_traces < 1:
        raise ConfigError("The recipe has no warm start: set `warmstart_traces`, for example to 800.")
    model = require_model(recipe.model.model_name_or_path)
    data = load_data(recipe)
    directory = warmstart_model(recipe, model, data[recipe.script.dataset_train_split])
    print(f"Warm-started model in {directory}: train on it with `--model_name_or_path {directory}`.")
    return 0
