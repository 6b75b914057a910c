"""Estimates the peak memory of training with a recipe, by part, without weights and without a GPU."""

import copy
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig
from trl import get_peft_config

from ..errors import ConfigError
from ..internalize.divergence import PIECE, PIECE_BYTES
from ..method.context_length import shown_strategies
from ..recipe import Recipe
from ..sgpo_config import SGPOConfig
from ..speed.shared_prompts import within_window
from .simulate import SimulatedModel, Weights


GIB = 2**30
HEADROOM = 0.05
"""Part of a GPU's memory that must stay free for a recipe to fit."""

CONTEXT = 600 * 2**20
"""Bytes of the CUDA context and of the workspaces of its libraries. Assumed, not measured."""

FRAGMENTATION = 0.1
"""Bytes that CUDA's allocator holds beyond those in use, for a byte that is not a weight. Assumed, not measured."""

PROBLEM_TOKENS = 256
"""Assumed tokens of the longest problem: few problems of GSM8K have more."""

_MARKS = 16  # tokens that a chat template, or the list of retrieved strategies, adds to a text


@dataclass(frozen=True)
class Lengths:
    """
    Tokens of the longest row.

    Args:
        request (`int`):
            The request for a strategy, with the problem and retrieved strategies.
        strategy (`int`):
            The strategy.
        turn (`int`):
            The turn between strategy and execution.
        execution (`int`):
            The execution.
    """

    request: int
    strategy: int
    turn: int
    execution: int

    @property
    def completion(self) -> int:
        return self.strategy + self.turn + self.execution


@dataclass(frozen=True)
class Estimate:
    """
    Peak memory of a training run on one device, in bytes.

    Args:
        parts (`dict[str, int]`):
            Memory at the peak, by part.
        moments (`dict[str, int]`):
            Total at each moment of a step, the largest of which is the peak.
        on_host (`dict[str, int]`):
            Host memory, by part.
        parameters (`int`), trained (`int`):
            Parameters of the base model, and those that are trained.
        lengths ([`Lengths`]):
            The lengths assumed.
        notes (`list[str]`):
            What is assumed, or not included.
    """

    parts: dict[str, int]
    moments: dict[str, int]
    on_host: dict[str, int]
    parameters: int
    trained: int
    lengths: Lengths
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)

    def fits(self, vram_gb: float) -> bool:
        """Whether it leaves 5% of the memory free."""
        return self.peak <= (1 - HEADROOM) * vram_gb * GIB

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "moment": self.moment}


def assumed_lengths(recipe: Recipe) -> Lengths:
    """
    Estimates the lengths of the longest row without tokenizer and data.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe. Without `max_problem_tokens`, its longest problem is taken to have 256 tokens.
    """
    args = recipe.training
    problem = recipe.script.max_problem_tokens or PROBLEM_TOKENS
    return Lengths(
        request=problem + _MARKS + _asking_tokens(args),
        strategy=args.max_strategy_length,
        turn=_tokens(args.execution_prompt) + _MARKS,
        execution=args.max_completion_length,
    )


def _asking_tokens(args: SGPOConfig) -> int:
    """Tokens that ask for a strategy, and those of the strategies that are shown."""
    return _tokens(args.strategy_prompt) + shown_strategies(args) * (args.max_strategy_length + _MARKS)


def _tokens(text: str) -> int:
    return len(text.split()) * 3 // 2


