"""
Pushes of a trainer to the Hub: one commit with the published files and an export of the bank.

What this file relies on in TRL 1.16 and transformers (`tests/test_trl_contract.py`): `init_hf_repo`,
`create_model_card`, `push_to_hub`, `_push_from_checkpoint`, `_finish_current_push`, `push_in_progress`.
"""

import os
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress
from trl.trainer.utils import get_config_model_id

from ..errors import SGPOError
from ..files import write_file
from ..inference.loading import adapter_base
from ..run.trainer import RunTrainer
from ..sgpo_config import SGPOConfig
from .model_card import CARD, TrainingFacts, make_card
from .publication import write_metrics
from .push import claim, start_push


logger = transformers.utils.logging.get_logger(__name__)


class HubTrainer(RunTrainer):
    """
    Pushes model, bank export, metrics and card in one commit, at the end of training and during training.

    Attributes:
        facts ([`~trl_sgpo.hub.model_card.TrainingFacts`]): Facts of the training for the model card. They may be
            replaced by more complete ones.
    """

    _tag_names: ClassVar = ["trl", "sgpo", "trl-sgpo"]
    _name = "SGPO"
    _paper: ClassVar[dict[str, str]] = {}

    args: SGPOConfig
    facts: TrainingFacts
    push_in_progress: PushInProgress | None

    def training_facts(self, model: Any = None) -> TrainingFacts:
        """
        Facts of the training that are known at its start.

        Args:
            model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
                Model as it was passed to the trainer. A name is kept where its weights are found elsewhere.
        """
        name = model if isinstance(model, str) else get_config_model_id(self.model.config) or ""
        earlier = TrainingFacts.load(name).base_model if os.path.isdir(name) else ""
        return TrainingFacts.of(self.args, earlier or name, self.reward_func_names)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            claim(name, token or self.args.hub_token, self.args.hub_private_repo if private is None else private)
        super().init_hf_repo(token)  # the repository exists, private or not

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """
        Writes the model card to `output_dir`, with `metrics.json`.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Name of the dataset used for training.
            tags (`str` or `list[str]`, *optional*):
                Tags to be associated with the model card.
            license (`str`, *optional*):
                Licence of model and strategies, as the Hub names licences.
        """
        super().create_model_card(model_name, None, tags)
        if not self.is_world_process_zero():
            return
        directory = Path(self.args.output_dir)
        self.facts = self.facts.with_card((directory / CARD).read_text(encoding="utf-8"))
        if dataset_name is not None:
            self.facts = replace(self.facts, datasets=(dataset_name,))
        if license is not None:
            self.facts = replace(self.facts, license={"license": license})
        self.facts.save(directory)
        write_metrics(directory, self.state.global_step, self.state.epoch, self.state.log_history)
        name = self.hub_model_id or self.args.hub_model_id or model_name or directory.absolute().name
        card = make_card(directory, name, self.facts, self.facts.license, adapter_base(directory) is not None)
        write_file(directory / CARD, card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Pushes model, bank export, metrics and card to `hub_model_id`, in one commit.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until it is done.
            token (`str`, *optional*):
                Access token. If `None`, `hub_token`, or the one that `hf auth login` stored.
            revision (`str`, *optional*):
                Branch. If `None`, `hub_revision`, or the main one.
            private (`bool`, *optional*):
                Whether the repository must be private. If `None`, `hub_private_repo`.
            **kwargs:
                Passed on to [`~HubTrainer.create_model_card`].

        Returns:
            `str` or `Future`: The commit, 40 hexadecimal digits, or what gives it if not `blocking`. `None` on ranks
            other than 0.

        Raises:
            [`ModelError`]: If the push fails. The run is saved before, and the message says how to push it again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        message = commit_message or "End of training"
        pushing = self._start_push(self.args.output_dir, message, token=token, revision=revision)
        return pushing.result() if blocking else pushing

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the published files, and with some hub strategies the checkpoint, in one commit in the background."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        names = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        message = f"Training in progress, step {self.state.global_step}"
        try:
            pushing = self._start_push(checkpoint_folder, message, names.get(args.hub_strategy))
        except (SGPOError, OSError) as error:
            logger.warning(f"{message}: not pushed to {self.hub_model_id}. {error} Training goes on.")
            return
        pushing.add_done_callback(self._warn_of_failed_push)
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.append(pushing)
        else:
            self.push_in_progress = PushInProgress([pushing])

    def _start_push(
        self,
        source: str,
        message: str,
        checkpoint: str | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> Future[str]:
        assert self.hub_model_id is not None
        return start_push(
            Path(source),
            self.hub_model_id,
            message,
            self.strategy_bank,
            self.facts,
            checkpoint,
            token or self.args.hub_token,
            revision or self.args.hub_revision,
        )

    def _warn_of_failed_push(self, pushing: Future[str]) -> None:
        error = pushing.exception()
        if error is not None:
            logger.warning(f"{error} Training goes on, and a later save pushes again.")
