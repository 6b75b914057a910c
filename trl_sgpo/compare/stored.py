"""What the result of a run of a comparison holds that was written earlier."""

from typing import Any

from ..checks.shapes import Check, count, either, exactly, listing, nothing, number, record, text
from ..evaluation.stored import RATE
from .config import Comparison


_CONDITIONS = ("transfer", "own", "other", "empty", "none")
_DIFFERENCES = ("transfer - none", "own - other", "own - none")
_SPENT = ("generated", "labels", "trained")


def _sampled(value: Any, place: str) -> None:
    rate = record({"value": RATE})
    record({"accuracy": rate}, optional={"samples": count})(value, place)
    if "samples" in value:
        record({"pass_at_k": record({str(value["samples"]): rate})})(value, place)


def run_result(comparison: Comparison, seed: int) -> Check:
    """The values of a run's `result.json` that a table is made of."""
    rate, difference = record({"value": RATE}), record({"value": number(-1, 1)})
    accuracy = record({"value": RATE}, optional={"problems": count})
    rates, more = {"accuracy": accuracy, "sampled": _sampled}, {"generated_tokens": count}
    way = record(rates, optional=more)
    suite = record(rates, optional={"plain": way, "own": way} | more)
    parts = record(
        {
            "seed": exactly(seed),
            "suites": record(dict.fromkeys((each.name for each in comparison.parsed_suites), suite), closed=True),
            "transfer": record(
                {
                    "conditions": record(dict.fromkeys(_CONDITIONS, rate)),
                    "differences": record(dict.fromkeys(_DIFFERENCES, difference)),
                    "classes": listing(text),
                }
            ),
            "tokens": record(dict.fromkeys(_SPENT, count), closed=True),
            "training_seconds": number(),
            "details": record({}),
        },
        optional={"validation": listing(record({"accuracy": RATE, "generated_tokens": count}))},
    )

    def check(result: Any, place: str) -> None:
        parts(result, place)
        classes = len(result["transfer"]["classes"])
        trained = "steps" in result["details"]  # only trainers measure a curve, on validation problems or on others
        points = comparison.curve_points if trained and not result.get("validation") else 0
        record(
            {
                "transfer": record({"matrix": listing(listing(either(nothing, RATE), classes), classes)}),
                "curve": listing(record({"accuracy": RATE, "generated_tokens": count}), points),
            }
        )(result, place)

    return check
