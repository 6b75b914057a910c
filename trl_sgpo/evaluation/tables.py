"""Evaluation results as tables, plots and files."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks.terminal import printable
from ..files import write_file
from .chunks import RESULTS_FILE
from .plots import draw_bars, draw_matrix
from .statistics import wilson_interval


CONDITION_NAMES = {
    "transfer": "transfer (STS): a strategy of the same class, written for another problem",
    "own": "own: the strategy written for the problem",
    "other": "other: a strategy of another class",
    "empty": "empty: no text where the strategy would be",
    "none": "none: answered at once",
    "transfer_with_bank": "transfer, bank in view",
    "own_with_bank": "own, bank in view",
}


PLAIN = "accuracy of plain answers"
WAYS = {"plain": "plain", "own": "own strategy", "bank": "bank"}
"""Ways in which a two-phase model answers, as results name them, and their names in tables."""

MEASURED = {
    "plain": PLAIN,
    "own": "accuracy with own strategy",
    "bank": "accuracy with the bank in view",
    "transfer": "strategy transfer score",
}
"""What is measured before and after training, by its name in [`by_way`]."""

_MARKUP = re.compile(r"[\\`*<>&|]|!(?=\[)|(?<=\])[(:\[]")


@dataclass(frozen=True)
class ResultTable:
    """A title, the names of columns, and rows of as many cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(map(in_markdown, line))} |" for line in lines)
        return f"## {self.title}\n\n{body}\n"


def one_line(text: str) -> str:
    """A text in one line, with nothing that a terminal acts on."""
    return printable(" ".join(text.split()))


def in_markdown(text: str) -> str:
    """A text in one line that shows as it is: no mark-up, link or picture, and nothing that a terminal acts on."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def in_code(text: str) -> str:
    """A text in one line as code, or as it is if it holds what would end the code or a cell."""
    line = one_line(text)
    return f"`{line}`" if line and not {"`", "|"} & {*line} else in_markdown(line)


def tables(results: dict[str, Any]) -> list[ResultTable]:
    """
    Arranges results as tables.

    Args:
        results (`dict`):
            Content of `results.json`.

    Returns:
        `list[ResultTable]`: Suites, kinds, classes and transfer.
    """
    suites: dict[str, dict[str, Any]] = results["suites"]
    rows = [
        [name, suite["kind"], judged_of(suite), _cell(suite["accuracy"]), str(suite["generated_tokens"])]
        for name, suite in suites.items()
    ]
    result = [ResultTable("Suites", ["suite", "kind", "problems", "accuracy", "tokens"], rows)]
    sampled = {name: suite["sampled"] for name, suite in suites.items() if suite["sampled"] is not None}
    if sampled:
        n = next(iter(sampled.values()))["samples"]
        attempts = [
            [name, _cell(each["accuracy"]), _cell(each["pass_at_k"][str(n)]), _cell(each["majority"])]
            for name, each in sampled.items()
        ]
        result.append(ResultTable(f"{n} sampled attempts", ["suite", "accuracy", f"pass@{n}", "majority"], attempts))
    if (ways := ways_table(suites)) is not None:
        result.append(ways)
    if results["kinds"]:
        kinds = [[kind, _cell(figures)] for kind, figures in results["kinds"].items()]
        result.append(ResultTable("Kinds of suites", ["kind", "accuracy"], kinds))
    for name, suite in suites.items():
        if len(suite["classes"]) > 1:
            per_class = [
                [label or "(no class)", str(figures["problems"]), _cell(figures)]
                for label, figures in suite["classes"].items()
            ]
            result.append(ResultTable(f"{name} by class", ["class", "problems", "accuracy"], per_class))
    for name, transfer in results["transfer"].items():
        conditions = [[CONDITION_NAMES[key], _cell(figures)] for key, figures in transfer["conditions"].items()]
        differences = [[key, _cell(figures, signed=True)] for key, figures in transfer["differences"].items()]
        relative = transfer["relative"]
        ratio = [["transfer / own", "–" if relative is None else f"{relative:.3f}"]]
        count = len(transfer["classes"])
        title = f"Transfer on {name}, {count} classes" if count > 1 else f"Transfer on {name}, 1 class: no interval"
        if transfer["left_out_classes"]:
            title += f" ({len(transfer['left_out_classes'])} too small, or beyond --transfer_classes)"
        result.append(ResultTable(title, ["", "mean over classes"], [*conditions, *differences, *ratio]))
    return result


def judged(suite: dict[str, Any]) -> int:
    """Number of a suite's problems that the verifier judged, of which its figures are."""
    return suite["problems"] - suite.get("unverified", 0)


