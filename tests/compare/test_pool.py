"""Comparisons with several models as one table."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.cli.main import main
from trl_sgpo.compare import pictures
from trl_sgpo.compare.pictures import Bar
from trl_sgpo.compare.pool import markdown, pooled, read_summaries
from trl_sgpo.compare.table import files_of_table
from trl_sgpo.errors import ConfigError


NAME = "held_out accuracy"


def summary(model: str, **runs: list[float]) -> dict[str, Any]:
    return {
        "settings": {
            "budget": 100,
            "suites": [{"name": "held_out"}],
            "transfer": {"suite": "held_out"},
            "overrides": {"model_name_or_path": model},
        },
        "reference": "sgpo",
        "arms": {arm: {NAME: {"values": values}} for arm, values in runs.items()},
        "seeds": {arm: list(range(1, len(values) + 1)) for arm, values in runs.items()},
        "problems": {"held_out": 384},
        "curves": {arm: [[{"accuracy": value, "generated_tokens": 90}] for value in runs[arm]] for arm in runs},
    }


BOTH = [summary("a", sgpo=[0.9, 0.8, 0.85], grpo=[0.7, 0.01, 0.7]), summary("b", sgpo=[0.8, 0.84], grpo=[0.0, 0.1])]


def test_means_are_over_models_and_collapsed_runs_are_counted() -> None:
    summed = pooled(BOTH)
    sgpo, grpo = summed["arms"]["sgpo"][NAME], summed["arms"]["grpo"][NAME]
    assert sgpo["mean"] == pytest.approx((0.85 + 0.82) / 2)
    assert (grpo["collapsed"], grpo["runs"], sgpo["collapsed"]) == (3, 5, 0)
    difference = summed["differences"]["grpo"][NAME]
    assert difference["mean"] == pytest.approx(((0.2 + 0.79 + 0.15) / 3 + (0.8 + 0.74) / 2) / 2)
    text = markdown(summed)
    assert "| grpo | 0.26 [" in text and "| 3 of 5 |" in text and "| 0.70 0.01 0.70; 0.00 0.10 |" in text
    assert summed == pooled(BOTH)  # the same draws


def test_an_interval_holds_the_variance_between_models() -> None:
    alike = pooled([summary(name, sgpo=[0.5, 0.5, 0.5]) for name in "abcd"])["arms"]["sgpo"][NAME]
    apart = pooled([summary(name, sgpo=[x] * 3) for name, x in zip("abcd", (0.1, 0.9, 0.2, 0.8), strict=True)])
    other = apart["arms"]["sgpo"][NAME]
    # Three runs of four models with 384 problems each: the standard error of a rate of 0.5 is 0.0074
    assert alike["high"] - alike["low"] == pytest.approx(4 * 0.0074, rel=0.2)
    assert other["high"] - other["low"] > 0.5 and other["mean"] == alike["mean"]


@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1, max_size=3),
    problems=st.integers(1, 500),
)
def test_figures_stay_in_their_range(values: list[list[float]], problems: int) -> None:
    summaries = [
        summary(str(index), sgpo=each, grpo=each[::-1]) | {"problems": {"held_out": problems}}
        for index, each in enumerate(values)
    ]
    summed = pooled(summaries)
    for figures in summed["arms"].values():
        figure = figures[NAME]
        assert 0 <= figure["low"] <= figure["high"] <= 1
    difference = summed["differences"]["grpo"][NAME]
    assert -1 <= difference["low"] <= difference["high"] <= 1 and abs(difference["mean"]) < 1e-9


def test_runs_are_paired_by_seed_and_incomplete_arms_are_left_out() -> None:
    summaries = copy.deepcopy(BOTH)
    summaries[1]["seeds"]["grpo"] = [2, 3]
    values = pooled(summaries)["differences"]["grpo"][NAME]["values"]
    assert values[1] == [pytest.approx(0.84)]
    del summaries[1]["arms"]["grpo"]
    assert "grpo" not in pooled(summaries)["differences"] and pooled(summaries)["arms"]["grpo"] == {}
    assert "Without it for each model, and so left out: grpo." in markdown(pooled(summaries))
    summaries[0]["settings"]["overrides"]["model_name_or_path"] = "a\x1b]0;title\x07"
    assert "\x1b" not in markdown(pooled(summaries))


def test_only_accuracies_on_the_suite_of_transfer_tell_of_collapse() -> None:
    summaries = copy.deepcopy(BOTH)
    for each in summaries:
        for figures in each["arms"].values():
            figures["longer accuracy"] = {"values": [0.0] * len(figures[NAME]["values"])}
    summed = pooled(summaries)
    assert "collapsed" in summed["arms"]["grpo"][NAME] and "collapsed" not in summed["arms"]["grpo"]["longer accuracy"]
    assert "| grpo | 0.00 [0.00, 0.00] |  |" in markdown(summed).partition("## longer accuracy")[2]


def test_learning_curves_are_named_by_their_tokens() -> None:
    summaries = copy.deepcopy(BOTH)
    for each in summaries:
        for figures in each["arms"].values():
            figures["curve 1"] = dict(figures[NAME])
    summed = pooled(summaries)
    assert "## held_out accuracy after about 100 tokens, on its first problems" in markdown(summed)
    figures = summed["arms"]["sgpo"]
    assert figures["curve 1"]["mean"] == figures[NAME]["mean"]  # its problems are not drawn anew
    assert figures["curve 1"]["high"] - figures["curve 1"]["low"] < figures[NAME]["high"] - figures[NAME]["low"]
    assert [run[0]["accuracy"] for run in summed["curves"]["grpo"]] == [0.7, 0.01, 0.7, 0.0, 0.1]


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, one in zip(files, BOTH, strict=True):
        file.write_text(json.dumps(one))
    assert main(["compare", "--pool", *map(str, files), "--results", str(tmp_path / "both")]) == 0
    assert "# Comparison over 2 models" in capsys.readouterr().out
    assert json.loads((tmp_path / "both.json").read_text())["models"] == ["a", "b"]
    assert (tmp_path / "both.png").stat().st_size > 1000
    assert main(["compare", "--pool", str(files[0])]) == 2 and "--results" in capsys.readouterr().err
    assert (
        main(["compare", "--pool", str(files[0]), "--results", str(tmp_path / "a"), "--seeds", "1", "--beta", "2"])
        == 2
    )
    assert "does not read `--seeds`, --beta, 2" in capsys.readouterr().err
    assert main(["compare"]) == 2 and "--config" in capsys.readouterr().err


def test_figures_that_are_not_drawn(tmp_path: Path) -> None:
    """Neither a figure of a suite's accuracy nor a point of a learning curve."""
    for name, curves in (("other accuracy", {}), ("curve x", {}), ("curve 1", {})):
        one = BOTH[0] | {"arms": {"sgpo": {name: {"values": [0.5] * 3}}}, "curves": curves}
        (tmp_path / "one.json").write_text(json.dumps(one))
        assert main(["compare", "--pool", str(tmp_path / "one.json"), "--results", str(tmp_path / "all")]) == 0
        assert f"## {name}" in (tmp_path / "all.md").read_text()
        assert (tmp_path / "all.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": BOTH[0]["settings"] | {"budget": 7}}, "has other `budget`"),
        ({"settings": BOTH[0]["settings"]}, "are of one model"),
        ({"arms": {"sgpo": {NAME: {"values": ["x"]}}}}, "is damaged"),
        ({"problems": {"held_out": 0}}, "is damaged"),
        ({"seeds": 5}, "is damaged"),
        ({"arms": {"sgpo": {NAME: {"values": [0.5] * 50_001}}}}, "more than 1000 seeds or 50,000 values"),
        ({"seeds": {"sgpo": list(range(1001))}}, "more than 1000 seeds or 50,000 values"),
        ({"arms": {f"arm {number}": {} for number in range(201)}}, "more than 200 arms or 500 figures"),
        ({"arms": {"sgpo": {f"accuracy {n}": {"values": []} for n in range(501)}}}, "more than 200 arms or 500"),
        ({"arms": {"sgpo": {NAME: {"values": [5.0]}}}}, "is damaged"),
    ],
)
def test_what_cannot_be_pooled(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(BOTH[0]))
    files[1].write_text(json.dumps(BOTH[1] | change))
    with pytest.raises(ConfigError, match=said):
        read_summaries(list(map(str, files)))
    files[1].unlink()
    with pytest.raises(ConfigError, match=r"There is no file .*`--pool` reads the tables"):
        read_summaries(list(map(str, files)))


def test_a_table_may_have_points_in_its_name() -> None:
    names = [path.name for path in files_of_table(Path("dose/lab-0.667"))]
    assert names == ["lab-0.667.json", "lab-0.667.md", "lab-0.667.png"]


def test_a_picture_of_many_arms_is_of_bounded_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = {f"arm {number}": Bar(0.5, 0.4, 0.6, [[0.5]]) for number in range(200)}
    sizes = []

    def figure(width: float, height: float) -> None:
        sizes.append((width, height))
        raise KeyboardInterrupt  # drawing it takes seconds

    monkeypatch.setattr(pictures, "new_figure", figure)
    for panels in (1, 30):
        with pytest.raises(KeyboardInterrupt):
            pictures.draw_comparison(tmp_path / "x.png", {f"{n}": bars for n in range(panels)}, {}, "curves", "arm 0")
    assert sizes == [(3 + 5, 60 * 0.32 + 2), (12 * 3 + 5, 60 * 0.32 + 2)]
    assert "shows 1 of 1 figures and 60 of 200 arms" in caplog.text
    assert "shows 12 of 30 figures and 60 of 200 arms" in caplog.text
