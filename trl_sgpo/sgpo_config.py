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
from .errors import ConfigError, SettingsError, refuse
from .method.prompts import EXECUTION_PROMPT, check_strategy_prompt, default_strategy_prompt
from .method.sampling import check_generation_kwargs


class _GRPOConfig(WithoutSecrets, GRPOConfig):
    """It shows no secrets to trackers of runs."""


@dataclass(repr=False)
class SGPOConfig(WithoutSecrets, GRPOConfig):
    r"""
    Configuration class for the [`SGPOTrainer`].

    Inherited parameters keep their meaning. `max_completion_length` limits the **execution** (the strategy has
    `max_strategy_length`), `mask_truncated_completions` masks each of both by its own end, `shuffle_dataset=False`
    keeps the order within each class, and `num_generations` counts the executions of a problem, `n * K + b`: `n` with
    its own strategies, `n * (K - 1)` borrowed from the other problems of its block, `b` from the bank.

    Parameters:
        > Parameters that control the transfer blocks

        transfer_block_size (`int`, *optional*, defaults to `2`):
            K, the number of problems of one class that execute each other's strategies. `1` switches transfer off.
        num_bank_rollouts (`int`, *optional*, defaults to `0`):
            b, executions per problem of strategies drawn from the bank, which test candidates. While the bank
            holds fewer than b strategies for a class, the block's own are executed again.
        per_device_train_batch_size (`int`, *optional*, defaults to `16`):
            Rows per device and forward pass. Times `gradient_accumulation_steps`, or `steps_per_generation`, they hold
            whole blocks of K * `num_generations` rows.
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
        return (self.num_generations - self.num_bank_rollouts) // self.transfer_block_size

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
        self._use_new_names()
        batch_is_given = self.generation_batch_size is not None
        for check in (self._check_choices, lambda: check_strategy_prompt(self.strategy_prompt), self._check_geometry):
            problems += _problems_of(check)
        if not problems and not batch_is_given:
            problems += _problems_of(self._check_local_batch)
        # TRL's own checks follow from the geometry: after a problem, only those of transformers
        problems += _problems_of((super(GRPOConfig, self) if problems else super()).__post_init__)
        if not problems and batch_is_given:
            problems += _problems_of(self._check_generation_batch)
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

    def _check_geometry(self):
        K, G, b = self.transfer_block_size, self.num_generations, self.num_bank_rollouts
        if K < 1 or b < 0:
            raise ConfigError(
                f"`transfer_block_size` must be at least 1 and `num_bank_rollouts` at least 0, got {K} and {b}."
            )
        own = G - b
        fit = max(own - own % K, K, 2) + b
        if own < K or own % K:
            single = K > 1 and own >= 2 and self.execution_baseline == "problem"
            raise ConfigError(
                f"num_generations ({G}) must be n * transfer_block_size ({K}) + num_bank_rollouts ({b}) with n >= 1: "
                f"set num_generations to {fit} or {fit + K}{', or transfer_block_size to 1' if single else ''}."
                f"{self._batch_of(fit)}{self._batch_of(fit + K)}"
            )
        if own < 2:
            raise ConfigError(
                f"A block needs at least 2 strategies to compare, but num_generations ({G}) - num_bank_rollouts "
                f"({b}) leaves {own}: set num_generations to {fit}.{self._batch_of(fit)}"
            )
        n, more = own // K, f"set num_generations to {2 * K + b}"
        if K > 1 and n == 1 and self.transfer_weight == 0 and self.correctness_weight != 0:
            raise ConfigError(
                "`transfer_weight` is 0 and each problem writes one strategy, which can be compared with those of "
                f"other problems only, and that rewards transfer: {more}, or set transfer_block_size to 1, or "
                "transfer_weight above 0."
            )
        if K > 1 and G - n == 1 and self.correctness_weight == 0 and self.transfer_weight != 0:
            raise ConfigError(
                "`correctness_weight` is 0 and each problem executes one borrowed strategy, which can be compared "
                f"with its own only, and that rewards correctness: {more}, or set correctness_weight above 0."
            )
        if K == 1 and self.execution_baseline != "problem":
            raise ConfigError(
                f"execution_baseline={self.execution_baseline!r} needs strategies executed on several problems: set "
                "transfer_block_size to 2 or more, or execution_baseline to 'problem'."
            )

    def _batch_of(self, generations: int) -> str:
        """What batches lack for another value of `num_generations`, so that one message names all changes."""
        block, steps = self.transfer_block_size * generations, self.steps_per_generation
        rows = self.per_device_train_batch_size * (steps or self.gradient_accumulation_steps)
        text = ""
        if self.generation_batch_size is None and rows % block:
            name = "gradient_accumulation_steps" if steps is None else "steps_per_generation"
            text += (
                f" With {generations}, per_device_train_batch_size * {name} ({rows}) must be a multiple of {block}."
            )
        evaluated = self.num_generations_eval or generations
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % evaluated:
            text += (
                f" With {generations}, per_device_eval_batch_size ({self.per_device_eval_batch_size}) must be a "
                f"multiple of {evaluated}."
            )
        return text

    def _check_choices(self):
        problems, b = [], self.num_bank_rollouts
        if b > 0 and not self.use_bank:
            problems.append(f"`num_bank_rollouts` is {b} but `use_bank` is false: set one of them to 0 or true.")
        if self.bank_server is not None and not self.use_bank:
            problems.append("`bank_server` is set but `use_bank` is false: remove it, or set `use_bank` to true.")
        for name, choices in (
            ("small_classes", ("error", "merge")),
            ("strategy_format", ("text", "steps")),
            ("execution_baseline", ("problem", "strategy", "two_way")),
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

    def _check_local_batch(self):
        """Checked before TRL does, whose message names no fix."""
        rows = self.per_device_train_batch_size
        per_generation = self.steps_per_generation or self.gradient_accumulation_steps
        name = "gradient_accumulation_steps" if self.steps_per_generation is None else "steps_per_generation"
        if missing := self._missing_rows(rows * per_generation):
            raise self._no_whole_blocks(
                f"per_device_train_batch_size ({rows}) * {name} ({per_generation}) = {rows * per_generation}",
                f"set per_device_train_batch_size or {name} so that it is {rows * per_generation + missing}",
            )

    def _check_generation_batch(self):
        """Checked after TRL, which finds the number of devices."""
        total, devices = self.generation_batch_size, self.world_size
        if missing := self._missing_rows(total // devices):
            raise self._no_whole_blocks(
                f"generation_batch_size ({total}) / number of devices ({devices}) = {total // devices}",
                f"set generation_batch_size to {total + missing * devices}",
            )

    def _missing_rows(self, local: int) -> int:
        return -local % (self.transfer_block_size * self.num_generations)

    def _no_whole_blocks(self, local: str, fix: str) -> ConfigError:
        K, G = self.transfer_block_size, self.num_generations
        return ConfigError(
            f"One device generates {local} rows at a time, which must be a multiple of transfer_block_size ({K}) * "
            f"num_generations ({G}) = {K * G}, so that a block stays on one device: {fix}."
        )


def _problems_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except Exception as error:
        message = what_to_mend(error)
        if message is None:
            raise
        return error.problems if isinstance(error, SettingsError) else [message]
    return []
