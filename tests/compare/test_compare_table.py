"""Means, intervals and paired differences of a comparison."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from trl_sgpo.compare.config import Arm, Comparison
from trl_sgpo.compare.table import APART, cell, interval, markdown, summary, write


values = st.lists(st.floats(0, 1), min_size=2, max_size=6)


@given(values)
def test_interval_holds_the_mean_within_the_range(numbers: list[float]) -> None:
    result = interval(numbers, 0.0, 1.0)
    if math.isnan(result.low):
        assert max(numbers) - min(numbers) > APART or max(numbers) - min(numbers) < 1e-9
    else:
        assert 0 <= result.low <= result.mean + 1e-12 and result.mean <= result.high + 1e-12 <= 1 + 2e-12


def test_interval_is_students() -> None:
    result = interval([1, 2, 3, 4, 5])
    assert math.isclose(result.high - result.mean, 2.776445 * 1.58114 / math.sqrt(5), rel_tol=1e-4)
    assert math.isnan(interval([0.3]).low)


@pytest.mark.parametrize("numbers", [[0.74, 0.01, 0.71, 0.71, 0.10], [0.0, 0.0, 0.0], [0.4, 0.7 - 0.3]])
def test_seeds_that_end_apart_or_all_alike_have_no_interval(numbers: list[float]) -> None:
    result = interval(numbers, 0.0, 1.0)
    assert math.isnan(result.low) and math.isnan(result.high)
    assert result.to_dict()["low"] is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("mean", [0.5, 0.95])
def test_interval_covers_where_seeds_vary_about_their_mean(seeds: int, mean: float) -> None:
    rng = np.random.default_rng(0)
    found = [interval(list(rng.normal(mean, 0.02, seeds)), 0.0, 1.0) for _ in range(1000)]
    assert np.mean([each.low <= mean <= each.high for each in found]) == pytest.approx(0.95, abs=0.015)


def test_interval_does_not_cover_where_a_part_of_the_runs_collapses() -> None:
    """As docs/comparison.md says: seeds that all end alike do not show it."""
    rng = np.random.default_rng(0)
    collapsed = rng.random((1000, 5)) < 0.2
    found = [
        interval(list(each), 0.0, 1.0) for each in np.where(collapsed, 0.02, 0.85) + rng.normal(0, 0.02, (1000, 5))
    ]
    printed = [each for each in found if not math.isnan(each.low)]
    assert len(printed) / len(found) == pytest.approx(0.8**5, abs=0.04)
    assert not any(each.low <= 0.2 * 0.02 + 0.8 * 0.85 <= each.high for each in printed if each.mean > 0.8)


def _result(seed: int, accuracy: float) -> dict[str, Any]:
    value = {"value": accuracy}
    conditions = dict.fromkeys(("transfer", "own", "other", "empty", "none"), value)
    return {
        "seed": seed,
        "suites": {"seen": {"accuracy": value, "sampled": {"accuracy": value}}},
        "transfer": {
            "conditions": conditions,
            "differences": dict.fromkeys(("transfer - none", "own - other", "own - none"), value),
            "classes": ["a"],
            "matrix": [[accuracy]],
        },
        "tokens": {"generated": 10, "labels": 0, "trained": 0},
        "training_seconds": 1.0,
        "curve": [{"generated_tokens": 5, "accuracy": accuracy}],
    }


def _comparison() -> Comparison:
    arms = [Arm(name, "sgpo", {}, {}) for name in ("sgpo", "k1")]
    suites = [{"name": "seen", "path": "list_functions/seen"}]
    return Comparison("recipe.yaml", "runs/x", [1, 2], 10, arms, suites, {"suite": "seen"})


def test_differences_are_paired_by_seed() -> None:
    # The arms vary by seed far more than they differ
    results = {"sgpo": [_result(1, 0.9), _result(2, 0.3)], "k1": [_result(2, 0.2), _result(1, 0.8)]}
    summed = summary(_comparison(), results)
    difference = summed["differences"]["k1"]["seen accuracy"]
    assert math.isclose(difference["mean"], 0.1)
    sgpo = summed["arms"]["sgpo"]["seen accuracy"]
    assert sgpo["low"] is None and cell(sgpo) == "0.60 (0.30 to 0.90)" and cell(difference, signed=True) == "+0.10"


def test_learning_curves_are_compared_where_arms_have_them() -> None:
    results = {"sgpo": [_result(1, 0.9), _result(2, 0.7)], "k1": [_result(1, 0.5), _result(2, 0.3)]}
    results["base"] = [_result(1, 0.1) | {"curve": []}]
    text = markdown(summary(_comparison(), results)).split("## Learning curves")[1]
    assert "| k1 | 0.40 " in text and "| k1 | +0.40 |" in text and "| base |" not in text.split("##")[0]


def test_plain_answers_stand_beside_guided_ones() -> None:
    results = {"sgpo": [_result(1, 0.9), _result(2, 0.8)], "k1": [_result(1, 0.5), _result(2, 0.4)]}
    without = markdown(summary(_comparison(), results))
    assert "plain" not in without
    for runs, rates in zip(results.values(), ((0.7, 0.68), (0.5, None)), strict=True):
        for result, rate in zip(runs, rates, strict=True):
            if rate is not None:
                value = {"value": rate}
                result["suites"]["seen"]["plain"] = {"accuracy": value, "sampled": {"accuracy": value}}
    summed = summary(_comparison(), results)
    assert summed["arms"]["sgpo"]["seen plain accuracy"]["values"] == [0.7, 0.68]
    assert 0 <= summed["arms"]["sgpo"]["seen plain accuracy"]["low"] < 0.69
    assert "seen plain accuracy" not in summed["arms"]["k1"]  # of one seed only: the other is of an earlier version
    lines = markdown(summed).splitlines()
    assert "| arm | seeds | seen accuracy | seen plain accuracy | transfer score |" in "\n".join(lines)
    assert any(line.startswith("| sgpo | 2 | 0.85 [0.21, 1.00] | 0.69 [0.56, 0.82] | 0.85 ") for line in lines)
    assert any(line.startswith("| k1 | 2 | 0.45 [0.00, 1.00] | – | 0.45 ") for line in lines)
    results["k1"][1]["suites"]["seen"]["plain"] = results["sgpo"][1]["suites"]["seen"]["plain"]
    difference = summary(_comparison(), results)["differences"]["k1"]["seen plain accuracy"]
    assert difference["values"] == [0.7 - 0.5, 0.0]
    for result in results["sgpo"]:
        result["suites"]["seen"]["own"] = result["suites"]["seen"]["plain"]
    text = markdown(summary(_comparison(), results))
    assert "| arm | seeds | seen accuracy | seen accuracy without the bank | seen plain accuracy |" in text


def test_pass_at_k_and_tokens_an_answer() -> None:
    results = {"sgpo": [_result(1, 0.5), _result(2, 0.6)], "k1": [_result(1, 0.5)]}
    for result, rate in zip(results["sgpo"], (0.8, 0.9), strict=True):
        suite = result["suites"]["seen"]
        passed = {"1": suite["accuracy"], "8": {"value": rate}}
        suite |= {"accuracy": suite["accuracy"] | {"problems": 4}, "generated_tokens": 4 * 9 * 30}
        suite["sampled"] = suite["sampled"] | {"samples": 8, "pass_at_k": passed}
        suite["plain"] = {key: suite[key] for key in ("accuracy", "sampled")} | {"generated_tokens": 4 * 9 * 12}
    summed = summary(_comparison(), results)
    assert summed["arms"]["sgpo"]["seen pass@8"]["values"] == [0.8, 0.9]
    assert "seen pass@8" not in summed["arms"]["k1"]  # of an earlier version
    text = markdown(summed).partition("## Problems that one of k")[2]
    assert "| arm | seen pass@8 | seen plain pass@8 | seen tokens an answer | seen plain tokens an answer |" in text
    assert "| sgpo | 0.85 [0.21, 1.00] | 0.85 [0.21, 1.00] | 30.0 | 12.0 |" in text
    assert "| k1 | – | – | – | – |" in text
    assert not any(name.endswith("an answer") for name in summed["differences"]["k1"])


def test_unfinished_arms_are_left_out_and_files_are_written(tmp_path: Path) -> None:
    summed = summary(_comparison(), {"sgpo": [_result(1, 0.5)], "k1": []})
    assert list(summed["arms"]) == ["sgpo"]
    assert "| sgpo | 1 | 0.50 |" in markdown(summed)
    paths = write(summed, tmp_path / "out" / "table")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert all(path.stat().st_size > 100 for path in paths)


def test_each_run_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    scatter = Axes.scatter
    monkeypatch.setattr(Axes, "scatter", lambda *args, **kwargs: drawn.append(args[1]) or scatter(*args, **kwargs))
    results = {"sgpo": [_result(1, 0.91), _result(2, 0.7)], "k1": [_result(1, 0.5), _result(2, 0.33)]}
    write(summary(_comparison(), results), tmp_path / "table")
    assert [0.91, 0.7] in drawn and [0.5, 0.33] in drawn


def test_every_figure_is_clipped_to_its_range() -> None:
    results = {"sgpo": [_result(1, 0.99), _result(2, 0.9)], "k1": [_result(1, 0.01), _result(2, 0.1)]}
    summed = summary(_comparison(), results)
    for name, figure in summed["arms"]["sgpo"].items():
        assert figure["low"] is None or 0 <= figure["low"] <= figure["high"]
        assert figure["high"] is None or name.startswith(("tokens", "training")) or figure["high"] == 1
    assert summed["differences"]["k1"]["seen accuracy"]["high"] == 1
    assert summed["differences"]["k1"]["lift"]["high"] > 1  # of two differences
