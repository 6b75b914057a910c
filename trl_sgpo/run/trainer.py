"""
A trainer whose output folder belongs to one run.

What this file relies on in TRL 1.16 and transformers (`tests/test_trl_contract.py`): `_save`, `_save_checkpoint`,
`_load_optimizer_and_scheduler`, `_load_rng_state` and `ref_model`.
"""

import os
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..bank import StrategyBank
from ..bank.files import BANK_DIRECTORY
from ..checks.damaged import expect_readable
from ..checks.weights import check_weight
from ..errors import ConfigError
from ..report.run_files import COMPLETIONS_DIRECTORY, REFERENCE_FILE, STATE_FILE
from ..sgpo_config import SGPOConfig
from .directory import Run, begin_run, last_checkpoint, run_id, write_run_id
from .output_lock import held
from .resuming import ANOTHER, OptimizerBefore, check_same_model


class _BestCheckpointCallback(TrainerCallback):
    """Finds the best checkpoint so far beside the resumed one, if it was set aside with it."""

    resumed: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resumed is None or os.path.isdir(state.best_model_checkpoint or ""):
            return
        saved = TrainerState.load_from_json(os.path.join(self.resumed, STATE_FILE))
        beside = Path(self.resumed).parent / Path(saved.best_model_checkpoint or "").name
        if saved.best_model_checkpoint is not None and beside.is_dir():
            state.best_model_checkpoint, state.best_metric = str(beside), saved.best_metric


class RunTrainer(GRPOTrainer):
    """
    Sets aside what an earlier run left in the output folder, and resumes checkpoints of the same run only.

    Attributes:
        run ([`~trl_sgpo.run.directory.Run`] or `None`): The run, `None` before training. Who began it before the
            trainer was made, sets it.
    """

    args: SGPOConfig
    run: Run | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._best = _BestCheckpointCallback()
        self.add_callback(self._best)

    @property
    def strategy_bank(self) -> StrategyBank | None:
        """The bank in use."""
        return None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Trains.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the last complete one of the run that `output_dir` belongs to. Without it,
                a new run begins, which sets aside what an earlier one left in `output_dir`. A further call for the
                same trainer continues its run.
            *args, **kwargs:
                Passed on to [`~trl.GRPOTrainer`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]

        Raises:
            [`ConfigError`]: There is no checkpoint to resume from, or it is of another model or optimizer, or
                another process trains in `output_dir`.
        """
        with held(self.args.output_dir, self.args.should_save):
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        with self.args.main_process_first(local=self.args.save_on_each_node):
            checkpoint = self._checkpoint(resume_from_checkpoint)
            check_same_model(self.model, checkpoint)
            if self.run is None and self.args.should_save:
                self.run = begin_run(self.args.output_dir, checkpoint, self._kept())
                if self.log_completions:  # TRL made it when it made the trainer, and an earlier run's was set aside
                    Path(self.args.output_dir, COMPLETIONS_DIRECTORY).mkdir(exist_ok=True)
            elif self.run is None:
                self.run = Run(run_id(self.args.output_dir) or "")
        self._best.resumed = checkpoint
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self.run = replace(self.run, earlier=None)  # what a further call finds is of this run
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()  # after an interruption it would be drawn again below what is said

    def _checkpoint(self, given: str | bool | None) -> str | None:
        if given is not True:
            return given or None
        checkpoint = last_checkpoint(self.args.output_dir)
        if checkpoint is None:
            raise ConfigError(
                f"{self.args.output_dir} holds no complete checkpoint of its run: call `train` without "
                "`resume_from_checkpoint`."
            )
        return checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        before = OptimizerBefore(self.optimizer, self.lr_scheduler)
        with expect_readable(f"The state of the optimizer or schedule in {checkpoint}", ANOTHER):
            super()._load_optimizer_and_scheduler(checkpoint)
        before.check(checkpoint, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.args.sync_ref_model:
            self._load_reference(Path(checkpoint, REFERENCE_FILE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with expect_readable(f"The state of random numbers in {checkpoint}", ANOTHER):
            try:
                super()._load_rng_state(checkpoint)
            except (RuntimeError, UnpicklingError) as error:
                raise ValueError(" ".join(str(error).split())[:200]) from error

    def _load_reference(self, file: Path) -> None:
        """Reads the reference model, which `sync_ref_model` moves as the policy is trained."""
        if not file.is_file():
            raise ConfigError(
                f"{file.parent} has no reference model, so training with `sync_ref_model` cannot go on from it: train "
                "without `resume_from_checkpoint`, or set `sync_ref_model` to false."
            )
        with expect_readable(file, "resume from another checkpoint"):
            try:
                load_model(self.ref_model, file, device=str(self.accelerator.device))
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(" ".join(str(error).split())) from error
            for name, weight in self.ref_model.named_parameters():
                check_weight(name, weight, weight)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # no rank has the whole reference model
        if self.args.sync_ref_model and self.args.should_save and not sharded:
            directory = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            directory.mkdir(parents=True, exist_ok=True)
            save_model(self.ref_model, str(directory / REFERENCE_FILE))
        super()._save_checkpoint(model, trial)

    def _kept(self) -> tuple[str, ...]:
        """Files of a bank that is open are not moved."""
        bank, place = self.strategy_bank, Path(self.args.output_dir, BANK_DIRECTORY)
        return (BANK_DIRECTORY,) if bank is not None and Path(bank.path).resolve() == place.resolve() else ()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.run is not None:  # by this process
            write_run_id(output_dir or self.args.output_dir, self.run.id)
