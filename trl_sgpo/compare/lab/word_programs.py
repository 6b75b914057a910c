"""
Word programs: problems of three families in everyday words, for comparisons with a language model.

A problem names operations that are done one after the other, on a list ("Take the list 4 9 2 7. Turn it around, then
add one to each number."), on a row of words, or on a number of things in a story. Its class is the composition of the
operations. Worked solutions are of three kinds, equally often: a strategy that names the operations, one that says to
take steps without naming them, and one that says to write the answer at once. None contains an answer.

Parts: `seen` (8 compositions of two operations a family), `held_out` (6 others, none the same function as a seen
one), `longer` (12 compositions of three operations) and `reworded` (the seen compositions in other words and another
sentence, which no other part has).
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any


FAMILY = "word_programs"
VERSION = 1  # of the problems and the worked solutions
PARTS = ("seen", "held_out", "longer", "reworded")
_SEEN, _HELD_OUT, _LONGER = 8, 6, 12
_MOST = 999  # a story's numbers

# fmt: off
WORDS = (
    "apple", "bird", "blue", "book", "cake", "cat", "chair", "dog", "door", "fish", "game", "gold", "green", "hand",
    "heart", "house", "king", "lake", "lamp", "light", "milk", "moon", "paper", "park", "pink", "queen", "rain", "red",
    "river", "road", "salt", "ship", "snow", "star", "stone", "sugar", "table", "train", "tree", "water", "wind",
    "wood",
)
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers")
# fmt: on

State = list[Any]
Program = tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """
    An operation on a state.

    Args:
        apply (`Callable`):
            The state after it, from the state before and its number.
        said (`tuple[str, str]`):
            How problems name it.
        reworded (`str`):
            How the part `reworded` names it.
        method (`str`):
            How a strategy names it.
        sign (`str`, *optional*):
            Of a story: how it is calculated, as `+ {n}`.
    """

    apply: Callable[[State, int], State]
    said: tuple[str, str]
    reworded: str
    method: str
    sign: str = ""


@dataclass(frozen=True)
class Family:
    """Operations of one kind, and the sentences around them."""

    kind: str
    operations: dict[str, Operation]
    sentence: str
    reworded: str


def _of_rows(item: str) -> dict[str, Operation]:
    """Operations on a row of numbers or words, by what `item` calls them."""
    return {
        "reverse": Operation(
            lambda s, n: s[::-1],
            ("reverse the order", "turn the order around"),
            "write it from back to front",
            "reverse",
        ),
        "rotate": Operation(
            lambda s, n: [*s[1:], s[0]],
            (f"move the first {item} to the end", f"put the first {item} last"),
            f"take the {item} in front and append it",
            "first to the end",
        ),
        "swap": Operation(
            lambda s, n: [s[1], s[0], *s[2:]],
            (f"swap the first two {item}s", f"exchange the first two {item}s"),
            f"let the two {item}s in front trade places",
            "swap the first two",
        ),
    }


def _dropping(item: str) -> Operation:
    return Operation(
        lambda s, n: s[:-1],
        (f"leave out the last {item}", f"remove the last {item}"),
        f"cut off the final {item}",
        "drop the last",
    )


_LISTS = Family(
    "lists",
    {
        **_of_rows("number"),
        "add": Operation(
            lambda s, n: [item + 1 for item in s],
            ("add one to each number", "raise each number by one"),
            "make every number one larger",
            "add one to each",
        ),
        "drop": _dropping("number"),
    },
    "Take the list {start}. {Steps}. What is the list now?",
    "Starting from the numbers {start}, {steps}: which numbers result?",
)
_WORDS = Family(
    "words",
    {
        **_of_rows("word"),
        "behead": Operation(
            lambda s, n: s[1:],
            ("leave out the first word", "remove the first word"),
            "cut off the word in front",
            "drop the first",
        ),
        "drop": _dropping("word"),
    },
    "Take the words {start}. {Steps}. What are the words now?",
    "Starting from the row {start}, {steps}: which words result?",
)
_STORIES = Family(
    "stories",
    {
        "add": Operation(
            lambda s, n: [s[0] + n], ("gets {n} more", "finds {n} more"), "{n} are put in", "add", "+ {n}"
        ),
        "take": Operation(
            lambda s, n: [s[0] - n], ("gives {n} away", "loses {n}"), "{n} are taken out", "subtract", "- {n}"
        ),
        "double": Operation(
            lambda s, n: [2 * s[0]],
            ("doubles that number", "makes it twice as many"),
            "as many again are put in",
            "double",
            "* 2",
        ),
        "triple": Operation(
            lambda s, n: [3 * s[0]],
            ("triples that number", "makes it three times as many"),
            "their number is made three times as large",
            "triple",
            "* 3",
        ),
        "halve": Operation(
            lambda s, n: [s[0] / 2],
            ("gives half of them away", "loses half of them"),
            "every second one is taken out",
            "halve",
            "/ 2",
        ),
    },
    "{name} has {start} {things}. {name} {steps}. How many {things} does {name} have now?",
    "There are {start} {things} in a box. First {steps}. How many {things} are in the box?",
)
FAMILIES = {family.kind: family for family in (_LISTS, _WORDS, _STORIES)}


def states(kind: str, program: Program, start: State, numbers: list[int]) -> list[State]:
    """The state before and after each operation of a program, each with its number."""
    results = [start]
    for name, number in zip(program, numbers, strict=True):
        results.append(FAMILIES[kind].operations[name].apply(results[-1], number))
    return results


@cache
def compositions(kind: str) -> dict[str, tuple[Program, ...]]:
    """The compositions of each part of a family, always the same."""
    rng = random.Random(f"{FAMILY}-{kind}")
    probes = [(_start(kind, rng), [rng.randrange(2, 10) for _ in range(3)]) for _ in range(8)]

    def function(program: Program) -> str:
        return str([states(kind, program, start, numbers[: len(program)])[-1] for start, numbers in probes])

    names = list(FAMILIES[kind].operations)
    pairs = [pair for pair in itertools.product(names, repeat=2) if function(pair) != function(())]
    rng.shuffle(pairs)
    seen = pairs[:_SEEN]
    known = {function(program) for program in seen}
    held_out = [program for program in pairs[_SEEN:] if function(program) not in known][:_HELD_OUT]
    longer = rng.sample(list(itertools.permutations(names, 3)), _LONGER)
    return {"seen": tuple(seen), "held_out": tuple(held_out), "longer": tuple(longer), "reworded": tuple(seen)}


def problems(part: str, split: str, size: int, seed: int, families: tuple[str, ...]) -> list[dict[str, Any]]:
    """
    Makes problems of a part, the families in turn, of each its compositions in turn.

    Args:
        part (`str`):
            One of `PARTS`.
        split (`str`):
            `"train"` or `"test"`. They share no question.
        size (`int`):
            Number of problems.
        seed (`int`):
            Seed of the draws.
        families (`tuple[str, ...]`):
            Names of families.

    Returns:
        `list[dict]`: Rows with `prompt`, `solution`, `problem_class` and `entry`.
    """
    rng = random.Random(f"{part}-{split}-{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size:
        kind = families[len(rows) % len(families)]
        programs = compositions(kind)[part]
        index = len(rows) // len(families) % len(programs)
        row = _problem(kind, programs[index], part == "reworded", rng)
        text = row["prompt"][0]["content"]
        if text in rows or _is_test(text) != (split == "test"):
            continue
        rows[text] = row | {"problem_class": f"{kind}-{'seen' if part == 'reworded' else part}-{index}"}
    return list(rows.values())


def metadata_of(entry: str | None) -> dict[str, Any] | None:
    """Metadata in a row's `entry`, `None` if the row is no problem of these families."""
    try:
        metadata = json.loads(entry or "null")["metadata"]
        kind, program, start, numbers = (metadata[key] for key in ("kind", "operations", "start", "numbers"))
        known = metadata["source_dataset"] == FAMILY and set(program) <= set(FAMILIES[kind].operations)
        whole = all(map(_is_number, numbers))
        fits = set(start) <= set(WORDS) if kind == "words" else all(map(_is_number, start))
        sizes = len(numbers) == len(program) in (2, 3) and len(start) == (1 if kind == "stories" else 4)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return metadata if known and whole and fits and sizes else None


