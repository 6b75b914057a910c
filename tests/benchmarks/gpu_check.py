"""
What only a GPU can show, in at most ten minutes and without downloads: peaks of recipes under their caps, times of
steps, and attention of packed rows by each kernel.

    make gpu-check
"""

# ruff: noqa: E402
import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before the imports: it warns when it is imported

from trl_sgpo.bench.arms import STEP_ARMS
from trl_sgpo.checks.setup import setup_problems
from trl_sgpo.errors import ConfigError, SGPOError
from trl_sgpo.files import write_file
from trl_sgpo.inference.pretrained import load_tokenizer
from trl_sgpo.inference.weights import require_model
from trl_sgpo.recipe import Recipe, read_recipe
from trl_sgpo.vram.estimate import GIB, PROBLEM_TOKENS

from .packed_attention import LENGTHS, MODEL


SECONDS = 570.0
"""Of all parts together, with which the command stays below 10 minutes."""
ATTENTION, STEP, PEAK = "attention", "step", "peak"
LIMITS = {ATTENTION: 150.0, STEP: 150.0, PEAK: 120.0}
"""Seconds of a part of each kind."""
STEP_RECIPE = "recipes/quickstart.yaml"
RECIPES = (
    "recipes/SmolLM2-135M-Instruct/sgpo/config_full_8gb.yaml",
    "recipes/Qwen2.5-0.5B-Instruct/sgpo/config_lora_8gb.yaml",
    "recipes/gemma-3-1b-it/sgpo/config_qlora_8gb.yaml",
    "recipes/Llama-3.1-8B-Instruct/sgpo/config_qlora_12gb.yaml",
    "recipes/Phi-4-mini-instruct/sgpo/config_qlora_16gb.yaml",
    "recipes/Qwen3-8B/sgpo/config_qlora_24gb.yaml",
)
"""Of six families and all caps, cheap ones first. Vocabularies contain SmolLM2's, whose tokenizer all of them use."""


@dataclass(frozen=True)
class Part:
    """
    A measurement in a process of its own.

    Args:
        name (`str`):
            Name of its figures.
        kind (`str`):
            Key of `LIMITS`.
        command (`list[str]`):
            Module and arguments, to which `--output` is added.
    """

    name: str
    kind: str
    command: list[str]


def parts_of(tokenizer: str, problems: Path) -> list[Part]:
    """All parts. Raises [`ConfigError`] if a recipe needs what is not installed."""
    cli = "trl_sgpo.cli.main"
    lengths = ["--lengths", *map(str, LENGTHS)]
    parts = [
        Part(ATTENTION, ATTENTION, ["benchmarks.packed_attention", "--model", MODEL, *lengths]),
        Part(STEP, STEP, [cli, "bench", "step", "--config", STEP_RECIPE, "--steps", "3"]),
    ]
    limits = {path: _checked(path).script.max_problem_tokens or PROBLEM_TOKENS for path in (STEP_RECIPE, *RECIPES)}
    write_problems(problems, tokenizer, {limits[path] for path in RECIPES})
    for path in RECIPES:
        options = ["--steps", "0", "--arms", "sgpo", "--tokenizer", tokenizer]
        options += ["--dataset_name", str(problems), "--class_column", "problem_class"]
        parts.append(Part(path, PEAK, [cli, "bench", "fit", "--config", path, *options]))
    return parts


def _checked(path: str) -> Recipe:
    try:
        return read_recipe(["--config", path], "make gpu-check", setup_problems)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot run here. {error}") from error


