"""A hostile run whose report is served: its limits are those of a report that is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_runs import HOSTILE, log_step, write_run
from test_report_watch import get, served

from trl_sgpo.report.records import read_run, read_watched


def lines(*values: object) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


def link(path: Path) -> None:
    log_step(path.parent.parent / "elsewhere", 9)
    path.symlink_to(path.parent.parent / "elsewhere" / path.name)


PROGRESS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link out of the run": link,
    "sparse": sparse,
    "empty": lambda path: path.write_text(""),
    "no JSON": lambda path: path.write_text("{\n"),
    "deep": lambda path: path.write_text("[" * 100_000 + "]" * 100_000 + "\n"),
    "no mappings": lines(5, [1]),
    "no header": lines({"step": 1}),
    "no step": lines({"max_steps": 2}, {"reward": 1}),
}
DAMAGED: dict[str, Callable[[Path], object]] = {
    "more steps than there are": lines({"max_steps": 2}, {"step": 10**400, "reward": 1.0}),
    "steps that are texts": lines({"max_steps": 2}, {"step": "a"}, {"step": "b"}),
    "planned steps that are a text": lines({"max_steps": "a"}, {"step": 1, "reward": 1.0}),
    "numbers whose sum is infinite": lines({"max_steps": 2}, {"step": 1, "reward": 10**400}),
}


@pytest.mark.parametrize("name", PROGRESS)
def test_progress_that_no_training_writes(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bank=False, completions=False, evaluation=False)
    PROGRESS[name](run / "progress.jsonl")
    for read in (read_run, read_watched):
        assert read(run).steps == 12  # as in `trainer_state.json`
    with served(run) as address:
        assert "step 12 of 12" in get(address)[2]


@pytest.mark.parametrize("name", DAMAGED)
def test_progress_with_values_that_no_training_writes(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bank=False, completions=False, evaluation=False)
    DAMAGED[name](run / "progress.jsonl")
    assert "progress.jsonl is damaged" in read_watched(run).missing["curves"]
    with served(run) as address:
        assert "progress.jsonl is damaged" in get(address)[2]


def test_links_pipes_and_huge_files_of_a_run_that_is_served(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bank=False)
    (tmp_path / "secret.json").write_text('{"learning_rate": "precious"}')
    for name in ("settings.json", "report.json", "trainer_state.json"):
        (run / name).unlink()
    (run / "settings.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(run / "report.json")
    sparse(run / "trainer_state.json")
    with served(run) as address:
        status, _, page = get(address)
        assert status == 200 and "precious" not in page and "No settings.json" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")
def test_text_of_a_hostile_run_stays_text_when_the_page_refreshes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text=HOSTILE, steps=4)
    with served(run) as address, Browser(tmp_path / "profile") as browser:
        browser.open(address)
        for step in range(1, 6):
            log_step(run, step)
        facts = "document.querySelector('.facts').textContent.includes('step 5 of 12')"
        browser.run(f"(async () => {{ while (!{facts}) await new Promise(requestAnimationFrame) }})()")
        assert browser.run("document.querySelectorAll('script').length") == 1
        assert browser.run("document.querySelectorAll('main :is(script, style, img, iframe)').length") == 0
        assert browser.run("window.pwned") is None and browser.errors == []
        assert {url.rstrip("/") for url in browser.requests} == {address}
