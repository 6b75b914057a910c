"""
Memory that a model's forward and backward passes allocate, measured by running them on tensors without data.

The model is built from its config and run as transformers, peft and torch would run it, under `FakeTensorMode`: shapes
and lifetimes of all tensors are real, but they have no content. So no architecture needs formulas.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig
from transformers.initialization import no_init_weights
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from ..speed.generation import rows_at_a_time
from ..speed.row_cache import RowCache
from ..speed.shared_prompts import SharedPrompts, packed_attention, share_prompts


@dataclass(frozen=True)
class Weights:
    """
    Memory of a model's weights and gradients, in bytes.

    Args:
        parameters (`int`):
            Number of parameters of the base model.
        base (`int`):
            Base weights and buffers.
        constants (`int`):
            Scaling constants of 4-bit or 8-bit weights.
        adapters (`int`):
            LoRA weights.
        trained (`int`):
            Number of trained parameters.
        gradients (`int`):
            Their gradients.
        mergeable (`int`):
            Base weights that adapters can be merged into.
    """

    parameters: int
    base: int
    constants: int
    adapters: int
    trained: int
    gradients: int
    mergeable: int


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that operations allocate. Those that they are given are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tree_map_only(torch.Tensor, lambda tensor: self.seen.add(tensor.untyped_storage()), (args, kwargs))
        result = func(*args, **kwargs)
        tree_map_only(torch.Tensor, self._note, result)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size

    def moment(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


class _Dequantized(torch.autograd.Function):
    """A matrix product with quantized weights, dequantized in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return torch.nn.functional.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty_like(ctx.weight), None, None


class _QuantizedLinear(torch.nn.Linear):
    def forward(self, x):
        return _Dequantized.apply(x.to(self.weight.dtype), self.weight, self.bias)


