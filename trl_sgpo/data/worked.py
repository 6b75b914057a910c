"""Worked solutions in two phases, a strategy and its execution, for a supervised warm start."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..compare.lab import list_functions, word_programs
from ..errors import DataError
from .annotations import worked_execution
from .families import generated_again, read_reference


if TYPE_CHECKING:
    from datasets import Dataset

_MAX_NUMBER, _MAX_EXPRESSION = 10**6, 1000  # steps count up to a number, and a row of a stranger may name any
_LONGEST_IN_VAIN = 300  # seconds: a row of a stranger names the problem that is generated
_MAX_CHARACTERS = 64  # characters of an execution, about 45 tokens: small models make errors in longer ones


@dataclass(frozen=True)
class Trace:
    """
    A strategy and its execution on one problem.

    Args:
        prompt (`list[dict[str, str]]`):
            The problem as messages.
        strategy (`str`):
            A general way to solve problems of the class, without numbers. Empty if `execution` is a plain answer.
        execution (`str`):
            The strategy applied to the problem, with `#### answer` as last line.
        problem_class (`str`):
            Class of the problem.
        given (`bool`, *optional*, defaults to `False`):
            Whether the strategy is given to the model, which then learns from the execution only.
    """

    prompt: list[dict[str, str]]
    strategy: str
    execution: str
    problem_class: str
    given: bool = False


def traces(dataset: "Dataset", per_problem: int, seed: int, problems: int | None = None) -> list[Trace]:
    """
    Writes worked solutions for problems of covered families.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems as loaded by [`~trl_sgpo.data.tasks.load_problems`].
        per_problem (`int`):
            Number of traces of each problem. Strategies are drawn with replacement.
        seed (`int`):
            Seed of the draws.
        problems (`int`, *optional*):
            Number of problems that are enough: those after them are not read. If `None`, all problems are read.

    Returns:
        `list[Trace]`: Those of one problem in a row.

    Raises:
        `DataError`: If no problem is of a covered family, or if problems without a worked solution took five minutes.
    """
    rng = random.Random(seed)
    covered: list[Trace] = []
    in_vain = 0.0
    for problem in dataset:
        if problems is not None and len(covered) >= problems * per_problem:
            break
        start = time.monotonic()
        drawn = [trace for _ in range(per_problem) if (trace := worked_traces(problem, rng)) is not None]
        covered += drawn
        if not drawn and (in_vain := in_vain + time.monotonic() - start) > _LONGEST_IN_VAIN:
            raise DataError(
                f"The dataset names reasoning-gym problems that took {_LONGEST_IN_VAIN} seconds to generate and have "
                "no worked solution: leave these rows out, or set `warmstart_traces: 0`."
            )
    if not covered:
        raise DataError(
            "No problem has a worked solution: use problems of the reasoning-gym families "
            f"{', '.join(_STRATEGIES)}, like `reasoning_gym/{'+'.join(_STRATEGIES)}`."
        )
    return covered


def solutions(dataset: "Dataset") -> list[Trace]:
    """
    The worked solutions that the data has, as plain answers.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems as loaded by [`~trl_sgpo.data.tasks.load_problems`]. The column `worked_solution` is read.

    Returns:
        `list[Trace]`: In the order of the problems. Empty if no problem has a worked solution that leads to an answer.
    """
    if "worked_solution" not in dataset.column_names:
        return []
    return [
        Trace(row["prompt"], "", execution, "")
        for row in dataset
        if row["worked_solution"] is not None
        and (execution := worked_execution(row["worked_solution"], row["solution"])) is not None
    ]


def worked_traces(problem: dict[str, Any], rng: random.Random) -> Trace | None:
    """
    Solves one problem by a strategy drawn from those that apply to it.

    Args:
        problem (`dict[str, Any]`):
            A row with `prompt`, `solution`, `problem_class` and the `entry` that refers to a generated problem.
        rng (`random.Random`):
            Source of the draw.

    Returns:
        [`Trace`] or `None`: `None` if the family is not covered, or the problem is not of its usual form (two
        numbers; whole, non-negative factors) or too large for a short execution.
    """
    metadata = list_functions.metadata_of(problem.get("entry"))
    if metadata is not None:
        text, strategy, execution = list_functions.worked(metadata, rng)
        return Trace([{"role": "user", "content": text}], strategy, execution, problem["problem_class"])
    metadata = word_programs.metadata_of(problem.get("entry"))
    if metadata is not None:
        return Trace(problem["prompt"], *word_programs.worked(metadata, rng), problem["problem_class"])
    reference = read_reference(problem.get("entry"))
    if reference is None or reference.family not in _STRATEGIES:
        return None
    family, entry = reference.family, generated_again(reference)
    if entry is None or entry["answer"] != problem["solution"]:
        return None
    if len(entry["metadata"].get("expression", "")) > _MAX_EXPRESSION:
        return None
    numbers = _numbers(entry["metadata"])
    if max(map(abs, numbers), default=0) >= _MAX_NUMBER:
        return None
    if family != "chain_sum" and (len(numbers) != 2 or min(numbers) < 0):
        return None
    answer = str(_ANSWERS[family](*numbers))
    if answer != entry["answer"]:
        return None
    worked = [(phrasings, execute(numbers)) for phrasings, execute in _STRATEGIES[family]]
    executions = [(phrasings, f"{steps}\n#### {answer}".strip()) for phrasings, steps in worked if steps is not None]
    suitable = [(phrasings, execution) for phrasings, execution in executions if len(execution) <= _MAX_CHARACTERS]
    if len(suitable) < 2:  # only the answer without steps
        return None
    phrasings, execution = rng.choice(suitable)
    return Trace(problem["prompt"], rng.choice(phrasings), execution, problem["problem_class"])


def _numbers(metadata: dict[str, Any]) -> list[int]:
    """The numbers of a problem; those of a sum with their signs."""
    if "numbers" in metadata:
        return metadata["numbers"]
    numbers, sign = [], 1
    for token in metadata["expression"].split():
        if token in "+-*":
            sign = -1 if token == "-" else 1
        else:
            numbers.append(sign * int(token))
    return numbers


def _direct(numbers: list[int]) -> str:
    return ""


def _lcm_multiples(numbers: list[int]) -> str:
    small, large = sorted(numbers)
    multiples = list(range(large, math.lcm(small, large) + 1, large))
    return f"{_join(multiples)}. {multiples[-1]} / {small} = {multiples[-1] // small}."


def _lcm_by_gcd(numbers: list[int]) -> str:
    first, second = numbers
    product, divisor = first * second, math.gcd(first, second)
    return f"{first} * {second} = {product}. GCD {divisor}. {product} / {divisor} = {product // divisor}."


def _euclid(numbers: list[int]) -> str:
    small, large = sorted(numbers)
    steps = []
    while small:
        steps.append(f"{large} mod {small} = {large % small}.")
        small, large = large % small, small
    return " ".join(steps)


def _divisors(numbers: list[int]) -> str:
    small, large = sorted(numbers)
    common = math.gcd(small, large)
    divisors = [divisor for divisor in range(small, common - 1, -1) if small % divisor == 0]
    return f"{_join(divisors)}. {large} / {common} = {large // common}."


def _left_to_right(numbers: list[int]) -> str:
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(_add(total, number))
        total += number
    return " ".join(steps)


def _tens_and_ones(numbers: list[int]) -> str | None:
    tens = [int(number / 10) * 10 for number in numbers]  # towards zero
    ones = [number - ten for number, ten in zip(numbers, tens, strict=True)]
    if not any(tens) or len(numbers) < 2:
        return None
    return f"{_chain(tens)}. {_chain(ones)}. {_add(sum(tens), sum(ones))}"


def _split_factor(numbers: list[int]) -> str | None:
    small, large = sorted(numbers)
    if large < 10:
        return None
    ones, tens = large % 10, large - large % 10
    return f"{tens} * {small} = {tens * small}. {ones} * {small} = {ones * small}. {_add(tens * small, ones * small)}"


def _repeated_addition(numbers: list[int]) -> str | None:
    small, large = sorted(numbers)
    return f"{_join(large * count for count in range(1, small + 1))}." if 1 <= small < 10 else None


def _join(numbers: Any) -> str:
    return ", ".join(map(str, numbers))


def _chain(numbers: list[int]) -> str:
    terms = "".join(f" {'-' if number < 0 else '+'} {abs(number)}" for number in numbers[1:])
    return f"{numbers[0]}{terms} = {sum(numbers)}"


def _add(first: int, second: int) -> str:
    return f"{_chain([first, second])}."


_ANSWERS: dict[str, Callable[..., int]] = {
    "lcm": math.lcm,
    "gcd": math.gcd,
    "chain_sum": lambda *numbers: sum(numbers),
    "products": lambda first, second: first * second,
}

# family -> its strategies, each with two phrasings and a function for its steps (`None` if it does not apply)
_STRATEGIES: dict[str, list[tuple[tuple[str, str], Callable[[list[int]], str | None]]]] = {
    "lcm": [
        (
            (
                "To find an LCM, list the multiples of the larger number until the smaller number divides one.",
                "For a least common multiple, go up in steps of the larger number and stop when the smaller divides.",
            ),
            _lcm_multiples,
        ),
        (
            (
                "To find an LCM, multiply the numbers and divide the product by their GCD.",
                "For a least common multiple, take the product and divide it by the greatest common divisor.",
            ),
            _lcm_by_gcd,
        ),
        (
            (
                "To find an LCM, write it down at once.",
                "For a least common multiple, give the answer directly, without steps.",
            ),
            _direct,
        ),
    ],
    "gcd": [
        (
            (
                "To find a GCD, replace the larger number by its remainder by the smaller until it is zero.",
                "For a greatest common divisor, divide with remainder again and again; the last divisor is it.",
            ),
            _euclid,
        ),
        (
            (
                "To find a GCD, list the divisors of the smaller number, largest first, until one divides the larger.",
                "For a greatest common divisor, try the smaller number's divisors downwards on the larger number.",
            ),
            _divisors,
        ),
        (
            (
                "To find a GCD, write it down at once.",
                "For a greatest common divisor, give the answer directly, without steps.",
            ),
            _direct,
        ),
    ],
    "chain_sum": [
        (
            (
                "To add and subtract in a chain, go left to right, doing a single operation at a time.",
                "For a sum of several terms, keep a running total from left to right.",
            ),
            _left_to_right,
        ),
        (
            (
                "To add and subtract in a chain, work out the tens and the ones separately, then add both results.",
                "For a sum of several terms, total the tens, total the ones, and put the totals together.",
            ),
            _tens_and_ones,
        ),
        (
            (
                "To add and subtract in a chain, write the result down at once.",
                "For a sum of several terms, give the answer directly, without steps.",
            ),
            _direct,
        ),
    ],
    "products": [
        (
            (
                "To multiply, split the larger factor into tens and ones, multiply each part and add.",
                "For a product, multiply the tens and the ones of the larger factor separately, then add both.",
            ),
            _split_factor,
        ),
        (
            (
                "To multiply by a factor below ten, add the larger factor that many times.",
                "For a product with a small factor, count up in steps of the larger factor.",
            ),
            _repeated_addition,
        ),
        (
            (
                "To multiply, write the product down at once.",
                "For a product, give the answer directly, without steps.",
            ),
            _direct,
        ),
    ],
}
