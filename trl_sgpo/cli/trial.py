"""The trial of a recipe: 16 rollouts of its model, and what to change before training."""

from ..errors import ConfigError


def try_recipe(path: str) -> None:
    """
    Writes and executes strategies for 16 training problems of a recipe, sampled as in training, and prints figures.

    Args:
        path (`str`):
            The recipe. Its warm start is not made, and its bank is not read.

    Raises:
        [`ConfigError`]: Its verifier is a reward model.
    """
    from trl import get_quantization_config

    from ..compare.lab.model import fetch_model
    from ..data.loading import load_data, load_rewards, without_long_problems
    from ..evaluation.trial import advice, draw, run_trial
    from ..inference.model import Decoding, TwoPhaseModel
    from ..inference.settings import TwoPhaseSettings
    from ..recipe import model_init_kwargs, read_recipe

    recipe = read_recipe(["--config", path], "trl-sgpo init --try")
    script, training = recipe.script, recipe.training
    verifier = load_rewards(script)[0]
    if isinstance(verifier, str):
        raise ConfigError("A reward model does not tell right from wrong: put a reward function first to try.")
    name = fetch_model(recipe.model.model_name_or_path)
    problems = load_data(recipe)[script.dataset_train_split]
    rows = draw(without_long_problems(problems, script.max_problem_tokens, name), training.seed)
    kwargs = model_init_kwargs(recipe)
    quantization = get_quantization_config(recipe.model)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    settings = TwoPhaseSettings.from_config(training, rows[0]["prompt"])
    device = "cpu" if training.use_cpu else None
    model = TwoPhaseModel.from_pretrained(name, settings, batch_size=len(rows), device=device, **kwargs)
    sampled = Decoding(greedy=False, temperature=training.temperature, top_p=training.top_p, seed=training.seed)
    trial = run_trial(model, rows, verifier, sampled)
    limits = (training.max_strategy_length, training.max_completion_length)
    figures = {
        "right": f"{trial.right} of {trial.rollouts}",
        "cut off": f"{trial.cut_strategies} strategies at {limits[0]} tokens, {trial.cut_executions} executions at "
        f"{limits[1]}",
        "malformed": f"{trial.malformed} strategies, {trial.unanswered} executions without a final answer",
        "time a rollout": f"{trial.seconds / trial.rollouts:.2f} s",
    }
    print(f"{trial.rollouts} rollouts of {recipe.model.model_name_or_path}, sampled as in training:")
    for title, figure in figures.items():
        print(f"  {title:<15} {figure}")
    if script.warmstart_traces > 0 or script.warmstart_file is not None:
        print("This is the model before the recipe's warm start.")
    changes = advice(trial, *limits)
    print("Before training:" if changes else "No change is needed before training.")
    for change in changes:
        print(f"  - {change}")
