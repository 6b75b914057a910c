"""
Benchmarks of the strategy bank:

    make bench-bank ARGS="--sections index scale"
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_sgpo.files import write_file

from . import fuzz, index, kills, poison, retention, scale, sleepers, trust


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "kills": lambda options, directory: kills.measure(options.kills, directory),
    "retention": lambda options, directory: retention.measure(options.seeds, directory),
    "poison": lambda options, directory: poison.measure(options.seeds, directory),
    "sleepers": lambda options, directory: sleepers.measure(options.seeds, directory),
    "index": lambda options, directory: index.measure(options.index_sizes, directory),
    "scale": lambda options, directory: scale.measure(options.sizes, directory),
    "trust": lambda options, directory: trust.measure(options.strategies),
    "fuzz": lambda options, directory: fuzz.measure(options.inputs, directory),
}


def main(argv: list[str]) -> None:
    """Measures sections of the bank and prints their figures."""
    parser = argparse.ArgumentParser(
        prog="make bench-bank ARGS=",
        description="Measure the strategy bank. Each section takes less than ten minutes on two CPU cores.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sections:\n"
        "  kills      a writing process is killed many times, half of them while Chroma writes its index\n"
        "  retention  20 classes one after the other, each with five times as many strategies as it may keep\n"
        "  poison     harmful strategies that are imported or written by a compromised rollout\n"
        "  sleepers   strategies that are right on most problems and mislead on those with a trigger\n"
        "  index      a step, opening and closing with and without the index, by size\n"
        "  scale      retrieval, commits, opening and snapshots by size, beside plain Chroma and an exact matrix\n"
        "  trust      how often strategies of known success rates are ever trusted or retired\n"
        "  fuzz       imports of malformed files",
    )
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--output", help="write the figures to this JSON file; those of other sections in it stay")
    parser.add_argument("--kills", type=int, default=120, help="how often the writing process is killed")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of retention, poison and sleepers")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="strategies in the bank"
    )
    parser.add_argument(
        "--index_sizes", type=int, nargs="+", default=[100, 1_000, 10_000], help="strategies with and without index"
    )
    parser.add_argument("--strategies", type=int, default=2_000, help="simulated strategies of each rate, for trust")
    parser.add_argument("--inputs", type=int, default=10_000, help="malformed imports")
    options = parser.parse_args(argv)

    output = Path(options.output) if options.output else None
    known = json.loads(output.read_text()) if output is not None and output.exists() else {}
    for name in dict.fromkeys(options.sections):
        print(f"Measuring {name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="trl-sgpo-bench-") as directory:
            figures = SECTIONS[name](options, Path(directory))
        _print(name, figures)
        known |= figures | {"device": platform.processor() or platform.machine()}
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_file(output, json.dumps(known, indent=2))


def _print(name: str, figures: dict[str, Any]) -> None:
    table = Table(title=f"Strategy bank: {name}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in figures.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                if not isinstance(number, dict | list):
                    table.add_row(f"{key} {inner}", _shown(number))
        elif not isinstance(value, list):
            table.add_row(key, _shown(value))
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
