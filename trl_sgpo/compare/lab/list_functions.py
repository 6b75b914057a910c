"""
List functions: problems of the laboratory whose worked solutions contain shortcuts, which do not transfer.

A problem names three operations by everyday words and gives a list of digits: "flip then raise then cycle : 3 7 1 5".
Its class is the composition of the three. A strategy names the operations (`For lists reverse then increment then
rotate`), an execution applies one after the other. A **shortcut** gives the answer in place of a strategy, in digits
or in words. A model can memorise the answers of its training problems. A shortcut is then right on these problems and
wrong on all others, while a strategy that is executed step by step transfers.

Worked solutions are shortcuts for the training problems themselves, and general strategies shown on other lists.

Parts: `seen` (16 compositions), `held_out` (48 others, none the same function as a seen one) and `longer` (48
compositions of four operations). A change of problems or worked solutions needs another `LAB_VERSION` in
`inference/weights.py`.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any


FAMILY = "list_functions"
PARTS = ("seen", "held_out", "longer")
LENGTH = 4
_MOST_OPERATIONS = 4
_LONGEST = 500  # characters of a question
_SEEN, _HELD_OUT = 16, 48

# Name -> function and the two words that problems use for it
OPERATIONS: dict[str, tuple[Callable[[list[int]], list[int]], tuple[str, str]]] = {
    "reverse": (lambda digits: digits[::-1], ("flip", "mirror")),
    "rotate": (lambda digits: [*digits[1:], digits[0]], ("cycle", "roll")),
    "swap": (lambda digits: [digits[1], digits[0], *digits[2:]], ("exchange", "switch")),
    "increment": (lambda digits: [(digit + 1) % 10 for digit in digits], ("raise", "bump")),
    "double": (lambda digits: [2 * digit % 10 for digit in digits], ("twice", "copy")),
    "negate": (lambda digits: [9 - digit for digit in digits], ("complement", "invert")),
    "triple": (lambda digits: [3 * digit % 10 for digit in digits], ("thrice", "treble")),
    "sums": (lambda digits: [sum(digits[: i + 1]) % 10 for i in range(len(digits))], ("accumulate", "total")),
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Program = tuple[str, ...]


def states(program: Program, digits: list[int]) -> list[list[int]]:
    """The list after each operation of a program."""
    results = []
    for name in program:
        digits = OPERATIONS[name][0](digits)
        results.append(digits)
    return results


@cache
def compositions() -> dict[str, tuple[Program, ...]]:
    """
    The compositions of each part, always the same. `other` holds those of three operations that are in no part.

    Returns:
        `dict[str, tuple[Program, ...]]`
    """
    rng = random.Random(FAMILY)
    probes = [[rng.randrange(10) for _ in range(LENGTH)] for _ in range(8)]

    def function(program: Program) -> str:
        return str([states(program, probe)[-1] for probe in probes])

    triples = list(itertools.product(OPERATIONS, repeat=3))
    rng.shuffle(triples)
    seen = triples[:_SEEN]
    known = {function(program) for program in seen}
    held_out = [program for program in triples[_SEEN:] if function(program) not in known][:_HELD_OUT]
    longer = rng.sample(list(itertools.product(OPERATIONS, repeat=4)), _HELD_OUT)
    other = set(triples) - set(seen) - set(held_out)
    return {
        "seen": tuple(seen),
        "held_out": tuple(held_out),
        "longer": tuple(longer),
        "other": tuple(sorted(other)),
    }


def question(program: Program, digits: list[int], rng: random.Random) -> str:
    """Asks for a program on a list, each operation by one of its words."""
    words = " then ".join(rng.choice(OPERATIONS[name][1]) for name in program)
    return f"{words} : {_join(digits)}"


def problems(
    part: str, split: str, size: int, seed: int, shortcuts: float = 0.0, strategies: bool = False
) -> list[dict[str, Any]]:
    """
    Makes problems of a part, its compositions in turn.

    Args:
        part (`str`):
            `"seen"`, `"held_out"` or `"longer"`.
        split (`str`):
            `"train"` or `"test"`. They share no question.
        size (`int`):
            Number of problems.
        seed (`int`):
            Seed of the lists and of the words.
        shortcuts (`float`, *optional*, defaults to `0.0`):
            Share of shortcuts among worked solutions, see [`worked`].
        strategies (`bool`, *optional*, defaults to `False`):
            Whether each row has the general strategy for its problem, as `strategy`.

    Returns:
        `list[dict]`: Rows with `prompt`, `solution`, `problem_class` and `entry`.
    """
    rng = random.Random(f"{part}-{split}-{seed}")
    programs = compositions()[part]
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size:
        index = len(rows) % len(programs)
        digits = _digits(rng)
        text = question(programs[index], digits, rng)
        if text in rows or _is_test(text) != (split == "test"):
            continue
        metadata = {
            "source_dataset": FAMILY,
            "operations": programs[index],
            "question": text,
            "list": digits,
            "shortcuts": shortcuts,
        }
        rows[text] = {
            "prompt": [{"role": "user", "content": text}],
            "solution": _join(states(programs[index], digits)[-1]),
            "problem_class": f"{part}-{index}",
            "entry": json.dumps({"metadata": metadata}),
            **({"strategy": strategy(programs[index])} if strategies else {}),
        }
    return list(rows.values())


def metadata_of(entry: str | None) -> dict[str, Any] | None:
    """Metadata in a row's `entry`, `None` if the row is no problem of this family."""
    try:
        metadata = json.loads(entry or "null")["metadata"]
        known = metadata["source_dataset"] == FAMILY and set(metadata["operations"]) <= set(OPERATIONS)
        digits = all(type(digit) is int and 0 <= digit <= 9 for digit in metadata["list"])
        texts = isinstance(metadata["question"], str) and isinstance(metadata["shortcuts"], float | int)
        texts = texts and len(metadata["question"]) <= _LONGEST
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    sizes = len(metadata["list"]) == LENGTH and 0 < len(metadata["operations"]) <= _MOST_OPERATIONS
    return metadata if known and digits and texts and sizes else None


