"""`trl-sgpo report`: writes a run as one HTML file, or serves it while training goes on."""

import argparse
from pathlib import Path

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_file
from ..errors import ConfigError


PORT = 8600
MAX_PORT = 65_535


def main(argv: list[str]) -> int:
    """Writes or serves a run's report."""
    options = _parser().parse_args(argv)
    if options.problems < 0:
        raise ConfigError(f"`--problems` must be at least 0, got {options.problems}.")
    if options.watch:
        return _watch(options)
    if options.port is not None:
        raise ConfigError("`--port` is the one of `--watch`: add `--watch`, or leave it out.")

    from ..report.page import write_report
    from ..report.records import read_run
    from ..report.run_files import REPORT_PAGE

    run = read_run(options.run, options.eval, options.problems)
    other = None if options.other is None else read_run(options.other, problems=0)
    output = Path(options.output or run.path / REPORT_PAGE)
    check_file("--output", output)
    write_report(run, output, other)
    for text in run.missing.values():
        print(f"Not in the report: {text}")
    print(f"Written to {output} ({output.stat().st_size / 1024:.0f} KiB). It needs no network: open it in a browser.")
    return 0


def _watch(options: argparse.Namespace) -> int:
    port = PORT if options.port is None else options.port
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"`--port` must be from 0 to {MAX_PORT}, got {port}.")
    if options.output is not None:
        raise ConfigError("`--watch` writes no file: leave out `--output`, or `--watch`.")

    from ..report.watch import ADDRESS, WatchedReport, serve

    report = WatchedReport(options.run, options.other, options.eval, options.problems)
    with serve(report, port) as server:
        address = f"http://{ADDRESS}:{server.server_port}"
        print(f"The report of {options.run} is at {address} and follows the run. Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            report.close()
            print("\nEnded.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo report",
        description="Write a run as one HTML file that needs no network: whether it learnt, ways of answering side by "
        "side, transfer between classes, curves, the strategy bank with lift, map and lineage, rollouts side by side, "
        "settings. A run that is not finished is shown as far as it is on record.",
    )
    parser.add_argument("run", type=path_option, metavar="RUN", help="output folder of a run, or a checkpoint")
    parser.add_argument("other", type=path_option, metavar="RUN2", nargs="?", help="a run to compare it with")
    parser.add_argument(
        "--output", type=path_option, metavar="FILE.html", help="the file to write (report.html in RUN)"
    )
    parser.add_argument(
        "--eval",
        type=path_option,
        metavar="DIRECTORY",
        action="append",
        default=[],
        help="output folder of `trl-sgpo eval`; may be repeated. Those in RUN are found automatically",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the report on 127.0.0.1, refreshed while training writes, until Ctrl-C; RUN may not have begun",
    )
    parser.add_argument("--port", type=int, metavar="PORT", help=f"port of --watch ({PORT}), 0 for a free one")
    parser.add_argument(
        "--problems",
        type=int,
        default=40,
        metavar="N",
        help="problems to show rollouts of, evenly from all steps (40)",
    )
    return parser
