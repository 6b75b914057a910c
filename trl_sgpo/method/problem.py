"""A problem, its class, its answer and the strategies retrieved for it."""

from dataclasses import dataclass
from typing import Any

from ..bank.strategy import Strategy
from .prompts import Prompt, problem_text


@dataclass(frozen=True)
class Problem:
    """
    A problem to write a strategy for and to execute strategies on.

    Args:
        prompt (`str` or `list[dict]`):
            The dataset's prompt.
        problem_class (`str`):
            Its class, `""` if unknown.
        answer (`str` or `None`):
            Its short answer, if the dataset has one.
        retrieved (`tuple[Strategy, ...]`):
            Strategies shown with it.
        similarities (`tuple[float, ...]`):
            Cosine similarity of each of them to the problem.
    """

    prompt: Prompt
    problem_class: str = ""
    answer: str | None = None
    retrieved: tuple[Strategy, ...] = ()
    similarities: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        return problem_text(self.prompt)

    @property
    def shown(self) -> list[tuple[str, str]]:
        """Class and text of the retrieved strategies."""
        return [(strategy.problem_class, strategy.text) for strategy in self.retrieved]


def as_problem(row: dict[str, Any], class_column: str = "problem_class", answer_column: str = "solution") -> Problem:
    """Reads a dataset row as a problem. A missing class is `""`, a missing answer `None`."""
    name, answer = row.get(class_column), row.get(answer_column)
    return Problem(row["prompt"], "" if name is None else str(name), None if answer is None else str(answer))
