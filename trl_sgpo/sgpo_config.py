import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

import torch
from trl import GRPOConfig

from .bank.strategy import DEFAULT_EMBEDDING_MODEL
from .checks.origin import what_to_mend
from .checks.ranges import not_finite, range_problems
from .checks.remote_code import remote_code_problems
from .checks.secrets import WithoutSecrets
from .checks.settings import setting_problems
from .errors import SettingsError, refuse
from .method.block_checks import check_block, check_generation_batch, check_local_batch
from .method.prompts import EXECUTION_PROMPT, check_strategy_prompt, default_strategy_prompt
from .method.sampling import check_generation_kwargs
from .method.transfer import BlockGeometry


class _GRPOConfig(WithoutSecrets, GRPOConfig):
    """It shows no secrets to trackers of runs."""


@dataclass(repr=False)
class SGPOConfig(WithoutSecrets, GRPOConfig):
    r"""
    Configuration class for the [`SGPOTrainer`].

    Inherited parameters keep their meaning. `max_completion_length` limits the **execution** (the strategy has
    `max_strategy_length`), `mask_truncated_completions` masks each of both by its own end, `shuffle_dataset=False`
    keeps the order within each class, and `num_generations` counts the rows of a problem, `n * K + b + m`: `n` with
    its own strategies, `n * (K - 1)` borrowed from the other problems of its block, `b` from the bank, `m` without
    one.

    Parameters:
        > Parameters that control the transfer blocks

        transfer_block_size (`int`, *optional*, defaults to `2`):
            K, the number of problems of one class that execute each other's strategies. `1` switches transfer off.
        num_bank_rollouts (`int`, *optional*, defaults to `0`):
            b, executions per problem of strategies drawn from the bank, which test candidates. While the bank
            holds fewer than b strategies for a class, the block's own are executed again.
        num_plain_rollouts (`int`, *optional*, defaults to `0`):
            m, rows per problem that answer without a strategy. They are a GRPO group of their own and enter no
            strategy's outcome. With m = `num_generations` there are no strategies, and training is GRPO.
        per_device_train_batch_size (`int`, *optional*, defaults to `16`):
            Rows per device and forward pass. Times `gradient_accumulation_steps`, or `steps_per_generation`, they hold
            whole blocks of K * `num_generations` rows.
        strategy_column (`str`, *optional*):
            Column with a strategy for each problem, such as one that a stronger model wrote. The `num_bank_rollouts`
            rows of the problem execute it. There is no bank then, and K is 1.
        class_column (`str`, *optional*):
            Dataset column with the problem class. If `None`, `"problem_class"` is used where the dataset has it, and
            clusters of prompt embeddings where it does not.
        num_clusters (`int`, *optional*, defaults to `16`):
            Number of classes to make where the dataset names none.
        small_classes (`str`, *optional*, defaults to `"error"`):
            Treatment of a class with fewer than K problems: `"error"` raises an error, `"merge"` joins it to the
            nearest class by prompt embedding.
        answer_column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the short answer, if there is one. It is used to keep problems with equal answers
            out of one block and to find answers leaked into strategies.

        > Parameters that control the two phases

        max_strategy_length (`int`, *optional*, defaults to `128`):
            Maximum number of tokens of a strategy.
        strategy_format (`str`, *optional*, defaults to `"text"`):
            `"text"` for free text, `"steps"` for numbered steps with placeholders in braces.
        strategy_prompt (`str`, *optional*):
            Template of the request for a strategy, with `{problem}` and, where retrieved strategies go,
            `{strategies}`. If empty, the one for `strategy_format` in `trl_sgpo/method/prompts.py`.
        execution_prompt (`str`, *optional*):
            The turn between strategy and execution. Defaults to the one in `trl_sgpo/method/prompts.py`.
        merge_adapters (`bool`, *optional*, defaults to `True`):
            Whether to merge LoRA adapters into the base weights while generating, which then takes as long as without
            adapters. The base weights are restored bit by bit from a copy in host memory. Has no effect
            on quantized or sharded models and with vLLM.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Whether the request of a problem is read once for all its rows, in a forward pass of training and in
            generation with transformers. Has no effect with attention implementations other than `"sdpa"` (in
            generation, `"sdpa"` and `"eager"`), and on models that are recurrent, slide their attention within a row
            or add a router loss.
        worst_case_step (`bool`, *optional*):
            Whether to take the largest possible step before the first real one, so that a run that does not fit into
            memory fails at once: the longest problems, both phases at full length. It changes no state. If `None`,
            it is taken on accelerators by runs without vLLM, DeepSpeed and FSDP.

        > Parameters that control rewards and credit

        correctness_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a strategy's outcome on its own problem. `0` rewards transfer alone.
        transfer_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a strategy's mean outcome on the other problems of its block. `0` rewards no transfer and needs
            `n >= 2`, because an outcome on the own problem is then compared with those of the same problem's other
            strategies, and not with those of the block.
        coherence_weight (`float`, *optional*, defaults to `0.1`):
            Weight of a strategy's coherence, in [0, 1].
        leak_weight (`float`, *optional*, defaults to `0.5`):
            Penalty for a strategy that contains its problem's answer.
        execution_baseline (`str`, *optional*, defaults to `"problem"`):
            What an execution is compared with: `"problem"` (executions of the same problem, as in GRPO),
            `"strategy"` (executions of the same strategy) or `"two_way"` (what remains after both effects).
        internalize (`str`, *optional*, defaults to `"none"`):
            How plain answers learn from guided ones. `"distill"` adds the negative log-likelihood of the step's right
            guided rollouts, written as plain answers that hold their strategy.
            `"contrast"` changes the advantages of the tokens of plain rows by how much likelier a teacher finds them
            with a strategy that solves other problems of the class than with strategies that do not. `"kl"` adds the
            forward KL, at most 1 nat a token, from a teacher that is given their strategy to the model without it, on
            the step's right executions, weighted by how far a problem's plain answers fall short of its guided ones.
        internalize_weight (`float`, *optional*):
            Weight of the loss of `"distill"` or `"kl"`, a mean over all rows, 0 for rows that teach nothing, or the
            largest change of an advantage by `"contrast"`. If `None`, 1 for `"distill"`, 0.5 for the others.
        internalize_contrasts (`int`, *optional*, defaults to `4`):
            Wrong strategies at most that `"contrast"` compares with the right one.
        internalize_snapshot_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps after which the teacher takes over the weights of the model.
        strategy_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the advantages of strategy tokens. A strategy is trained in one row but executed in K, so values
            up to K keep short strategies from vanishing in a token mean.

        > Parameters that control the strategy bank

        use_bank (`bool`, *optional*, defaults to `True`):
            Whether to retrieve strategies before the strategy phase and to store good ones after the step.
        bank_path (`str`, *optional*):
            Directory of the bank. If `None`, `strategy_bank` in `output_dir`, empty when a run begins. A bank named
            here is continued.
        embedding_model (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Name or path of the sentence-transformers model that embeds problems and strategies.
        retrieve_when (`str`, *optional*, defaults to `"always"`):
            `"plain_fails"` shows retrieved strategies in training only for problems of which at most half of the plain
            rows, which are then generated first, are right.
        num_retrieved (`int`, *optional*, defaults to `1`):
            Strategies shown with each problem.
        bank_min_lift (`float`, *optional*, defaults to `0.0`):
            A strategy is stored if its mean outcome on siblings exceeds the block's mean on the same problems by
            more than this.
        bank_capacity (`int`, *optional*, defaults to `256`):
            Maximum number of strategies kept per class.
        bank_min_problems (`int`, *optional*, defaults to `4`):
            Number of distinct problems, without those it was written for, that a strategy must have been executed on
            before it is trusted or retired.
        bank_tolerance (`float`, *optional*, defaults to `0.2`):
            Part of the other strategies' success rate on the same problems that a strategy may fall short of it and
            be trusted, so trusted means not inferior. One that falls short by more is retired. Of strategies that
            fall short by exactly this part, at most 5% are ever trusted or retired.
        bank_max_share (`float`, *optional*, defaults to `0.25`):
            Maximum share of a class's retrievals in training for one strategy, while there are others.
        bank_cross_class (`bool`, *optional*, defaults to `False`):
            Whether strategies of other classes are shown too, so that they can be combined.
        bank_server (`str`, *optional*):
            Address of a Chroma server through which several jobs exchange the strategies they trust, such as
            `http://127.0.0.1:8000`. Received strategies are in quarantine until they prove useful in executions here.
            A token for a proxy in front of the server is taken from the environment variable `TRL_SGPO_BANK_TOKEN`.
        bank_sync_steps (`int`, *optional*, defaults to `10`):
            Number of optimizer steps between two exchanges with `bank_server`.
    """

    per_device_train_batch_size: int = field(
        default=16,
        metadata={"help": "Rows per device and forward pass. 16 holds one transfer block of 2 problems x 8 rows."},
    )

    # Parameters that control the transfer blocks
    transfer_block_size: int = field(
        default=2,
        metadata={
            "help": "K, the number of problems of one class that execute each other's strategies. 1 switches "
            "transfer off."
        },
    )
    num_bank_rollouts: int = field(
        default=0,
        metadata={"help": "b, executions per problem of strategies that are drawn from the bank and not rewritten."},
    )
    num_plain_rollouts: int = field(
        default=0, metadata={"help": "m, rows per problem that answer without a strategy."}
    )
    strategy_column: str | None = field(
        default=None,
        metadata={"help": "Column with a strategy for each problem, which `num_bank_rollouts` rows execute."},
    )
    class_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column with the problem class. If `None`, `problem_class` where the dataset has it, "
            "clusters of prompt embeddings where it does not."
        },
    )
    num_clusters: int = field(default=16, metadata={"help": "Number of classes to make where the dataset names none."})
    small_classes: str = field(
        default="error",
        metadata={
            "help": "Treatment of a class with fewer than K problems: `error` raises an error, `merge` joins it to "
            "the nearest class.",
            "choices": ["error", "merge"],
        },
    )
    answer_column: str = field(
        default="solution", metadata={"help": "Dataset column with the short answer, if there is one."}
    )

    # Parameters that control the two phases
    max_strategy_length: int = field(default=128, metadata={"help": "Maximum number of tokens of a strategy."})
    strategy_format: str = field(
        default="text",
        metadata={
            "help": "`text` for free text, `steps` for numbered steps with placeholders in braces.",
            "choices": ["text", "steps"],
        },
    )
    strategy_prompt: str = field(
        default="",
        metadata={
            "help": "Template of the request for a strategy, with `{problem}` and optionally `{strategies}`. If "
            "empty, the one for `strategy_format`."
        },
    )
    execution_prompt: str = field(
        default=EXECUTION_PROMPT, metadata={"help": "The turn between strategy and execution."}
    )
    merge_adapters: bool = field(
        default=True,
        metadata={"help": "Whether to merge LoRA adapters into the base weights while generating."},
    )
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Whether the request of a problem is read once for all its rows."},
    )
    worst_case_step: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to take the largest possible step before the first real one, to test whether it fits. If "
            "`None`, on accelerators."
        },
    )

    # Parameters that control rewards and credit
    correctness_weight: float = field(
        default=1.0, metadata={"help": "Weight of a strategy's outcome on its own problem."}
    )
    transfer_weight: float = field(
        default=1.0, metadata={"help": "Weight of a strategy's mean outcome on the other problems of its block."}
    )
    coherence_weight: float = field(default=0.1, metadata={"help": "Weight of a strategy's coherence, in [0, 1]."})
    leak_weight: float = field(
        default=0.5, metadata={"help": "Penalty for a strategy that contains its problem's answer."}
    )
    execution_baseline: str = field(
        default="problem",
        metadata={
            "help": "What an execution is compared with: `problem` (as in GRPO), `strategy`, or `two_way` (what "
            "remains after both effects).",
            "choices": ["problem", "strategy", "two_way"],
        },
    )
    internalize: str = field(
        default="none",
        metadata={
            "help": "How plain answers learn from guided ones: `none`, `distill` (right guided rollouts as plain "
            "answers that hold their strategy), `contrast` (a teacher compares right and wrong strategies) or `kl` "
            "(a teacher that is given the strategy shows the distribution of each token of right executions).",
            "choices": ["none", "distill", "contrast", "kl"],
        },
    )
    internalize_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of what plain answers learn. If `None`, 1 for `distill`, else 0.5."},
    )
    internalize_contrasts: int = field(
        default=4, metadata={"help": "Wrong strategies at most that `contrast` compares with the right one."}
    )
    internalize_snapshot_steps: int = field(
        default=10, metadata={"help": "Optimizer steps after which the teacher takes over the weights."}
    )
    strategy_weight: float = field(default=1.0, metadata={"help": "Factor on the advantages of strategy tokens."})

    # Parameters that control the strategy bank
    use_bank: bool = field(
        default=True,
        metadata={"help": "Whether to retrieve strategies before the strategy phase and to store good ones after."},
    )
    bank_path: str | None = field(
        default=None,
        metadata={"help": "Directory of a bank to continue. If `None`, a new `strategy_bank` in `output_dir`."},
    )
    embedding_model: str = field(
        default=DEFAULT_EMBEDDING_MODEL,
        metadata={"help": "Name or path of the sentence-transformers model that embeds problems and strategies."},
    )
    retrieve_when: str = field(
        default="always",
        metadata={
            "help": "Problems that retrieved strategies are shown with: `always`, or `plain_fails`.",
            "choices": ["always", "plain_fails"],
        },
    )
    num_retrieved: int = field(default=1, metadata={"help": "Strategies shown with each problem."})
    bank_min_lift: float = field(
        default=0.0, metadata={"help": "Lift over the block's mean on siblings a strategy needs to be stored."}
    )
    bank_capacity: int = field(default=256, metadata={"help": "Maximum number of strategies kept per class."})
    bank_min_problems: int = field(
        default=4,
        metadata={"help": "Distinct problems a strategy must be executed on before it is trusted or retired."},
    )
    bank_tolerance: float = field(
        default=0.2,
        metadata={
            "help": "Part of other strategies' success rate that a trusted strategy may fall short of it: trusted "
            "means not inferior."
        },
    )
    bank_max_share: float = field(
        default=0.25,
        metadata={"help": "Maximum share of a class's retrievals in training for one strategy."},
    )
    bank_cross_class: bool = field(
        default=False, metadata={"help": "Whether strategies of other classes are shown too."}
    )
    bank_server: str | None = field(
        default=None,
        metadata={"help": "Address of a Chroma server through which several jobs exchange strategies they trust."},
    )
    bank_sync_steps: int = field(
        default=10, metadata={"help": "Optimizer steps between two exchanges with `bank_server`."}
    )

    @property
    def own_strategies(self) -> int:
        """n, the number of strategies each problem writes."""
        return (self.num_generations - self.num_plain_rollouts - self.num_bank_rollouts) // self.transfer_block_size

    @property
    def internalize_scale(self) -> float:
        """`internalize_weight`, or its default."""
        defaults = {"none": 0.0, "distill": 1.0, "contrast": 0.5, "kl": 0.5}
        return defaults[self.internalize] if self.internalize_weight is None else self.internalize_weight

    @property
    def max_plain_length(self) -> int:
        """Tokens of a plain answer, which holds what strategy and execution hold."""
        return self.max_strategy_length + self.max_completion_length

    @property
    def geometry(self) -> BlockGeometry:
        """Shape of the transfer blocks in training."""
        K, b, m = self.transfer_block_size, self.num_bank_rollouts, self.num_plain_rollouts
        return BlockGeometry(K, self.own_strategies, b, m)

    def to_grpo(self, **changes: Any) -> GRPOConfig:
        """The settings that [`~trl.GRPOTrainer`] has too, with changes: the same training without SGPO."""
        known = {item.name for item in fields(GRPOConfig) if item.init}
        settings = {name: value for name, value in vars(self).items() if name in known}
        derived = {"generation_batch_size": None, "steps_per_generation": self.steps_per_generation}
        return _GRPOConfig(**(settings | derived | changes))

    def __post_init__(self):
        refuse("SGPOConfig", list(not_finite(vars(self))))  # before numbers are compared and rounded
        problems = [*range_problems(vars(self)), *setting_problems(vars(self), get_type_hints(SGPOConfig))]
        problems += remote_code_problems(vars(self))
        refuse("SGPOConfig", problems if self.num_generations is None else [])  # its key has no value
        self.strategy_prompt = self.strategy_prompt or default_strategy_prompt(self.strategy_format)
        # TRL's default of bf16 is refused without an accelerator unless `use_cpu` is set
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bank_path = None if self.bank_path is None else os.path.expanduser(self.bank_path)  # as `output_dir`
        self._use_new_names()
        batch_is_given = self.generation_batch_size is not None
        checks = self._check_choices, lambda: check_strategy_prompt(self.strategy_prompt), lambda: check_block(self)
        for check in checks:
            problems += _problems_of(check)
        if self.load_best_model_at_end or self.save_strategy == "best":  # transformers takes the loss, which is near 0
            self.metric_for_best_model = self.metric_for_best_model or "eval_reward"
        if not problems and not batch_is_given:
            problems += _problems_of(lambda: check_local_batch(self))
        # TRL's own checks follow from the geometry: after a problem, only those of transformers
        problems += _problems_of((super(GRPOConfig, self) if problems else super()).__post_init__)
        if not problems and batch_is_given:
            problems += _problems_of(lambda: check_generation_batch(self))
        problems += _problems_of(self._check_sampling)
        refuse("SGPOConfig", problems)

    def _check_sampling(self):
        if isinstance(self.generation_kwargs, dict):  # text in JSON, unless transformers refused it
            check_generation_kwargs(self.generation_kwargs, self.use_vllm)

    def _use_new_names(self):
        """Names of transformers for what TRL sets by its old names, of which transformers would warn."""
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if self.__dict__.get(new) is None:
                self.__dict__[new] = self.__dict__[old]

    def _check_choices(self):
        problems, b = [], self.num_bank_rollouts
        if b > 0 and not self.use_bank and self.strategy_column is None:
            problems.append(f"`num_bank_rollouts` is {b} but `use_bank` is false: set one of them to 0 or true.")
        if self.use_bank and self.num_plain_rollouts == self.num_generations:
            problems.append(
                "`num_plain_rollouts` is `num_generations`, which leaves no rows with strategies, but `use_bank` is "
                "true: set it to false, or `num_plain_rollouts` lower."
            )
        if self.bank_server is not None and not self.use_bank:
            problems.append("`bank_server` is set but `use_bank` is false: remove it, or set `use_bank` to true.")
        for name, choices in (
            ("small_classes", ("error", "merge")),
            ("strategy_format", ("text", "steps")),
            ("execution_baseline", ("problem", "strategy", "two_way")),
            ("retrieve_when", ("always", "plain_fails")),
            ("internalize", ("none", "distill", "contrast", "kl")),
        ):
            value = self.__dict__[name]
            if value not in choices:
                problems.append(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        for name, least in (
            ("bank_capacity", 1),
            ("bank_min_problems", 1),
            ("bank_sync_steps", 1),
            ("num_clusters", 1),
        ):
            if self.__dict__[name] is None or self.__dict__[name] < least:
                problems.append(f"`{name}` must be at least {least}, got {self.__dict__[name]}.")
        if not (0 <= self.bank_tolerance < 1 and 0 < self.bank_max_share <= 1):
            problems.append(
                f"`bank_tolerance` must be in [0, 1) and `bank_max_share` in (0, 1], got {self.bank_tolerance} and "
                f"{self.bank_max_share}."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            problems.append(
                "SGPO builds its outcome matrix from the weighted sum of the rewards: set "
                "multi_objective_aggregation to 'sum_then_normalize'."
            )
        refuse("SGPOConfig", problems)


def _problems_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except Exception as error:
        message = what_to_mend(error)
        if message is None:
            raise
        return error.problems if isinstance(error, SettingsError) else [message]
    return []
