"""Trainer callbacks: writing the bank, recording the run, the worst-case step, and advice on metrics."""

import json
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl import GRPOTrainer

from ._version import __version__
from .bank.session import BankSession
from .checks.secrets import redacted
from .data.classes import CLASS_COLUMN
from .files import append_file, durable_replace, unfinished_file, write_file
from .method.conversation import Conversation
from .method.transfer import BlockGeometry
from .report.run_files import PROGRESS_FILE, RUN_SETTINGS_FILE, STATE_FILE
from .run.trainer import RunTrainer
from .speed.sampling import SAMPLER_KL, SAMPLER_KL_LIMIT
from .speed.trainer import SharedPromptGRPOTrainer
from .vram.worst_case import take_worst_case_step


logger = transformers.utils.logging.get_logger(__name__)


class StrategyBankCallback(TrainerCallback):
    """
    Commits to the bank after each optimizer step, so that it does not change within one, and exchanges strategies with
    other jobs every `bank_sync_steps`. When a run begins, it sets aside the bank that an earlier one left in
    `output_dir`.
    """

    def __init__(self, trainer: RunTrainer, session: BankSession, log_metric: Callable[[str, float], None]):
        self.trainer, self.session, self.log_metric = trainer, session, log_metric

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.trainer.run
        if state.global_step == 0 and run is not None and run.earlier is not None:
            self.session.set_aside_old_bank(run.earlier)
        self.session.share(self.log_metric)  # before the first step, so that a wrong address ends the run at once

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.commit()
        if state.global_step % args.bank_sync_steps == 0:
            self.session.share(self.log_metric)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.end()


class RunRecordCallback(TrainerCallback):
    """
    Writes files that `trl-sgpo report` reads into `output_dir`: `settings.json`, without secrets, when training
    begins, `progress.jsonl` while it goes on, and `trainer_state.json`, which replaces it, when it ends.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.recipe: dict[str, Any] = {}  # settings that the trainer does not know

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer = self.trainer
        settings = {
            "model": trainer.model.config.name_or_path,
            "reward_funcs": trainer.reward_func_names,
            "problems": Counter(trainer.train_dataset[CLASS_COLUMN]),
            "versions": {
                "trl-sgpo": __version__,
                **{name: version(name) for name in ("trl", "transformers", "torch")},
            },
            **redacted(self.recipe),
            **args.to_dict(),
        }
        path = Path(args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / RUN_SETTINGS_FILE, json.dumps(settings, indent=2, default=str), private=True)
        lines = [{"max_steps": state.max_steps}, *state.log_history]
        write_file(path / PROGRESS_FILE, "".join(f"{json.dumps(line)}\n" for line in lines))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and (path := Path(args.output_dir) / PROGRESS_FILE).is_file():
            with append_file(path) as file:
                file.write(f"{json.dumps(state.log_history[-1])}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / STATE_FILE
            with unfinished_file(path) as temporary:
                state.save_to_json(str(temporary))
                durable_replace(temporary, path)
            path.with_name(PROGRESS_FILE).unlink(missing_ok=True)


class WorstCaseCallback(TrainerCallback):
    """
    Takes the largest possible step before the first real one, to test whether it fits into memory. `peaks` are the
    peaks that [`~trl_sgpo.vram.worst_case.take_worst_case_step`] measured.
    """

    def __init__(self, trainer: SharedPromptGRPOTrainer, conversation: Conversation, geometry: BlockGeometry):
        self.trainer, self.conversation, self.geometry = trainer, conversation, geometry
        self.peaks: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        enabled = args.worst_case_step
        if enabled is None:
            enabled = trainer.accelerator.device.type != "cpu"
        if enabled and not (trainer.use_vllm or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            take_worst_case_step(trainer, self.conversation, self.geometry, self.peaks)


class AdviceCallback(TrainerCallback):
    """Logs, once each, what a surprising metric means and what to change."""

    def __init__(self) -> None:
        self.logged: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        if abs(logs["loss"]) < 1e-3:
            self._log_once(
                "loss",
                "A loss near 0 is expected: advantages are centred, so on fresh rollouts the loss is about 0 while "
                "its gradient is not. Watch sgpo/correctness and sgpo/transfer instead.",
            )
        if logs.get("sgpo/strategy_truncated", 0) > 0.5:
            self._log_once(
                "strategy",
                f"Over half of the strategies were cut off at {args.max_strategy_length} tokens: raise "
                "`max_strategy_length`, or ask for shorter ones in `strategy_prompt`.",
            )
        if logs.get("sgpo/execution_truncated", 0) > 0.5:
            self._log_once(
                "execution",
                f"Over half of the executions were cut off at {args.max_completion_length} tokens: raise "
                "`max_completion_length`, or ask for shorter ones in `execution_prompt`.",
            )
        if logs.get("sgpo/frac_blocks_no_signal", 0) > 0.5:
            self._log_once(
                "signal",
                "Over half of the transfer blocks taught nothing, because all their executions earned the same: raise "
                "`num_generations`, choose easier or harder problems, or warm-start the model.",
            )

        if logs.get(SAMPLER_KL, 0) > SAMPLER_KL_LIMIT:
            self._log_once(
                "sampler",
                f"The policy that samples is not the one that is trained: `{SAMPLER_KL}` is {logs[SAMPLER_KL]:.2g}. "
                "Set `merge_adapters` or `share_prompts` to false, leave out dropout, or use `dtype: float32`; with "
                "vLLM, compare the data types of both.",
            )

    def _log_once(self, topic: str, message: str) -> None:
        if topic not in self.logged:
            self.logged.add(topic)
            with tqdm.external_write_mode():  # beneath the bars
                logger.warning(message)
