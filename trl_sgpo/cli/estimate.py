"""`trl-sgpo estimate`: estimates the memory that recipes need, by part, before anything is downloaded."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..checks.arguments import Parser, path_option
from ..checks.console import console
from ..checks.paths import check_file
from ..errors import ConfigError
from ..files import write_file
from .text import print_table


def main(argv: list[str]) -> int:
    """Prints the estimate of one recipe by part, or a line for each of several."""
    options, overrides = _parser().parse_known_args(argv)
    if options.vram is not None and options.vram <= 0:
        raise ConfigError(f"`--vram` must be above 0, got {options.vram:g}.")

    if options.output is not None:
        check_file("--output", options.output)

    from ..recipe import read_recipe
    from ..vram.check import estimate_recipe

    results = []
    for path in options.config:
        recipe = read_recipe(["--config", path, *overrides], "trl-sgpo estimate")
        results.append(estimate_recipe(recipe, path, options.vram or recipe.script.vram_gb, options.device))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(options.output), json.dumps(results, indent=2))
    terminal = console()
    if len(results) == 1:
        _print_parts(terminal, results[0])
    else:
        _print_recipes(terminal, results)
    return 1 if any(result["fits"] is False for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo estimate",
        description="Estimate the peak memory of training by recipes, computed from the models' configs: no weights "
        "are downloaded and no GPU is needed.",
        epilog="Further arguments override the recipes, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, required=True, nargs="+", help="recipes")
    parser.add_argument("--vram", type=float, help="memory of the card in GB; defaults to the recipe's `vram_gb`")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="device to train on; for a CPU, only tensors are counted",
    )
    parser.add_argument("--output", type=path_option, help="write the estimates to this JSON file")
    return parser


def _print_parts(terminal: Console, result: dict[str, Any]) -> None:
    lengths = result["lengths"]
    title = f"{result['model']}: estimated peak memory, while {_WHEN[result['moment']]}"
    terminal.print(title, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, size in result["parts"].items():
        table.add_row(name, _gb(size))
    table.add_section()
    table.add_row("peak", _gb(result["peak"]), style="bold")
    for name, size in result["moments"].items():
        table.add_row(f"  {_WHEN[name]}", _gb(size), style="dim")
    terminal.print(table)
    lines = [
        f"{result['parameters'] / 1e6:,.1f}M parameters, {result['trained'] / 1e6:,.1f}M of them trained; config from "
        f"{result['model_config']}.",
        f"Longest row: {lengths['request']} tokens of request, {lengths['strategy']} of strategy, "
        f"{lengths['execution']} of execution.",
        *[f"In the host's memory: {_gb(size)} GB of {name}." for name, size in result["on_host"].items() if size],
        *result["notes"],
        _verdict(result),
    ]
    for line in lines:
        terminal.print(line, highlight=False, soft_wrap=True)


_WHEN = {
    "strategies": "strategies are written",
    "executions": "they are executed",
    "training": "rows are trained on",
    "optimizer step": "the optimizer steps",
}


def _print_recipes(terminal: Console, results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        vram, fits = result["vram_gb"], result["fits"]
        verdict = "" if fits is None else "yes" if fits else "no"
        rows.append([result["config"], _gb(result["peak"]), "" if vram is None else f"{vram:g}", verdict])
    print_table(["recipe", "GB", "of", "fits"], rows, title="Estimated peak memory")
    for result in results:
        if result["fits"] is False:
            terminal.print(f"{result['config']}: {_verdict(result)}", highlight=False, soft_wrap=True)


def _verdict(result: dict[str, Any]) -> str:
    from ..vram.advice import in_words
    from ..vram.estimate import GIB, HEADROOM

    vram = result["vram_gb"]
    if vram is None:
        return "Pass `--vram` for a verdict."
    if result["fits"]:
        return f"Fits into {vram:g} GB: {1 - result['peak'] / GIB / vram:.0%} stay free."
    start = f"Does not fit into {vram:g} GB with {HEADROOM:.0%} to spare."
    if result["change"] is None:
        return (
            f"{start} No change of batch, precision, `num_generations`, `max_problem_tokens` or "
            "`max_completion_length` is enough: take a smaller model."
        )
    return f"{start} It does with {in_words(result['change'])}: {_gb(result['peak_with_change'])} GB."


def _gb(size: int) -> str:
    from ..vram.estimate import GIB

    return f"{size / GIB:.2f}"
