"""The sentence that says whether a run learnt, and figures that the terminal and the report have in common."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import write_run
from test_report import Page

from trl_sgpo.cli.scores import print_scores
from trl_sgpo.report.figures import comparison, logged, verdict
from trl_sgpo.report.page import render
from trl_sgpo.report.records import read_run


RATE = st.floats(0, 1)
FIGURE = r"\d\.\d\d"
BY = r"[+-]\d\.\d\d \[([+-]\d\.\d\d), ([+-]\d\.\d\d)\]"


def score(accuracy, problems=80, **more):
    return {"accuracy": accuracy, "transfer": accuracy, "problems": problems, "unverified": 0} | more


def measured(before, after, problems=80, **more):
    """Equal figures with sampling and greedy decoding."""
    return {
        when: dict.fromkeys(("sampled", "greedy"), score(rate, problems, **more))
        for when, rate in (("before", before), ("after", after))
    }


def steps(values, metric="sgpo/correctness"):
    return [{"step": step, metric: value} for step, value in enumerate(values, 1)]


def test_the_quickstart():
    report = measured(0.5125, 0.75)
    report["before"]["greedy"] = score(0.7)
    assert verdict(report, []) == (
        "Held-out accuracy rose from 0.51 to 0.75 with sampling (+0.24 [+0.09, +0.37]), but did not change beyond its "
        "interval with greedy decoding (0.70 to 0.75, +0.05 [-0.09, +0.19]): 95% intervals, 80 unseen problems."
    )


@given(RATE, RATE, st.integers(1, 5000))
def test_the_sentence_says_what_its_interval_does(before, after, problems):
    text = verdict(measured(before, after, problems), [])
    words = {"rose": "fell", "fell": "rose", "did not change": "did not change"}
    (said,) = [word for word in words if word in text]
    found = re.findall(BY, text)
    assert len(found) == 2 and "\n" not in text and text.endswith(" unseen problems.")
    for low, high in found:
        assert float(low) <= round(after - before, 2) + 0.011 and float(high) >= round(after - before, 2) - 0.011
        if said == "rose":
            assert after > before and float(low) >= 0
        elif said == "fell":
            assert after < before and float(high) <= 0
        else:
            assert float(low) <= 0 <= float(high)
    assert words[said] in verdict(measured(after, before, problems), [])  # the other way round


@given(RATE, st.integers(1, 5000))
def test_an_equal_accuracy_is_no_change(rate, problems):
    assert verdict(measured(rate, rate, problems), []).startswith(
        "Held-out accuracy did not change beyond its interval"
    )


@given(st.lists(st.floats(allow_nan=True), max_size=40))
def test_without_measurements_rollouts_are_judged_or_nothing(values):
    history = steps(values)
    text = verdict({}, history)
    known = [value for _, value in logged(history, "sgpo/correctness")]
    if len(known) < 4:
        assert text.startswith("Nothing shows yet whether this run learnt: ")
        assert ("no step is logged" in text) == (not known)
    else:
        assert text.startswith("Judged by its rollouts") and text.endswith("without an interval.")
        assert f"quarter of {len(known)} steps" in text


def test_what_a_run_is_judged_by():
    assert "correctness of own strategies went from 0.25 to 0.75" in verdict({}, steps([0.25, 0.3, 0.4, 0.75]))
    plain = steps([0.25, 0.3, 0.4, 0.75], "sgpo/plain_correctness")
    assert "correctness of plain answers went from 0.25 to 0.75" in verdict({}, plain)
    assert "reward went from 0.25 to 0.75" in verdict({}, steps([0.25, 0.3, 0.4, 0.75], "reward"))
    # Measured after training only, by a run that was resumed with other settings
    after = {"after": measured(0.5, 0.5)["after"]}
    assert verdict(after, steps([0.25, 0.3, 0.4, 0.75])).startswith("Judged by its rollouts")
    # With nothing but plain rows, plain answers are what was trained
    trained = measured(0.1, 0.1) | {"after": dict.fromkeys(("sampled", "greedy"), score(0.1, plain=0.9))}
    trained["before"] = dict.fromkeys(("sampled", "greedy"), score(0.1, plain=0.2))
    assert verdict(trained, plain).startswith("Held-out accuracy of plain answers rose from 0.20 to 0.90")
    assert verdict(trained, steps([0.5])).startswith("Held-out accuracy did not change")


def test_the_weights_are_judged_and_not_the_bank():
    report = measured(0.5, 0.9)
    report["after"] = dict.fromkeys(("sampled", "greedy"), score(0.9, own=0.5))
    assert "did not change beyond its interval with sampling (0.50 to 0.50" in verdict(report, [])


@pytest.mark.parametrize("report", [measured(0.5, 0.9, 0), measured(float("nan"), 0.9)])
def test_figures_of_no_problem_are_none(report):
    assert verdict(report, []).startswith("Nothing shows yet")


def test_ways_side_by_side():
    assert comparison({}, [], {}) is None
    report = measured(0.5, 0.75)
    report["after"]["greedy"] = score(0.75, plain=0.25, own=0.5)
    table = comparison(report, steps([0, 0, 1, 1]), {})
    assert table is not None and table.columns == ["", "plain", "own strategy", "bank", "transfer"]
    cells = {name: [cell.split()[0] for cell in row] for name, *row in table.rows}
    assert cells == {
        "before, sampled": ["–", "0.50", "–", "0.50"],
        "after, sampled": ["–", "0.75", "–", "0.75"],
        "before, greedy": ["–", "0.50", "–", "0.50"],
        "after, greedy": ["0.25", "0.50", "0.75", "0.75"],
        "rollouts, first quarter": ["–", "0.00", "–", "–"],
        "rollouts, last quarter": ["–", "1.00", "–", "–"],
    }


@pytest.mark.parametrize("before", [True, False])
def test_the_terminal_and_the_report_agree(tmp_path, capsys, monkeypatch, before):
    monkeypatch.setenv("COLUMNS", "1000")
    run = write_run(tmp_path / "run", metrics={"sgpo/plain_correctness": lambda step: step / 20})
    report = json.loads((run / "report.json").read_text())
    report["after"]["greedy"] |= {"accuracy": 0.875, "transfer": 0.625, "plain": 0.25, "own": 0.75, "unverified": 0}
    if not before:
        del report["before"]
    (run / "report.json").write_text(json.dumps(report))
    state = json.loads((run / "trainer_state.json").read_text())
    print_scores(report, state["log_history"])
    printed = capsys.readouterr().out
    html = render(read_run(run))
    assert (
        Page(html[html.index('<p class="verdict">') : html.index("</p>", html.index('"verdict"')) + 4]).text()
        == (printed.splitlines()[0])
    )
    shown = Page(html[html.index('<div class="compared">') : html.index('<section id="measured"')]).text()
    cells = re.findall(rf"{FIGURE} \[{FIGURE}, {FIGURE}\]", printed[printed.index("95% intervals") + 14 :])
    assert len(cells) == (6 if not before else 10) and all(cell in shown for cell in cells)
    assert sorted(re.findall(rf"{FIGURE} \[{FIGURE}, {FIGURE}\]", shown)) == sorted(cells)
    (first, last) = re.findall(rf"({FIGURE}) → ({FIGURE})", printed)[0]
    assert (first, last) == ("0.12", "0.69")  # of steps 1 to 3 and 10 to 12
    assert re.search(rf"first quarter {FIGURE} {first} .* last quarter {FIGURE} {last} ", shown)