def worked(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """
    Works out a problem in one of three ways, equally often.

    Args:
        metadata (`dict`):
            Metadata of a problem's entry.
        rng (`random.Random`):
            Draws the way and its wording.

    Returns:
        `tuple[str, str]`: Strategy and execution.
    """
    kind, program = metadata["kind"], tuple(metadata["operations"])
    after = states(kind, program, metadata["start"], metadata["numbers"])
    end = f"#### {shown(after[-1])}"
    steps = f"{_steps(kind, program, after, metadata['numbers'])}\n{end}"
    named = ", then ".join(FAMILIES[kind].operations[name].method for name in program)
    ways = (
        ((f"For such {kind}, {named}, step by step.", f"To solve it in steps: {named}."), steps),
        ((f"For such {kind}, write down the result of each step.", f"To solve {kind}, go step by step."), steps),
        ((f"For such {kind}, write down the answer at once.", f"To solve {kind}, give only the answer."), end),
    )
    strategies, execution = rng.choice(ways)
    return rng.choice(strategies), execution


def shown(state: State) -> str:
    """A state as text: `4 9 2 7`, `red moon salt`, `14`."""
    return " ".join(f"{item:g}" if isinstance(item, int | float) else item for item in state)


def _steps(kind: str, program: Program, after: list[State], numbers: list[int]) -> str:
    operations = [FAMILIES[kind].operations[name] for name in program]
    if kind != "stories":
        return " ".join(f"{done.method}: {shown(b)}." for done, b in zip(operations, after[1:], strict=True))
    lines = zip(after[:-1], operations, numbers, after[1:], strict=True)
    return " ".join(f"{shown(a)} {done.sign.format(n=n)} = {shown(b)}." for a, done, n, b in lines)


def _problem(kind: str, program: Program, reworded: bool, rng: random.Random) -> dict[str, Any]:
    """A problem of a program, whose numbers are whole and not negative."""
    family = FAMILIES[kind]
    while True:
        start, numbers = _start(kind, rng), [rng.randrange(2, 10) for _ in program]
        after = states(kind, program, start, numbers)
        if kind != "stories" or all(value >= 0 and value == int(value) for (value,) in after):
            break
    asked = [family.operations[name] for name in program]
    said = [operation.reworded if reworded else rng.choice(operation.said) for operation in asked]
    phrases = [phrase.format(n=number) for phrase, number in zip(said, numbers, strict=True)]
    steps = (", and after that " if reworded else ", then ").join(phrases)
    text = (family.reworded if reworded else family.sentence).format(
        start=shown(start),
        steps=steps,
        Steps=steps[:1].upper() + steps[1:],
        name=rng.choice(_NAMES),
        things=rng.choice(_THINGS),
    )
    metadata = {"source_dataset": FAMILY, "kind": kind, "operations": program, "start": start, "numbers": numbers}
    return {
        "prompt": [{"role": "user", "content": text}],
        "solution": shown(after[-1]),
        "entry": json.dumps({"metadata": metadata}),
    }


def _start(kind: str, rng: random.Random) -> State:
    if kind == "words":
        return rng.sample(WORDS, 4)
    return [rng.randrange(2, 21)] if kind == "stories" else [rng.randrange(1, 9) for _ in range(4)]


def _is_number(item: Any) -> bool:
    return type(item) is int and 0 <= item <= _MOST


def _is_test(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0
