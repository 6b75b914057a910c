"""
What the family of a generated problem accepts as its answer.

A row's `entry` refers to a problem of reasoning-gym, which is generated again for the check: nothing else in a row
reaches a verifier. Verifiers that evaluate the answer as code are never called: a grammar takes their place.
"""

import json
import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from ..checks.process import CHECKS
from ..compare.lab import list_functions, word_programs
from . import expressions
from .expressions import DIFFERENTIABLE, EXACT, Dual, NotInGrammar


logger = logging.getLogger(__name__)

GYM = "reasoning_gym/"

_REFERENCE = re.compile(rf"{GYM}(\w{{1,60}})\?([\w.=&+-]{{0,1000}})#(\d{{1,9}})")
_POINTS = 8
MAX_LENGTH = 10_000
_REFUSED: set[tuple[str, str]] = set()  # families and settings that gave no problem in time
_MOST_REFUSED = 16  # each may take seconds
_TOLD: set[tuple[str, str]] = set()

# Families whose module evaluates text as code: their verifiers are never called
# fmt: off
EVALUATING = frozenset([
    "basic_arithmetic", "binary_matrix", "bitwise_arithmetic", "codeio", "countdown", "intermediate_integration",
    "n_queens", "number_sorting", "polynomial_multiplication", "propositional_logic", "puzzle24", "simple_integration",
    "spiral_matrix", "string_insertion",
])
# fmt: on
_JSON = r"[\[\]\",\s\w>-]+"
# Families with several right answers whose verifier decides, and the form that an answer must have before it may: the
# verifiers of reasoning-gym 0.1.25 accept `not 5` and `5 or 6` where they look for 5. Other families have one answer.
_BRACED = r"\{\s*-?\d+\s*\}"
VERIFIED = {
    family: re.compile(form)
    for family, form in {
        "cryptarithm": r"[A-Z]=\d(?:\s*,\s*[A-Z]=\d)*",
        "fraction_simplification": rf"[$\s(]*-?(?:\d+|\\[dt]?frac\s*{_BRACED}\s*{_BRACED}|\d+\s*/\s*-?\d+)[)\s$]*",
        "futoshiki": r"[\d\s<>∧∨]+",
        "group_anagrams": _JSON,
        "jugs": _JSON,
        "kakurasu": r"[01\s]+",
        "knight_swap": rf"{_JSON}|No",
        "mini_sudoku": r"[\d\s]+",
        "palindrome_generation": r"[a-z]+",
        "palindrome_partitioning": _JSON,
        "prime_factorization": r"[\d\s×]+",
        "quantum_lock": r"[A-Z](?:\s*→\s*[A-Z])*",
        "shortest_path": r"(?:up|down|left|right|\s)+|infeasible",
        "sokoban": r"[LRUD]+",
        "sudoku": r"[\d\s]+",
        "survo": r"[\d\s]+",
        "tower_of_hanoi": r"(?:Move disk \d+ from Peg \d+ to Peg \d+\s*)+",
        "word_ladder": r"[A-Za-z]+(?:\s*,\s*[A-Za-z]+)*",
    }.items()
}


@dataclass(frozen=True)
class Reference:
    """
    A problem of a reasoning-gym family.

    Args:
        family (`str`):
            Name of the family.
        settings (`str`):
            Settings of its dataset as JSON, with `size` and `seed`.
        index (`int`):
            Position in the dataset.
    """

    family: str
    settings: str
    index: int

    def __str__(self) -> str:
        return f"{GYM}{self.family}?{urlencode(json.loads(self.settings))}#{self.index}"


def read_reference(entry: str | None) -> Reference | None:
    """The reference in a row's `entry`, `None` if it is something else, such as a column of the user's own."""
    match = None if entry is None else _REFERENCE.fullmatch(entry)
    if match is None:
        return None
    settings: dict[str, int | float | bool] = {}
    for key, value in parse_qsl(match[2]):
        number = setting(value)
        if isinstance(number, str):
            return None  # no setting of a row may name a file
        settings[key] = number
    return Reference(match[1], json.dumps(settings), int(match[3]))