def judged_of(suite: dict[str, Any]) -> str:
    """That number, with that of the problems that the verifier did not judge."""
    unverified = suite.get("unverified", 0)
    return f"{judged(suite)} ({unverified} unverified)" if unverified else str(judged(suite))


def ways_table(suites: dict[str, dict[str, Any]]) -> ResultTable | None:
    """Plain answers, own strategies and the bank side by side, `None` where a single form was evaluated."""
    rows = ways_rows(suites)
    return ResultTable("Plain answers, own strategies, bank", ["accuracy", *WAYS.values()], rows) if rows else None


def ways_rows(suites: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Suite and decoding, and a cell for each of these ways."""
    rows = []
    for name, suite in suites.items():
        measured = {way: suite[way] for way in WAYS if way in suite}
        sampled = {way: each["sampled"] for way, each in measured.items() if each["sampled"] is not None}
        for decoding, found in (("greedy", measured), ("sampled", sampled)):
            if found:
                cells = [_cell(found[way]["accuracy"] if way in found else None) for way in WAYS]
                rows.append([f"{name}, {decoding}", *cells])
    return rows


def before_and_after(report: dict[str, Any]) -> ResultTable:
    """
    What a run measured before and after training, or after it only.

    Args:
        report (`dict`):
            Content of `report.json`: by `"before"`, if it is known, and `"after"`, and by decoding, a `TransferScore`.
            Those of earlier versions have no plain answers.

    Returns:
        `ResultTable`
    """
    rows = []
    known = ["before", "after"] if "before" in report else ["after"]
    for decoding in ("sampled", "greedy"):
        scores = [report[when][decoding] for when in known]
        for way, name in MEASURED.items():
            rates = [by_way(score)[way] for score in scores]
            if any(rate is not None for rate in rates):
                cells = [rate_cell(rate, score["problems"]) for rate, score in zip(rates, scores, strict=True)]
                rows.append([f"{name}, {decoding}", *cells])
    return ResultTable(f"{' and '.join(known).capitalize()} training, on unseen problems", ["", *known], rows)


def by_way(score: dict[str, Any]) -> dict[str, float | None]:
    """Accuracy of each way of answering, and transfer, in a `TransferScore`: `None` where it was not measured."""
    shown = score.get("own") is not None
    return {
        "plain": score.get("plain"),
        "own": score["own"] if shown else score["accuracy"],
        "bank": score["accuracy"] if shown else None,
        "transfer": score["transfer"],
    }


def rate_cell(rate: float | None, problems: int) -> str:
    """A rate with its 95% interval, or a dash where there is none."""
    if rate is None or problems == 0:
        return "–"
    low, high = wilson_interval(rate, problems)
    return f"{rate:.2f} [{low:.2f}, {high:.2f}]"


def _cell(figures: dict[str, Any] | None, signed: bool = False) -> str:
    if figures is None:
        return "–"
    sign = "+" if signed else ""
    return f"{figures['value']:{sign}.3f} [{figures['low']:{sign}.3f}, {figures['high']:{sign}.3f}]"


def write_results(directory: Path, results: dict[str, Any], plots: bool) -> list[Path]:
    """
    Writes `results.json`, `results.md` and, if `plots` is set, plots.

    Args:
        directory (`Path`):
            Output directory.
        results (`dict`):
            The results.
        plots (`bool`):
            Whether to draw `accuracy.png` and, for each suite with transfer, `transfer_NAME.png` and
            `matrix_NAME.png`.

    Returns:
        `list[Path]`: The files.
    """
    written = [directory / RESULTS_FILE, directory / "results.md"]
    write_file(written[0], json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_file(written[1], "\n".join(table.markdown() for table in tables(results)))
    if not plots:
        return written
    bars = {name: suite["accuracy"] for name, suite in results["suites"].items() if suite["accuracy"] is not None}
    if bars:
        written.append(directory / "accuracy.png")
        draw_bars(written[-1], "Accuracy", bars)
    for name, transfer in results["transfer"].items():
        if transfer["conditions"]:
            written.append(directory / f"transfer_{name}.png")
            draw_bars(written[-1], f"Transfer on {name}", transfer["conditions"])
        written.append(directory / f"matrix_{name}.png")
        draw_matrix(written[-1], f"Transfer between classes of {name}", transfer["classes"], transfer["matrix"])
    return written
