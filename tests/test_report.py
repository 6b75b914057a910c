"""`trl-sgpo report`: what it reads, draws and escapes. How it behaves in a browser is in test_report_browser.py."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_helpers import hashed_words
from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE, results, strategies, write_run

from trl_sgpo.bank import Outcome, Strategy, StrategyBank
from trl_sgpo.cli.eval import read_options
from trl_sgpo.cli.main import main
from trl_sgpo.evaluation.digest import weights_digest
from trl_sgpo.report.charts import averaged, bank_map, line_chart, project, ticks
from trl_sgpo.report.page import render
from trl_sgpo.report.records import BankRecord, read_run


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text in each kind of element."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, text):
        self.texts.append((self.stack[-1] if self.stack else "", text))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "hostile", text=HOSTILE)


@pytest.fixture(scope="module")
def pages(finished, hostile):
    """Reports of a run alone, of a hostile one, and of one compared with the other."""
    runs = [read_run(finished), read_run(hostile)]
    return [Page(render(runs[0])), Page(render(runs[1])), Page(render(runs[0], runs[1]))]


class TestDocument:
    def test_well_formed_with_unique_ids_that_references_lead_to(self, pages):
        for page in pages:
            assert page.stack == []
            ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
            assert max(ids.values()) == 1
            wanted = [a["href"][1:] for a in page.of("a") if a["href"].startswith("#")]
            for _, attributes in page.elements:
                for name in ("aria-labelledby", "aria-describedby", "for"):
                    wanted += (attributes.get(name) or "").split()
            wanted += [form["data-filters"] for form in page.of("form")]
            assert len(wanted) > 20 and set(wanted) <= set(ids)

    def test_everything_has_a_name(self, pages):
        for page in pages:
            assert page.of("html") == [{"lang": "en"}] and len(page.of("h1")) == len(page.of("main")) == 1
            for svg in page.of("svg"):
                assert svg.get("aria-hidden") == "true" or svg.get("aria-labelledby")
            for region in page.of("div"):
                assert region.get("tabindex") is None or region["aria-label"]
            inside = "".join(f"<{tag}>" for tag, _ in page.elements)
            assert inside.count("<label><input>") == len(page.of("input"))
            assert inside.count("<label><select>") == len(page.of("select"))
            assert all("scope" in cell for cell in page.of("th"))

    def test_headings_do_not_skip_a_level(self, pages):
        for page in pages:
            levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
            assert levels[0] == 1
            assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_loads_nothing_and_runs_nothing_but_its_own_script(self, pages):
        for page in pages:
            for tag, attributes in page.elements:
                assert tag not in ("img", "iframe", "object", "embed", "base", "foreignobject", "use")
                assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style")]
                if tag in ("a", "link"):
                    assert attributes["href"].startswith("#") or attributes == {"rel": "icon", "href": "data:,"}
            (policy,) = (m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            for tag in ("script", "style"):
                ((_, content),) = [text for text in page.texts if text[0] == tag]
                digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
                assert f"{tag}-src 'sha256-{digest}'" in policy

    def test_foreign_text_stays_text(self, pages):
        for page in pages[1:]:
            assert len(page.of("script")) == len(page.of("style")) == 1
            assert HOSTILE in page.text() and " 49" not in HOSTILE
        # In strategies, classes, problems, executions, names of rewards and settings, and evaluations
        everything = pages[1].text()
        assert everything.count(HOSTILE) > 100
        for before in ("Problem 0 of step 1 ", "#### 0 ", "answer_reward", "sums", "org/model", "origin "):
            assert before + HOSTILE in everything
        labels = [a["aria-label"] for a in pages[1].of("a") if "aria-label" in a]
        assert any(label.endswith(HOSTILE) for label in labels)
        assert HOSTILE in [option.get("value") for option in pages[1].of("option")]

    @pytest.mark.parametrize("text", ["\ud800", "\x00\x07", "\u202e", "'\"`=<>&", "${1}{% raw %}", "]]>", "-->"])
    def test_odd_characters(self, tmp_path, text):
        run = write_run(tmp_path / "run", bank=False, completions=False, evaluation=False, odd=text)
        html = render(read_run(run))
        html.encode()
        assert len(Page(html).of("script")) == 1
        assert not set(html) & set("\x00\x07\u202e")
        for shown in {"\x00\x07": [r"\x00\x07"], "\u202e": [r"\u202e"]}.get(text, []):
            assert shown in Page(html).text()


class TestContent:
    def test_parts_of_a_finished_run(self, pages):
        page = pages[0]
        text = page.text()
        for words in (
            "Finished: step 12 of 12", "Correctness and transfer", "before, sampled", "Transfer between classes: sums",
            "Transfer of the bank's strategies", "24 problems of 12 logged",
            "11 strategies in the bank (10 candidate, 1 trusted, 1 retired)",
            "borrowed strategy", "learning_rate 1e-05", "0.50 [0.34, 0.66]", "0.40 [0.25, 0.57]",
        ):  # fmt: skip
            assert words in text, words
        assert "Not in this report" not in text
        assert len([a for a in page.of("a") if "mark" in (a.get("class") or "")]) == 11
        assert len([a for a in page.of("details") if a.get("data-trust")]) == 12
        assert len(page.of("figure")) == 8 + 1

    def test_plain_answers_where_they_were_logged_and_measured(self, tmp_path, pages):
        logged = {"sgpo/plain_correctness": lambda step: step / 20, "sgpo/lift": lambda step: 0.5 - step / 10}
        logged |= {"sgpo/internalize_loss": lambda step: 1 / step}
        run = write_run(tmp_path / "run", metrics=logged)
        report = json.loads((run / "report.json").read_text())
        report["after"]["greedy"] |= {"plain": 0.75, "own": 0.25}
        (run / "report.json").write_text(json.dumps(report))
        results = json.loads((run / "eval" / "results.json").read_text())
        figures = {"value": 0.625, "low": 0.375, "high": 0.875, "problems": 8}
        results["suites"]["sums"] |= {
            name: {"accuracy": figures, "sampled": None, "generated_tokens": 9} for name in ("plain", "own")
        }
        (run / "eval" / "results.json").write_text(json.dumps(results))
        page = Page(render(read_run(run)))
        ids = {attributes["id"] for attributes in page.of("figure") if "id" in attributes}
        assert {"chart-plain", "chart-internalize"} < ids and "not in this report" not in page.text().casefold()
        for words in (
            "before, greedy – 0.50 [0.34, 0.66] – 0.40 [0.25, 0.57]",
            "after, greedy 0.75 [0.58, 0.87] 0.25 [0.13, 0.42] 0.50 [0.34, 0.66] 0.40 [0.25, 0.57]",
            "eval: sums, greedy 0.625 [0.375, 0.875] 0.625 [0.375, 0.875] – –",
            "rollouts, last quarter 0.55 0.69 – 0.55",
            "accuracy plain own strategy bank sums, greedy 0.625 [0.375, 0.875] 0.625 [0.375, 0.875] –",
        ):
            assert words in page.text(), words
        without = pages[0]
        assert not {"chart-plain", "chart-internalize"} & {each.get("id") for each in without.of("figure")}
        assert "after, greedy – 0.50 [0.34, 0.66] – 0.40 [0.25, 0.57]" in without.text()

    def test_lift_over_plain_answers_of_a_strategy(self, tmp_path, pages):
        run = write_run(tmp_path / "run")
        first, second = strategies()[:2]
        with StrategyBank(run / "strategy_bank", hashed_words) as bank:
            bank.update(Outcome(first.id, f"q{i}", 1, 1, 0.5, plain=0.25) for i in range(8))
            bank.update(Outcome(second.id, f"z{i}", 0, 1, 0.0, plain=1) for i in range(8))
        html = render(read_run(run))
        parts = {}
        for strategy in (first, second):
            start = html.index(f'id="s-{strategy.id}"')
            parts[strategy.id] = Page(html[start : html.index("</details>", start)]).text()
        assert "lift over plain answers +0.75 [+0." in parts[first.id] and "on 8 problems" in parts[first.id]
        assert "lift over plain answers -1.00 [-1.00, -0." in parts[second.id] and " harmful " in parts[second.id]
        assert "lift over plain answers" not in pages[0].text()

    def test_lineage_goes_back_to_the_first(self, finished):
        run = read_run(finished)
        youngest = strategies()[3]
        html = render(run)
        start = html.index(f'id="s-{youngest.id}"')
        part = html[start : html.index("</details>", start)]
        found = re.findall(r'<li class="d(\d)"><a href="#s-(\w+)"', part)
        assert found == [("1", strategies()[2].id), ("2", strategies()[1].id), ("3", strategies()[0].id)]

    def test_lineage_in_a_circle_ends(self, finished):
        first, second = strategies()[:2]
        run = read_run(finished)
        circle = [Strategy(first.text, "lcm", (), (second.id,)), Strategy(second.text, "lcm", (), (first.id,))]
        run.bank = BankRecord(circle, {}, {each.id: [] for each in circle})
        assert render(run).count("adapts") == 2

    def test_two_runs(self, pages, finished, tmp_path):
        other = write_run(tmp_path / "other", steps=5, learning_rate=1e-4)
        with StrategyBank(other / "strategy_bank", hashed_words) as bank:
            bank.add([Strategy("something else entirely", "gcd", ("x",))])
        text = Page(render(read_run(finished), read_run(other))).text()
        assert "learning_rate 1e-05 0.0001" in text and "seed" not in text.split("Settings that differ")[1][:60]
        assert "Strategies only in finished (0)" in text and "Strategies only in other (1)" in text
        assert "something else entirely" in text and "Strategies in both (12)" in text
        assert "execution, finished" in text and "execution, other" in text

    def test_runs_of_the_same_name_are_told_apart(self, tmp_path):
        runs = [read_run(write_run(tmp_path / each / "run", bank=False)) for each in ("a", "b")]
        assert f"{tmp_path}/a/run" in Page(render(*runs)).text()

    def test_rollouts_come_evenly_from_all_steps(self, finished):
        steps = [problem.step for problem in read_run(finished, problems=3).problems]
        assert steps == [1, 7, 12] or steps == [1, 6, 12]
        assert len(read_run(finished, problems=7).problems) == 7
        assert read_run(finished, problems=0).problems == []


class TestMissing:
    def test_unfinished_run_without_anything_else(self, tmp_path, capsys):
        run = write_run(tmp_path / "run", steps=4, bank=False, completions=False, evaluation=False)
        assert main(["report", str(run)]) == 0
        shown = capsys.readouterr().out
        text = Page((run / "report.html").read_text()).text()
        for words in ("log_completions: true", "use_bank: false", "--transfer"):
            assert words in shown and words in text
        assert "Unfinished: step 4 of 12" in text

    def test_transfer_that_the_run_measured_is_not_called_missing(self, tmp_path):
        run = write_run(tmp_path / "run")
        shutil.rmtree(run / "eval")
        found = read_run(run)
        text = Page(render(found)).text()
        assert "before, sampled – 0.50 [0.34, 0.66] – 0.40" in text and "No transfer measured" not in text
        assert "to compare" in found.missing["transfer"] and "--transfer" in found.missing["transfer"]
        (run / "report.json").unlink()
        assert "No transfer measured" in read_run(run).missing["transfer"]

    def test_names_in_messages_are_code(self, tmp_path):
        run = read_run(write_run(tmp_path / "run", bank=False, completions=False, evaluation=False))
        run.missing["bank"] = "Bad `<b>name</b>` in <i>`it`</i>, one ` alone: " + HOSTILE
        html = render(run)
        page = Page(html)
        codes = [text for tag, text in page.texts if tag == "code"]
        assert codes.count("log_completions: true") == codes.count("<b>name</b>") == codes.count("it") == 2
        assert "`" not in html.split("Not in this report")[1].split("Bad")[0]
        assert not page.of("b") and not page.of("i") and page.text().count(f"one ` alone: {HOSTILE}") == 2

    def test_run_before_its_first_checkpoint(self, tmp_path):
        run = write_run(tmp_path / "run", bank=False, completions=False, evaluation=False)
        (run / "trainer_state.json").unlink()
        text = Page(render(read_run(run))).text()
        assert "No metrics yet" in text and "logging_steps" in text

    def test_bank_in_use_is_read_from_a_checkpoint(self, tmp_path):
        run = write_run(tmp_path / "run", steps=4)
        with StrategyBank(run / "strategy_bank", hashed_words) as bank:
            bank.snapshot(run / "checkpoint-4" / "strategy_bank")
            found = read_run(run)
        assert len(found.bank.strategies) == 12
        assert "checkpoint-4" in found.missing["bank"] and "is in use" in found.missing["bank"]

    def test_half_written_files(self, tmp_path):
        run = write_run(tmp_path / "run")
        newest = run / "completions" / "completions_00012.parquet"
        newest.write_bytes(newest.read_bytes()[:100])
        (run / "checkpoint-13").mkdir()
        (run / "checkpoint-13" / "trainer_state.json").write_text('{"log_his')
        (run / "report.json").write_text("")
        found = read_run(run)
        assert found.steps == 12 and found.problems[-1].step == 11

    def test_empty_bank(self, tmp_path):
        run = write_run(tmp_path / "run", bank=False)
        StrategyBank(run / "strategy_bank", hashed_words).close()
        assert "is empty" in Page(render(read_run(run))).text()

    def test_rows_of_another_trainer(self, tmp_path):
        """Completions as TRL alone logs them."""
        import pandas as pd

        run = write_run(tmp_path / "run", bank=False, completions=False)
        (run / "completions").mkdir()
        rows = [{"step": 1, "prompt": "What?", "completion": "That.", "reward": 1.0, "advantage": None}]
        pd.DataFrame(rows).to_parquet(run / "completions" / "completions_00001.parquet")
        text = Page(render(read_run(run))).text()
        assert "What?" in text and "That." in text and "no strategy" in text


class TestNextCommand:
    """The command that measures transfer can be copied: it names the run and the problems that it has not seen."""

    def command(self, tmp_path: Path, **settings: Any) -> list[str]:
        run = write_run(tmp_path / "a run", evaluation=False, dataset_test_split="test", **settings)
        (command,) = re.findall(r"`(trl-sgpo eval .*?)`", read_run(run).missing["transfer"])
        words = shlex.split(command)
        options = read_options(words[2:])
        assert options.model == str(run) and options.output_dir == str(run / "eval") and options.transfer == []
        return options.suites

    def test_of_a_dataset_and_of_a_mixture(self, tmp_path):
        path, other = "reasoning_gym/lcm?size=9&max_numbers=2", "reasoning_gym/gcd"
        assert self.command(tmp_path / "one", dataset_name=path, datasets=[]) == [f"id_1={path}@test"]
        found = self.command(tmp_path / "two", datasets=[{"path": path, "name": None}, {"path": other}])
        assert found == [f"id_1={path}@test", f"id_2={other}@test"]

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"dataset_name": "openai/gsm8k", "dataset_config": "main"},
            {"dataset_name": "rows.jsonl"},  # which has no split of that name
            {"dataset_name": "rows.jsonl", "prompt_template": "{Body}"},
            {"datasets": [{"path": "a/b"}], "test_split_size": 0.1},
            *({"datasets": damaged} for damaged in (5, ["a"], [{}], {"a": 1})),
        ],
    )
    def test_problems_that_need_more_are_to_be_named(self, tmp_path, settings):
        assert self.command(tmp_path, **settings) == ["NAME=PATH"]


class TestCommand:
    def test_messages(self, tmp_path, finished, capsys):
        for arguments, words in (
            ([tmp_path], "holds no run"),
            ([tmp_path / "nowhere"], "nowhere holds no run (there is no such folder): name the `output_dir`"),
            ([finished, tmp_path], "holds no run"),
            ([finished, "--eval", tmp_path], "trl-sgpo eval"),
            ([finished, "--problems", "-1"], "--problems"),
            ([finished, "--output", tmp_path], "--output"),
        ):
            assert main(["report", *map(str, arguments)]) == 2
            assert words in capsys.readouterr().err

    def test_output_evaluation_and_checkpoint(self, finished, tmp_path):
        run = write_run(tmp_path / "run", evaluation=False)
        output = tmp_path / "new" / "page.html"
        assert main(["report", str(run), "--output", str(output), "--eval", str(finished / "eval")]) == 0
        assert "Transfer between classes: sums (eval)" in Page(output.read_text()).text()
        checkpoint = write_run(tmp_path / "second", steps=4, bank=False) / "checkpoint-4"
        assert main(["report", str(checkpoint), "--output", str(output)]) == 0
        assert "learning_rate" in output.read_text()

    def test_evaluations_of_one_name_are_both_shown(self, tmp_path):
        run = write_run(tmp_path / "run")
        write_run(tmp_path / "other")
        named = [str(tmp_path / "other" / "eval"), str(tmp_path / "other" / ".." / "other" / "eval")]
        assert main(["report", str(run), *(f"--eval={path}" for path in named)]) == 0
        text = Page((run / "report.html").read_text()).text()
        assert f"Evaluation {run / 'eval'}" in text and f"Evaluation {named[1]}" in text
        assert list(read_run(run, named).evaluations) == [str(run / "eval"), named[1]]

    def test_an_evaluation_of_other_weights_says_so(self, tmp_path):
        run = write_run(tmp_path / "run")
        (run / "model.safetensors").write_bytes(b"new")
        path = run / "eval" / "results.json"
        of_now = {"weights": weights_digest(run)}
        for settings, name in ((of_now, "eval"), ({"weights": "0"}, "eval (of other weights than the run's)")):
            path.write_text(json.dumps(results("") | {"settings": settings}))
            assert list(read_run(run).evaluations) == [name]
        (run / "model.safetensors").unlink()  # of a checkpoint, while training goes on
        assert list(read_run(run).evaluations) == ["eval"]

    def test_help_loads_no_heavy_module(self):
        code = (
            "import sys\nfrom trl_sgpo.cli.report import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'jinja2', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1])

    def test_report_loads_no_torch(self, finished, tmp_path):
        code = (
            "import sys\nfrom trl_sgpo.cli.main import main\n"
            f"assert main(['report', {str(finished)!r}, '--output', {str(tmp_path / 'page.html')!r}]) == 0\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1])


FINITE = st.floats(-1e6, 1e6, allow_nan=False)


class TestCharts:
    @given(st.lists(FINITE, min_size=1, max_size=400), st.lists(FINITE, max_size=30))
    def test_points_stay_inside(self, first, second):
        lines = [("a", list(enumerate(first, 1)), 0, False), ("b", list(enumerate(second, 1)), 1, True)]
        chart = line_chart("id", "title", "note", lines, None)
        assert len(chart.lines) == 1 + bool(second)
        for line in chart.lines:
            assert 1 <= len(line.dots) <= 120
            assert all(40 <= dot.x <= 352.1 and 9.9 <= dot.y <= 194.1 for dot in line.dots)
        assert 2 <= len(chart.y_ticks) <= 12

    def test_no_points_no_chart(self):
        assert line_chart("id", "title", "note", [("a", [], 0, False)], (0, 1)) is None

    @given(FINITE, st.floats(1e-6, 1e6))
    def test_ticks_are_few_and_cover(self, low, span):
        found = ticks(low, low + span)
        assert len(found) <= 12
        assert found[0] <= low + span * 1e-3 and found[-1] >= low + span * (1 - 1e-3)

    @given(st.lists(FINITE, max_size=500))
    def test_averages_keep_the_mean(self, values):
        points, size = averaged(list(enumerate(values)), 50)
        assert len(points) <= 50 and (size == 1 or len(values) > 50)
        if len(values) % size == 0 and values:
            assert np.mean([y for _, y in points]) == pytest.approx(np.mean(values), abs=1e-6, rel=1e-9)

    def test_projection_keeps_distances_of_a_plane(self):
        rng = np.random.default_rng(0)
        plane = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 16))
        coordinates, kept = project(plane)
        assert kept == pytest.approx(1)
        between = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
        assert np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1) == pytest.approx(between)

    @pytest.mark.parametrize("n", [0, 1, 2, 3])
    def test_maps_of_few_strategies(self, n):
        few = strategies()[:n]
        marks, kept = bank_map(few, {each.id: hashed_words([each.text])[0] for each in few})
        assert len(marks) == n and 0 <= kept <= 1.001
        assert all(0 <= mark.x <= 360 and 0 <= mark.y <= 360 for mark in marks)
