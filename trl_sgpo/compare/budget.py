"""An equal number of generated tokens for every arm."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..checks.damaged import expect_readable
from ..checks.shapes import count, listing, record
from ..evaluation.stored import RATE
from ..speed.trainer import SharedPromptGRPOTrainer


_SAVED = record({"spent": count, "curve": listing(record({"generated_tokens": count, "accuracy": RATE}))})


class TokenBudget(TrainerCallback, ExportableState):
    """
    Counts the tokens that a trainer generates and ends training once they reach a budget. Count and curve are saved in
    checkpoints and restored on resume.

    Args:
        budget (`int`):
            Tokens that training may generate. The step that reaches it is the last.
        spent (`int`):
            Tokens generated before training.
        points (`list[int]`):
            Numbers of tokens at which the model is measured.
        measure (`Callable[[], float]`):
            Returns the model's accuracy.

    Attributes:
        curve (`list[dict]`): `generated_tokens` and `accuracy` of each measurement.
    """

    def __init__(self, budget: int, spent: int, points: list[int], measure: Callable[[], float]):
        self.budget = budget
        self.spent = spent
        self.points = points
        self.measure = measure
        self.curve: list[dict[str, float]] = []

    def count_in(self, trainer: Any) -> "TokenBudget":
        """Counts the tokens generated in training and registers this callback, which ends training."""
        shared = isinstance(trainer, SharedPromptGRPOTrainer)
        generate = trainer.generate if shared else trainer._generate_single_turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = generate(*args, **kwargs)
            if trainer.model.training:
                self.spent += sum(len(ids) for ids in result[0])
            return result

        if shared:
            trainer.generate = counted
        else:
            trainer._generate_single_turn = counted
        trainer.add_callback(self)
        return self

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"spent": self.spent, "curve": self.curve}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            # transformers restores callbacks as new instances, which would not be called by `counted`
            with expect_readable(f"The state of {type(self).__name__} in the checkpoint", "remove the checkpoint"):
                saved = state.stateful_callbacks[type(self).__name__]["attributes"]
                _SAVED(saved, "it")
                if len(saved["curve"]) > len(self.points):
                    raise ValueError(
                        f"`it.curve` has {len(saved['curve'])} points, and {len(self.points)} are measured"
                    )
            self.spent, self.curve = saved["spent"], saved["curve"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed = sum(point <= self.spent for point in self.points)
        if passed > len(self.curve):
            self.curve += [{"generated_tokens": self.spent, "accuracy": self.measure()}] * (passed - len(self.curve))
        if self.spent >= self.budget:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["generated_tokens"] = self.spent
