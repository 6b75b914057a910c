"""
`SGPOTrainer`: what differs from `GRPOTrainer`.

1. Sampling: K problems of one class stand side by side (`_get_train_sampler`, `transfer.py`).
2. Generation: two phases instead of one (`rollout_func`, `rollout.py`). Each problem writes n strategies; every
   strategy of a block is executed on every problem of the block.
3. Rewards: reward functions see the execution only (`_calculate_rewards`). Their weighted sum fills the outcome
   matrix; the first one is the verifier that transfer score and bank rest on.
4. Credit: strategy tokens and execution tokens have advantages of their own (`_generate_and_score_completions`,
   `advantages.py`).
5. Bank: strategies are retrieved before the first phase and stored after the optimizer step (`bank/`); checkpoints
   hold the bank as of their step, and the rollouts still to be trained on.
6. Speed: rows of a problem are trained side by side, their prompt is read once, and only trained tokens are scored
   (`_prepare_inputs`, `_get_per_token_logps_and_entropies`, `shared_prompts.py`).
7. Hub: a push is one commit of what others need, with an export of the bank (`push_to_hub`, `_push_from_checkpoint`,
   `create_model_card`, `hub.py`, `model_card.py`).

In evaluation each row writes and executes its own strategy, and nothing is written to the bank.
"""

import math
import os
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftType
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id, nanstd, split_tensor_dict

from .bank import Outcome, Strategy, StrategyBank, load_embedder, problem_id
from .bank.audit import control_tokens
from .bank.shared import SharedBank
from .callbacks import AdviceCallback, RunRecordCallback, StrategyBankCallback, WorstCaseCallback
from .data.classes import merge_small_classes, problem_classes
from .errors import ConfigError, DataError, SGPOError
from .hub.model_card import CARD, TrainingFacts, make_card
from .hub.push import adapter_base, claim, start_push, write_metrics
from .inference.loading import how_trained, keep_4bit_layout, keep_adapters_in_float32
from .inference.retrieval import with_retrieved
from .inference.settings import TwoPhaseSettings
from .inference.verifier import as_completions
from .method import advantages as credit
from .method.admission import outcomes, proposals
from .method.conversation import Conversation
from .method.problem import Problem, as_problem
from .method.prompts import problem_text
from .method.rewards import coherence, distinct, leak
from .method.rollout import Rollout, RolloutBatch, stop_at, two_phase_rollout
from .method.transfer import BlockGeometry, TransferBlockSampler, outcome_matrix, rows_of
from .sgpo_config import SGPOConfig
from .speed.lm_head import project_labelled_tokens_only
from .speed.shared_prompts import SharedPrompts, share_prompts, within_window


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` warns at every start

logger = transformers.utils.logging.get_logger(__name__)

BANK_DIRECTORY = "strategy_bank"
CLASS_COLUMN = "transfer_class"

_QUANTIZED_VLLM = (
    "Quantized weights with `use_vllm` are refused: vLLM would generate with other weights than are trained. Set "
    "`use_vllm` to false, or train without quantization."
)
SHARDED_CHECKPOINTS = (
    "With FSDP's sharded state dicts, checkpoints would hold neither a model that others can load nor the bank: set "
    "`fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration."
)