def write_problems(path: Path, tokenizer: str, lengths: set[int]) -> None:
    """Writes problems as long as recipes allow, which estimates assume, in place of data that would be downloaded."""
    encoder, rows = load_tokenizer(tokenizer), []
    for length in sorted(lengths):
        for n in range(16):
            ids = encoder(f"Add {n}" + " and 1" * length, add_special_tokens=False)["input_ids"][:length]
            rows.append({"prompt": encoder.decode(ids), "solution": str(n), "problem_class": f"sums {n % 2}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_part(part: Part, directory: Path, seconds: float) -> tuple[int | None, str]:
    """Runs a part and returns its exit status, `None` if it was stopped, with what it printed."""
    log = directory / "log"
    command = [sys.executable, "-m", *part.command, "--output", str(directory / "figures.json")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
    return status, log.read_text(errors="replace")


def measure(part: Part, seconds: float, on_gpu: bool) -> dict[str, Any]:
    """Runs a part and judges its figures: `failed` lists what went wrong."""
    if seconds <= 0:
        return {"seconds": 0.0, "failed": ["It was not started: the time was over."], "figures": {}}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trl-sgpo-gpu-check-") as directory:
        status, printed = run_part(part, Path(directory), seconds)
        written = Path(directory, "figures.json")
        figures = json.loads(written.read_text()) if written.exists() else {}
    failed = list(problems(part.kind, figures, on_gpu)) if figures else []
    lines = [line for line in printed.splitlines() if line.strip()]
    if status is None:
        failed.append(f"It was stopped after {seconds:.0f} s.")
    elif not failed and (status != 0 or not figures):
        failed.append(f"It ended with status {status}: {lines[-1] if lines else 'it printed nothing'}")
    result = {"seconds": time.perf_counter() - start, "failed": failed, "figures": figures}
    return result | ({"printed": lines[-40:]} if failed else {})


def problems(kind: str, figures: dict[str, Any], on_gpu: bool) -> Iterator[str]:
    """What is wrong with the figures of a part."""
    if kind == ATTENTION:
        if not figures.get("summary"):
            yield "No kernel was compared."
        for line in figures.get("summary", []):
            if line["wrong_lengths"]:
                lengths = ", ".join(map(str, line["wrong_lengths"]))
                yield f"{_kernel(line)}: {_differences(line)}. Wrong at lengths {lengths}."
    if kind == PEAK:
        entry = figures["recipes"][0]
        if "error" in entry["sgpo"]:
            yield entry["sgpo"]["error"]
        elif on_gpu and not peak_of(entry) <= entry["vram_gb"] * GIB:
            outside = entry["sgpo"]["outside_pytorch_bytes"] / GIB
            yield (
                f"The peak is {peak_of(entry) / GIB:.2f} GB, over the cap of {entry['vram_gb']:g} GB. Of it, "
                f"{outside:.2f} GB are outside of PyTorch: the CUDA context, and other processes on this GPU."
            )


def peak_of(entry: dict[str, Any]) -> float:
    """Bytes of a recipe's largest step, as PyTorch reserved them, and outside of PyTorch."""
    return entry["figures"]["worst_case_reserved_bytes"] + entry["sgpo"]["outside_pytorch_bytes"]


def _kernel(line: dict[str, Any]) -> str:
    return f"{line['of']}, {line['dtype']}, {line['kernel']}, {line['rows']}"


def _differences(line: dict[str, Any]) -> str:
    texts = [f"{reason}: {line[reason]}" for reason in ("error", "refused") if reason in line]
    for figure in ("values", "gradients"):
        if figure in line:
            found, limit = (
                "NaN" if line[name] is None else f"{line[name]:.2g}" for name in (figure, f"{figure}_tolerance")
            )
            texts.append(f"{figure} differ by {found} of {limit}")
    return ", ".join(texts)


def rows_of_table(part: Part, result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    figures = result["figures"]
    if part.kind == ATTENTION:
        for line in figures.get("summary", []):
            yield _kernel(line), _differences(line)[:110]
    for arm in STEP_ARMS if part.kind == STEP and figures else ():
        seconds = median(row["seconds"] for row in figures["rows"] if row["arm"] == arm and row["step"] > 0)
        memory = [
            f"{name} {figures[key] / GIB:.2f} GB"
            for name in ("peak", "step")
            if (key := f"{arm}_{name}_bytes") in figures
        ]
        yield f"step, {arm}", ", ".join([f"{seconds:.2f} s", *memory])
    if part.kind == PEAK and figures:
        entry = figures["recipes"][0]
        reserved = "worst_case_reserved_bytes" in entry["figures"] and "outside_pytorch_bytes" in entry["sgpo"]
        measured = f"measured {peak_of(entry) / GIB:.2f} GB" if reserved else "not measured"
        estimated = f"estimated {entry['figures']['estimated_bytes'] / GIB:.2f} GB"
        yield part.name, f"{estimated}, {measured}, cap {entry['vram_gb']:g} GB"
    for message in result["failed"]:
        yield f"{part.name}: FAILED", message[:300]


def main(argv: list[str]) -> int:
    """Runs all parts one after the other. The status is 1 if one failed, 2 if they cannot be started."""
    parser = argparse.ArgumentParser(prog="make gpu-check ARGS=", description="Measure what needs a GPU.")
    parser.add_argument("--output", default="runs/gpu_check.json", help="JSON file of all figures")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, which measures no peaks")
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.cpu:
        print(
            "make gpu-check: error: PyTorch finds no GPU here (torch.cuda.is_available() is false): run `make install "
            "TORCH=torch` in a clone on a machine with one.",
            file=sys.stderr,
        )
        return 2
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trl-sgpo-gpu-check-") as directory:
        try:
            parts = parts_of(require_model(MODEL), Path(directory, "problems.jsonl"))
        except SGPOError as error:
            print(f"make gpu-check: error: {error}", file=sys.stderr)
            return 2
        report: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
            "capability": torch.cuda.get_device_capability() if on_gpu else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "trl-sgpo")},
            "parts": {},
        }
        table = Table("measurement", "result", title=f"GPU check on {report['device']}")
        for part in parts:
            print(f"{part.name} ...", flush=True)
            left = SECONDS - (time.perf_counter() - start)
            result = report["parts"][part.name] = measure(part, min(LIMITS[part.kind], left), on_gpu)
            for row in rows_of_table(part, result):
                table.add_row(*row)
            report["failed"] = [name for name, each in report["parts"].items() if each["failed"]]
            report["seconds"] = time.perf_counter() - start
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
            write_file(Path(options.output), json.dumps(report, indent=2))  # after each, so that a kill loses one
    Console().print(table)
    print(
        f"{report['seconds']:.0f} s, figures in {options.output}. Failed: {', '.join(report['failed']) or 'nothing'}."
    )
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
