"""A trainer's rollouts outside training, without effect on training."""

from collections.abc import Iterator
from contextlib import contextmanager

from trl import GRPOTrainer


@contextmanager
def measuring(trainer: GRPOTrainer, greedy: bool) -> Iterator[None]:
    """Evaluation mode, greedy or sampled decoding, and no metrics or table columns from reward functions."""
    training, sampling = trainer.model.training, trainer.generation_config.do_sample
    pending = (trainer._pending_extra_logs, trainer._pending_metrics)
    before = [dict(each) for each in pending]
    trainer.model.eval()
    trainer.generation_config.do_sample = not greedy
    try:
        yield
    finally:
        trainer.model.train(training)
        trainer.generation_config.do_sample = sampling
        for each, kept in zip(pending, before, strict=True):
            each.clear()
            each.update(kept)