class _TritonHead(torch.autograd.Function):
    """Allocates the memory of TRL's chunked log-probabilities with their Triton kernel."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        _tile(hidden)
        return hidden.new_empty(hidden.size(0), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tile(hidden)
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype)


def _tile(hidden: torch.Tensor) -> None:
    hidden.new_empty(min(hidden.size(0), TOKEN_CHUNK_SIZE), _CHUNKED_LOGPROB_CHUNK_SIZE)


class SimulatedModel:
    """
    A causal language model without data.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Its config.
        dtype (`torch.dtype`):
            Data type it is loaded in.
        autocast (`torch.dtype`, *optional*):
            Data type of mixed precision.
        bits (`int`, *optional*, defaults to `16`):
            4 or 8 for quantized weights.
        double_quantization (`bool`, *optional*, defaults to `False`):
            Whether the constants of 4-bit weights are quantized, too.
        lora ([`~peft.LoraConfig`], *optional*):
            Adapters. If `None`, all parameters are trained.
        attention (`str`, *optional*, defaults to `"sdpa"`):
            Attention implementation, `"sdpa"` or `"eager"`.
        triton (`bool`, *optional*, defaults to `True`):
            Whether the LM head is computed as on a GPU.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
        bits: int = 16,
        double_quantization: bool = False,
        lora: LoraConfig | None = None,
        attention: str = "sdpa",
        triton: bool = True,
    ):
        self.config, self.autocast, self.triton = config, autocast, triton
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=dtype, attn_implementation=attention
            )
        model.tie_weights()
        self.base = model
        head = model.get_output_embeddings()
        parameters = sum(weight.numel() for weight in model.parameters())
        quantized = [
            module
            for module in model.modules()
            if bits < 16 and isinstance(module, torch.nn.Linear) and module is not head
        ]
        for module in quantized:
            module.__class__ = _QuantizedLinear
        packed = sum(module.weight.numel() for module in quantized)
        resident = sum(map(_nbytes, [*model.parameters(), *model.buffers()]))
        unpacked = sum(_nbytes(module.weight) for module in quantized)
        if bits == 4:
            # One constant of 32 bits for 64 weights, or of 8 bits and one of 32 bits for 256 of those
            constants = sum(
                -(-module.weight.numel() // 64) * (1 + 4 / 256 if double_quantization else 4) for module in quantized
            )
        else:
            constants = sum(4 * module.out_features for module in quantized)
        mergeable = 0
        if lora is not None:
            with torch.device("meta"):
                model = get_peft_model(model, copy.deepcopy(lora))  # peft adds the module names that it finds
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            mergeable = 0 if quantized else sum(_nbytes(layer.get_base_layer().weight) for layer in layers)
        self.model = model
        # peft keeps adapters in 32 bits, TRL casts those of quantized models to bfloat16, float16 training casts back
        adapter_dtype = torch.bfloat16 if bits < 16 and autocast != torch.float16 else torch.float32
        self.mode = FakeTensorMode()
        with self.mode:
            _without_data(model, adapter_dtype if lora is not None else None)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.weights = Weights(
            parameters=parameters,
            base=resident - unpacked + packed * bits // 8,
            constants=int(constants),
            adapters=sum(map(_nbytes, trained)) if lora is not None else 0,
            trained=sum(weight.numel() for weight in trained),
            gradients=sum(map(_nbytes, trained)),
            mergeable=mergeable,
        )

    def training(
        self, problems: tuple[int, ...], request: int, completion: int, scored: int, checkpointing: bool
    ) -> dict[str, int]:
        """
        Memory of one forward and backward pass, in addition to weights and gradients.

        Args:
            problems (`tuple[int, ...]`):
                Number of rows of each problem, which share its request.
            request (`int`), completion (`int`):
                Tokens of a row.
            scored (`int`):
                Tokens that are projected onto the vocabulary.
            checkpointing (`bool`):
                Whether layers are computed again in the backward pass.

        Returns:
            `dict[str, int]`: The peak of each stage.
        """
        adapted = self.model is not self.base
        ids = torch.tensor([[n] * (request + completion) for n, rows in enumerate(problems) for _ in range(rows)])
        shared = share_prompts(ids, torch.ones_like(ids), request)
        with self.mode, packed_attention():
            for weight in self.model.parameters():
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
            self.model.train()
            if checkpointing:
                self.base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
                if adapted:
                    self.base.enable_input_require_grads()
            with _Live() as live:
                with self._autocast():
                    hidden = (
                        self._decoder(torch.zeros(ids.shape, dtype=ids.dtype))
                        if shared is None
                        else self._shared_decoder(shared)
                    )
                    forward = live.moment()
                    log_probs = self._log_probs(hidden.flatten(0, 1)[:scored].clone())
                    del hidden
                head = live.moment()
                log_probs.sum().backward()
                del log_probs
                backward = live.moment()
            if checkpointing:
                self.base.gradient_checkpointing_disable()
                if adapted:
                    self.base.disable_input_require_grads()
            for weight in self.model.parameters():
                weight.grad = None
        return {"forward": forward, "head": head, "backward": backward}

    def _log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.base.get_output_embeddings()
        if self.triton:
            return _TritonHead.apply(hidden, head.weight)
        targets = torch.zeros(hidden.size(0), dtype=torch.long)
        softcap = vars(self.config.get_text_config()).get("final_logit_softcapping")
        return ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, 1.0, ("entropy",)
        )[0]

    def generation(
        self,
        rows: int,
        prefixes: int,
        prefix_length: int,
        rest_length: int,
        new_tokens: int,
        logit_bytes: int,
        keep_prefixes: bool,
    ) -> dict[str, int]:
        """
        Memory of `generate`, in addition to weights.

        Args:
            rows (`int`):
                Sequences generated at once.
            prefixes (`int`), prefix_length (`int`):
                Number of prefixes that are computed first and shared by the rows, and their tokens. `0` shares none.
            rest_length (`int`):
                Tokens of the context after that.
            new_tokens (`int`):
                Tokens generated.
            logit_bytes (`int`):
                Bytes that sampling takes for each row and word of the vocabulary.
            keep_prefixes (`bool`):
                Whether the prefixes' KV cache is kept for later use.

        Returns:
            `dict[str, int]`: The peak of each stage, and the `cache` of keys and values as it is in the end.
        """
        self.model.eval()
        with self.mode, torch.no_grad(), _Live() as live:
            cache: Cache = DynamicCache(config=self.config.get_text_config())
            moments = {}
            if prefixes:
                prefix_cache = DynamicCache()
                self._decoder(torch.zeros(prefixes, prefix_length, dtype=torch.long), prefix_cache)
                moments["requests"] = live.moment()
                length = prefix_length + rest_length
                cache = RowCache(prefix_cache, torch.zeros(rows, dtype=torch.long), length, length + new_tokens)
                moments["copies"] = live.moment()
                if not keep_prefixes:
                    del prefix_cache
                self._read(cache, rows, rest_length - 1)
            self._next_token(rows, 1 if prefixes else rest_length, cache, logit_bytes)
            moments["contexts"] = live.moment()
            if new_tokens > 2:
                for index, layer in enumerate(cache.layers):
                    shape = (rows, layer.keys.size(1), new_tokens - 2, layer.keys.size(3))
                    cache.update(layer.keys.new_empty(shape), layer.values.new_empty(shape), index)
            self._next_token(rows, 1, cache, logit_bytes)
            moments["last token"] = live.moment()
            cached = sum(_nbytes(layer.keys) + _nbytes(layer.values) for layer in cache.layers)
        return {**moments, "cache": cached}

    def _read(self, cache: RowCache, rows: int, unread: int) -> None:
        at_a_time = rows_at_a_time(unread)
        for part, part_cache in cache.parts(at_a_time, unread):
            if unread and part.start == 0:  # no part is larger
                self._decoder(torch.zeros(min(at_a_time, rows), unread, dtype=torch.long), part_cache)

    def _next_token(self, rows: int, length: int, cache: Cache, logit_bytes: int) -> None:
        ids = torch.zeros(rows, length, dtype=torch.long)
        hidden = self._decoder(ids, cache)
        head = self.base.get_output_embeddings()
        logits = torch.nn.functional.linear(hidden[:, -1].contiguous(), head.weight, head.bias)
        torch.empty(rows * logits.size(1) * logit_bytes, dtype=torch.uint8)

    def _decoder(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        kinds = list(vars(self.config.get_text_config()).get("layer_types") or [""])
        rows, length = ids.shape
        eager = self.config.get_text_config()._attn_implementation == "eager"
        layers = [] if cache is None else cache.layers
        masks = {}
        for kind in dict.fromkeys(kinds):
            seen = layers[kinds.index(kind)].get_mask_sizes(length)[0] if layers else length
            dtype = self.base.get_input_embeddings().weight.dtype if eager else torch.bool
            masks[kind] = torch.empty(rows, 1, length, seen, dtype=dtype)
        return self.base.get_decoder()(
            input_ids=ids,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=torch.zeros_like(ids),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _shared_decoder(self, shared: SharedPrompts) -> torch.Tensor:
        tensors = {name: value for name, value in vars(shared).items() if isinstance(value, torch.Tensor)}
        shared = replace(
            shared, **{name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items()}
        )
        return self.base.get_decoder()(
            input_ids=shared.input_ids,
            attention_mask=shared.attention_mask,
            position_ids=shared.position_ids,
            shared_prompts=shared,
            use_cache=False,
        ).last_hidden_state

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            yield


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _without_data(model: torch.nn.Module, adapter_dtype: torch.dtype | None) -> None:
    """Replaces tensors on the meta device by fake CPU tensors; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    trained = tensor.requires_grad
                    dtype = adapter_dtype if trained and adapter_dtype is not None else tensor.dtype
                    new = torch.empty(tensor.shape, dtype=dtype)
                    made[id(tensor)] = torch.nn.Parameter(new, trained) if tensors is module._parameters else new
                tensors[name] = made[id(tensor)]
