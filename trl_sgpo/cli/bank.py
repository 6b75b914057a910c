"""`trl-sgpo bank`: look into, check and share a strategy bank."""

import argparse
import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bank import Execution, Strategy, StrategyBank, policy
from ..bank.audit import audit as find_suspicious
from ..bank.bank import INDEX, LEDGER, MANIFEST
from ..bank.exchange import FILES, ImportReport, export_bank, import_bank
from ..bank.ledger import Ledger
from ..bank.snapshot import BANK_DIRECTORY, bank_directory
from ..bank.snapshot import is_snapshot as _is_snapshot
from ..bank.snapshot import reading as _reading
from ..bank.snapshot import to_read as _to_read
from ..bank.strategy import TRUST_STATES
from ..errors import BankError, ConfigError


SORT_KEYS: dict[str, Callable[[Strategy], float]] = {
    "utility": lambda strategy: policy.utility(strategy.successes, strategy.trials),
    "lift": lambda strategy: strategy.lift,
    "shown": lambda strategy: strategy.shown,
    "step": lambda strategy: strategy.step,
}


def main(argv: list[str]) -> int:
    """Runs a command on a bank. Returns the exit status, which is 1 where a check found something."""
    options = _parser().parse_args(argv)
    return options.run(options)


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-sgpo bank",
        description="Look into, check and share a strategy bank. BANK is a bank's directory, a checkpoint or a run's "
        f"output folder, which have their bank in {BANK_DIRECTORY}/. Snapshots, like those in checkpoints, are read "
        "from a copy and stay as they are.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        added.add_argument("bank", metavar="BANK", help="directory of a bank, a checkpoint or an output folder")
        added.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        return added

    added = command("list", list_strategies, "list the strategies of a bank")
    added.add_argument("--class", dest="problem_class", metavar="CLASS", help="only those of this class")
    added.add_argument(
        "--trust",
        action="append",
        choices=TRUST_STATES,
        help="only those in this state; may be repeated (all but retired)",
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
        "--trust", action="append", choices=TRUST_STATES, help="only those in this state; may be repeated (trusted)"
    )
    _add_embedding_model(added)

    command("stats", stats, "sum up a bank by problem class, and what transfers between classes")

    added = command("audit", audit, "look for what should not be in a bank; exit status 1 if there are errors")
    added.add_argument("--strict", action="store_true", help="exit status 1 for warnings too")

    command("verify", verify, "check that a bank or snapshot is what was written; exit status 1 if not")

    added = command("retire", retire, "keep strategies on record only, where they are neither shown nor tried")
    added.add_argument("ids", metavar="ID", nargs="+", help="ids, or as many of their first digits as it takes")

    added = command("export", export, "write strategies to a directory that another bank can import")
    added.add_argument("directory", metavar="DIRECTORY", help="new directory, or one with an earlier export")
    _add_format(added)

    added = command("import", import_strategies, "add the strategies of an export, in quarantine")
    added.add_argument("directory", metavar="DIRECTORY", help="what an export wrote")
    _add_import(added)

    added = command("merge", merge, "add the strategies of another bank of yours, with their trust and counts")
    added.add_argument("other", metavar="OTHER", help="the other bank, which is not changed")
    _add_embedding_model(added)

    added = command("push", push, "publish strategies as a dataset on the Hugging Face Hub")
    added.add_argument("repo_id", metavar="REPO_ID", help="dataset repository, like user/strategies")
    added.add_argument("--private", action="store_true", help="create the repository as a private one")
    _add_format(added)

    added = command("pull", pull, "add the strategies of a dataset on the Hugging Face Hub, in quarantine")
    added.add_argument("repo_id", metavar="REPO_ID", help="dataset repository, like user/strategies")
    added.add_argument("--revision", metavar="SHA", help="commit, branch or tag (that of the default branch)")
    _add_import(added)
    return parser


def _add_embedding_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embedding_model",
        metavar="MODEL",
        help="by another one the bank is embedded anew (the one it was made with)",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FILES, default="jsonl", help="of the file of strategies (jsonl)")
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
        if _is_snapshot(directory):
            raise BankError(
                f"{directory} is a snapshot, by which damage is found only while it stays as it is: name a bank, or "
                "merge the snapshot into a new one."
            )
    with StrategyBank(directory) as bank:
        _embed_with(bank, embedding_model)
        yield bank


def _embed_with(bank: StrategyBank, embedding_model: str | None) -> None:
    bank.embedding_model = embedding_model or bank.made_with or bank.embedding_model


