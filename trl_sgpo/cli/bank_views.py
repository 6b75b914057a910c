"""Commands of `trl-sgpo bank` that only read: list, show, search, stats, audit and verify."""

import argparse
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ..bank import StrategyBank, policy
from ..bank.audit import audit as find_suspicious
from ..bank.files import BANK_DIRECTORY, INDEX, LEDGER
from ..bank.ledger import Ledger
from ..bank.manifest import is_snapshot, snapshot_damage
from ..bank.snapshot import bank_directory, embed_with, open_read_only, read_only_directory
from ..bank.statistics import class_figures, lift_text, plain_lift_text, transfer, with_bounds
from ..bank.strategy import TRUST_STATES, Strategy
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.terminal import printable
from ..errors import BankError, ConfigError
from ..report.run_files import STATE_FILE
from .text import print_facts, print_json, print_table, rate


_EMPTY = (
    "empty: no strategy was stored. A run stores one per block if it is well-formed, does not contain its problem's "
    "answer, solves its own problem, is better than the others of its block on sibling problems, and is no near-copy."
)
_REASONS = {
    "sgpo/malformed": "of the strategies were malformed",
    "sgpo/leak": "contained the answer",
    "sgpo/correctness": "of the executions on the own problem were right",
    "sgpo/frac_blocks_no_signal": "of the blocks had equal outcomes, so that no strategy was better",
}

SORT_KEYS: dict[str, Callable[[Strategy], float]] = {
    "utility": lambda strategy: policy.utility(strategy.successes, strategy.trials),
    "lift": lambda strategy: strategy.lift,
    "plain_lift": lambda strategy: strategy.plain_lift,
    "shown": lambda strategy: strategy.shown,
    "step": lambda strategy: strategy.step,
}


def _state(strategy: Strategy) -> str:
    """Trust state, and whether the strategy is useful or harmful."""
    return f"{strategy.trust}{', useful' * policy.useful(strategy)}{', harmful' * policy.harmful(strategy)}"


def _record(strategy: Strategy) -> dict[str, Any]:
    low, high = policy.lift_bounds(strategy)
    plain_low, plain_high = policy.plain_lift_bounds(strategy)
    return {
        "id": strategy.id,
        **asdict(strategy),
        "utility": policy.utility(strategy.successes, strategy.trials),
        "lift": strategy.lift,
        "lift_low": low,
        "lift_high": high,
        "plain_lift": strategy.plain_lift,
        "plain_lift_low": plain_low,
        "plain_lift_high": plain_high,
        "useful": policy.useful(strategy),
        "harmful": policy.harmful(strategy),
        "checksum": strategy.checksum,
    }


def all_strategies(bank: StrategyBank) -> list[Strategy]:
    """All strategies of a bank, the retired ones last."""
    return [*bank.strategies(), *bank.retired()]


def _short_ids(strategies: Sequence[Strategy]) -> dict[str, str]:
    """Strategy id → its first digits, as many as make all of them distinct."""
    ids = [strategy.id for strategy in strategies]
    length = next((n for n in range(8, 16) if len({key[:n] for key in ids}) == len(ids)), 16)
    return {key: key[:length] for key in ids}


def _why_empty(run: Path) -> str:
    """Reasons for which a run stores no strategy, with their figures where the run has logged them."""
    found = [*sorted(run.glob(f"checkpoint-*/{STATE_FILE}"), key=lambda file: file.stat().st_mtime)]
    found += [run / STATE_FILE] * (run / STATE_FILE).is_file()  # written when training ends
    if not found:
        return f"{_EMPTY} No logged step of a run is beside this bank."
    with expect_readable(found[-1]):
        steps = [log for log in read_json(found[-1])["log_history"] if "sgpo/malformed" in log]
        figures = [
            f"{fmean(log[key] for log in steps if key in log):.0%} {text}"
            for key, text in _REASONS.items()
            if any(key in log for log in steps)
        ]
    if not steps:
        return f"{_EMPTY} No logged step of a run is beside this bank."
    return f"{_EMPTY} In the {len(steps)} logged steps: {'; '.join(figures)}."


def list_strategies(options: argparse.Namespace) -> int:
    """`trl-sgpo bank list`"""
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"`--limit` must be at least 1, got {options.limit}.")
    with open_read_only(options.bank) as bank:
        everything = all_strategies(bank)
    wanted = options.trust or [state for state in TRUST_STATES if state != "retired"]
    chosen = [
        strategy
        for strategy in everything
        if strategy.trust in wanted and options.problem_class in (None, strategy.problem_class)
    ]
    shown = in_order(chosen, SORT_KEYS[options.sort])[: options.limit]
    if options.json:
        print_json([_record(strategy) for strategy in shown])
        return 0
    if not everything:
        print(_why_empty(bank_directory(options.bank).parent))
        return 0
    if not shown:
        counts = Counter(strategy.trust for strategy in everything)
        states = ", ".join(f"{counts[state]} {state}" for state in TRUST_STATES if counts[state])
        print(f"none of {len(everything)} strategies ({states}) fits --class and --trust")
        return 0
    print_strategies(shown, everything)
    return 0


