"""Text in a report shows what it holds, and none is so long that a browser cannot show the page."""

import re

import pytest
from browser import CHROMIUM, Browser
from report_runs import write_run

from trl_sgpo.evaluation.plots import draw_bars, draw_matrix
from trl_sgpo.evaluation.tables import ResultTable
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
