"""The line a step that `train` prints, and what is asked for beside it."""

import io
import json
import logging
import os
from types import SimpleNamespace

import pytest
import yaml
from models import save_tiny_model

from trl_sgpo import SGPOConfig
from trl_sgpo.cli.main import main
from trl_sgpo.run.step_lines import REPEATED, StepLines, clock, fitting, training_columns, training_legend


LOGS = {
    "loss": 0.0,
    "reward": -0.123,
    "sgpo/correctness": 0.5,
    "sgpo/transfer": 0.25,
    "sgpo/plain_correctness": float("nan"),
    "sgpo/strategy_length": 127.6,
    "sgpo/execution_length": 384.0,
    "sgpo/plain_length": 12.0,
    "sgpo/strategy_truncated": 0.1,
    "sgpo/execution_truncated": 0.75,
    "sgpo/bank_size": 18.0,
}
LIMITS = {"max_strategy_length": 128, "max_completion_length": 384, "num_plain_rollouts": 2}


def columns(tmp_path, **kwargs):
    config = {"bf16": False, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 80, **kwargs}
    return training_columns(SGPOConfig(str(tmp_path), **config))


def printed(monkeypatch, capsys, shown, logs, width, steps=1):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = StepLines(shown)
    state = SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True)
    lines.on_train_begin(None, state, None)
    for _ in range(steps):
        state.global_step += 1
        lines.on_log(None, state, None, logs)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_has_all_columns_and_fits(tmp_path, monkeypatch, capsys, width):
    header, line = printed(monkeypatch, capsys, columns(tmp_path, num_generations=10, **LIMITS), LOGS, width)
    names = "step reward correct transfer plain tokens cut off bank s/step ETA"
    assert header.split() == names.split() and len(header) <= width and len(header) == len(line)
    cells = ["1/1000", "-0.12", "0.50", "0.25", "–", "128/384/12", "e", "75%", "18"]
    assert line.split()[: len(cells)] == cells
    for name, cell in (("correct", "0.50"), ("bank", "18"), ("tokens", "128/384/12")):  # right-aligned
        assert header.index(name) + len(name) == line.index(cell) + len(cell)


def test_a_narrow_terminal_keeps_the_figures(tmp_path):
    shown, gap = fitting(columns(tmp_path), 30)
    assert [column.name for column in shown] == ["reward", "correct", "transfer"] and gap == 2


def test_no_column_for_what_is_not_there(tmp_path):
    names = [column.name for column in columns(tmp_path, use_bank=False)]
    assert "bank" not in names and "plain" not in names


def test_the_header_is_repeated(tmp_path, monkeypatch, capsys):
    out = printed(monkeypatch, capsys, columns(tmp_path), LOGS, 80, steps=REPEATED + 1)
    headers = [index for index, line in enumerate(out) if "reward" in line]
    assert headers == [0, REPEATED + 1]


def test_text_in_metrics_reaches_no_terminal(tmp_path, monkeypatch, capsys):
    hostile = dict.fromkeys(LOGS, "\x1b[2J")
    assert "\x1b" not in "".join(printed(monkeypatch, capsys, columns(tmp_path), hostile, 80))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_colours_only_on_a_terminal_and_not_with_no_color(tmp_path, monkeypatch, capsys, no_color, colours):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    shown = columns(tmp_path)
    assert "\x1b" not in "".join(printed(monkeypatch, capsys, shown, LOGS, 80))  # a pipe
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    printed(monkeypatch, capsys, shown, LOGS, 80)
    assert ("\x1b[33m" in terminal.getvalue()) == colours


def test_times():
    assert [clock(9), clock(750), clock(10_800)] == ["0:09", "12:30", "3:00:00"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lines")
    path = directory / "recipe.yaml"
    values = {
        "model_name_or_path": save_tiny_model(directory / "model"),
        "dataset_name": "reasoning_gym/chain_sum+gcd?size=8&max_terms=2&max_digits=1",
        "reward_funcs": ["models.evenness"],
        "max_strategy_length": 8,
        "max_completion_length": 8,
        "num_generations": 5,
        "num_plain_rollouts": 1,
        "per_device_train_batch_size": 10,
        "use_bank": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 2,
        "output_dir": str(directory / "run"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("asked", [False, True])
def test_all_metrics_are_logged_and_printed_where_they_are_asked_for(recipe, capsys, caplog, monkeypatch, asked):
    of_bars = {"HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"}  # read by libraries at import
    for name in ("TRANSFORMERS_VERBOSITY", "TRL_EXPERIMENTAL_SILENCE", *of_bars):
        monkeypatch.delenv(name, raising=False)
    of_transformers = logging.getLogger("transformers")
    level = of_transformers.level
    try:
        assert main(["train", "--config", str(recipe), *(["--log_level", "info"] if asked else [])]) == 0
    finally:
        of_transformers.setLevel(level)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if "/2 " in line] == ["1/2", "2/2"]
    assert out.count("correct  transfer  plain") == 1 and out.count("2 steps in ") == 1
    assert ("'completions/mean_length'" in out) == asked
    assert "A loss near 0 is expected" in caplog.text
    assert "/2 [" not in err  # no bars where there is no terminal
    assert of_bars <= os.environ.keys()
    history = json.loads((recipe.parent / "run" / "trainer_state.json").read_text())["log_history"]
    assert len([log for log in history if "clip_ratio/low_mean" in log]) == 2
    assert os.environ.get("TRL_EXPERIMENTAL_SILENCE") == (None if asked else "1")


def test_the_legend_explains_the_columns_of_the_run(tmp_path):
    legend = training_legend(SGPOConfig(str(tmp_path), bf16=False, report_to="none", use_cpu=True))
    assert "plain" not in legend and "transfer" in legend