def rows_of_problems(rows: int, group: int) -> tuple[int, ...]:
    """
    Finds the micro-batch with the most problems.

    Args:
        rows (`int`):
            `per_device_train_batch_size`.
        group (`int`):
            `num_generations`.

    Returns:
        `tuple[int, ...]`: Number of rows of each of its problems.
    """
    most: tuple[int, ...] = ()
    for first in range(0, group * rows, rows):  # micro-batches, until one starts at a group's first row again
        problems = [row // group for row in range(first, first + rows)]
        counts = tuple(problems.count(problem) for problem in dict.fromkeys(problems))
        most = max(most, counts, key=len)
        if (first + rows) % group == 0:
            break
    return most


class _Architecture:
    """A model of any depth, extrapolated from models of few layers: each layer of a kind adds the same."""

    def __init__(self, config: PreTrainedConfig, settings: dict[str, Any]):
        text = config.get_text_config()
        kinds = list(vars(text).get("layer_types") or ["layer"] * text.num_hidden_layers)
        self.counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        first = [kinds.index(kind) for kind in self.counts]
        self.base = SimulatedModel(_with_layers(config, first), **settings)
        self.deeper = {
            kind: SimulatedModel(_with_layers(config, [*first, kinds.index(kind)]), **settings)
            for kind, count in self.counts.items()
            if count > 1
        }
        self.of_layers = cache(self._of_layers)

    def _of_layers(self, method: str, *arguments: Any) -> dict[str, int]:
        base = self._figures(self.base, method, arguments)
        total = dict(base)
        for kind, model in self.deeper.items():
            for name, value in self._figures(model, method, arguments).items():
                total[name] += (self.counts[kind] - 1) * (value - base[name])
        return total

    def _figures(self, model: SimulatedModel, method: str, arguments: tuple[Any, ...]) -> dict[str, int]:
        if method == "weights":
            return {item.name: vars(model.weights)[item.name] for item in fields(Weights)}
        return model.training(*arguments) if method == "training" else model.generation(*arguments)


def _with_layers(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    depth = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    return changed


class Estimator:
    """
    Estimates recipes of one model. Simulations are cached, so that a changed recipe reuses those it shares.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's config.
        device (`str`, *optional*, defaults to `"cuda"`):
            `"cuda"` or `"cpu"`. On a CPU only tensors are counted, not the memory of Python and its libraries.
    """

    def __init__(self, config: PreTrainedConfig, device: str = "cuda"):
        self.config, self.device = config, device
        self.architectures: dict[str, _Architecture] = {}

    def __call__(self, recipe: Recipe, lengths: Lengths) -> Estimate:
        args, model = recipe.training, recipe.model
        if args.use_vllm:
            raise ConfigError("Memory is estimated for generation with transformers: set `use_vllm` to false.")
        settings = _settings(recipe, self.config, self.device)
        architecture = self._architecture(settings)
        weights = Weights(**architecture.of_layers("weights"))
        share = shares_prompts(recipe, self.config)
        whole = lengths.request + lengths.completion

        rows = args.per_device_train_batch_size
        apart = not share or settings["attention"] != "sdpa" or not within_window(self.config, whole)
        problems = (1,) * rows if apart else rows_of_problems(rows, args.num_generations)
        own = min(rows, -(-rows // args.num_generations) * args.own_strategies)  # borrowed strategies are not trained
        scored = own * lengths.strategy + rows * lengths.execution
        training = architecture.of_layers(
            "training", problems, lengths.request, lengths.completion, scored, args.gradient_checkpointing
        )
        taught = self._taught(architecture, recipe, lengths, apart)
        written, executed = self._generation(architecture, recipe, lengths, share)

        states = optimizer_bytes(str(args.optim), weights)
        reference = weights.base if args.beta > 0 and not model.use_peft else 0
        resident = {
            "weights": weights.base + reference,
            "quantization constants": weights.constants,
            "adapters": weights.adapters,
            "teacher": weights.gradients if args.internalize in ("contrast", "kl") else 0,  # a copy of what is trained
        }
        kept = weights.mergeable if model.use_peft and args.merge_adapters else 0
        if self.device == "cpu":
            resident[_RESTORED] = kept
        moments: dict[str, dict[str, int]] = {
            "strategies": {"optimizer states": states, **_generation_parts(written, "KV cache of strategies")},
            "executions": {"optimizer states": states, **_generation_parts(executed, "KV cache of executions")},
            "training": {"optimizer states": states, "gradients": weights.gradients, **_training_parts(training)},
            "optimizer step": {"optimizer states": states, "gradients": weights.gradients},
        }
        if taught is not None:
            parts = {"optimizer states": states, "gradients": weights.gradients, **_training_parts(taught)}
            if args.internalize == "kl":
                parts["tiles of logits"] = min(PIECE_BYTES, PIECE_BYTES // PIECE * rows * lengths.execution)
            moments["plain answers"] = parts
        totals = {}
        for name, parts in moments.items():
            moving = sum(parts.values()) + resident["adapters"]
            if self.device == "cuda":
                parts["fragmentation"] = int(FRAGMENTATION * moving)
                parts["CUDA context"] = CONTEXT
            totals[name] = sum(resident.values()) + sum(parts.values())
        peak = max(totals, key=totals.__getitem__)
        return Estimate(
            parts={**resident, **moments[peak]},
            moments=totals,
            on_host={
                "the embedder and the bank": _EMBEDDER if args.use_bank else 0,
                _RESTORED: 0 if self.device == "cpu" else kept,
            },
            parameters=weights.parameters,
            trained=weights.trained,
            lengths=lengths,
            notes=_notes(recipe),
        )

    def _taught(
        self, architecture: _Architecture, recipe: Recipe, lengths: Lengths, apart: bool
    ) -> dict[str, int] | None:
        """The pass over plain answers that learn from guided ones, `None` without one."""
        args = recipe.training
        rows, group = args.per_device_train_batch_size, args.num_generations
        problem = max(lengths.request - _asking_tokens(args), 1)
        if args.internalize == "distill":
            answer = lengths.strategy + lengths.execution
            counts = tuple(min(args.own_strategies, count) for count in rows_of_problems(rows, group))
        elif args.internalize == "kl":
            answer, apart = lengths.execution, True
            counts = tuple(min(group - args.num_plain_rollouts, count) for count in rows_of_problems(rows, group))
        else:
            return None
        problems = (1,) * sum(counts) if apart else counts
        checkpointing = args.gradient_checkpointing
        return architecture.of_layers("training", problems, problem, answer, sum(counts) * answer, checkpointing)

    def _architecture(self, settings: dict[str, Any]) -> _Architecture:
        key = repr(settings)
        if key not in self.architectures:
            self.architectures[key] = _Architecture(self.config, settings)
        return self.architectures[key]

    def _generation(
        self, architecture: _Architecture, recipe: Recipe, lengths: Lengths, share: bool
    ) -> tuple[dict[str, int], dict[str, int]]:
        args = recipe.training
        rows = args.per_device_train_batch_size * (args.steps_per_generation or args.gradient_accumulation_steps)
        problems = rows // args.num_generations
        sampling = _SAMPLING_BYTES + (_SORTING_BYTES if args.top_p < 1 else 0)
        phases = (
            (problems * args.own_strategies, 0, lengths.strategy, True),
            (rows, lengths.strategy + lengths.turn, lengths.execution, False),
        )
        results = []
        for count, more, new, keep in phases:
            ahead = share and within_window(self.config, lengths.request + more + new)
            head, rest = (lengths.request - 1, more + 1) if ahead else (0, lengths.request + more)
            results.append(
                architecture.of_layers("generation", count, problems if ahead else 0, head, rest, new, sampling, keep)
            )
        return results[0], results[1]


_RESTORED = "base weights to restore after generation"
_EMBEDDER = 200 * 2**20  # MiniLM and a bank of thousands of strategies
# Logits, their copy in 32 bits, probabilities, and for log-probabilities two copies more
_SAMPLING_BYTES = 2 + 4 + 4 + 2 * 4
_SORTING_BYTES = 4 + 8 + 4 + 4


def _generation_parts(moments: dict[str, int], name: str) -> dict[str, int]:
    kept = moments["cache"]
    peak = max(value for moment, value in moments.items() if moment != "cache")
    return {name: kept, "work of generation": max(peak - kept, 0)}


def _training_parts(moments: dict[str, int]) -> dict[str, int]:
    """The LM head's share is the memory that its peak adds to the hidden states."""
    peak = max(moments.values())
    head = max(moments["head"] - moments["forward"], 0)
    return {"activations": peak - head, "logits": head}


def _settings(recipe: Recipe, config: PreTrainedConfig, device: str) -> dict[str, Any]:
    model, args = recipe.model, recipe.training
    init = args.model_init_kwargs or {}
    dtype = init.get("dtype", model.dtype)
    if dtype == "auto":
        dtype = config.dtype or "float32"
    dtype = dtype if isinstance(dtype, torch.dtype) else vars(torch)[str(dtype).removeprefix("torch.")]
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else 16
    peft = get_peft_config(model)
    if peft is not None and not isinstance(peft, LoraConfig):
        raise ConfigError("Memory is estimated for LoRA and for full fine-tuning.")
    attention = init.get("attn_implementation", model.attn_implementation) or "sdpa"
    return {
        "dtype": dtype,
        "autocast": autocast,
        "bits": bits,
        "double_quantization": model.use_bnb_nested_quant,
        "lora": peft,
        "attention": "eager" if attention == "eager" else "sdpa",
        "triton": device == "cuda",
    }


def shares_prompts(recipe: Recipe, config: PreTrainedConfig) -> bool:
    """Whether the trainer computes a problem's request once for all its rows."""
    settings = vars(config.get_text_config())
    attention = recipe.model.attn_implementation or "sdpa"
    return (
        recipe.training.share_prompts
        and attention in ("sdpa", "eager")
        and set(settings.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}
        and not settings.get("alibi")
    )


def optimizer_bytes(optimizer: str, weights: Weights) -> int:
    """
    Bytes of an optimizer's states. Paged states, which can be moved to host memory, are counted as well.

    Args:
        optimizer (`str`):
            `optim` of the recipe.
        weights ([`~trl_sgpo.vram.simulate.Weights`]):
            The trained weights.
    """
    name = optimizer.rsplit(".", 1)[-1].casefold()
    states = 1 if "lion" in name or "rmsprop" in name else 0 if name in ("sgd", "adafactor") else 2
    if "8bit" in name:
        return int(states * weights.trained * (1 + 4 / 256))
    return states * (4 * weights.trained if "bnb" in name or "paged" in name else weights.gradients)


def _notes(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.script.reward_model_name_or_path:
        notes.append(f"The reward model {recipe.script.reward_model_name_or_path} is not included.")
    if recipe.training.deepspeed or recipe.training.fsdp:
        notes.append("Weights are counted as if they were not sharded.")
    return notes
