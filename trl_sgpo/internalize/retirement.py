"""When plain answers have learnt what guided ones can teach (RetireOPD, arXiv 2609.20784)."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any


WINDOW = 10  # logged values of a mean
SHARE = 0.95  # of the guided answers' correctness, which plain answers must reach
FLAT = 0.02  # change of the lift from one window to the next, at most


def retirement(history: Sequence[Mapping[str, Any]]) -> str | None:
    """
    Finds the first step at which plain answers were nearly as good as guided ones and no longer came closer.

    Args:
        history (`Sequence[Mapping]`):
            Logged metrics in the order of their steps. Those without `sgpo/lift` do not count.

    Returns:
        `str` or `None`: Why nothing more is taught, `None` before.
    """
    logs = [entry for entry in history if "sgpo/lift" in entry and "sgpo/plain_correctness" in entry]

    def mean(key: str, end: int) -> float:
        return fmean(entry[key] for entry in logs[end - WINDOW : end])

    for end in range(2 * WINDOW, len(logs) + 1):
        plain, lift = mean("sgpo/plain_correctness", end), mean("sgpo/lift", end)
        if plain >= SHARE * (plain + lift) and abs(lift - mean("sgpo/lift", end - WINDOW)) <= FLAT:
            return (
                f"Plain answers learn no more from guided ones from step {logs[end - 1].get('step')} on: in the last "
                f"{WINDOW} logged values {plain:.2f} of them are right, and {plain + lift:.2f} of the guided ones."
            )
    return None
