"""`trl-sgpo bench memory`: peak memory of SGPO and of TRL's GRPOTrainer, at equal rows and total lengths."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..checks.arguments import Parser, path_option
from ..errors import ConfigError
from ..recipe import read_recipe
from .arms import ARMS, build_trainer, report, settings
from .processes import in_new_process, peak_resident


def main(argv: list[str]) -> int:
    """Measures each trainer in a process of its own and prints the figures."""
    parser = Parser(
        prog="trl-sgpo bench memory",
        description="Measure the peak memory of SGPO and of TRL's GRPOTrainer on a recipe's model and data, at equal "
        "rows and total lengths: GRPO's completions are as long as strategy and execution together, and every row is "
        "generated to its full length. Each trainer has a process of its own.",
        epilog="Further arguments override the recipe, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, required=True, help="recipe")
    parser.add_argument("--output", type=path_option, help="write the figures to this JSON file")
    options, overrides = parser.parse_known_args(argv)
    arguments = ["--config", options.config, *overrides]
    recipe = read_recipe(arguments, "trl-sgpo bench memory")
    args = recipe.training
    total = args.max_strategy_length + args.max_completion_length
    figures = peaks(arguments, equal_lengths=True)
    result = {**figures, "settings": settings(recipe) | {"grpo_max_completion_length": total}}
    report("Memory of SGPO and GRPO at equal rows and total lengths", result, options.output)
    return 0


def peaks(arguments: list[str], equal_lengths: bool, arms: Sequence[str] = ARMS) -> dict[str, float]:
    """
    Peak memory of several trainers, in bytes, and its ratio to that of TRL's.

    `peak` is the most a process had: what PyTorch allocated on a GPU, resident memory on a CPU. `step` is what
    tensors took at most during a step above what they took before it.

    Args:
        arguments (`list[str]`):
            The recipe and what overrides it.
        equal_lengths (`bool`):
            Whether GRPO's completions have the length of strategy and execution together.
        arms (`Sequence[str]`, *optional*, defaults to `("sgpo", "grpo")`):
            The trainers.
    """
    return memory_figures({arm: _in_new_process(arm, arguments, equal_lengths) for arm in arms})


def memory_figures(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """Peaks of each trainer, and their ratios to those of TRL's."""
    figures = {
        f"{'' if arm == 'sgpo' else f'{arm}_'}{name}_memory_ratio": memory[name] / measured["grpo"][name]
        for arm, memory in measured.items()
        if arm != "grpo"
        for name in ("peak", "step")
    }
    for arm, memory in measured.items():
        figures |= {f"{arm}_{name}_bytes": value for name, value in memory.items()}
    return figures


def _in_new_process(arm: str, arguments: list[str], equal_lengths: bool) -> dict[str, float]:
    peaks = in_new_process(_send_peaks, arm, arguments, equal_lengths)
    if peaks is None:
        raise ConfigError(f"The {arm} arm could not take a step with this recipe: see the error above.")
    return peaks


def _send_peaks(arm: str, arguments: list[str], equal_lengths: bool, send: Any) -> None:
    trainer = build_trainer(arm, read_recipe(arguments, "trl-sgpo bench"), equal_lengths=equal_lengths)
    print(f"{arm}: measuring the memory of a step", flush=True)
    trainer.train()  # the first step also makes what stays, such as the copy of adapted weights
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        trainer.train()
        peak = torch.cuda.max_memory_allocated()
        send.send({"peak": float(peak), "step": float(peak - before)})
        return
    trainer.train()
    peak = peak_resident()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    send.send({"peak": float(peak), "step": float(max(accumulate(changes)))})
