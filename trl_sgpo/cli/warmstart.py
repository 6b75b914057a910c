"""`trl-sgpo warmstart`: only the supervised warm start of a recipe."""

from ..checks.setup import path_problems
from ..compare.lab.model import fetch_model
from ..data.loading import load_data
from ..data.warmstart import warmstart_model
from ..errors import ConfigError
from ..recipe import read_recipe


def main(argv: list[str]) -> int:
    """Fine-tunes the recipe's model on two-phase traces and saves it to `<output_dir>/warmstart`."""
    # `--traces` is the short name of the recipe's `warmstart_file`
    argv = [
        argument.replace("--traces", "--warmstart_file", 1) if _names_traces(argument) else argument
        for argument in argv
    ]
    recipe = read_recipe(argv, "trl-sgpo warmstart", path_problems)
    if recipe.script.warmstart_traces < 1 and recipe.script.warmstart_file is None:
        raise ConfigError(
            "The recipe has no warm start: set `warmstart_traces`, for example to 800, or name a file of traces with "
            "`--traces`."
        )
    model = fetch_model(recipe.model.model_name_or_path)
    data = load_data(recipe)
    directory = warmstart_model(recipe, model, data[recipe.script.dataset_train_split])
    print(f"Warm-started model in {directory}: train on it with `--model_name_or_path {directory}`.")
    return 0


def _names_traces(argument: str) -> bool:
    return argument.split("=", 1)[0] == "--traces"