class SGPOTrainer(GRPOTrainer):
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
            Model to train, as in [`~trl.GRPOTrainer`].
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
        [`ConfigError`]: Something SGPO cannot work with: tools, images, a rollout function, 4-bit weights with vLLM.
        [`DataError`]: A dataset without a needed column, or with too few problems of a class.
    """

    _tag_names: ClassVar = ["trl", "sgpo", "trl-sgpo"]
    _name = "SGPO"
    _paper: ClassVar[dict[str, str]] = {}

    args: SGPOConfig
    conversation: Conversation
    _buffered_inputs: list[dict[str, Any]]
    push_in_progress: PushInProgress | None

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
        _refuse_unsupported(args, train_dataset, eval_dataset, processing_class, quantization_config, kwargs)
        if reward_funcs is None:
            raise ConfigError(
                "SGPO needs at least one reward function: pass `reward_funcs`. The first is the verifier."
            )

        self.geometry = BlockGeometry(args.transfer_block_size, args.own_strategies, args.num_bank_rollouts)
        self.starts_with_empty_bank = strategy_bank is None and args.bank_path is None
        if args.process_index > 0 and strategy_bank is not None:
            strategy_bank.close()  # one process may have a bank open
            strategy_bank = None
        if strategy_bank is None and args.use_bank and args.process_index == 0:
            strategy_bank = StrategyBank(
                args.bank_path or os.path.join(args.output_dir, BANK_DIRECTORY),
                embedding_model=args.embedding_model,
                capacity_per_class=args.bank_capacity,
                min_problems=args.bank_min_problems,
                tolerance=args.bank_tolerance,
                max_share=args.bank_max_share,
            )
        self.strategy_bank = strategy_bank  # on rank 0 only, which reads and writes for all
        self.shared_bank: SharedBank | None = None
        if strategy_bank is not None and args.bank_server is not None:
            self.shared_bank = SharedBank(strategy_bank, args.bank_server)
        train_dataset = with_classes(train_dataset, args, strategy_bank)
        self.rollout_batch = RolloutBatch([], self.geometry)

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
            rollout_func=lambda prompts, trainer: two_phase_rollout(self.rollout_batch, self, self.conversation),
            **kwargs,
        )
        self.conversation = TwoPhaseSettings.from_config(args).conversation(self.processing_class)
        stop_at(self, self.conversation.stop_ids)
        self.facts = self._facts()  # what the model card says; whoever knows more may replace it
        self.base_weights: list[torch.Tensor] | None = None
        self.merges_adapters = self._can_merge_adapters()
        may_share = self._can_share_prompts()
        self.shares_prompts = may_share and self.model.config.get_text_config()._attn_implementation == "sdpa"
        self.reads_requests_once = may_share and not (
            self.use_vllm
            or self.use_transformers_continuous_batching
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
        )
        self.leaves_out_ended_rows = not self.args.generation_kwargs  # which may count from where a call begins
        self._row_advantages: tuple[torch.Tensor, torch.Tensor] | None = None
        self._trained_tokens: torch.Tensor | None = None
        self._found: list[Strategy] = []
        self._observed: list[Outcome] = []
        self._shown = Counter[str]()
        self.add_callback(StrategyBankCallback(self))
        self.run_record = RunRecordCallback(self)
        self.add_callback(self.run_record)
        self.worst_case = WorstCaseCallback(self)
        self.add_callback(self.worst_case)
        self.add_callback(AdviceCallback())
        if args.use_vllm and "quantization_config" in vars(self.model.config):
            raise ConfigError(_QUANTIZED_VLLM)
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise ConfigError(SHARDED_CHECKPOINTS)
        if args.fp16 and "quantization_config" in vars(self.model.config):
            keep_adapters_in_float32(self.model)
        if self.accelerator.device.type == "cpu":
            keep_4bit_layout(self.model)

    def _facts(self) -> TrainingFacts:
        name = get_config_model_id(self.model.config) or ""
        earlier = TrainingFacts.load(name).base_model if os.path.isdir(name) else ""
        return TrainingFacts.of(self.args, earlier or name, self.reward_func_names)

    def _can_merge_adapters(self) -> bool:
        if not self.args.merge_adapters or self.use_vllm or not isinstance(self.model, PeftModel):
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or "quantization_config" in vars(self.model.config):
            return False
        configs = self.model.peft_config.values()
        return all(
            config.peft_type == PeftType.LORA and not config.target_parameters and not config.lora_bias
            for config in configs
        )

    def _can_share_prompts(self) -> bool:
        """Whether rows can be continued from another row's keys and values, and attention shown which belong to it."""
        config = self.model.config.get_text_config()
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return (
            self.args.share_prompts
            and config._attn_implementation in ("sdpa", "eager")
            and base.is_backend_compatible()  # passes what it is called with on to attention
            and set(vars(config).get("layer_types") or ()) <= {"full_attention", "sliding_attention"}
            and not base._is_stateful
            and not self.aux_loss_enabled  # TRL reads the mask to count each row's tokens
        )

    # 1. Sampling

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if dataset is None else dataset
        answers = self.args.answer_column
        return TransferBlockSampler(
            dataset[CLASS_COLUMN],
            self.geometry,
            problems_per_batch=self.args.generation_batch_size // self.geometry.executions,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
            shuffle=self.shuffle_dataset,
            # Asked of the state, because a dataloader that skips batches on resume does not forward `set_epoch`
            epoch=lambda: int(self.state.epoch or 0),
            answers=[str(answer) for answer in dataset[answers]] if answers in dataset.column_names else None,
        )

    # 2. Generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.rollout_batch = self._plan_rollouts(inputs)
        self._row_advantages = None
        output = super()._generate_and_score_completions(inputs)
        if self._row_advantages is not None:
            strategy, execution = self._row_advantages
            lengths = torch.tensor([row["rollout"].strategy_length for row in inputs], device=strategy.device)
            output["advantages"] = credit.token_advantages(
                strategy * self.args.strategy_weight, execution, lengths, output["completion_ids"].size(1)
            )
        return output

    def _plan_rollouts(self, inputs: list[dict[str, Any]]) -> RolloutBatch:
        """Problems of the local batch with the strategies retrieved for them, by rank 0 for all ranks."""
        geometry = self.geometry if self.model.training else BlockGeometry(problems=1, own=1)
        class_column = CLASS_COLUMN if self.model.training else self.args.class_column or "problem_class"
        problems = [as_problem(row, class_column, self.args.answer_column) for row in inputs[:: geometry.executions]]
        if not self.args.use_bank:
            return RolloutBatch(problems, geometry, [[] for _ in range(len(problems) // geometry.problems)])
        everyone = gather_object(problems)
        plans: list[Any] = [None] * self.accelerator.num_processes
        if self.accelerator.is_main_process:
            plan = self._read_bank(everyone, geometry)
            plans = [
                RolloutBatch(theirs, geometry, tried)
                for theirs, tried in zip(
                    _in_blocks(plan.problems, len(problems)),
                    _in_blocks(plan.bank, len(problems) // geometry.problems),
                    strict=True,
                )
            ]
        return broadcast_object_list(plans)[self.accelerator.process_index]

    def _read_bank(self, problems: list[Problem], geometry: BlockGeometry) -> RolloutBatch:
        """
        Adds to the problems what the bank has for them. Nothing written for a problem is shown to it, and candidates
        are shown in training only, where their outcomes are verified.
        """
        bank, args = self.strategy_bank, self.args
        assert bank is not None
        training = self.model.training
        problems = with_retrieved(
            problems,
            bank,
            args.num_retrieved,
            cross_class=args.bank_cross_class,
            trust=("trusted", "candidate") if training else ("trusted",),
            explore=_seed(args.seed, self.state.global_step) if training else None,
        )
        blocks = _in_blocks(problems, geometry.problems)
        tried = [
            bank.sample(
                block[0].problem_class,
                k=geometry.bank,
                seed=_seed(args.seed, self.state.global_step, index),
                exclude={problem_id(problem.prompt) for problem in block},
            )
            if geometry.bank
            else []
            for index, block in enumerate(blocks)
        ]
        return RolloutBatch(problems, geometry, tried)

    # 3. Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts = [row["rollout"] for row in inputs]
        rewards = self._verify(inputs, prompts, rollouts)
        start = self.accelerator.process_index * len(inputs)
        local = rewards[start : start + len(inputs)]
        self._log_phases(rollouts, local[:, 0])
        if self.model.training:
            self._assign_credit(rollouts, local)
        return rewards

    def _verify(self, inputs: list[dict[str, Any]], prompts: list[Any], rollouts: list[Rollout]) -> torch.Tensor:
        """Rewards of all ranks' executions, shape `(world size * B, number of reward functions)`."""
        executions = as_completions(prompts[0], [rollout.execution for rollout in rollouts])
        return super()._calculate_rewards(inputs, prompts, executions, [rollout.execution_ids for rollout in rollouts])

    def _log_phases(self, rollouts: list[Rollout], verified: torch.Tensor) -> None:
        own = [rollout for rollout in rollouts if rollout.source == "own"]
        limit, eos = self.args.max_completion_length, self.eos_token_ids
        truncated = [r.execution_ids[-1] not in eos and len(r.execution_ids) >= limit for r in rollouts]
        for name, values in (
            ("strategy_length", [rollout.strategy_length for rollout in own]),
            ("strategy_truncated", [rollout.strategy.flaw == "truncated" for rollout in own]),
            ("malformed", [rollout.strategy.flaw is not None for rollout in own]),
            ("execution_length", [len(rollout.execution_ids) for rollout in rollouts]),
            ("execution_truncated", truncated),
        ):
            self._log_metric(f"sgpo/{name}", sum(values) / len(values))
        self._log_metric("sgpo/distinct_strategies", distinct([rollout.strategy.text for rollout in own]))
        if self.strategy_bank is not None:
            self._log_metric("sgpo/bank_size", float(len(self.strategy_bank)))
        self._log_completion_extra("source", [rollout.source for rollout in rollouts])
        shown = [
            " ".join(strategy.id for strategy in problem.retrieved)
            for problem in self.rollout_batch.problems
            for _ in range(len(rollouts) // len(self.rollout_batch.problems))
        ]
        self._log_completion_extra("retrieved", shown)
        self._log_completion_extra("strategy", [rollout.strategy.text for rollout in rollouts])
        self._log_completion_extra("execution", [rollout.execution for rollout in rollouts])
        self._log_completion_extra("correctness", verified.tolist())
        if not self.model.training:
            self._log_mean("correctness", verified)
            # TRL keeps the last rows of each column apart, so a column left out would show rows of training
            columns = ["transfer", "strategy_advantage"]
            columns += ["execution_advantage"] if self.args.execution_baseline != "problem" else []
            for column in columns:
                self._log_completion_extra(column, [math.nan] * len(rollouts))

    def _log_mean(self, name: str, values: torch.Tensor) -> None:
        if not torch.isnan(values).all():
            self._log_metric(f"sgpo/{name}", torch.nanmean(values.float()).item())

    # 4. Credit

    def _assign_credit(self, rollouts: list[Rollout], rewards: torch.Tensor) -> None:
        """Fills `_row_advantages` from the local rewards of shape `(B, number of reward functions)`."""
        args, geometry = self.args, self.geometry
        n, device = geometry.own, rewards.device
        weighted = (rewards * self.reward_weights.to(device)).nansum(dim=1)
        weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
        outcomes, verified = outcome_matrix(weighted, geometry), outcome_matrix(rewards[:, 0], geometry)

        # Own rows come in the order of their strategies: problem by problem within a block
        problems = [problem for problem in self.rollout_batch.problems for _ in range(n)]
        strategies = [rollout.strategy for rollout in rollouts if rollout.source == "own"]
        pairs = list(zip(strategies, problems, strict=True))
        shape = (-1, geometry.written)
        coherent = torch.tensor([coherence(s, p.text) for s, p in pairs], device=device).view(shape)
        leaked = torch.tensor([leak(s.text, p.text, p.answer) for s, p in pairs], device=device).view(shape)

        weights = (args.correctness_weight, args.transfer_weight)
        earned = credit.strategy_outcomes(outcomes, n, *weights)
        compared = credit.strategy_outcomes(credit.center_by_problem(outcomes), n, *weights)
        shaping = args.coherence_weight * coherent - args.leak_weight * leaked
        by_group = self.scale_rewards == "group"
        strategy = credit.strategy_advantages(compared, scaled=by_group)
        execution = credit.execution_advantages(outcomes, args.execution_baseline, scaled=by_group)
        if self.scale_rewards == "batch":
            strategy = strategy / (nanstd(self.accelerator.gather(earned)) + 1e-4)
            execution = execution / (nanstd(self.accelerator.gather(weighted)) + 1e-4)
        signal = strategy.abs().amax(dim=1).maximum(execution.abs().amax(dim=(1, 2)))
        strategy = strategy + credit.strategy_advantages(shaping, scaled=False)
        per_strategy = torch.nn.functional.pad(strategy, (0, geometry.bank)).unsqueeze(2).expand_as(execution)
        self._row_advantages = (rows_of(per_strategy), rows_of(execution))

        on_own, on_siblings = credit.own_and_siblings(verified, n)
        for name, values in (
            ("correctness", on_own),
            ("transfer", on_siblings),
            ("coherence", coherent),
            ("leak", leaked),
            ("strategy_reward", earned + shaping),
        ):
            self._log_mean(name, values)
        self._log_mean("frac_blocks_no_signal", signal < 1e-2)
        transfer = torch.nn.functional.pad(on_siblings, (0, geometry.bank), value=torch.nan)
        self._log_completion_extra("transfer", rows_of(transfer.unsqueeze(2).expand_as(execution)).tolist())
        self._log_completion_extra("strategy_advantage", self._row_advantages[0].tolist())
        if args.execution_baseline != "problem":  # otherwise it is TRL's own column `advantage`
            self._log_completion_extra("execution_advantage", self._row_advantages[1].tolist())
        if args.use_bank:
            self._observe(verified, pairs, leaked)

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
        class_column = self.args.class_column or "problem_class"
        problems = [as_problem(row, class_column, self.args.answer_column) for row in rows]
        training, sampling = self.model.training, self.generation_config.do_sample
        logs, metrics = dict(self._pending_extra_logs), dict(self._pending_metrics)
        self.model.eval()
        if self.strategy_bank is None:
            self.rollout_batch = RolloutBatch(problems, geometry, [[] for _ in range(len(rows) // geometry.problems)])
        else:
            self.rollout_batch = self._read_bank(problems, geometry)
        self.generation_config.do_sample = not greedy
        try:
            repeated = [dict(row) for row in rows for _ in range(geometry.executions)]
            prompts = [row["prompt"] for row in repeated]
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                rollouts = two_phase_rollout(self.rollout_batch, self, self.conversation)["rollout"]
            rewards = self._verify(repeated, prompts, rollouts)
        finally:
            self.model.train(training)
            self.generation_config.do_sample = sampling
            for pending, before in ((self._pending_extra_logs, logs), (self._pending_metrics, metrics)):
                pending.clear()
                pending.update(before)
        return rollouts, rewards[:, 0]

    # 5. Bank and checkpoints

    def _observe(self, verified, pairs, leaked) -> None:
        """Notes, on rank 0, what the bank is to learn from this batch once the optimizer step is done."""
        geometry, batch = self.geometry, self.rollout_batch
        written = _in_blocks([self._as_strategy(s.text, problem) for s, problem in pairs], geometry.written)
        sound = _in_blocks([s.flaw is None and not control_tokens(s.text) for s, _ in pairs], geometry.written)
        executed = [
            [s.id for s in (*own, *tried, *(own[slot % len(own)] for slot in range(len(tried), geometry.bank)))]
            for own, tried in zip(written, batch.bank, strict=True)
        ]
        problems = _in_blocks([problem_id(problem.prompt) for problem in batch.problems], geometry.problems)
        classes = [problem.problem_class for problem in batch.problems[:: geometry.problems]]
        noted = (
            proposals(written, verified, geometry.own, leaked, sound, self.args.bank_min_lift),
            outcomes(executed, problems, classes, verified),
            [strategy.id for problem in batch.problems for strategy in problem.retrieved],
        )
        for found, observed, shown in gather_object([noted]):
            self.note_found(found)
            self._observed += observed
            self._shown.update(shown)

    def _as_strategy(self, text: str, problem: Problem) -> Strategy:
        return Strategy(
            text=text,
            problem_class=problem.problem_class,
            source_problems=(problem_id(problem.prompt),),
            parents=tuple(shown.id for shown in problem.retrieved),
            model=get_config_model_id(self.model.config) or "",
            run=os.path.basename(os.path.normpath(self.args.output_dir)),
            step=self.state.global_step + 1,
        )

    def share_bank(self) -> None:
        """Sends trusted strategies to the server that jobs share, if there is one, and receives those of others."""
        if self.shared_bank is not None:
            report = self.shared_bank.sync()
            self._log_metric("sgpo/strategies_sent", float(report.sent))
            self._log_metric("sgpo/strategies_received", float(report.received))

    def set_aside_old_bank(self) -> None:
        """Empties the default bank if an earlier run in `output_dir` left one, keeping a copy beside it."""
        bank = self.strategy_bank
        if bank is None or not self.starts_with_empty_bank or len(bank) == 0:
            return
        kept = Path(self.args.output_dir) / f"{BANK_DIRECTORY}.previous"
        bank.snapshot(kept)
        logger.warning(
            f"{bank.path} holds {len(bank)} strategies of an earlier run. Training starts anew with an empty bank; "
            f"they are kept in {kept}. To continue with them, set `--bank_path {kept}`."
        )
        bank.clear()
        self.starts_with_empty_bank = False

    def note_found(self, strategies: list[Strategy]) -> None:
        """Adds strategies to those the next [`~SGPOTrainer.commit_bank`] stores."""
        self._found += strategies

    def commit_bank(self) -> None:
        """
        Writes what the last optimizer step taught to the bank, and exchanges strategies with other jobs when it is
        time to. Does nothing on other ranks.
        """
        if self.strategy_bank is not None:
            self.strategy_bank.record(self._found, self._observed, self._shown)
            if self.state.global_step % self.args.bank_sync_steps == 0:
                self.share_bank()
        self._found, self._observed, self._shown = [], [], Counter()

    # 6. Speed

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = problems_together(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = _without_padding(inputs)
        self._trained_tokens = inputs["completion_mask"] * inputs["tool_mask"]
        try:
            with project_labelled_tokens_only(self.accelerator.device):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._trained_tokens = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        scorer = _RowScorer(self, model, input_ids.size(1) - logits_to_keep)
        with project_labelled_tokens_only(self.accelerator.device):
            return super()._get_per_token_logps_and_entropies(
                scorer, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        settings = TwoPhaseSettings.from_config(self.args, self.train_dataset[0]["prompt"])
        settings = replace(settings, turn_end=self.conversation.end_token)
        if isinstance(self.model, PeftModel):
            settings = replace(settings, trained_on=how_trained(self.model))
        settings.save(output_dir or self.args.output_dir)
        self.facts.save(output_dir or self.args.output_dir)
        directory = Path(output_dir or self.args.output_dir).resolve() / BANK_DIRECTORY
        if self.strategy_bank is not None and directory != Path(self.strategy_bank.path).resolve():
            self.strategy_bank.snapshot(directory)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        directory.mkdir(parents=True, exist_ok=True)
        self._save_rollouts(directory)
        super()._save_checkpoint(model, trial)  # writes trainer_state.json last: a checkpoint with it is complete

    def _rollouts_file(self, directory: str | Path) -> Path:
        return Path(directory) / f"rollouts_{self.accelerator.process_index}.safetensors"

    def _save_rollouts(self, directory: Path) -> None:
        """Keeps the rollouts that later optimizer steps still train on."""
        tensors = {}
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            for index, rollouts in enumerate(self._buffered_inputs):
                for key, value in rollouts.items():
                    if value is not None:
                        tensors[f"{index}.{key}"] = value.detach().cpu().clone().contiguous()
        save_file(tensors, self._rollouts_file(directory), metadata={"step": str(self._step)})

    def _load_rollouts(self, directory: str) -> None:
        path = self._rollouts_file(directory)
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            self._step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key).to(self.accelerator.device) for key in file.keys()}  # noqa: SIM118
        if tensors:
            self._buffered_inputs = [{} for _ in range(self.args.steps_per_generation)]
            for name, tensor in tensors.items():
                index, key = name.split(".", 1)
                self._buffered_inputs[int(index)][key] = tensor

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(checkpoint)
            self._load_bank(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_bank(self.state.best_model_checkpoint)

    def _load_bank(self, checkpoint: str) -> None:
        if self.strategy_bank is None:
            return
        snapshot = os.path.join(checkpoint, BANK_DIRECTORY)
        if os.path.isdir(snapshot):
            self.strategy_bank.load_snapshot(snapshot)
        else:
            logger.warning(f"{checkpoint} holds no strategy bank: continuing with {self.strategy_bank.path}.")

    # 7. Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            claim(name, token or self.args.hub_token, self.args.hub_private_repo if private is None else private)
        super().init_hf_repo(token, private)

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
        (directory / CARD).write_text(card, encoding="utf-8")

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
                Passed on to [`~SGPOTrainer.create_model_card`].

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
        """Pushes what others need, and with some strategies the checkpoint too, in one commit, in the background."""
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


def with_classes(dataset: Dataset, args: SGPOConfig, bank: StrategyBank | None = None) -> Dataset:
    """
    Adds the column with the class that each problem's block is formed from.

    Args:
        dataset ([`~datasets.Dataset`]):
            Training problems. If they have the column already they are returned as they are.
        args ([`SGPOConfig`]):
            Says where classes come from.
        bank ([`StrategyBank`], *optional*):
            Its embedder is used where embeddings are needed.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        [`DataError`]: The class column is missing, or a class has too few problems for a block.
    """
    if CLASS_COLUMN in dataset.column_names:
        return dataset

    def embed(texts: list[str]) -> Any:
        return bank.embed(texts) if bank is not None else load_embedder(args.embedding_model)(texts)

    classes = problem_classes(dataset, args.class_column, embed, args.num_clusters, args.seed)
    clustered = args.class_column is None and "problem_class" not in dataset.column_names
    classes = merge_small_classes(
        classes,
        args.transfer_block_size,
        "merge" if clustered else args.small_classes,
        lambda: embed([problem_text(prompt) for prompt in dataset["prompt"]]),
    )
    return dataset.add_column(CLASS_COLUMN, classes)


def _refuse_unsupported(
    args: SGPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    quantization_config: Any,
    kwargs: Any,
) -> None:
    for name in ("tools", "environment_factory", "rollout_func"):
        if kwargs.pop(name, None) is not None:
            raise ConfigError(f"SGPO generates in two phases of its own and cannot work with `{name}`: remove it.")
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("SGPO trains text models: pass a tokenizer as `processing_class`, not a processor.")
    if quantization_config is not None and args.use_vllm:
        raise ConfigError(_QUANTIZED_VLLM)
    if train_dataset is None:
        raise DataError("SGPO needs a `train_dataset`.")
    evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *(dataset for dataset in evals if dataset is not None)):
        if isinstance(dataset, IterableDataset):
            raise DataError(
                "SGPO sorts problems into classes and cannot stream: load the dataset with `streaming=False`, or take "
                "a part of it with `Dataset.from_generator`."
            )
        if "prompt" not in dataset.column_names:
            raise DataError(f"The dataset has no column `prompt`, only {', '.join(dataset.column_names)}.")
        images = {"image", "images"} & set(dataset.column_names)
        if images:
            raise DataError(f"SGPO trains text models: remove the column `{images.pop()}`.")


def _seed(*parts: int) -> int:
    return hash(parts) % 2**32


def _in_blocks(values: list[Any], size: int) -> list[list[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def problems_together(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Moves rows with the same prompt next to each other, problems in the order of their first rows.

    TRL shuffles the rows of a generation batch, so those of a problem would be trained in different micro-batches.

    Args:
        batches (`list[dict]`):
            Micro-batches of equal size. Values are tensors with a row each, 0-dimensional tensors or `None`.

    Returns:
        `list[dict]`: Micro-batches of the same size.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])
    problem = torch.unique(prompts, dim=0, return_inverse=True)[1]
    position = torch.arange(len(problem), device=problem.device)
    first = torch.full_like(position, len(problem)).scatter_reduce(0, problem, position, "amin")
    order = torch.argsort(first[problem], stable=True)
    rows = {
        key: value if value is None or value.dim() == 0 else torch.cat([batch[key] for batch in batches])[order]
        for key, value in batches[0].items()
    }
    return split_tensor_dict(rows, len(batches))


class _RowScorer:
    """
    Stands in for a model where TRL scores completions: reads the prompt of consecutive rows once, and projects only
    tokens that are trained onto the vocabulary. What it returns is what the model would.
    """

    def __init__(self, trainer: SGPOTrainer, model: Any, prompt_width: int):
        self.trainer, self.model, self.prompt_width = trainer, model, prompt_width

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs: Any):
        trained = self.trainer._trained_tokens
        if trained is not None:
            labels = torch.cat(
                [labels[:, : self.prompt_width], labels[:, self.prompt_width :].masked_fill(trained == 0, -100)], dim=1
            )
        shared = self._shared(input_ids, attention_mask) if self.trainer.shares_prompts else None
        if shared is None:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        outputs = self.model(
            input_ids=shared.input_ids,
            attention_mask=shared.attention_mask,
            position_ids=shared.position_ids,
            shift_labels=shared.next_labels(labels),
            shared_prompts=shared,
            **kwargs,
        )
        log_probs, entropy = outputs.log_probs, outputs.entropy
        return replace(
            outputs,
            log_probs=shared.to_rows(log_probs)[:, :-1],
            entropy=None if entropy is None else shared.to_rows(entropy)[:, :-1],
        )

    def _shared(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SharedPrompts | None:
        """The layout, unless attention would have to slide within a row."""
        if not within_window(self.trainer.model.config, int(attention_mask.sum(dim=1).max())):
            return None
        return share_prompts(input_ids, attention_mask, self.prompt_width)


def _without_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = inputs["prompt_mask"].any(dim=0).nonzero(), inputs["completion_mask"].any(dim=0).nonzero()
    if len(prompt) == 0 or len(completion) == 0:
        return inputs
    start, stop = int(prompt[0]), int(completion[-1]) + 1
    length = inputs["completion_mask"].size(1)
    cut = {key: inputs[key][:, start:] for key in ("prompt_ids", "prompt_mask")}
    for key, value in inputs.items():
        if key not in cut and isinstance(value, torch.Tensor) and value.dim() == 2 and value.size(1) == length:
            cut[key] = value[:, :stop]
    return {**inputs, **cut}
