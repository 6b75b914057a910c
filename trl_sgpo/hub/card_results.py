"""The results of a run in its model card, and in the metadata of the card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..bank.export_files import published
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.repositories import own_file
from ..checks.shapes import count, either, exactly, listing, mapping, nothing, number, record, text
from ..evaluation.chunks import RESULTS_FILE
from ..evaluation.stored import RATE
from ..evaluation.tables import PLAIN, WAYS, before_and_after, in_markdown, judged_of, one_line
from ..report.run_files import REPORT_FILE
from ..yaml_files import read_list, read_mapping


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RESULTS_DIRECTORY = ".eval_results"

_MAYBE = either(nothing, RATE)
_SCORE = record(
    {"accuracy": RATE, "transfer": RATE, "problems": count, "transfers": count},
    optional={"plain": _MAYBE, "own": _MAYBE, "unverified": count},
)
_SCORES = record({"sampled": _SCORE, "greedy": _SCORE}, closed=True)
_REPORT = record({"after": _SCORES}, optional={"before": _SCORES})
_ACCURACY = record({"value": RATE, "low": RATE, "high": RATE})
_RATES = {"accuracy": either(nothing, _ACCURACY)}
_SUITE = record(
    {"kind": text, "problems": count, "available": count, **_RATES},
    optional={"unverified": count} | dict.fromkeys(WAYS, record(_RATES)),
)
_ENTRY = record(
    {
        "task": record({"type": exactly("text-generation")}, closed=True),
        "dataset": record({"name": text, "type": text}),
        "metrics": listing(record({"type": exactly("accuracy"), "value": RATE}), 1),
    },
    closed=True,
)
_ON_BENCHMARK = record(
    {"dataset": record({"id": text, "task_id": text}, closed=True), "value": number(0, 100)},
    closed=True,
    optional={"notes": text},
)
_OF_DATASET, _OF_METRIC = ("name", "type", "config", "split"), ("type", "value", "name")


def check_scores(scores: Any) -> None:
    """Raises a `ValueError` if figures before training are not those of a run."""
    _SCORES(scores, "scores")


def _report(directory: Path) -> dict[str, Any]:
    path = directory / REPORT_FILE
    if not path.is_file():
        return {}
    report: dict[str, Any] = read_json(path)
    _REPORT(report, "it")
    return report


@expect_readable(RESULTS_FILE)
def _suites_of(evaluation: Path) -> dict[str, Any]:
    results = read_json(own_file(evaluation, RESULTS_FILE))
    record({"suites": mapping(_SUITE)})(results, "it")
    suites: dict[str, Any] = results["suites"]
    return suites


@expect_readable(REPORT_FILE)
def measured(directory: Path, data: str) -> list[dict[str, Any]]:
    """The run's measurements on unseen problems of some data after training, as entries of a `model-index`."""
    after = _report(directory).get("after", {})
    metrics = [
        {"type": key, "name": f"{name}, {decoding}, {score[count]} executions", "value": round(score[key], 4)}
        for decoding, score in after.items()
        for key, name, count in (
            ("plain", PLAIN, "problems"),
            ("accuracy", "accuracy with the own strategy", "problems"),
            ("transfer", "strategy transfer score", "transfers"),
        )
        if score[count] > 0 and score.get(key) is not None
    ]
    dataset = {"name": f"unseen problems of {data}", "type": data}
    return [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}] if metrics else []


@expect_readable("hub/model_index.yaml")
def evaluated(evaluation: Path | None) -> list[dict[str, Any]]:
    """The results of `trl-sgpo eval`, as entries of a `model-index`."""
    if evaluation is None:
        return []
    path = own_file(evaluation, "hub/model_index.yaml")
    if not path.is_file():
        return []
    entries, suites = read_mapping(str(path))["model-index"][0]["results"], _suites_of(evaluation)
    listing(_ENTRY)(entries, "results")
    for entry in entries:
        value, figures = entry["metrics"][0]["value"], suites[entry["dataset"]["name"]]["accuracy"]
        if value != round(figures["value"], 4):
            raise ValueError(f"an accuracy of {value}, and {figures['value']} in {RESULTS_FILE}")
    return [_known(entry) for entry in entries]


