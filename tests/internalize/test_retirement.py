"""Teaching ends where plain answers are nearly as good as guided ones and come no closer."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.internalize.retirement import FLAT, SHARE, WINDOW, retirement


def logs(values: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {"step": step, "sgpo/plain_correctness": plain, "sgpo/lift": guided - plain}
        for step, (plain, guided) in enumerate(values, start=1)
    ]


def test_the_step_is_the_first_of_a_flat_and_small_gap() -> None:
    rising = [(0.3 + 0.02 * step, 0.9) for step in range(30)]
    reason = retirement(logs([*rising, *[(0.88, 0.9)] * 40]))
    assert reason is not None and "0.88 of them are right, and 0.90 of the guided ones" in reason
    step = int(reason.split("from step ")[1].split(" ")[0])
    assert retirement(logs([*rising, *[(0.88, 0.9)] * 40])[: step - 1]) is None
    assert retirement([{"loss": 1.0}, *logs(rising)]) is None


def test_a_gap_that_stays_does_not_end_it() -> None:
    assert retirement(logs([(0.6, 0.9)] * 200)) is None


def test_few_logs_do_not_end_it() -> None:
    assert retirement(logs([(0.9, 0.9)] * (2 * WINDOW - 1))) is None
    assert retirement(logs([(0.9, 0.9)] * 2 * WINDOW)) is not None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=60), st.integers(0, 60))
def test_it_is_final_and_follows_from_the_logs(values: list[tuple[float, float]], more: int) -> None:
    reason = retirement(logs(values))
    if reason is not None:
        assert retirement(logs(values + [(0.0, 1.0)] * more)) == reason
    for end in range(2 * WINDOW, len(values) + 1):
        plain, guided, before = (
            sum(part) / WINDOW
            for part in (
                [each[0] for each in values[end - WINDOW : end]],
                [each[1] for each in values[end - WINDOW : end]],
                [each[1] - each[0] for each in values[end - 2 * WINDOW : end - WINDOW]],
            )
        )
        if plain > SHARE * guided + 1e-9 and abs(guided - plain - before) < FLAT - 1e-9:
            assert reason is not None
