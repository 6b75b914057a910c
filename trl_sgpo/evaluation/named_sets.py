"""
Evaluation during training: metrics of several evaluation sets by name.

What this file relies on in TRL 1.16 and transformers (`tests/test_trl_contract.py`): `_metrics`, whose keys `log` puts
`eval_` before, and `_determine_best_metric`.
"""

from contextlib import nullcontext
from typing import Any

from trl import GRPOTrainer

from ..errors import ConfigError
from ..method.measuring import without_timings


class NamedEvaluationTrainer(GRPOTrainer):
    """Logs the metrics of the evaluation set `hard` as `eval_hard_reward` and so on, as transformers does the loss."""

    _metric_prefix = "eval"

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`]."""
        outer, self._metric_prefix = self._metric_prefix, metric_key_prefix
        try:
            with nullcontext() if self.is_in_train else without_timings(self):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._metric_prefix = outer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~trl.GRPOTrainer.log`]."""
        _, named, name = self._metric_prefix.partition("eval_")
        if named and not self.model.training:
            metrics = self._metrics["eval"]
            renamed = {f"{name}_{key}": values for key, values in metrics.items()}
            metrics.clear()
            metrics.update(renamed)
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:  # only the first evaluation shows which metrics there are
            raise ConfigError(str(error.args[0])) from error
