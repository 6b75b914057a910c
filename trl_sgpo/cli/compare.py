"""`trl-sgpo compare`: runs or resumes arms × seeds at an equal budget, and writes their table."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_directory, check_file
from ..checks.secrets import arguments_without_secrets, without_credentials
from ..errors import ConfigError
from ..files import private_file


if TYPE_CHECKING:
    from ..compare.config import Arm


def main(argv: list[str]) -> int:
    """Runs the arms that are not finished and writes the table. Exit status 1 if a run failed."""
    options, overrides = _parser().parse_known_args(argv)
    if options.pool:
        given = {name for name, value in vars(options).items() if value not in (None, False)} - {"pool", "results"}
        if given or overrides:
            others = ", ".join([*(f"`--{name}`" for name in sorted(given)), *arguments_without_secrets(overrides)])
            raise ConfigError(f"`--pool` runs nothing, and does not read {others}: leave it out.")
        return _pool(options.pool, options.results)
    if options.config is None:
        raise ConfigError(
            "the following arguments are required: --config, such as recipes/lab/compare.yaml, or --pool"
        )
    changes: dict[str, Any] = {
        key: options.__dict__[key]
        for key in ("arms", "seeds", "budget", "processes", "output_dir", "results")
        if options.__dict__[key] is not None
    }
    if overrides:
        changes["overrides"] = _as_mapping(overrides)

    from ..compare.arm_run import check, fetch_models, finished, run_records
    from ..compare.config import read_comparison
    from ..compare.table import summary, write

    comparison = read_comparison(options.config, changes)
    check_directory("output_dir", comparison.output_dir)
    if comparison.results is not None:
        check_file("results", comparison.results)
    check(comparison)
    runs = [(arm, seed) for seed in comparison.seeds for arm in comparison.arms]
    if not options.table_only:
        fetch_models(comparison)
    records = run_records(comparison, runs, with_models=not options.table_only)

    def result(arm: "Arm", seed: int) -> dict[str, Any] | None:
        return finished(comparison, arm, seed, records[arm.name, seed])

    missing = [(arm.name, seed) for arm, seed in runs if result(arm, seed) is None]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished.", flush=True)
    failed: list[str] = []
    if missing and not options.table_only:
        base = [sys.executable, "-m", "trl_sgpo.compare.arm_run", options.config, json.dumps(changes)]
        failed = _run_all(base, missing, Path(comparison.output_dir), comparison.processes)
    results = {
        arm.name: [found for seed in comparison.seeds if (found := result(arm, seed)) is not None]
        for arm in comparison.arms
    }
    if not any(results.values()):
        fix = "see the logs above" if failed else "run the same command without `--table_only` first"
        raise ConfigError(f"No run of {options.config} is finished in {comparison.output_dir}: {fix}.")
    summed = summary(comparison, results)
    stems = [Path(comparison.output_dir, "comparison")] + ([Path(comparison.results)] if comparison.results else [])
    for stem in stems:
        print(f"Written: {', '.join(map(str, write(summed, stem)))}")
    _print(summed)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo compare",
        description="Train every arm of a comparison with every seed, from the same warm start and at an equal number "
        "of generated tokens, evaluate them, and write a table with 95% intervals, learning curves and raw results. "
        "Finished runs are kept; the same command resumes.",
        epilog="Further arguments override the recipe for all arms, as in `trl-sgpo train`.",
    )
    parser.add_argument("--config", type=path_option, help="comparison, such as recipes/lab/compare.yaml")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the file's")
    parser.add_argument("--budget", type=int, help="tokens each arm may generate, instead of the file's")
    parser.add_argument("--processes", type=int, help="runs at a time, instead of the file's")
    parser.add_argument("--output_dir", type=path_option, help="where runs are kept, instead of the file's")
    parser.add_argument("--results", type=path_option, help="path without suffix for the table, instead of the file's")
    parser.add_argument("--table_only", action="store_true", help="run nothing, only write the table of finished runs")
    parser.add_argument(
        "--pool",
        nargs="+",
        metavar="FILE",
        type=path_option,
        help="run nothing, pool the tables (.json) of comparisons with several base models, into `--results`",
    )
    return parser


def _pool(files: list[str], results: str | None) -> int:
    """Writes one table of comparisons with several base models."""
    from ..compare.pool import markdown, pooled, read_summaries, write

    if results is None:
        raise ConfigError("`--pool` needs `--results`, the path without suffix of the table.")
    check_file("results", results)
    summed = pooled(read_summaries(files))
    print(markdown(summed))
    print(f"Written: {', '.join(map(str, write(summed, Path(results))))}")
    return 0


def _as_mapping(arguments: list[str]) -> dict[str, Any]:
    """Reads `--key value …` as a mapping."""
    mapping: dict[str, Any] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument.removeprefix("--").partition("=")
            mapping[key] = value if equals else []
        elif key is None:
            raise ConfigError(f"Unknown argument {argument!r}: write overrides as `--key value`.")
        else:
            mapping[key].append(argument)
    return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in mapping.items()}


def _run_all(base: list[str], missing: list[tuple[str, int]], output_dir: Path, processes: int) -> list[str]:
    """Warm-starts each seed, then runs its arms, `processes` at a time. Returns the names of failed runs."""
    # Runs import nothing from the working directory, which may be of somebody else
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"}
    if processes > 1:
        environment |= {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    seeds = list(dict.fromkeys(seed for _, seed in missing))
    total, started, done, failed = len(missing), time.monotonic(), 0, []
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(processes) as pool, _ended_with(pool, running):
        waiting: dict[Future[int], tuple[str | None, int]] = {}

        def submit(arm: str | None, seed: int) -> None:
            log = output_dir / "logs" / f"{arm or 'warmstart'}-seed-{seed}.txt"
            command = [*base, str(seed), *([arm] if arm else [])]
            waiting[pool.submit(_run, command, environment, log, running)] = (arm, seed)

        for seed in seeds:
            submit(None, seed)
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                arm, seed = waiting.pop(future)
                name = f"{arm or 'warm start'}, seed {seed}"
                status = future.result()
                if status != 0:
                    failed.append(name)
                    log = output_dir / "logs" / f"{arm or 'warmstart'}-seed-{seed}.txt"
                    print(f"FAILED {name} (exit status {status}), see {log}:\n{_tail(log)}", flush=True)
                    total -= 0 if arm else sum(1 for _, its in missing if its == seed)
                if arm is None and status == 0:
                    print(f"warm start of seed {seed} is ready", flush=True)
                    for its_arm, its_seed in missing:
                        if its_seed == seed:
                            submit(its_arm, seed)
                elif arm is not None:
                    done += 1
                    minutes = (time.monotonic() - started) / 60
                    left = minutes / done * (total - done)
                    print(f"{done}/{total} {name}: {minutes:.0f} min, about {left:.0f} to go", flush=True)
    return failed


@contextmanager
def _ended_with(pool: ThreadPoolExecutor, running: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ends runs that are under way, and starts no others, where the block is left by an error, Ctrl-C or SIGTERM."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: list[str], environment: dict[str, str], log: Path, running: set[subprocess.Popen[bytes]]) -> int:
    with private_file(log) as file:  # a library may print an address with a token
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        running.add(process)
        try:
            return process.wait()
        finally:
            running.discard(process)


def _tail(log: Path) -> str:
    last = log.read_text(errors="replace").splitlines()[-8:]
    return "\n".join(f"  {without_credentials(line)}" for line in last)


def _print(summed: dict[str, Any]) -> None:
    from ..compare.table import cell
    from .text import print_table

    suites = [suite["name"] for suite in summed["settings"]["suites"]]
    columns = [f"{name} accuracy" for name in suites] + ["transfer score", "own - other"]
    rows = []
    for name, figures in summed["arms"].items():
        rows.append([name, *(cell(figures[column]) for column in columns)])
    title = f"{summed['settings']['budget']:,} tokens an arm and seed, means with 95% intervals"
    print_table(["arm", *columns], rows, title)