def in_order(strategies: Sequence[Strategy], key: Callable[[Strategy], float]) -> list[Strategy]:
    """The strategies, the highest by a key first."""
    return sorted(strategies, key=lambda strategy: (-key(strategy), -strategy.trials, strategy.id))


def print_strategies(shown: Sequence[Strategy], everything: Sequence[Strategy]) -> None:
    """Prints strategies of a bank as a table, and what their trust states mean."""
    short = _short_ids(everything)
    print_table(
        ["id", "class", "trust", "won", "problems", "lift [bounds]", "plain lift [bounds]", "shown", "text"],
        [
            [
                short[strategy.id],
                strategy.problem_class,
                _state(strategy),
                rate(strategy),
                str(strategy.problems),
                lift_text(strategy),
                plain_lift_text(strategy),
                str(strategy.shown),
                strategy.text,
            ]
            for strategy in shown
        ],
    )
    print(f"{len(shown)} of {len(everything)} strategies")
    if any(strategy.trust == "trusted" for strategy in shown):
        print("trusted: not inferior to other strategies on the same problems, by the tolerance of the run")
    if any(policy.useful(strategy) for strategy in shown):
        print("useful: better than plain answers to the same problems, which follow no strategy")
    if any(policy.harmful(strategy) for strategy in shown):
        print("harmful: worse than plain answers to the same problems, and not shown")


def find(strategies: Sequence[Strategy], prefix: str) -> Strategy:
    """The only strategy whose id starts with some digits."""
    matches = [strategy for strategy in strategies if strategy.id.startswith(prefix.casefold())]
    if not matches:
        raise BankError(f"No strategy has an id that starts with {prefix!r}: `trl-sgpo bank list` prints them.")
    if len(matches) > 1:
        ids = ", ".join(strategy.id for strategy in matches[:3])
        raise BankError(
            f"{len(matches)} ids start with {prefix!r} ({ids}{', …' * (len(matches) > 3)}): give more digits."
        )
    return matches[0]


def _figures(group: dict[str, Any]) -> list[str]:
    lift = with_bounds(group["lift"], group["lift_low"], group["lift_high"])
    return [str(group["problems"]), f"{group['rate']:.2f}", f"{group['baseline']:.2f}", lift]


def show(options: argparse.Namespace) -> int:
    """`trl-sgpo bank show`"""
    with open_read_only(options.bank) as bank:
        everything = all_strategies(bank)
        strategy = find(everything, options.id)
        executions = bank.executions(strategy.id)
    texts = {each.id: each.text for each in everything}
    parents = {key: texts.get(key) for key in strategy.parents}
    children = {each.id: each.text for each in everything if strategy.id in each.parents}
    by_class = transfer(((strategy, each) for each in executions), lambda _, execution: execution.problem_class)
    if options.json:
        print_json(
            _record(strategy)
            | {
                "parents": [{"id": key, "text": text} for key, text in parents.items()],
                "children": [{"id": key, "text": text} for key, text in children.items()],
                "transfer": [{"problem_class": name, **group} for name, group in by_class.items()],
            }
        )
        return 0
    print_facts(
        {
            "id": strategy.id,
            "class": strategy.problem_class,
            "text": strategy.text,
            "trust": _state(strategy),
            "written by": strategy.model or "unknown",
            "in run": f"{strategy.run or 'unknown'}, at step {strategy.step}",
            "origin": strategy.origin,
            "written for": ", ".join(strategy.source_problems) or "no problem on record",
            "executions": f"{rate(strategy)} won, utility {SORT_KEYS['utility'](strategy):.2f}",
            "other problems": f"{strategy.problems}, lift {lift_text(strategy)}",
            "beside plain answers": f"{strategy.plain_problems}, plain lift {plain_lift_text(strategy)}",
            "shown": f"{strategy.shown} times",
            "checksum": strategy.checksum,
        }
    )
    for title, relatives in (("parents", parents), ("children", children)):
        if relatives:
            rows = [[key, text or "(not in this bank)"] for key, text in relatives.items()]
            print_table(["id", "text"], rows, title=title)
    if by_class:
        rows = [[name, *_figures(group)] for name, group in by_class.items()]
        print_table(["class", "problems", "rate", "baseline", "lift [bounds]"], rows, title="transfer")
    return 0


