"""What the chunks of an evaluation hold that were written earlier."""

from ..checks.shapes import Check, count, either, listing, nothing, number, record, text


RATE = number(0, 1)
_OPTIONAL_TEXT = either(nothing, text)
_OUTCOME = either(nothing, RATE)


def attempts_chunk(problems: int, attempts: int) -> Check:
    """A number of attempts at each of some problems of a suite."""
    attempt = {"strategy": _OPTIONAL_TEXT, "flaw": _OPTIONAL_TEXT, "text": text, "answer": _OPTIONAL_TEXT}
    result = {
        "problem": text,
        "class": text,
        "shown": listing(text),
        "attempts": listing(record(attempt | {"outcome": _OUTCOME}), attempts),
    }
    return record({"results": listing(record(result), problems), "tokens": count})


def strategies_chunk(strategies: int) -> Check:
    """Strategies written to be transferred."""
    strategy = {
        "problem": text,
        "text": text,
        "flaw": _OPTIONAL_TEXT,
        "sampled": either(nothing, text, listing(count)),
    }
    return record({"strategies": listing(record(strategy), strategies), "tokens": count})


def executions_chunk(executions: int) -> Check:
    """Executions of strategies on other problems."""
    return record(
        {
            "problems": listing(text, executions),
            "texts_written": listing(text, executions),
            "outcomes": listing(_OUTCOME, executions),
            "tokens": count,
        }
    )
