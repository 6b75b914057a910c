"""A trainer's computations outside training, without effect on training."""

from collections.abc import Iterator
from contextlib import contextmanager

from trl import GRPOTrainer


SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Settings of which transformers warns where decoding is greedy."""


@contextmanager
def measuring(trainer: GRPOTrainer, greedy: bool) -> Iterator[None]:
    """Evaluation mode, greedy or sampled decoding, and no metrics or table columns from reward functions."""
    training, decoding = trainer.model.training, vars(trainer.generation_config)
    sampling = {name: decoding[name] for name in ("do_sample", *SAMPLING)}
    trainer.model.eval()
    if greedy:
        decoding.update(dict.fromkeys(SAMPLING), do_sample=False)
    try:
        with without_timings(trainer), without_records(trainer):
            yield
    finally:
        trainer.model.train(training)
        decoding.update(sampling)


@contextmanager
def without_records(trainer: GRPOTrainer) -> Iterator[None]:
    """Leaves out the metrics and table columns that reward functions log."""
    pending = (trainer._pending_extra_logs, trainer._pending_metrics)
    before = [{name: list(values) for name, values in each.items()} for each in pending]
    try:
        yield
    finally:
        for each, kept in zip(pending, before, strict=True):
            each.clear()
            each.update(kept)


@contextmanager
def without_timings(trainer: GRPOTrainer) -> Iterator[None]:
    """TRL sends the times of its methods to trackio without asking whether a run is open, which raises an error."""
    args = trainer.args
    trackers, args.report_to = args.report_to, [name for name in args.report_to if name != "trackio"]
    try:
        yield
    finally:
        args.report_to = trackers
