"""Each figure of `trl-sgpo bench` is bad where what it measures is, and memory is that of one trainer alone."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from trl_sgpo.bench.fit import _figures as fit_figures
from trl_sgpo.bench.memory import memory_figures
from trl_sgpo.bench.speedups import MEASURES
from trl_sgpo.bench.speedups import _figures as speedup_figures
from trl_sgpo.bench.throughput import generation_figures, step_figures


ARM = """
from trl_sgpo.bench.processes import in_new_process, peak_resident


def arm(extra, send):
    filled = b"x" * (extra << 20)
    send.send(peak_resident() >> 20)


if __name__ == "__main__":
    filled = b"x" * (600 << 20)
    print(in_new_process(arm, 0), in_new_process(arm, 200))
"""


def test_the_peak_of_an_arm_is_without_that_of_the_process_that_started_it(tmp_path):
    path = tmp_path / "arms.py"
    path.write_text(ARM)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert small < 300 and 190 <= large - small <= 210


def step_rows() -> list[dict[str, Any]]:
    """Two steps of three arms that are alike."""
    step = {
        "seconds": 2.0,
        "cpu_seconds": 4.0,
        "generated_tokens": 100,
        "seconds_generating": 1.0,
        "seconds_of_bank": 0.1,
        "seconds_outside_model": 0.2,
        "plain_seconds_generating": 0.5,
        "plain_generated_tokens": 100,
        "bytes_read": 1e9,
        "bytes_per_second": 1e10,
    }
    rows: list[dict[str, Any]] = []
    for arm in ("sgpo", "shared_grpo", "grpo"):
        rows.append({"arm": arm, "step": 0, "flops": 1e9, "generated_tokens": 100})
        rows += [{"arm": arm, "step": number, **step} for number in (1, 2)]
    return rows


def worse(rows: list[dict[str, Any]], key: str, factor: float, **where: Any) -> list[dict[str, Any]]:
    """The rows with one measurement of one arm multiplied."""
    named = [key in row and all(row[name] == value for name, value in where.items()) for row in rows]
    return [row | {key: row[key] * factor} if hit else row for row, hit in zip(rows, named, strict=True)]


STEP = {
    **{
        f"{prefix}{figure}": (arm, key)
        for arm, prefix in (("sgpo", ""), ("shared_grpo", "shared_grpo_"))
        for figure, key in (
            ("step_time_ratio", "seconds"),
            ("generated_tokens_ratio", "generated_tokens"),
            ("seconds_per_generated_token_ratio", "seconds"),
            ("cpu_seconds_per_generated_token_ratio", "cpu_seconds"),
            ("flops_per_generated_token_ratio", "flops"),
        )
    },
    "bank_share": ("sgpo", "seconds_of_bank"),
    "share_outside_model": ("sgpo", "seconds_outside_model"),
    "sgpo_seconds_per_step": ("sgpo", "seconds"),
    "grpo_seconds_per_step": ("grpo", "seconds"),
}
# Figures that are bad when they are low, and what lowers them
GENERATION = {
    "fraction_of_generate_throughput": ("sgpo", "seconds_generating", 3.0),
    "fraction_of_bandwidth_limit": ("sgpo", "seconds_generating", 3.0),
    "rollout_tokens_per_second": ("sgpo", "seconds_generating", 3.0),
    "grpo_rollout_tokens_per_second": ("grpo", "seconds_generating", 3.0),
    "generate_tokens_per_second": ("sgpo", "plain_seconds_generating", 3.0),
    "bandwidth_limit_tokens_per_second": ("sgpo", "bytes_read", 3.0),
    "memory_bytes_per_second": ("sgpo", "bytes_per_second", 1 / 3),
}


@pytest.mark.parametrize("figure", STEP)
def test_figures_of_a_step(figure: str) -> None:
    arm, key = STEP[figure]
    rows = step_rows()
    good, bad = step_figures(rows), step_figures(worse(rows, key, 3.0, arm=arm))
    assert bad[figure] == pytest.approx(3 * good[figure])
    if figure.endswith("_ratio"):
        assert good[figure] == 1
        assert step_figures(worse(rows, key, 3.0, arm="grpo"))[figure] == pytest.approx(1 / 3)


def test_the_cost_of_internalizing() -> None:
    rows = step_rows()
    rows += [row | {"arm": "untaught"} for row in rows if row["arm"] == "sgpo"]
    assert step_figures(rows)["internalize_step_ratio"] == 1
    assert step_figures(worse(rows, "seconds", 3.0, arm="sgpo"))["internalize_step_ratio"] == pytest.approx(3)
    assert step_figures(worse(rows, "seconds", 3.0, arm="untaught"))["internalize_step_ratio"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("figure", GENERATION)
def test_figures_of_generation(figure: str) -> None:
    arm, key, factor = GENERATION[figure]
    rows = step_rows()
    good, bad = generation_figures(rows), generation_figures(worse(rows, key, factor, arm=arm))
    assert bad[figure] == pytest.approx(good[figure] / 3)


def test_every_figure_of_steps_and_generation_has_a_bad_case() -> None:
    assert step_figures(step_rows()).keys() == STEP.keys()
    assert generation_figures(step_rows()).keys() == GENERATION.keys()


@pytest.mark.parametrize("measure", MEASURES)
def test_a_fast_path_that_costs_time_shows(measure: str) -> None:
    rows = [
        {"without": without, "step": step, "generated_tokens": 10, **dict.fromkeys(MEASURES, 1.0)}
        for without in (None, "shares_prompts")
        for step in (0, 1, 2)
    ]
    slower_with = speedup_figures(worse(rows, measure, 2.0, without=None), "shares_prompts")
    assert slower_with == {f"{each}_ratio": 0.5 if each == measure else 1.0 for each in MEASURES}


@pytest.mark.parametrize("name", ["peak", "step"])
@pytest.mark.parametrize("arm", ["sgpo", "shared_grpo"])
def test_an_arm_that_takes_more_memory_shows(arm: str, name: str) -> None:
    measured = {each: {"peak": 10.0, "step": 2.0} for each in ("sgpo", "shared_grpo", "grpo")}
    good = memory_figures(measured)
    measured[arm] = measured[arm] | {name: measured[arm][name] * 3}
    bad = memory_figures(measured)
    ratio = f"{'' if arm == 'sgpo' else f'{arm}_'}{name}_memory_ratio"
    assert good[ratio] == 1 and bad[ratio] == 3
    assert {key for key in good if good[key] != bad[key]} == {ratio, f"{arm}_{name}_bytes"}


def fit_result() -> dict[str, Any]:
    steps = [
        {"step": step, "seconds": 2.0, "seconds_generating": 1.0, "generated_tokens": 100, "peak": 4.0}
        for step in (0, 1)
    ]
    arms = {arm: {"steps": [dict(row) for row in steps]} for arm in ("sgpo", "grpo")}
    arms["sgpo"]["worst_case"] = {"generation": 5.0, "training": 6.0, "reserved": 7.0}
    return {"estimate": {"peak": 3.0}, **arms}


def _slow(arm: str, key: str) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        result[arm]["steps"] = worse(result[arm]["steps"], key, 3.0)

    return change


FIT: dict[str, tuple[Callable[[dict[str, Any]], None], float]] = {
    "estimated_bytes": (lambda result: result["estimate"].update(peak=9.0), 3),
    "sgpo_peak_bytes": (_slow("sgpo", "peak"), 3),
    "grpo_peak_bytes": (_slow("grpo", "peak"), 3),
    "sgpo_seconds_per_step": (_slow("sgpo", "seconds"), 3),
    "grpo_seconds_per_step": (_slow("grpo", "seconds"), 3),
    "sgpo_seconds_per_generated_token": (_slow("sgpo", "seconds"), 3),
    "grpo_seconds_per_generated_token": (_slow("grpo", "seconds"), 3),
    "sgpo_rollout_tokens_per_second": (_slow("sgpo", "seconds_generating"), 1 / 3),
    "grpo_rollout_tokens_per_second": (_slow("grpo", "seconds_generating"), 1 / 3),
    "worst_case_bytes": (lambda result: result["sgpo"]["worst_case"].update(training=18.0), 3),
    "worst_case_reserved_bytes": (lambda result: result["sgpo"]["worst_case"].update(reserved=21.0), 3),
    "peak_bytes_ratio": (_slow("sgpo", "peak"), 3),
    "seconds_per_generated_token_ratio": (_slow("sgpo", "seconds"), 3),
}


@pytest.mark.parametrize("figure", FIT)
def test_figures_of_recipes(figure: str) -> None:
    change, factor = FIT[figure]
    result = fit_result()
    good = fit_figures(result)
    assert good.keys() == FIT.keys()
    change(result)
    assert fit_figures(result)[figure] == pytest.approx(factor * good[figure])
