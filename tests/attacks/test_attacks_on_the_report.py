"""Text in a report shows what it holds, and none is so long that a browser cannot show the page."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from browser import CHROMIUM, Browser
from pyarrow import parquet
from report_runs import write_run

from trl_sgpo.bank.strategy import Execution
from trl_sgpo.cli.main import main
from trl_sgpo.evaluation.plots import draw_bars, draw_matrix
from trl_sgpo.evaluation.tables import ResultTable
from trl_sgpo.report import records
from trl_sgpo.report.page import write_report
from trl_sgpo.report.records import read_run


HIDDEN = {
    "left-to-right mark": "\u200e",
    "right-to-left mark": "\u200f",
    "Arabic letter mark": "\u061c",
    "zero-width space": "\u200b",
    "zero-width joiner": "\u200d",
    "word joiner": "\u2060",
    "byte order mark": "\ufeff",
    "tag": "\U000e0041",
    "soft hyphen": "\u00ad",
    "override": "\u202e",
    "line separator": "\u2028",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_characters_are_shown(name, tmp_path):
    run = read_run(write_run(tmp_path / "run", text=f"a{HIDDEN[name]}b", bank=name != "line separator"))
    run.missing["curves"] = f"`a{HIDDEN[name]}b` is missing"
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count(HIDDEN[name]) == 0
    assert page.count(HIDDEN[name].encode("unicode_escape").decode()) > 20


def long_run(tmp_path):
    """A run with texts of 3 MB without a space, as an answer and as a setting."""
    directory = write_run(tmp_path / "run", text="A" * 3_000_000, steps=2, max_steps=2, bank=False, evaluation=False)
    write_report(read_run(directory), tmp_path / "report.html")
    return tmp_path / "report.html"


def test_a_long_text_is_cut_and_its_length_said(tmp_path):
    page = long_run(tmp_path).read_text()
    assert len(page) < 3_000_000
    assert max(map(len, re.findall("[A ]+", page))) == 20_019 and max(map(len, re.findall("A+", page))) == 1000
    assert page.count("… (the first 20,000 of 3,000,") > 20


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")
def test_a_long_text_leaves_the_page_usable(tmp_path):
    report = long_run(tmp_path)
    with Browser(tmp_path / "profile") as browser:
        browser.open(report)
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        browser.run("document.querySelector('form[data-filters=problems] input').focus()")
        shown = "[...document.querySelectorAll('#problems > .item')].filter((each) => each.checkVisibility()).length"
        assert browser.run(shown) == 4
        for letter in "absent":
            browser.press(letter)
        assert browser.run(shown) == 0


MARKUP = "x | y |\n\n<script>alert(1)</script> <img src=x> ![a](http://evil) [click](javascript:x) `c` \x1b[31m\u202e"


def test_tables_in_markdown():
    lines = ResultTable("Classes", ["class", "accuracy"], [[MARKUP, "0.5 [0.4, 0.6]"]]).markdown().splitlines()
    row = lines[4]
    assert len(lines) == 5 and row.replace("\\|", "").count("|") == 3 and row.endswith("| 0.5 [0.4, 0.6] |")
    assert "\x1b" not in row and "\u202e" not in row
    unescaped = re.sub(r"\\.", "", row)
    assert not re.search(r"[<>`]|!\[|\]\(", unescaped)


@pytest.mark.parametrize("name", ["$\\frac{$", "$" + "{" * 2000 + "$", "x" * 100_000, "\x1b[31m"])
def test_names_in_pictures(name, tmp_path):
    draw_matrix(tmp_path / "a.png", name, [name, "b"], [[0.5, None], [None, 1.0]])
    draw_bars(tmp_path / "b.png", name, {name: {"value": 0.5, "low": 0.4, "high": 0.6}})
    assert (tmp_path / "a.png").stat().st_size and (tmp_path / "b.png").stat().st_size


STATE = {"log_history": [{"step": 1, "reward": 0.5}], "global_step": 1, "max_steps": 1}
SCORE = {"accuracy": 0.5, "transfer": 0.5, "problems": 4}
SUITE = {"kind": "harder", "problems": 1, "accuracy": None, "sampled": None, "generated_tokens": 1, "classes": {}}
MALFORMED: dict[str, tuple[str, Any, str]] = {
    "no list": ("trainer_state.json", {"log_history": 5}, "The metrics cannot be read"),
    "no step": ("trainer_state.json", STATE | {"log_history": [{"step": [1]}]}, "The metrics cannot be read"),
    "no steps": ("trainer_state.json", STATE | {"global_step": "a"}, "The metrics cannot be read"),
    "large": (
        "trainer_state.json",
        STATE | {"log_history": [{"step": step, "reward": 1e308} for step in range(10)]},
        "The metrics cannot be read",
    ),
    "many digits": ("trainer_state.json", STATE | {"log_history": [{"step": 10**400}]}, "The metrics cannot be read"),
    "before": ("report.json", {"before": 1}, "report.json is damaged"),
    "rate": (
        "report.json",
        dict.fromkeys(("before", "after"), dict.fromkeys(("sampled", "greedy"), SCORE | {"accuracy": 7})),
        "report.json is damaged",
    ),
    "plain rate": (
        "report.json",
        dict.fromkeys(("before", "after"), dict.fromkeys(("sampled", "greedy"), SCORE | {"plain": "many"})),
        "report.json is damaged",
    ),
    "way": (
        "eval/results.json",
        {"suites": {"a": SUITE | {"plain": 5}}, "transfer": {}, "kinds": {}},
        "eval/results.json is damaged",
    ),
    "suites": ("eval/results.json", {"suites": 5, "transfer": {}, "kinds": {}}, "eval/results.json is damaged"),
    "transfer": ("eval/results.json", {"suites": {}, "transfer": 5, "kinds": {}}, "eval/results.json is damaged"),
    "prompt": ("completions", [{"step": 1, "prompt": 5, "completion": "a"}], "rollouts cannot be read"),
    "message": ("completions", [{"step": 1, "prompt": [{"a": 5}], "completion": "a"}], "rollouts cannot be read"),
    "no completion": ("completions", [{"step": 1, "prompt": "a"}], "rollouts cannot be read"),
    "no step of rollouts": ("completions", [{"prompt": "a", "completion": "a"}], "rollouts cannot be read"),
    "strategy": ("completions", [{"step": 1, "prompt": "a", "execution": "a", "strategy": 5}], "rollouts cannot"),
    "correctness": (
        "completions",
        [{"step": 1, "prompt": "a", "execution": "a", "correctness": "yes"}],
        "rollouts cannot be read",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_named_as_damaged(name: str, tmp_path: Path) -> None:
    file, content, words = MALFORMED[name]
    directory = write_run(tmp_path / "run", bank=False, evaluation=False, completions=False)
    path = directory / (f"{file}/completions_00001.parquet" if file == "completions" else file)
    path.parent.mkdir(exist_ok=True)
    if file == "completions":
        pd.DataFrame(content).to_parquet(path)
    else:
        path.write_text(json.dumps(content))
    assert main(["report", str(directory), "--output", str(tmp_path / "report.html")]) == 0
    page = re.sub("<[^>]*>", "", (tmp_path / "report.html").read_text())
    assert words in page


def test_an_evaluation_whose_matrix_is_none(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", bank=False, completions=False)
    (path,) = directory.glob("**/results.json")
    results = json.loads(path.read_text())
    for report in results["transfer"].values():
        report["matrix"] = [["a"] * len(report["classes"])] * len(report["classes"])
    path.write_text(json.dumps(results))
    assert main(["report", str(directory), "--output", str(tmp_path / "report.html")]) == 0
    assert "is damaged" in (tmp_path / "report.html").read_text()


def report(directory: Path, tmp_path: Path) -> str:
    assert main(["report", str(directory), "--output", str(tmp_path / "report.html")]) == 0
    return re.sub("<[^>]*>", "", (tmp_path / "report.html").read_text())


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


@pytest.mark.parametrize("make", [pipe, sparse])
@pytest.mark.parametrize(
    "name, words",
    [
        ("trainer_state.json", "No metrics yet"),
        ("settings.json", "No settings.json"),
        ("report.json", ""),
        ("eval/results.json", ""),
        ("completions/completions_00001.parquet", "rollouts cannot be read"),
    ],
)
def test_a_file_of_a_run_that_no_run_writes(make: Any, name: str, words: str, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", bank=False, completions=False)
    (directory / name).parent.mkdir(exist_ok=True)
    make(directory / name)
    assert words in report(directory, tmp_path)


def test_settings_that_nest_deeply(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", bank=False, evaluation=False)
    (directory / "settings.json").write_text(f'{{"a": {"[" * 900}{"]" * 900}}}')
    assert "No settings.json" in report(directory, tmp_path)


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32(), pa.duration("s")])
def test_rollouts_with_times_that_python_does_not_have(kind: pa.DataType, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", bank=False, evaluation=False, completions=False)
    (directory / "completions").mkdir()
    times = pa.array([2**30 if kind == pa.date32() else 2**62], kind)
    table = pa.table({"step": [1], "prompt": ["a"], "completion": ["b"], "t": times})
    parquet.write_table(table, directory / "completions" / "completions_00001.parquet")
    assert "rollouts cannot be read" not in report(directory, tmp_path)
    ((rollout,),) = (problem.rollouts for problem in read_run(directory).problems)
    assert rollout.execution == "b" and rollout.parts == {}  # the column is not read


def test_texts_that_are_stored_once_and_read_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 4 << 20, raising=False)
    directory = write_run(tmp_path / "run", bank=False, evaluation=False, completions=False)
    (directory / "completions").mkdir()
    path = directory / "completions" / "completions_00001.parquet"
    texts = pa.array(["a" * 10_000] * 2_000)
    parquet.write_table(pa.table({"step": [1] * 2_000, "prompt": texts, "completion": texts}), path)
    assert path.stat().st_size < 100_000
    run = read_run(directory)
    (problem,) = run.problems
    assert "too large: completions_00001.parquet" in run.missing["rollouts"]
    kept = sum(len(rollout.execution) for rollout in problem.rollouts)
    assert 1 << 20 < kept < 4 << 20


def test_a_page_does_not_grow_with_the_square_of_the_classes(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=2, max_steps=2))
    (results,) = run.evaluations.values()
    names = [f"class {n}" for n in range(400)]
    (report,) = results["transfer"].values()
    report |= {"classes": names, "matrix": [[0.5] * 400] * 400}
    own, *_ = run.bank.strategies
    run.bank.executions[own.id] = [
        Execution(own.id, f"problem {n}", name, 1, 1.0, 0.5) for n, name in enumerate(names)
    ]
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("Of 400 classes the first 60 are shown.") >= 1 and "classes the first 60" in page
    assert "; 340 more classes" in page
    assert page.count("<td") < 2 * 60 * 61 + 2_000 and "class 399" not in page


def test_a_whole_number_beyond_64_bits_is_drawn(tmp_path):
    directory = write_run(tmp_path / "run", steps=2, max_steps=2)
    path = next((tmp_path / "run").rglob("trainer_state.json"))
    state = json.loads(path.read_text())
    state["log_history"][0]["sgpo/correctness"] = 10**30
    path.write_text(json.dumps(state))
    write_report(read_run(directory), tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()
