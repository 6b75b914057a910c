"""The results of a run in its model card, and in the metadata of the card."""

from pathlib import Path
from typing import Any

from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.repositories import own_file
from ..evaluation.chunks import RESULTS_FILE
from ..report.run_files import REPORT_FILE
from ..yaml_files import read_mapping


def _report(directory: Path) -> dict[str, Any]:
    path = directory / REPORT_FILE
    return read_json(path) if path.is_file() else {}


@expect_readable(REPORT_FILE)
def measured(directory: Path, data: str) -> list[dict[str, Any]]:
    """The run's measurements on unseen problems of some data after training, as entries of a `model-index`."""
    after = _report(directory).get("after", {})
    metrics = [
        {"type": key, "name": f"{name}, {decoding}, {score[count]} executions", "value": round(score[key], 4)}
        for decoding, score in after.items()
        for key, name, count in (
            ("accuracy", "accuracy with the own strategy", "problems"),
            ("transfer", "strategy transfer score", "transfers"),
        )
        if score[count] > 0
    ]
    dataset = {"name": f"unseen problems of {data}", "type": data}
    return [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}] if metrics else []


@expect_readable("hub/model_index.yaml")
def evaluated(evaluation: Path | None) -> list[dict[str, Any]]:
    """The results of `trl-sgpo eval`, as entries of a `model-index`."""
    if evaluation is None:
        return []
    path = own_file(evaluation, "hub/model_index.yaml")
    return list(read_mapping(str(path))["model-index"][0]["results"]) if path.is_file() else []


def results(directory: Path, evaluation: Path | None) -> str:
    """The section of the card, in Markdown."""
    tables = [_before_and_after(directory), _suites(evaluation)]
    return "## Results\n\n" + ("\n\n".join(table for table in tables if table) or "Nothing was measured.")


def _interval(rate: float, low: float, high: float) -> str:
    return f"{rate:.2f} [{low:.2f}, {high:.2f}]"


@expect_readable(REPORT_FILE)
def _before_and_after(directory: Path) -> str:
    from ..evaluation.statistics import wilson_interval

    report = _report(directory)
    if not report:
        return ""
    problems = next(iter(report["after"].values()))["problems"]
    lines = [
        f"On {problems} problems that were not trained on, with 95% intervals:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    for name, key in (("accuracy with the own strategy", "accuracy"), ("strategy transfer score", "transfer")):
        for decoding, after in report["after"].items():
            cells = [
                _interval(score[key], *wilson_interval(score[key], score["problems"])) if score["problems"] else "–"
                for score in (report["before"][decoding], after)
            ]
            lines.append(f"| {name}, {decoding} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "“Before” is before the reinforcement learning, after the supervised warm start if there was one. The "
        "transfer score is the mean outcome of strategies executed on other problems of their class.",
    ]
    return "\n".join(lines)


@expect_readable(RESULTS_FILE)
def _suites(evaluation: Path | None) -> str:
    if evaluation is None:
        return ""
    suites = read_json(own_file(evaluation, RESULTS_FILE))["suites"]
    lines = [
        "By `trl-sgpo eval`, greedy, with 95% intervals:",
        "",
        "| suite | kind | problems | accuracy |",
        "|---|---|---|---|",
    ]
    for name, suite in suites.items():
        figures = suite["accuracy"]
        rate = "–" if figures is None else _interval(figures["value"], figures["low"], figures["high"])
        kind = suite["kind"].replace("_", " ")
        lines.append(f"| {name} | {kind} | {suite['problems']} of {suite['available']} | {rate} |")
    return "\n".join(lines)
