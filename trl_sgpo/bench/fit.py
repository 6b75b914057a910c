"""`trl-sgpo bench fit`: memory and speed of recipes on this GPU, with random weights, so that none are downloaded."""

import time
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.initialization import no_init_weights
from trl import get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..checks.arguments import Parser, path_option
from ..compare.lab.model import fetch_model
from ..errors import ConfigError, SGPOError
from ..recipe import Recipe, model_init_kwargs, read_recipe
from ..vram.architectures import model_config
from ..vram.check import estimate_recipe
from ..vram.estimate import CONTEXT, GIB
from .arms import ARMS, build_trainer, measured_step, settings, write
from .processes import in_new_process


def main(argv: list[str]) -> int:
    """Measures recipes one after the other, each trainer in a process of its own, and prints a line for each."""
    parser = Parser(
        prog="trl-sgpo bench fit",
        description="Measure the peak memory and the speed of recipes on this GPU, and the same of TRL's GRPOTrainer "
        "at equal rows and total lengths. Weights are random, loaded and quantized as the recipe says, so that only "
        "configs and a tokenizer are needed. PyTorch may not allocate more than the card that a recipe is made for "
        "has, whatever this one has.",
        epilog="Further arguments override the recipes, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, required=True, nargs="+", help="recipes")
    parser.add_argument("--vram", type=float, help="memory in GB to stay within; defaults to the recipe's `vram_gb`")
    parser.add_argument("--tokenizer", help="tokenizer to use instead of the models' own: a directory or Hub id")
    parser.add_argument(
        "--steps", type=int, default=1, help="timed steps of each trainer, after a first one; 0 measures memory only"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="trainers")
    parser.add_argument("--output", type=path_option, help="write the figures to this JSON file")
    options, overrides = parser.parse_known_args(argv)
    if options.steps < 0 or (options.vram is not None and options.vram <= 0):
        raise ConfigError("`--steps` must be at least 0 and `--vram` above 0.")

    results = []
    for path in options.config:
        arguments = ["--config", path, *overrides]
        recipe = read_recipe(arguments, "trl-sgpo bench fit")
        vram = options.vram or recipe.script.vram_gb
        tokenizer = options.tokenizer or fetch_model(recipe.model.model_name_or_path)
        result: dict[str, Any] = {
            "config": path,
            "vram_gb": vram,
            "settings": settings(recipe),
            "estimate": estimate_recipe(recipe, path, vram, "cuda" if torch.cuda.is_available() else "cpu"),
        }
        for arm in options.arms:
            print(f"{path}: {arm}", flush=True)
            result[arm] = in_new_process(_send_figures, arm, arguments, vram, tokenizer, options.steps) or {
                "error": "The process ended without a result: see its output above."
            }
        results.append(result | {"figures": _figures(result)})
        write({"recipes": results}, options.output)  # after each, so that a kill loses one
    for result in results:
        print("\n".join(_lines(result)))
    return 1 if any("error" in result[arm] for result in results for arm in options.arms) else 0


def random_model(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """
    Loads a model of random weights the way TRL loads one from a checkpoint, quantization included.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's config.
        **kwargs:
            What `from_pretrained` takes.

    Returns:
        [`~transformers.PreTrainedModel`]: Matrices are normal with a deviation of 0.02, norms are 1. All are parts
        of one array of random numbers, so that making them takes little time and memory.
    """
    with torch.device("meta"), no_init_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16)
    empty.tie_weights()
    shapes = dict(empty.named_parameters())  # tied ones once
    largest = max(weight.numel() for weight in shapes.values())
    numbers = torch.empty(2**24, dtype=torch.bfloat16).normal_(0, 0.02).repeat(2 + largest // 2**24)
    weights = {}
    for index, (name, weight) in enumerate(shapes.items()):
        start = 997 * index % 2**24
        part = numbers[start : start + weight.numel()].view(weight.shape)
        weights[name] = torch.ones_like(part) if "norm" in name else part
    return create_model_from_path(None, type(empty), config=config, state_dict=weights, **kwargs)


def _send_figures(arm: str, arguments: list[str], vram: float | None, tokenizer: str, steps: int, send: Any) -> None:
    figures: dict[str, Any] = {}
    try:
        _measure(arm, read_recipe(arguments, "trl-sgpo bench fit"), vram, tokenizer, steps, figures)
    except (SGPOError, torch.OutOfMemoryError) as error:
        figures["error"] = str(error)
    send.send(figures)


class _WorstCaseDone(Exception):
    """Ends training after the worst-case step."""


class _EndBeforeSteps(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _WorstCaseDone


def _measure(
    arm: str, recipe: Recipe, vram: float | None, tokenizer: str, steps: int, figures: dict[str, Any]
) -> None:
    """Fills in the figures one by one, so that those before an error are kept."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and vram is not None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min((vram * GIB - CONTEXT) / whole, 1.0))
    start = time.perf_counter()
    trainer = _with_random_model(arm, recipe, tokenizer)
    figures["seconds_to_load"] = time.perf_counter() - start
    if on_gpu:
        figures["loaded_bytes"] = torch.cuda.memory_allocated()
    if arm == "sgpo":
        figures["worst_case"] = trainer.worst_case.peaks
        trainer.args.worst_case_step = True
        enough = _EndBeforeSteps()
        trainer.add_callback(enough)
        with suppress(_WorstCaseDone):
            trainer.train()
        trainer.remove_callback(enough)
        trainer.args.worst_case_step = False
    rows = figures["steps"] = []
    for step in range(1 if arm == "sgpo" else 0, steps + 1):  # the first step of SGPO was the worst-case step
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row = {"step": step, **measured_step(trainer)[0]}
        if on_gpu:
            row |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        rows.append(row)
    if on_gpu:  # what is not PyTorch's is the context, if no other process uses the GPU
        free, whole = torch.cuda.mem_get_info()
        figures["outside_pytorch_bytes"] = whole - free - torch.cuda.memory_reserved()


def _with_random_model(arm: str, recipe: Recipe, tokenizer: str) -> Any:
    name = recipe.model.model_name_or_path
    of_files = ("revision", "use_safetensors")
    loading = {
        key: value for key, value in model_init_kwargs(recipe).items() if key not in of_files and value is not None
    }
    quantization = get_quantization_config(recipe.model)
    if quantization is not None:
        loading["quantization_config"] = quantization
    model = random_model(model_config(name, recipe.model.model_revision)[0], **loading)
    return build_trainer(arm, recipe, equal_lengths=True, model=model, tokenizer=tokenizer)


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """Figures of a recipe in the table: medians of its timed steps, and the ratios of the two trainers."""
    figures = {"estimated_bytes": result["estimate"]["peak"]}
    for arm in ARMS:
        rows = result.get(arm, {}).get("steps", [])
        timed = [row for row in rows if row["step"] > 0]
        peaks = [row["peak"] for row in rows if "peak" in row]
        if peaks:
            figures[f"{arm}_peak_bytes"] = max(peaks)
        if timed:
            figures[f"{arm}_seconds_per_step"] = median(row["seconds"] for row in timed)
            figures[f"{arm}_seconds_per_generated_token"] = median(
                row["seconds"] / row["generated_tokens"] for row in timed
            )
            figures[f"{arm}_rollout_tokens_per_second"] = median(
                row["generated_tokens"] / row["seconds_generating"] for row in timed
            )
    worst = result.get("sgpo", {}).get("worst_case")
    if worst and "error" not in result["sgpo"]:
        figures["worst_case_bytes"] = max(value for name, value in worst.items() if name != "reserved")
        figures["worst_case_reserved_bytes"] = worst["reserved"]
    for name in ("peak_bytes", "seconds_per_generated_token"):
        if f"sgpo_{name}" in figures and f"grpo_{name}" in figures:
            figures[f"{name}_ratio"] = figures[f"sgpo_{name}"] / figures[f"grpo_{name}"]
    return figures


def _lines(result: dict[str, Any]) -> list[str]:
    """The printed lines of a recipe."""
    figures, limit = result["figures"], result["vram_gb"]

    def in_gb(name: str, key: str) -> list[str]:
        return [f"{name} {figures[key] / GIB:.2f}"] if key in figures else []

    memory = [
        *in_gb("estimated", "estimated_bytes"),
        *in_gb("largest step, as PyTorch reserved it,", "worst_case_reserved_bytes"),
        *in_gb("SGPO", "sgpo_peak_bytes"),
        *in_gb("GRPO", "grpo_peak_bytes"),
    ]
    speed = [
        f"{arm.upper()} {figures[f'{arm}_seconds_per_step']:.1f} s a step, "
        f"{figures[f'{arm}_rollout_tokens_per_second']:.0f} tokens/s while generating"
        for arm in ARMS
        if f"{arm}_seconds_per_step" in figures
    ]
    ratios = [
        f"{text} {figures[key]:.3f} of GRPO's"
        for key, text in (("peak_bytes_ratio", "peak"), ("seconds_per_generated_token_ratio", "time a token"))
        if key in figures
    ]
    errors = [f"{arm.upper()}: {result[arm]['error']}" for arm in ARMS if "error" in result.get(arm, {})]
    title = result["config"] if limit is None else f"{result['config']}, within {limit:g} GB"
    parts = [f"memory, GB: {', '.join(memory)}", "; ".join(speed), ", ".join(ratios), *errors]
    return [title, *(f"  {part}" for part in parts if part)]