# Output


def _printable(text: str) -> str:
    """The text with everything that a terminal would act on, or not show, spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table whose columns before the last are as wide as they need."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns[:-1]:
        table.add_column(Text(column), overflow="fold", max_width=24)
    table.add_column(Text(columns[-1]), overflow="fold")
    for row in rows:
        table.add_row(*[Text(_printable(cell)) for cell in row])
    Console().print(table)


def _print_facts(facts: dict[str, str]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, Text(_printable(value)))
    Console().print(grid)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _with_bounds(lift: float, low: float, high: float) -> str:
    return f"{lift:+.2f} [{low:+.2f}, {high:+.2f}]"


def _lift(strategy: Strategy) -> str:
    return _with_bounds(strategy.lift, *policy.lift_bounds(strategy)) if strategy.problems else "unknown"


def _lift_at_least(strategy: Strategy) -> str:
    return f"{strategy.lift:+.2f} ≥ {policy.lift_bounds(strategy)[0]:+.2f}" if strategy.problems else "unknown"


def _rate(strategy: Strategy) -> str:
    return f"{_number(strategy.successes)}/{strategy.trials}"


def _record(strategy: Strategy) -> dict[str, Any]:
    low, high = policy.lift_bounds(strategy)
    return {
        "id": strategy.id,
        **asdict(strategy),
        "utility": policy.utility(strategy.successes, strategy.trials),
        "lift": strategy.lift,
        "lift_low": low,
        "lift_high": high,
        "checksum": strategy.checksum,
    }


def _everything(bank: StrategyBank) -> list[Strategy]:
    return [*bank.strategies(), *bank.retired()]


def _short_ids(strategies: Sequence[Strategy]) -> dict[str, str]:
    """Strategy id → the start of it, long enough to tell all of them apart."""
    ids = [strategy.id for strategy in strategies]
    length = next((n for n in range(8, 16) if len({key[:n] for key in ids}) == len(ids)), 16)
    return {key: key[:length] for key in ids}


# Commands that read


def list_strategies(options: argparse.Namespace) -> int:
    """`trl-sgpo bank list`"""
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"`--limit` must be at least 1, got {options.limit}.")
    with _reading(options.bank) as bank:
        everything = _everything(bank)
    wanted = options.trust or [state for state in TRUST_STATES if state != "retired"]
    chosen = [
        strategy
        for strategy in everything
        if strategy.trust in wanted and options.problem_class in (None, strategy.problem_class)
    ]
    key = SORT_KEYS[options.sort]
    chosen.sort(key=lambda strategy: (-key(strategy), -strategy.trials, strategy.id))
    shown = chosen[: options.limit]
    if options.json:
        _print_json([_record(strategy) for strategy in shown])
        return 0
    short = _short_ids(everything)
    _print_table(
        ["id", "class", "trust", "won", "problems", "lift ≥ bound", "shown", "text"],
        [
            [
                short[strategy.id],
                strategy.problem_class,
                strategy.trust,
                _rate(strategy),
                str(strategy.problems),
                _lift_at_least(strategy),
                str(strategy.shown),
                strategy.text,
            ]
            for strategy in shown
        ],
    )
    print(f"{len(shown)} of {len(everything)} strategies")
    return 0


def _find(strategies: Sequence[Strategy], prefix: str) -> Strategy:
    found = [strategy for strategy in strategies if strategy.id.startswith(prefix.casefold())]
    if not found:
        raise BankError(f"No strategy has an id that starts with {prefix!r}: `trl-sgpo bank list` prints them.")
    if len(found) > 1:
        ids = ", ".join(strategy.id for strategy in found[:3])
        raise BankError(f"{len(found)} ids start with {prefix!r} ({ids}{', …' * (len(found) > 3)}): give more digits.")
    return found[0]


def transfer(pairs: Iterable[tuple[Strategy, Execution]], by: Callable[[Strategy, Execution], Any]) -> dict[Any, Any]:
    """
    What strategies achieved on problems they were not written for, where a problem counts once a strategy.

    Args:
        pairs (`Iterable[tuple[Strategy, Execution]]`):
            Executions, each with its strategy.
        by (`Callable[[Strategy, Execution], Any]`):
            What the groups are.

    Returns:
        `dict`: Group → `problems`, `rate`, `baseline`, `lift` and its bounds `lift_low` and `lift_high`.
    """
    groups: dict[Any, list[Execution]] = defaultdict(list)
    for strategy, execution in pairs:
        if execution.problem not in strategy.source_problems:
            groups[by(strategy, execution)].append(execution)
    figures = {}
    for group, executions in sorted(groups.items()):
        rate = fmean(execution.successes / execution.trials for execution in executions)
        baseline = fmean(execution.baseline / execution.trials for execution in executions)
        low, high = policy.wilson(rate * len(executions), len(executions))
        figures[group] = {
            "problems": len(executions),
            "rate": rate,
            "baseline": baseline,
            "lift": rate - baseline,
            "lift_low": low - baseline,
            "lift_high": high - baseline,
        }
    return figures


def _figures(group: dict[str, Any]) -> list[str]:
    lift = _with_bounds(group["lift"], group["lift_low"], group["lift_high"])
    return [str(group["problems"]), f"{group['rate']:.2f}", f"{group['baseline']:.2f}", lift]


def show(options: argparse.Namespace) -> int:
    """`trl-sgpo bank show`"""
    with _reading(options.bank) as bank:
        everything = _everything(bank)
        strategy = _find(everything, options.id)
        executions = bank.executions(strategy.id)
    texts = {each.id: each.text for each in everything}
    parents = {key: texts.get(key) for key in strategy.parents}
    children = {each.id: each.text for each in everything if strategy.id in each.parents}
    by_class = transfer(((strategy, each) for each in executions), lambda _, execution: execution.problem_class)
    if options.json:
        _print_json(
            _record(strategy)
            | {
                "parents": [{"id": key, "text": text} for key, text in parents.items()],
                "children": [{"id": key, "text": text} for key, text in children.items()],
                "transfer": [{"problem_class": name, **group} for name, group in by_class.items()],
            }
        )
        return 0
    _print_facts(
        {
            "id": strategy.id,
            "class": strategy.problem_class,
            "text": strategy.text,
            "trust": strategy.trust,
            "written by": strategy.model or "unknown",
            "in run": f"{strategy.run or 'unknown'}, at step {strategy.step}",
            "origin": strategy.origin,
            "written for": ", ".join(strategy.source_problems) or "no problem on record",
            "executions": f"{_rate(strategy)} won, utility {SORT_KEYS['utility'](strategy):.2f}",
            "other problems": f"{strategy.problems}, lift {_lift(strategy)}",
            "shown": f"{strategy.shown} times",
            "checksum": strategy.checksum,
        }
    )
    for title, relatives in (("parents", parents), ("children", children)):
        if relatives:
            rows = [[key, text or "(not in this bank)"] for key, text in relatives.items()]
            _print_table(["id", "text"], rows, title=title)
    if by_class:
        rows = [[name, *_figures(group)] for name, group in by_class.items()]
        _print_table(["class", "problems", "rate", "baseline", "lift [bounds]"], rows, title="transfer")
    return 0


def search(options: argparse.Namespace) -> int:
    """`trl-sgpo bank search`"""
    if options.k < 1:
        raise ConfigError(f"`-k` must be at least 1, got {options.k}.")
    with _reading(options.bank) as bank:
        _embed_with(bank, options.embedding_model)
        classes = None if options.problem_class is None else [options.problem_class]
        (found,) = bank.retrieve(
            [options.problem], options.k, classes, exclude=[set()], trust=options.trust or ["trusted"]
        )
        short = _short_ids(_everything(bank))
    if options.json:
        _print_json([{**_record(hit.strategy), "similarity": hit.similarity, "score": hit.score} for hit in found])
        return 0
    rows = [
        [
            short[hit.strategy.id],
            hit.strategy.problem_class,
            hit.strategy.trust,
            f"{hit.score:.2f}",
            f"{hit.similarity:.2f}",
            _rate(hit.strategy),
            _lift_at_least(hit.strategy),
            hit.strategy.text,
        ]
        for hit in found
    ]
    _print_table(["id", "class", "trust", "score", "similarity", "won", "lift ≥ bound", "text"], rows)
    if not found:
        print("Nothing found. Try another --class, or strategies that are not trusted yet: --trust candidate")
    return 0


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _class_figures(name: str, members: Sequence[Strategy]) -> dict[str, Any]:
    counts = Counter(strategy.trust for strategy in members)
    live = [strategy for strategy in members if strategy.trust != "retired"]
    tried = [strategy.lift for strategy in live if strategy.problems]
    shown = sum(strategy.shown for strategy in members)
    top = max(members, key=lambda strategy: strategy.shown)
    return {
        "problem_class": name,
        **{state: counts[state] for state in TRUST_STATES},
        "mean_utility": fmean(SORT_KEYS["utility"](strategy) for strategy in live) if live else None,
        "mean_lift": fmean(tried) if tried else None,
        "shown": shown,
        "most_shown": top.id if shown else None,
        "most_shown_share": top.shown / shown if shown else None,
    }


def stats(options: argparse.Namespace) -> int:
    """`trl-sgpo bank stats`"""
    directory = bank_directory(options.bank)
    with _reading(options.bank) as bank:
        everything = _everything(bank)
        executions = [(strategy, each) for strategy in everything for each in bank.executions(strategy.id)]
        embedder, dimension = bank.made_with, bank.dimension
    classes: dict[str, list[Strategy]] = defaultdict(list)
    for strategy in everything:
        classes[strategy.problem_class].append(strategy)
    by_class = [_class_figures(name, members) for name, members in sorted(classes.items())]
    pairs = transfer(executions, lambda strategy, execution: (strategy.problem_class, execution.problem_class))
    size = {name: _size(directory / name) for name in (LEDGER, INDEX)}
    if options.json:
        _print_json(
            {
                "bank": str(directory),
                "strategies": sum(strategy.trust != "retired" for strategy in everything),
                "retired": sum(strategy.trust == "retired" for strategy in everything),
                "embedding_model": embedder,
                "dimension": dimension,
                "bytes": size,
                "classes": by_class,
                "transfer": [
                    {"strategies_of": own, "problems_of": other, **group} for (own, other), group in pairs.items()
                ],
            }
        )
        return 0

    def optional(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    _print_table(
        ["class", *TRUST_STATES, "utility", "lift", "shown", "most shown"],
        [
            [
                each["problem_class"],
                *[str(each[state]) for state in TRUST_STATES],
                optional(each["mean_utility"], ".2f"),
                optional(each["mean_lift"], "+.2f"),
                str(each["shown"]),
                optional(each["most_shown_share"], ".0%"),
            ]
            for each in by_class
        ],
    )
    if any(own != other for own, other in pairs):
        rows = [[own, other, *_figures(group)] for (own, other), group in pairs.items()]
        columns = ["strategies of", "problems of", "problems", "rate", "baseline", "lift [bounds]"]
        _print_table(columns, rows, title="transfer")
    sizes = ", ".join(f"{name} {number / 2**20:.1f} MiB" for name, number in size.items())
    print(f"{len(everything)} strategies, embedded by {embedder} in {dimension} dimensions; {sizes}")
    return 0


def audit(options: argparse.Namespace) -> int:
    """`trl-sgpo bank audit`"""
    with _reading(options.bank) as bank:
        everything = _everything(bank)
        found = find_suspicious(everything, bank.embeddings(), bank.max_share, bank.min_problems, bank.tolerance)
    counts = Counter(each.severity for each in found)
    failed = counts["error"] > 0 or (options.strict and counts["warning"] > 0)
    if options.json:
        _print_json(
            {"errors": counts["error"], "warnings": counts["warning"], "findings": [asdict(each) for each in found]}
        )
        return int(failed)
    if found:
        texts = {strategy.id: strategy.text for strategy in everything}
        rows = [
            [each.strategy_id, each.severity, each.kind, f"{each.detail}\n{texts.get(each.strategy_id, '')}".rstrip()]
            for each in found
        ]
        _print_table(["id", "severity", "kind", "what was found, and the text"], rows)
    print(f"errors: {counts['error']}, warnings: {counts['warning']}, strategies: {len(everything)}")
    return int(failed)


def _manifest_damage(snapshot: Path) -> list[str]:
    try:
        expected = json.loads((snapshot / MANIFEST).read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        return [f"{snapshot / MANIFEST} is damaged"]
    with (snapshot / LEDGER).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == expected:
            return []
    return [f"{snapshot / LEDGER} is not what was written: its checksum is not the one in {MANIFEST}"]


def _record_damage(file: Path) -> tuple[int, list[str]]:
    """Number of strategies in a ledger, and what is wrong with it."""
    try:
        ledger = Ledger(file)
    except BankError as error:
        if isinstance(error.__cause__, sqlite3.DatabaseError):
            return 0, [str(error)]
        raise
    with closing(ledger):
        try:
            return ledger.count(), ledger.damage()
        except (BankError, ValueError) as error:
            return 0, [f"{file} has a value that cannot be: {error}"]


def verify(options: argparse.Namespace) -> int:
    """`trl-sgpo bank verify`"""
    directory = bank_directory(options.bank)
    damage = _manifest_damage(directory) if _is_snapshot(directory) else []
    with _to_read(directory) as copy:
        strategies, found = _record_damage(copy / LEDGER)
        damage += [each.replace(str(copy), str(directory)) for each in found]
        if not damage:
            with StrategyBank.restore(copy) as bank:
                damage += bank.damage()
    if options.json:
        _print_json({"bank": str(directory), "intact": not damage, "strategies": strategies, "damage": damage})
    elif damage:
        print(*(_printable(each) for each in damage), sep="\n")
        print(
            "\nTo recover: continue a run from its last checkpoint by `trl-sgpo train --resume_from_checkpoint true`, "
            f"or make a new bank of an intact snapshot by `trl-sgpo bank merge NEW CHECKPOINT/{BANK_DIRECTORY}`."
        )
    else:
        print(f"intact: {strategies} strategies")
    return int(bool(damage))


# Commands that copy and share


def export(options: argparse.Namespace) -> int:
    """`trl-sgpo bank export`"""
    with _reading(options.bank) as bank:
        directory = export_bank(bank, options.directory, options.format, options.license)
    if options.json:
        _print_json({"directory": str(directory)})
    else:
        print(f"Exported to {directory}. To add it to a bank: trl-sgpo bank import BANK {directory}")
    return 0


def _report(options: argparse.Namespace, report: ImportReport, **more: str) -> int:
    if options.json:
        _print_json(asdict(report) | more)
        return 0
    print(
        f"{report.added} added ({report.quarantined} in quarantine), {report.known} known already, "
        f"{report.near_copies} left out as near-copies, {report.retired} kept on record only"
    )
    print(f"To look for what should not be there: trl-sgpo bank audit {options.bank}")
    return 0


def import_strategies(options: argparse.Namespace) -> int:
    """`trl-sgpo bank import`"""
    with _writing(options.bank, options.embedding_model) as bank:
        return _report(options, import_bank(bank, options.directory, options.keep_trust))


def retire(options: argparse.Namespace) -> int:
    """`trl-sgpo bank retire`"""
    bank_directory(options.bank)  # nothing is retired from a bank that is made for it
    with _writing(options.bank, None) as bank:
        retired = [_find(_everything(bank), each) for each in options.ids]
        bank.retire(strategy.id for strategy in retired)
    if options.json:
        _print_json({"retired": [strategy.id for strategy in retired]})
    else:
        print(*(f"{strategy.id} retired: {_printable(strategy.text)}" for strategy in retired), sep="\n")
    return 0


def merge(options: argparse.Namespace) -> int:
    """`trl-sgpo bank merge`"""
    with _reading(options.other) as other:
        strategies = _everything(other)
        executions = [each for strategy in strategies for each in other.executions(strategy.id)]
    with _writing(options.bank, options.embedding_model) as bank:
        new = bank.merge(strategies, executions)
        total = len(bank)
    if options.json:
        _print_json({"added": len(new), "strategies": total})
    else:
        print(f"{len(new)} of {len(strategies)} added: the bank has {total} strategies now")
    return 0


def push(options: argparse.Namespace) -> int:
    """`trl-sgpo bank push`"""
    from ..bank.hub import push_bank

    with _reading(options.bank) as bank:
        sha = push_bank(
            bank, options.repo_id, file_format=options.format, license=options.license, private=options.private
        )
    if options.json:
        _print_json({"repo_id": options.repo_id, "revision": sha})
    else:
        print(f"Pushed to {options.repo_id} as {sha}.")
        print(f"To add exactly this to a bank: trl-sgpo bank pull BANK {options.repo_id} --revision {sha}")
    return 0


def pull(options: argparse.Namespace) -> int:
    """`trl-sgpo bank pull`"""
    from ..bank.hub import pull_bank

    with TemporaryDirectory(prefix="trl-sgpo-pull-") as temporary:
        directory, sha = pull_bank(options.repo_id, Path(temporary) / "export", revision=options.revision)
        with _writing(options.bank, options.embedding_model) as bank:
            report = import_bank(bank, directory, options.keep_trust, origin=f"{options.repo_id}@{sha}")
    return _report(options, report, revision=sha)
