"""`trl-sgpo bank`: look into, check and share a strategy bank."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from ..bank import StrategyBank
from ..bank.exchange import export_bank, import_bank, push_bank
from ..bank.export_files import check_export
from ..bank.files import BANK_DIRECTORY
from ..bank.hub import pull_bank
from ..bank.manifest import is_snapshot
from ..bank.snapshot import bank_directory, embed_with, open_read_only
from ..bank.strategy import TRUST_STATES, ImportReport
from ..checks.arguments import Parser, path_option
from ..checks.terminal import printable
from ..errors import BankError
from .bank_views import (
    SORT_KEYS,
    all_strategies,
    audit,
    find,
    list_strategies,
    search,
    show,
    stats,
    verify,
)
from .text import print_json


def main(argv: list[str]) -> int:
    """Runs a command on a bank. Returns the exit status, which is 1 where a check found something."""
    options = _parser().parse_args(argv)
    return options.run(options)


# Arguments


_LIFT = (
    "A lift such as +0.11 [-0.06, +0.24] is the success rate of a strategy minus that of other strategies on the same "
    "problems, with its lower and upper bound, each with 95% confidence. A lower bound below 0 leaves open that the "
    "strategy helps less than others. A plain lift is the same over plain answers, which follow no strategy; it is "
    "known where training has plain rows. A trusted strategy is useful if the lower bound of its plain lift is above "
    "0, and one whose upper bound is below 0 is harmful and not shown."
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo bank",
        description="Look into, check and share a strategy bank. BANK is a bank's directory, a checkpoint or a run's "
        f"output folder, which have their bank in {BANK_DIRECTORY}/. Snapshots, like those in checkpoints, are read "
        "from a copy and stay as they are.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        epilog = _LIFT if name in ("list", "show", "search", "stats") else None
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog)
        added.set_defaults(run=run)
        added.add_argument(
            "bank", type=path_option, metavar="BANK", help="directory of a bank, a checkpoint or an output folder"
        )
        added.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        return added

    added = command("list", list_strategies, "list the strategies of a bank")
    added.add_argument("--class", dest="problem_class", metavar="CLASS", help="only those of this class")
    added.add_argument(
        "--trust",
        action="append",
        choices=TRUST_STATES,
        help="only those in this state; may be repeated (all but retired); trusted: not inferior to other strategies "
        "on the same problems, by the tolerance of the run",
    )
    added.add_argument("--sort", choices=SORT_KEYS, default="utility", help="highest first (utility)")
    added.add_argument("--limit", type=int, metavar="N", help="the first N only")

    added = command("show", show, "show everything that is on record of one strategy")
    added.add_argument("id", metavar="ID", help="its id, or the start of it")

    added = command("search", search, "find strategies for a problem, as they are found for evaluation")
    added.add_argument("problem", metavar="PROBLEM", help="text of the problem")
    added.add_argument("--class", dest="problem_class", metavar="CLASS", help="only strategies of this class")
    added.add_argument("-k", type=int, default=3, help="how many at most (3)")
    added.add_argument(
        "--trust",
        action="append",
        choices=TRUST_STATES,
        help="only those in this state; may be repeated (trusted, which means not inferior to other strategies)",
    )
    _add_embedding_model(added)

    command("stats", stats, "sum up a bank by problem class, and what transfers between classes")

    added = command("audit", audit, "look for what should not be in a bank; exit status 1 if there are errors")
    added.add_argument("--strict", action="store_true", help="exit status 1 for warnings too")

    command("verify", verify, "check that a bank or snapshot is what was written; exit status 1 if not")

    added = command("retire", retire, "retire strategies: they stay on record and are neither shown nor executed")
    added.add_argument("ids", metavar="ID", nargs="+", help="ids, or enough of their first digits")

    added = command("export", export, "write strategies to a directory that another bank can import")
    added.add_argument(
        "directory", type=path_option, metavar="DIRECTORY", help="new directory, or one with an earlier export"
    )
    _add_license(added)

    added = command("import", import_strategies, "add the strategies of an export, in quarantine")
    added.add_argument("directory", type=path_option, metavar="DIRECTORY", help="what an export wrote")
    _add_import(added)

    added = command("merge", merge, "add the strategies of another bank of yours, with their trust and counts")
    added.add_argument("other", type=path_option, metavar="OTHER", help="the other bank, which is not changed")
    _add_embedding_model(added)

    added = command("push", push, "publish strategies as a dataset on the Hugging Face Hub")
    added.add_argument("repo_id", metavar="REPO_ID", help="dataset repository, like user/strategies")
    added.add_argument("--private", action="store_true", help="create the repository as a private one")
    _add_license(added)

    added = command("pull", pull, "add the strategies of a dataset on the Hugging Face Hub, in quarantine")
    added.add_argument("repo_id", metavar="REPO_ID", help="dataset repository, like user/strategies")
    added.add_argument("--revision", metavar="SHA", help="commit, branch or tag (that of the default branch)")
    _add_import(added)
    return parser


def _add_embedding_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embedding_model",
        type=path_option,
        metavar="MODEL",
        help="embeds the bank again if it is another one than the bank was made with (that one)",
    )


def _add_license(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--license", default="other", help="licence of the strategies, as the Hub names it (other)")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep_trust", action="store_true", help="they are your own: merge trust and counts, no quarantine"
    )
    _add_embedding_model(parser)


# Opening


@contextmanager
def _writing(path: str, embedding_model: str | None) -> Iterator[StrategyBank]:
    """A bank to change, a new one if there is nothing at its path."""
    directory = Path(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        directory = bank_directory(path)
        if is_snapshot(directory):
            raise BankError(
                f"{directory} is a snapshot, whose checksum would no longer fit: name a bank, or merge it into "
                "a new one."
            )
    with StrategyBank(directory) as bank:
        embed_with(bank, embedding_model)
        yield bank


# Commands that write and share


def export(options: argparse.Namespace) -> int:
    """`trl-sgpo bank export`"""
    with open_read_only(options.bank) as bank:
        directory = export_bank(bank, options.directory, options.license)
    if options.json:
        print_json({"directory": str(directory)})
    else:
        print(f"Exported to {directory}. To add it to a bank: trl-sgpo bank import BANK {directory}")
    return 0


def _report(options: argparse.Namespace, report: ImportReport, **more: str) -> int:
    if options.json:
        print_json(asdict(report) | more)
        return 0
    print(
        f"{report.added} added ({report.quarantined} in quarantine), {report.known} known already, "
        f"{report.near_copies} left out as near-copies, {report.retired} kept on record only"
    )
    if report.quarantined:
        print(
            "Imported strategies that mislead on a few problems only can still become trusted: import from sources "
            "that you trust."
        )
    print(f"To look for what should not be there: trl-sgpo bank audit {options.bank}")
    return 0


def import_strategies(options: argparse.Namespace) -> int:
    """`trl-sgpo bank import`"""
    check_export(options.directory)  # before a bank is made for it
    with _writing(options.bank, options.embedding_model) as bank:
        return _report(options, import_bank(bank, options.directory, options.keep_trust))


def retire(options: argparse.Namespace) -> int:
    """`trl-sgpo bank retire`"""
    bank_directory(options.bank)  # nothing is retired from a bank that is made for it
    with _writing(options.bank, None) as bank:
        retired = [find(all_strategies(bank), each) for each in options.ids]
        bank.retire(strategy.id for strategy in retired)
    if options.json:
        print_json({"retired": [strategy.id for strategy in retired]})
    else:
        print(*(f"{strategy.id} retired: {printable(strategy.text)}" for strategy in retired), sep="\n")
    return 0


def merge(options: argparse.Namespace) -> int:
    """`trl-sgpo bank merge`"""
    with open_read_only(options.other) as other:
        strategies = all_strategies(other)
        executions = [each for strategy in strategies for each in other.executions(strategy.id)]
    with _writing(options.bank, options.embedding_model) as bank:
        new = bank.merge(strategies, executions)
        total = len(bank)
    if options.json:
        print_json({"added": len(new), "strategies": total})
    else:
        print(f"{len(new)} of {len(strategies)} added: the bank has {total} strategies now")
    return 0


def push(options: argparse.Namespace) -> int:
    """`trl-sgpo bank push`"""
    with open_read_only(options.bank) as bank:
        sha = push_bank(bank, options.repo_id, license=options.license, private=options.private)
    if options.json:
        print_json({"repo_id": options.repo_id, "revision": sha})
    else:
        print(f"Pushed to {options.repo_id} as {sha}.")
        print(f"To add exactly this to a bank: trl-sgpo bank pull BANK {options.repo_id} --revision {sha}")
    return 0


def pull(options: argparse.Namespace) -> int:
    """`trl-sgpo bank pull`"""
    with TemporaryDirectory(prefix="trl-sgpo-pull-") as temporary:
        directory, sha = pull_bank(options.repo_id, Path(temporary) / "export", revision=options.revision)
        with _writing(options.bank, options.embedding_model) as bank:
            report = import_bank(bank, directory, options.keep_trust, origin=f"{options.repo_id}@{sha}")
    return _report(options, report, revision=sha)