def setting(value: str) -> int | float | bool | str:
    """The value of a family's setting that is written in a path."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


@lru_cache(512)
def generated_again(reference: Reference) -> dict[str, Any] | None:
    """The reasoning-gym entry of a problem, `None` if there is none."""
    if (reference.family, reference.settings) in _REFUSED or len(_REFUSED) >= _MOST_REFUSED:
        return None
    entry = CHECKS.ask("entry", reference.family, reference.settings, reference.index)
    if entry is None:
        _REFUSED.add((reference.family, reference.settings))
        if len(_REFUSED) == _MOST_REFUSED:
            logger.warning(
                f"{_MOST_REFUSED} settings of reasoning-gym families gave no problem within their limits: no further "
                "problem is generated again, and of rows that name one only the written solution is right. Remove "
                "these rows."
            )
    return entry


def _tell_once(reference: Reference) -> None:
    if (reference.family, reference.settings) not in _TOLD:
        _TOLD.add((reference.family, reference.settings))
        logger.warning(
            f"{reference} is another problem now than when its row was written, or cannot be generated: of such rows "
            "only the written solution is right. Load the problems again with this version of reasoning-gym."
        )


def family_of(entry: str | None) -> str | None:
    """The family that a row's `entry` names, `None` if the row is not a generated problem."""
    reference = read_reference(entry)
    if reference is not None:
        return reference.family
    own = (list_functions, word_programs)
    return next((family.FAMILY for family in own if family.metadata_of(entry) is not None), None)


def has_several_answers(family: str) -> bool:
    """Whether more than its solution is right for a problem of the family."""
    return family in _GRAMMARS or family in VERIFIED


def accepted(answer: str, solution: str, entry: str) -> bool:
    """
    Whether a family with several right answers accepts one.

    Args:
        answer (`str`):
            A final answer.
        solution (`str`):
            The row's solution.
        entry (`str`):
            The row's `entry`, which refers to a problem of such a family.
    """
    reference = read_reference(entry)
    if reference is None:
        return False
    answer = answer.strip()
    if len(answer) > MAX_LENGTH:
        return False
    if reference.family in VERIFIED and VERIFIED[reference.family].fullmatch(answer) is None:
        return False
    problem = generated_again(reference)
    if problem is None or str(problem["answer"]) != solution:
        _tell_once(reference)
        return False
    if reference.family in VERIFIED:
        return CHECKS.ask("accepts", reference.family, reference.settings, reference.index, answer) is True
    try:
        return _GRAMMARS[reference.family](answer, problem["metadata"])
    except NotInGrammar:
        return False


def _reaches(target: Callable[[dict[str, Any]], int]) -> Callable[[str, dict[str, Any]], bool]:
    """Calculations that use the given numbers once each. The verifier of puzzle24 does not compare them."""

    def check(answer: str, metadata: dict[str, Any]) -> bool:
        parsed = expressions.parse(answer)
        if sorted(expressions.numbers(parsed)) != sorted(metadata["numbers"]):
            return False
        return expressions.evaluate(parsed, {}, EXACT) == target(metadata)

    return check


def _is_integral(answer: str, metadata: dict[str, Any]) -> bool:
    """Whether the derivative of the answer has the integrand's values."""
    integral, integrand = expressions.parse(answer), expressions.parse(metadata["integrand"])
    rng = random.Random(answer)
    compared = 0
    for _ in range(_POINTS):
        point = Dual(complex(rng.uniform(0.3, 1.7), rng.uniform(-0.5, 0.5)), 1.0)
        try:
            wanted = expressions.evaluate(integrand, {metadata["variable"]: point}, DIFFERENTIABLE).value
        except NotInGrammar:
            continue
        # Another constant at each point, so that C may only be added
        variables = {metadata["variable"]: point, "C": Dual(complex(rng.uniform(1.0, 9.0)))}
        found = expressions.evaluate(integral, variables, DIFFERENTIABLE).slope
        if not abs(found - wanted) <= 1e-8 * max(1.0, abs(wanted)):
            return False
        compared += 1
    return compared > 0


def _is_expanded_product(answer: str, metadata: dict[str, Any]) -> bool:
    """Whether the answer is the polynomial, multiplied out."""
    found, wanted = expressions.parse(answer), expressions.parse(metadata["polynomial_expr"])
    if not expressions.is_expanded(found):
        return False
    rng = random.Random(answer)
    for _ in range(_POINTS):
        variables = {name: Fraction(rng.randrange(2, 10**6)) for name in metadata["variables"]}
        if expressions.evaluate(found, variables, EXACT) != expressions.evaluate(wanted, variables, EXACT):
            return False
    return True


def _is_board(answer: str, metadata: dict[str, Any]) -> bool:
    return answer.strip() in metadata["valid_answers"]


_GRAMMARS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "countdown": _reaches(lambda metadata: metadata["target"]),
    "puzzle24": _reaches(lambda metadata: 24),
    "simple_integration": _is_integral,
    "intermediate_integration": _is_integral,
    "polynomial_multiplication": _is_expanded_product,
    "n_queens": _is_board,
}
