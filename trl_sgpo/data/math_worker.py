"""
Process that compares mathematical expressions with math-verify, so that no expression can stop or fill the caller.

It is started as a script by [`~trl_sgpo.data.mathematics.MathWorker`] and imports nothing of this package. A line of
standard input is a JSON list of two expressions in LaTeX, the right one first; a line of standard output is `true` or
`false`. It ends with its input, or is ended by the system when a comparison takes too long.
"""

import json
import sys
from functools import lru_cache
from typing import Any


SECONDS = 2
MEMORY = 2 * 2**30


@lru_cache(4096)
def read(text: str) -> list[Any]:
    """Parses an expression."""
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)


def differ(first: Any, second: Any) -> bool:
    """Whether two expressions have clearly different values for some values of their variables."""
    from sympy import Expr, Rational

    if not (isinstance(first, Expr) and isinstance(second, Expr)):
        return False
    variables = sorted(first.free_symbols | second.free_symbols, key=str)
    values = {variable: Rational(7 * place + 3, 5 * place + 2) for place, variable in enumerate(variables, start=1)}
    try:
        one, other = (complex(expression.evalf(15, subs=values)) for expression in (first, second))
    except (ArithmeticError, AttributeError, TypeError, ValueError):  # no number, such as a limit
        return False
    return abs(one - other) > 1e-3 * max(abs(one), abs(other))


def equal(gold: str, answer: str) -> bool:
    """Whether two expressions are equal. Different values decide first: they are found a hundred times faster."""
    from math_verify import verify

    sides = [read(gold), read(answer)]
    if not all(sides) or differ(sides[0][0], sides[1][0]):
        return False
    return bool(verify(*sides, timeout_seconds=None))


def main() -> None:
    try:
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows: the caller ends the process after its own time limit
        signal = None  # type: ignore[assignment]
    import math_verify  # noqa: F401 (loaded before the first time limit)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if signal is not None:
            # SIGVTALRM ends the process even within a computation in C, which a handler in Python cannot
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            same = equal(*json.loads(line))
        except Exception:  # what cannot be compared is not the same
            same = False
        if signal is not None:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    main()
