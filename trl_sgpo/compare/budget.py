"""An equal number of generated tokens for every arm."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class TokenBudget(TrainerCallback, ExportableState):
    """
    Counts the tokens that a trainer generates and ends training once they reach a budget.

    Args:
        budget (`int`):
            Tokens that training may generate. The step that reaches it is the last.
        spent (`int`, *optional*, defaults to `0`):
            Tokens generated so far, kept in checkpoints.
        points (`list[int]`, *optional*):
            Numbers of tokens at which `measure` is called.
        measure (`Callable[[int], None]`, *optional*):
            Called with the tokens spent when a point is passed.
    """

    def __init__(
        self,
        budget: int,
        spent: int = 0,
        points: list[int] | None = None,
        measure: Callable[[int], None] | None = None,
    ):
        self.budget = budget
        self.spent = spent
        self.points = list(points or [])
        self.measure = measure

    def count_in(self, trainer: Any) -> "TokenBudget":
        """Counts what the trainer generates while training, and stops it."""
        generate = trainer._generate_single_turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = generate(*args, **kwargs)
            if trainer.model.training:
                self.spent += sum(len(ids) for ids in result[0])
            return result

        trainer._generate_single_turn = counted
        trainer.add_callback(self)
        return self

    def state(self) -> dict[str, Any]:
        return {"args": {"budget": self.budget}, "attributes": {"spent": self.spent}}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed = [point for point in self.points if point <= self.spent]
        if passed and self.measure is not None:
            self.points = [point for point in self.points if point > self.spent]
            self.measure(self.spent)
        if self.spent >= self.budget:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None:
            logs["generated_tokens"] = self.spent
