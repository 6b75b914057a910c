"""`trl-sgpo bench speedups`: time saved by each fast path, measured by switching it off."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.table import Table

from ..checks.arguments import Parser, path_option
from ..checks.console import console
from ..recipe import read_recipe
from .arms import build_trainer, counted_step, measured_step, write
from .throughput import add_step_options, check_step_options, step_settings


SPEEDUPS = {
    "merges_adapters": "adapters merged while generating",
    "shares_prefixes": "prompts read once, and finished rows dropped, while generating",
    "drops_finished_rows": "finished rows dropped while generating",
    "shares_prompts": "prompts read once while training",
}
MEASURES = {
    "seconds": "step",
    "cpu_seconds": "step, CPU",
    "seconds_generating": "generation",
    "cpu_seconds_generating": "generation, CPU",
    "flops": "operations",
}


def main(argv: list[str]) -> int:
    """Takes steps with all fast paths and without each of them in turn, and prints the figures."""
    parser = Parser(
        prog="trl-sgpo bench speedups",
        description="Measure the time that each fast path of SGPO saves on a recipe's model and data: time per "
        "generated token without it, divided by that with all of them. All variants take turns in one process. "
        "Dropping finished rows saves time only if rows end early: set `--end_probability`.",
        epilog="Further arguments override the recipe, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, required=True, help="recipe")
    parser.add_argument("--output", type=path_option, help="write the figures and the raw rows to this JSON file")
    add_step_options(parser)
    options, overrides = parser.parse_known_args(argv)
    check_step_options(options)
    recipe = read_recipe(["--config", options.config, *overrides], "trl-sgpo bench speedups")

    trainer = build_trainer("sgpo", recipe, options.end_probability)
    used = [name for name in SPEEDUPS if vars(trainer)[name]]
    rows: list[dict[str, Any]] = []
    for step in range(options.steps + 1):
        for without in [None, *used] if step % 2 else [*reversed(used), None]:
            with _switched_off(trainer, without):
                row = measured_step(trainer)[0] if step else counted_step(trainer)
            print(f"step {step} without {without}: {row['generated_tokens']} tokens generated", flush=True)
            rows.append({"without": without, "step": step, **row})
    figures = {name: _figures(rows, name) for name in used}
    write(figures | {"settings": step_settings(recipe, options), "rows": rows}, options.output)
    _print(figures)
    return 0


@contextmanager
def _switched_off(trainer: Any, name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    setattr(trainer, name, False)
    try:
        yield
    finally:
        setattr(trainer, name, True)


def _figures(rows: list[dict[str, Any]], without: str) -> dict[str, float]:
    def median(variant: str | None, measure: str) -> float:
        measured = [row for row in rows if row["without"] == variant and measure in row]
        return statistics.median(row[measure] / row["generated_tokens"] for row in measured)

    return {f"{measure}_ratio": median(without, measure) / median(None, measure) for measure in MEASURES}


def _print(figures: dict[str, dict[str, float]]) -> None:
    table = Table(title="Time per generated token without, divided by with")
    table.add_column("speedup")
    for measure in MEASURES.values():
        table.add_column(measure, justify="right")
    for name, values in figures.items():
        table.add_row(SPEEDUPS[name], *(f"{value:.2f}" for value in values.values()))
    console().print(table)
