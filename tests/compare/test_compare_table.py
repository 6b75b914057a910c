"""Means, intervals and paired differences of a comparison."""

import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.compare.config import Arm, Comparison
from trl_sgpo.compare.table import interval, markdown, summary, write


values = st.lists(st.floats(0, 1), min_size=2, max_size=6)


@given(values)
def test_interval_holds_the_mean(numbers: list[float]) -> None:
    result = interval(numbers)
    assert result.low <= result.mean + 1e-12 and result.mean <= result.high + 1e-12


def test_interval_is_students() -> None:
    result = interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert math.isclose(result.high - result.mean, 2.776445 * 0.158114 / math.sqrt(5), rel_tol=1e-4)
    assert math.isnan(interval([0.3]).low)


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
    assert math.isclose(difference["mean"], 0.1) and difference["high"] - difference["low"] < 1e-6
    assert summed["arms"]["sgpo"]["seen accuracy"]["high"] > 1


def test_learning_curves_are_compared_where_arms_have_them() -> None:
    results = {"sgpo": [_result(1, 0.9), _result(2, 0.7)], "k1": [_result(1, 0.5), _result(2, 0.3)]}
    results["base"] = [_result(1, 0.1) | {"curve": []}]
    text = markdown(summary(_comparison(), results)).split("## Learning curves")[1]
    assert "| k1 | 0.40 " in text and "| k1 | +0.40 [+0.40, +0.40] |" in text and "| base |" not in text.split("##")[0]


def test_unfinished_arms_are_left_out_and_files_are_written(tmp_path: Path) -> None:
    summed = summary(_comparison(), {"sgpo": [_result(1, 0.5)], "k1": []})
    assert list(summed["arms"]) == ["sgpo"]
    assert "| sgpo | 1 | 0.50 |" in markdown(summed)
    paths = write(summed, tmp_path / "out" / "table")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert all(path.stat().st_size > 100 for path in paths)
