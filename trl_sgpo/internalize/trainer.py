"""
`InternalizingTrainer`: plain answers learn from guided ones.

- `distill`: the step's right guided rollouts, written as plain answers, are learnt by their likelihood (`targets.py`).
- `contrast`: tokens of plain rows that a teacher finds likelier with a right strategy than with wrong ones get a
  higher advantage, others a lower one (`contexts.py`, `contrast.py`).
- `kl`: the distribution of each token of the step's right executions is learnt from a teacher that is given their
  strategy (`divergence.py`).

The teacher of both is a snapshot of the model (`snapshot.py`). All end where plain answers are as good as guided ones
(`retirement.py`).

What this file relies on in TRL 1.16 and transformers (`tests/test_trl_contract.py`): `_metrics`, `_save_checkpoint`,
`_get_per_token_logps_and_entropies`, `_load_optimizer_and_scheduler`, `_prepare_for_training`, which comes before it,
and that `compute_loss` divides the loss by `current_gradient_accumulation_steps`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from ..method.conversation import Conversation
from ..method.credit import Credit
from ..method.rollout import Rollout, RolloutBatch
from ..method.transfer import rows_of
from ..report.run_files import TEACHER_FILE
from ..sgpo_config import SGPOConfig
from ..speed.merging import base_of
from ..speed.scoring import without_padding
from ..speed.trainer import SharedPromptGRPOTrainer
from .contexts import contrasts
from .contrast import ContrastShape, evidence, token_rewards, with_contrast
from .divergence import forward_kl, hidden_states, logit_scaling
from .retirement import retirement
from .snapshot import WeightSnapshot
from .targets import Target, distill_targets, divergence_targets, divergence_weights, target_tensors


logger = transformers.utils.logging.get_logger(__name__)


class InternalizingTrainer(SharedPromptGRPOTrainer):
    """[`SharedPromptGRPOTrainer`] whose plain answers also learn from guided ones, as `args.internalize` says."""

    args: SGPOConfig
    conversation: Conversation
    _teacher: WeightSnapshot | None = None
    _said_retired = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.internalize not in ("contrast", "kl"):
            return
        if self._is_sharded():
            raise ConfigError(
                f"`internalize: {self.args.internalize}` keeps a copy of the weights, which are sharded here: use "
                "`distill`, or launch with DDP."
            )
        head = base_of(self.model).get_output_embeddings()
        if self.args.internalize == "kl" and isinstance(head, BaseTunerLayer):
            raise ConfigError("`internalize: kl` reads the LM head, which has an adapter: leave the head without one.")

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._teacher = None  # that of an earlier call of `train` is of a later step
        return super()._prepare_for_training(*args, **kwargs)

    def internalize(
        self, output: dict[str, Any], rollouts: Sequence[Rollout], credit: Credit, batch: RolloutBatch
    ) -> dict[str, Any]:
        """
        Adds to a batch what its plain answers learn from guided ones.

        Args:
            output (`dict`):
                The batch, with advantages of shape `(B, T)`.
            rollouts (`Sequence[Rollout]` of length B):
                Its rows.
            credit ([`~trl_sgpo.method.credit.Credit`]):
                Their outcomes.
            batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
                Their problems.
        """
        if self.args.internalize == "none" or self._is_retired():
            return output
        if self.args.internalize == "distill":
            verified = rows_of(torch.cat([credit.verified, credit.plain], dim=1)).tolist()
            targets = distill_targets(rollouts, verified, batch, self.conversation)
            return output | self._tensors(targets)
        if self.args.internalize == "kl":
            weights = rows_of(divergence_weights(credit.verified, credit.plain)).tolist()
            guided = [
                tokens[: -len(rollout.execution_ids)]
                for tokens, rollout in zip(_tokens_of(output), rollouts, strict=True)
            ]
            return output | self._tensors(divergence_targets(rollouts, guided, weights, batch, self.conversation))
        return output | {"advantages": self._contrasted(output, rollouts, credit, batch)}

    def _is_retired(self) -> bool:
        """Whether the logs say that nothing more is to be learnt. Rank 0 decides, so that all ranks do the same."""
        (reason,) = broadcast_object_list([retirement(self.state.log_history)])
        if reason is not None and not self._said_retired and self.accelerator.is_main_process:
            logger.warning(reason)
        self._said_retired = reason is not None
        return self._said_retired

    def _tensors(self, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
        return target_tensors(targets, self.processing_class.pad_token_id, self.accelerator.device)

    # Contrast

    @property
    def teacher(self) -> WeightSnapshot:
        """Weights of the teacher: those of the student, at most `internalize_snapshot_steps` ago."""
        if self._teacher is None:
            self._teacher = WeightSnapshot(self.model)
            self._teacher.step = self.state.global_step
        if self.state.global_step - self._teacher.step >= self.args.internalize_snapshot_steps:
            self._teacher.take(self.state.global_step)
        return self._teacher

    def _contrasted(
        self, output: dict[str, Any], rollouts: Sequence[Rollout], credit: Credit, batch: RolloutBatch
    ) -> torch.Tensor:
        """Advantages with the contrast in those of plain rows."""
        chosen = contrasts(batch, rollouts, credit.verified, self.args.internalize_contrasts)
        plain = [row for row, rollout in enumerate(rollouts) if rollout.source == "plain"]
        problems = [row // batch.geometry.executions for row in plain]
        answers = [rollouts[row].execution_ids for row in plain]

        def scored(strategies: list[str | None]) -> torch.Tensor:
            requests = [
                self.conversation.plain_request(batch.problems[problem].prompt)
                if strategy is None
                else self.conversation.execution_request(batch.problems[problem].prompt, (), strategy)
                for problem, strategy in zip(problems, strategies, strict=True)
            ]
            return self._teacher_log_probs(requests, answers)

        right = scored([chosen[problem].right for problem in problems])
        wrong, has_wrong = [], []
        for k in range(self.args.internalize_contrasts):  # as many passes on every rank
            strategies = [chosen[problem].wrong[k : k + 1] for problem in problems]
            wrong.append(scored([each[0] if each else None for each in strategies]))
            has_wrong.append([len(each) > 0 for each in strategies])
        whole = torch.tensor([chosen[problem].is_whole for problem in problems], device=right.device)
        present = torch.tensor(has_wrong, device=right.device)
        present[0] |= ~whole  # what they give is left out below
        found = evidence(right, torch.stack(wrong), present).masked_fill(~whole.unsqueeze(1), 0.0)
        rewards = token_rewards(found, ContrastShape(scale=self.args.internalize_scale))
        advantages = output["advantages"].clone()
        width = rewards.size(1)
        advantages[plain, :width] = with_contrast(advantages[plain, :width], rewards)
        lengths = torch.tensor([len(answer) for answer in answers], device=right.device)
        tokens = torch.arange(width, device=right.device) < lengths.unsqueeze(1)
        # TRL's `_log_metric` would add them to the next batch: it has logged the rewards of this one
        for name, value in (("contrast_rows", whole.float().mean()), ("contrast", found[tokens].mean())):
            mean = self.accelerator.gather(value).float().mean().item()
            self._metrics["train" if self.model.training else "eval"][f"sgpo/{name}"].append(mean)
        return advantages

    @torch.no_grad()
    def _teacher_log_probs(self, requests: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        """Log-probabilities that the teacher gives to answers, shape `(B, T)`, any value behind their ends."""
        rows = self._tensors([Target(*row, 1.0) for row in zip(requests, answers, strict=True)])
        found = []
        with self.teacher.in_place():
            for start in range(0, len(requests), self.args.per_device_train_batch_size):
                part = slice(start, start + self.args.per_device_train_batch_size)
                found.append(self._log_probs(self.model, {key: value[part] for key, value in rows.items()}))
        return torch.cat(found)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._teacher is not None and self.args.should_save:
            directory = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._teacher.save(Path(self._get_output_dir(trial=trial), directory, TEACHER_FILE))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "", TEACHER_FILE)
        if checkpoint is None or self.args.internalize not in ("contrast", "kl"):
            return
        if file.is_file():
            self._teacher = WeightSnapshot(self.model)
            self._teacher.load(file)
        else:
            logger.warning(f"{checkpoint} has no {TEACHER_FILE}: plain answers learn from a new copy of the weights.")

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = {key: value for key, value in inputs.items() if key.startswith("target_")}
        others = {key: value for key, value in inputs.items() if key not in targets}
        if not targets or not self.model.training:
            return super().compute_loss(model, others, return_outputs, num_items_in_batch)
        learn = self._divergence_loss if self.args.internalize == "kl" else self._imitation_loss
        taught = learn(model, targets)
        self._metrics["train"]["sgpo/internalize_loss"].append(taught.item())
        taught = self.args.internalize_scale * taught / self.current_gradient_accumulation_steps
        if not self._is_sharded():  # so that the activations of one loss at a time are in memory
            self.accelerator.backward(taught)
            taught = taught.detach()
        return super().compute_loss(model, others, return_outputs, num_items_in_batch) + taught

    def _imitation_loss(self, model: Any, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the rows of a micro-batch of the negative log-likelihood of a target's token, 0 without target."""
        weights = targets["target_weight"]
        rows = weights > 0
        rows[0] |= ~rows.any()  # a forward pass on every rank, which sharded models need
        targets = {key: value[rows] for key, value in targets.items()}
        mask = targets["target_mask"]
        by_row = -(self._log_probs(model, targets) * mask).sum(dim=1) / mask.sum(dim=1)
        return (targets["target_weight"] * by_row).sum() / len(weights)

    def _divergence_loss(self, model: Any, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the rows of a micro-batch of the mean divergence of a target's tokens, 0 without target."""
        weights = targets["target_weight"]
        rows = weights > 0
        rows[0] |= ~rows.any()
        prompts, guided, answers = (
            [
                ids[mask.bool()]
                for ids, mask in zip(targets[f"{name}_ids"][rows], targets[f"{name}_mask"][rows], strict=True)
            ]
            for name in ("target_prompt", "target_guided", "target")
        )
        base = base_of(self.model)
        head = base.get_output_embeddings()
        with torch.no_grad(), self.teacher.in_place():
            shown = hidden_states(model, base, guided, answers)
            teacher = head.weight.data
        student = hidden_states(model, base, prompts, answers)
        by_token = forward_kl(student, shown, head, teacher, logit_scaling(base.config), self.temperature)
        by_row = torch.stack([part.mean() for part in by_token.split([len(answer) for answer in answers])])
        return (weights[rows] * by_row).sum() / len(weights)

    def _log_probs(self, model: Any, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of target tokens, shape `(B, T)`, 0 behind the longest one of these rows."""
        inputs = without_padding(
            {
                "prompt_ids": targets["target_prompt_ids"],
                "prompt_mask": targets["target_prompt_mask"],
                "completion_ids": targets["target_ids"],
                "completion_mask": targets["target_mask"],
            }
        )
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        log_probs = self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
        return torch.nn.functional.pad(log_probs, (0, targets["target_ids"].size(1) - width))


def _tokens_of(output: dict[str, Any]) -> list[list[int]]:
    """Tokens of each row of a batch, without padding."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
