"""The warm start of a recipe."""

import random
from pathlib import Path

from datasets import Dataset

from ..recipe import Recipe, model_init_kwargs
from .bootstrap import warmstart
from .trace_files import read_traces
from .worked import Trace, traces


def warmstart_model(recipe: Recipe, model: str, dataset: Dataset) -> str:
    """
    Fine-tunes the recipe's model on two-phase traces, those of its `warmstart_file` or worked solutions. A model that
    an earlier run of the recipe made is kept.

    Returns:
        `str`: Directory of the fine-tuned model.
    """
    script, training = recipe.script, recipe.training
    if script.warmstart_file is None:
        chosen = _worked_traces(recipe, dataset)
    else:
        chosen = read_traces(script.warmstart_file)
        random.Random(training.seed).shuffle(chosen)
        chosen = chosen[: script.warmstart_traces or len(chosen)]
    return warmstart(
        model,
        chosen,
        training,
        Path(training.output_dir) / "warmstart",
        learning_rate=script.warmstart_learning_rate,
        model_init_kwargs=model_init_kwargs(recipe),
        batch_size=script.warmstart_batch_size,
        plain_share=script.warmstart_plain_share,
        full=not recipe.model.use_peft,
    )


def _worked_traces(recipe: Recipe, dataset: Dataset) -> list[Trace]:
    wanted, seed = recipe.script.warmstart_traces, recipe.training.seed
    repeats = -(-wanted // len(dataset)) + 1
    worked = traces(dataset.shuffle(seed=seed), per_problem=repeats, seed=seed)
    # Every problem's first trace, then every problem's second one
    in_rounds = [worked[i] for start in range(repeats) for i in range(start, len(worked), repeats)]
    return in_rounds[:wanted]
