"""`trl-sgpo report`: writes a run as one HTML file."""

import argparse
from pathlib import Path

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_file
from ..errors import ConfigError


def main(argv: list[str]) -> int:
    """Writes a run's report."""
    options = _parser().parse_args(argv)
    if options.problems < 0:
        raise ConfigError(f"`--problems` must be at least 0, got {options.problems}.")

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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo report",
        description="Write a run as one HTML file that needs no network: curves, transfer between classes, the "
        "strategy bank with a map and lineage, rollouts side by side, settings. A run that is not finished is shown "
        "as far as it is on record.",
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
        "--problems",
        type=int,
        default=40,
        metavar="N",
        help="problems to show rollouts of, evenly from all steps (40)",
    )
    return parser