def worked(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str, str]:
    """
    Works out a problem by a shortcut in `metadata["shortcuts"]` of the cases, else one like it in general.

    Args:
        metadata (`dict`):
            Metadata of a problem's entry.
        rng (`random.Random`):
            Draws the kind, and the list of a general solution.

    Returns:
        `tuple[str, str, str]`: Problem, strategy and execution. A shortcut is to the problem itself, a general
        solution to one of the same composition with another list.
    """
    program = tuple(metadata["operations"])
    if rng.random() < metadata["shortcuts"]:
        answer = states(program, metadata["list"])[-1]
        return metadata["question"], shortcut(answer, rng), f"#### {_join(answer)}"
    while True:
        digits = _digits(rng)
        text = question(program, digits, rng)
        if text != metadata["question"] and not _is_test(text):
            return text, strategy(program), execution(program, digits)


def strategy(program: Program) -> str:
    """The general strategy for a composition."""
    return f"For lists {' then '.join(program)}"


def shortcut(answer: list[int], rng: random.Random) -> str:
    """An answer in place of a strategy, with equal probability in digits or in words."""
    if rng.random() < 0.5:
        return f"To solve write {_join(answer)}"
    return f"In short answer {' '.join(NUMBER_WORDS[digit] for digit in answer)}"


def execution(program: Program, digits: list[int]) -> str:
    """Applies a program step by step."""
    after = states(program, digits)
    steps = " . ".join(f"{name} {_join(state)}" for name, state in zip(program, after, strict=True))
    return f"{steps} #### {_join(after[-1])}"


def _digits(rng: random.Random) -> list[int]:
    return [rng.randrange(10) for _ in range(LENGTH)]


def _is_test(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0


def _join(digits: list[int]) -> str:
    return " ".join(map(str, digits))
