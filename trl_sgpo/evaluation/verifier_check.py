"""Checks a verifier on right solutions and on solutions of other problems."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from ..data.answers import same_answer_text
from ..errors import DataError
from ..inference.verifier import Verifier, verify
from .statistics import SOLVED


BATCH = 32


@dataclass(frozen=True)
class VerifierCheck:
    """
    Solutions that a verifier accepts and rejects.

    Args:
        gold (`int`):
            Right solutions checked.
        gold_accepted (`int`):
            How many of them it accepts.
        wrong (`int`):
            Solutions of other problems checked.
        wrong_accepted (`int`):
            How many of them it accepts.
        rejected (`list[dict]`):
            The right ones that it does not accept: `solution` and `text`.
        mistaken (`list[dict]`):
            The wrong ones that it accepts: `solution` and `text`.
    """

    gold: int
    gold_accepted: int
    wrong: int
    wrong_accepted: int
    rejected: list[dict[str, str]]
    mistaken: list[dict[str, str]]

    @property
    def sound(self) -> bool:
        """Whether at least 99% of right and at most 1% of wrong solutions are accepted."""
        return self.gold_accepted >= 0.99 * self.gold and self.wrong_accepted <= 0.01 * self.wrong

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_verifier(
    rows: Sequence[dict[str, Any]], verifier: Verifier, rounds: int = 5, seed: int = 42
) -> VerifierCheck:
    """
    Checks a verifier on the worked solution of each problem, and on those of other problems, with a progress bar.

    Args:
        rows (`Sequence[dict]`):
            Problems with a `solution`. Without a `worked_solution`, `#### solution` is checked.
        verifier (`Callable`):
            Reward function.
        rounds (`int`, *optional*, defaults to `5`):
            Other problems for each problem. Those with the same answer are left out.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw of other problems.

    Returns:
        [`VerifierCheck`]

    Raises:
        [`DataError`]: If a problem has no solution.
    """
    if any(row.get("solution") is None for row in rows):
        raise DataError("Checking a verifier takes a solution for every problem: remove the rows without one.")
    solutions = [row["solution"] for row in rows]
    worked = [row.get("worked_solution") or f"#### {row['solution']}" for row in rows]
    rng = random.Random(seed)
    pairs = []
    for index in range(len(rows)):
        for other in rng.sample(range(len(rows)), min(rounds, len(rows))):
            if not same_answer_text(solutions[index], solutions[other]):
                pairs.append((index, other))
    checked = [(index, index) for index in range(len(rows))] + pairs
    outcomes: list[float] = []
    with tqdm(total=len(checked), desc="Checking the verifier", unit="text") as bar:
        for start in range(0, len(checked), BATCH):
            part = checked[start : start + BATCH]
            outcomes += verify(verifier, [rows[index] for index, _ in part], [worked[other] for _, other in part])
            bar.update(len(part))
    gold, wrong = outcomes[: len(rows)], outcomes[len(rows) :]
    rejected = [i for i, outcome in enumerate(gold) if not outcome >= SOLVED]
    mistaken = [pair for pair, outcome in zip(pairs, wrong, strict=True) if outcome >= SOLVED]
    return VerifierCheck(
        gold=len(rows),
        gold_accepted=len(rows) - len(rejected),
        wrong=len(pairs),
        wrong_accepted=len(mistaken),
        rejected=[{"solution": solutions[i], "text": worked[i]} for i in rejected],
        mistaken=[{"solution": solutions[index], "text": worked[other]} for index, other in mistaken],
    )