def search(options: argparse.Namespace) -> int:
    """`trl-sgpo bank search`"""
    if options.k < 1:
        raise ConfigError(f"`-k` must be at least 1, got {options.k}.")
    with open_read_only(options.bank) as bank:
        embed_with(bank, options.embedding_model)
        classes = None if options.problem_class is None else [options.problem_class]
        (found,) = bank.retrieve(
            [options.problem], options.k, classes, exclude=[set()], trust=options.trust or ["trusted"]
        )
        short = _short_ids(all_strategies(bank))
    if options.json:
        print_json([{**_record(hit.strategy), "similarity": hit.similarity, "score": hit.score} for hit in found])
        return 0
    rows = [
        [
            short[hit.strategy.id],
            hit.strategy.problem_class,
            _state(hit.strategy),
            f"{hit.score:.2f}",
            f"{hit.similarity:.2f}",
            rate(hit.strategy),
            lift_text(hit.strategy),
            plain_lift_text(hit.strategy),
            hit.strategy.text,
        ]
        for hit in found
    ]
    lifts = ["lift [bounds]", "plain lift [bounds]"]
    print_table(["id", "class", "trust", "score", "similarity", "won", *lifts, "text"], rows)
    if not found:
        print("Nothing found. Try another --class, or strategies that are not trusted yet: --trust candidate")
    return 0


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def stats(options: argparse.Namespace) -> int:
    """`trl-sgpo bank stats`"""
    directory = bank_directory(options.bank)
    with open_read_only(options.bank) as bank:
        everything = all_strategies(bank)
        executions = [(strategy, each) for strategy in everything for each in bank.executions(strategy.id)]
        embedder, dimension = bank.made_with, bank.dimension
    classes: dict[str, list[Strategy]] = defaultdict(list)
    for strategy in everything:
        classes[strategy.problem_class].append(strategy)
    by_class = [class_figures(name, members) for name, members in sorted(classes.items())]
    pairs = transfer(executions, lambda strategy, execution: (strategy.problem_class, execution.problem_class))
    size = {name: _size(directory / name) for name in (LEDGER, INDEX)}
    if options.json:
        print_json(
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
    if not everything:
        print(_why_empty(directory.parent))
        return 0

    def optional(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    print_table(
        ["class", *TRUST_STATES, "useful", "utility", "lift", "plain lift [bounds]", "shown", "most shown"],
        [
            [
                each["problem_class"],
                *[str(each[state]) for state in TRUST_STATES],
                str(each["useful"]),
                optional(each["mean_utility"], ".2f"),
                optional(each["mean_lift"], "+.2f"),
                "unknown"
                if each["plain_lift"] is None
                else with_bounds(each["plain_lift"], each["plain_lift_low"], each["plain_lift_high"]),
                str(each["shown"]),
                optional(each["most_shown_share"], ".0%"),
            ]
            for each in by_class
        ],
    )
    if any(own != other for own, other in pairs):
        rows = [[own, other, *_figures(group)] for (own, other), group in pairs.items()]
        columns = ["strategies of", "problems of", "problems", "rate", "baseline", "lift [bounds]"]
        print_table(columns, rows, title="transfer")
    sizes = ", ".join(f"{name} {number / 2**20:.1f} MiB" for name, number in size.items())
    print(f"{len(everything)} strategies, embedded by {embedder} in {dimension} dimensions; {sizes}")
    return 0


def audit(options: argparse.Namespace) -> int:
    """`trl-sgpo bank audit`"""
    with open_read_only(options.bank) as bank:
        everything = all_strategies(bank)
        findings = find_suspicious(everything, bank.embeddings(), bank.max_share, bank.min_problems, bank.tolerance)
    counts = Counter(each.severity for each in findings)
    failed = counts["error"] > 0 or (options.strict and counts["warning"] > 0)
    if options.json:
        print_json(
            {"errors": counts["error"], "warnings": counts["warning"], "findings": [asdict(each) for each in findings]}
        )
        return int(failed)
    if findings:
        texts = {strategy.id: strategy.text for strategy in everything}
        rows = [
            [each.strategy_id, each.severity, each.kind, f"{each.detail}\n{texts.get(each.strategy_id, '')}".rstrip()]
            for each in findings
        ]
        print_table(["id", "severity", "kind", "finding and text"], rows)
    print(f"errors: {counts['error']}, warnings: {counts['warning']}, strategies: {len(everything)}")
    return int(failed)


def _record_damage(file: Path) -> tuple[int, list[str]]:
    """Number of strategies in a ledger, and what is wrong with it."""
    try:
        ledger = Ledger(file)
    except BankError as error:
        if isinstance(error.__cause__, sqlite3.DatabaseError | ValueError):
            return 0, [str(error)]
        raise
    with closing(ledger):
        try:
            return ledger.count(), ledger.damage()
        except BankError as error:
            return 0, [str(error)]


def verify(options: argparse.Namespace) -> int:
    """`trl-sgpo bank verify`"""
    directory = bank_directory(options.bank)
    damage = snapshot_damage(directory) if is_snapshot(directory) else []
    with read_only_directory(directory) as copy:
        strategies, record_damage = _record_damage(copy / LEDGER)
        damage += [each.replace(str(copy), str(directory)) for each in record_damage]
        if not damage:
            with StrategyBank.restore(copy) as bank:
                damage += bank.damage()
    if options.json:
        print_json({"bank": str(directory), "intact": not damage, "strategies": strategies, "damage": damage})
    elif damage:
        print(*(printable(each) for each in damage), sep="\n")
        print(
            "\nTo recover: continue a run from its last checkpoint by `trl-sgpo train --resume_from_checkpoint true`, "
            f"or make a new bank of an intact snapshot by `trl-sgpo bank merge NEW CHECKPOINT/{BANK_DIRECTORY}`."
        )
    else:
        print(f"intact: {strategies} strategies")
    return int(bool(damage))