@expect_readable("hub/.eval_results")
def on_benchmarks(evaluation: Path) -> dict[str, str]:
    """The results on datasets of the Hub as it shows them, of what `eval` writes alone: name of a suite → YAML."""
    folder, found = own_file(evaluation, "hub") / RESULTS_DIRECTORY, {}
    paths = sorted(folder.glob("*.yaml"))
    suites = _suites_of(evaluation) if paths else {}
    for path in paths:
        entries = read_list(str(own_file(evaluation, str(path.relative_to(evaluation)))))
        listing(_ON_BENCHMARK, 1)(entries, path.name)
        entry, figures = entries[0], suites[path.stem]["accuracy"]
        if not HUB_NAME.fullmatch(entry["dataset"]["id"]) or entry["value"] != round(100 * figures["value"], 2):
            raise ValueError(f"{path.name} has not the dataset and the accuracy of {RESULTS_FILE}")
        texts = {key: one_line(entry[key]) for key in ("notes",) if key in entry}
        known = {"dataset": {key: one_line(value) for key, value in entry["dataset"].items()}, "value": entry["value"]}
        found[path.stem] = yaml.safe_dump([known | texts], sort_keys=False)
    return found


def _known(entry: dict[str, Any]) -> dict[str, Any]:
    """The parts of an entry that an evaluation writes, as texts in one line. Of a path, only the last part."""

    def of(part: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        found = {key: part[key] for key in keys if key in part}
        return {key: value if key == "value" else published(one_line(str(value))) for key, value in found.items()}

    return entry | {
        "dataset": of(entry["dataset"], _OF_DATASET),
        "metrics": [of(metric, _OF_METRIC) for metric in entry["metrics"]],
    }


def results(directory: Path, evaluation: Path | None) -> str:
    """The section of the card, in Markdown."""
    tables = [_before_and_after(directory), _suites(evaluation)]
    return "## Results\n\n" + ("\n\n".join(table for table in tables if table) or "Nothing was measured.")


def _accuracy(figures: dict[str, Any] | None) -> str:
    return "–" if figures is None else f"{figures['value']:.2f} [{figures['low']:.2f}, {figures['high']:.2f}]"


@expect_readable(REPORT_FILE)
def _before_and_after(directory: Path) -> str:
    report = _report(directory)
    if not report:
        return ""
    table, after = before_and_after(report), report["after"]["greedy"]
    rows = table.rows
    left_out = f" ({after.get('unverified')} more are left out: the verifier does not judge them)"
    lines = [
        f"On {after['problems']} problems that were not trained on{left_out if after.get('unverified') else ''}, with "
        "95% intervals:",
        "",
        f"| {' | '.join(table.columns)} |",
        "|---" * len(table.columns) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    note = "The transfer score is the mean outcome of strategies executed on other problems of their class."
    if "before" in report:
        note = (
            "“Before” is before the reinforcement learning, after the supervised warm start if there was one. " + note
        )
    if rows[0][0].startswith(PLAIN):
        note += " Plain answers are those to the bare problem."
    return "\n".join([*lines, "", note])


@expect_readable(RESULTS_FILE)
def _suites(evaluation: Path | None) -> str:
    if evaluation is None:
        return ""
    suites = _suites_of(evaluation)
    in_ways = any(way in suite for suite in suites.values() for way in WAYS)
    columns = WAYS if in_ways else {"": "accuracy"}
    lines = [
        "By `trl-sgpo eval`, greedy, with 95% intervals:",
        "",
        f"| suite | kind | problems | {' | '.join(columns.values())} |",
        f"|---|---|---{'|---' * len(columns)}|",
    ]
    for name, suite in suites.items():
        measured = [suite.get(way) if in_ways else suite for way in columns]
        rates = " | ".join(_accuracy(None if each is None else each["accuracy"]) for each in measured)
        kind = in_markdown(suite["kind"].replace("_", " "))
        lines.append(f"| {in_markdown(name)} | {kind} | {judged_of(suite)} of {suite['available']} | {rates} |")
    if in_ways:
        lines += [
            "",
            "Plain answers are those to the bare problem. An own strategy is written without strategies of the bank "
            "in view, and executed.",
        ]
    return "\n".join(lines)
