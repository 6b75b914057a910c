"""`trl-sgpo demo`: the recorded run, and what of it is shown."""

import json
import subprocess
import sys

import pytest

from trl_sgpo.cli import demo
from trl_sgpo.cli.main import main


RUN = json.loads(demo.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("width", [80, 120])
def test_block_bank_and_figures_are_shown(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    shown = " ".join(out.split())
    for strategy in RUN["block"]["strategies"]:
        cells = [f"{'✗✓'[int(each['reward'])]} {each['text']}" for each in strategy["executions"]]
        assert " ".join(["AB"[strategy["problem"]], *cells, f"{strategy['credit']:+.2f}"]) in shown
    assert f"{demo.BEST} of {len(RUN['bank'])} strategies" in out
    after = RUN["scores"]["after"]["sampled"]
    assert f"{after['accuracy']:.2f} [" in out and f"{after['transfer']:.2f} [" in out
    assert "trl-sgpo convert" in out and RUN["command"] in out


def test_what_is_said_of_the_block_is_true():
    strategies = RUN["block"]["strategies"]
    assert min(strategies, key=lambda each: each["credit"])["text"] == "#### 5"
    assert len({each["text"] for each in strategies}) == len(strategies)
    problems = [sum(each["problem"] == index for each in strategies) for index in range(2)]
    assert problems == [3, 3] and all(len(each["executions"]) == 2 for each in strategies)
    # Rewards and credit are of one run: the higher the outcomes, the higher the credit
    totals = [(sum(each["reward"] for each in strategy["executions"]), strategy["credit"]) for strategy in strategies]
    assert all(credit <= other for total, credit in totals for more, other in totals if total < more)


def test_it_loads_no_model_library():
    code = (
        "import sys\nfrom trl_sgpo.cli.main import main\nmain(['demo'])\n"
        "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_texts_of_the_run_cannot_control_the_terminal(capsys, monkeypatch, tmp_path):
    hostile = json.loads(json.dumps(RUN))
    hostile["block"]["problems"][0] = hostile["block"]["strategies"][0]["text"] = "\x1b[2Jgone"
    hostile["bank"] = [{**strategy, "problem_class": "\x1b]0;x\x07"} for strategy in hostile["bank"]]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(hostile))
    monkeypatch.setattr(demo, "FILE", file)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "gone" in out
