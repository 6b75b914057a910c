"""`trl-sgpo bench step`: time and memory of a step of SGPO and of shared-prompt GRPO, against TRL's GRPOTrainer."""

from ..checks.arguments import Parser, path_option
from ..recipe import read_recipe
from .arms import STEP_ARMS, UNTAUGHT, report, write
from .memory import peaks
from .throughput import add_step_options, step_figures, step_settings, take_turns


def main(argv: list[str]) -> int:
    """Takes steps of the three trainers in turn and prints the figures."""
    parser = Parser(
        prog="trl-sgpo bench step",
        description="Measure SGPO, and GRPO by SharedPromptGRPOTrainer, against TRL's GRPOTrainer on a recipe's model "
        "and data, at equal num_generations and max_completion_length. With `internalize`, also against SGPO without "
        "it, and every second row counts as right.",
        epilog="Further arguments override the recipe, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, required=True, help="recipe")
    parser.add_argument("--output", type=path_option, help="write the figures and the raw rows to this JSON file")
    add_step_options(parser)
    options, overrides = parser.parse_known_args(argv)
    arguments = ["--config", options.config, *overrides]
    recipe = read_recipe(arguments, "trl-sgpo bench step")

    arms = STEP_ARMS if recipe.training.internalize == "none" else (*STEP_ARMS, UNTAUGHT)
    rows = take_turns(recipe, options, arms)
    raw = {"settings": step_settings(recipe, options), "rows": rows}
    figures = step_figures(rows)
    write(figures | raw, options.output)  # what takes long follows
    figures |= peaks(arguments, equal_lengths=False, arms=arms)
    report("SGPO against GRPO, medians", figures | raw, options.output)
    return 0
