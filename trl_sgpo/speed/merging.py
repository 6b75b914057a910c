"""Adapters and their base: where merging is possible, how exact it is, and how it is undone bit by bit."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import transformers
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from .learned_prompts import is_prompt_learning


logger = transformers.utils.logging.get_logger(__name__)

EXACT_SHARE = 0.1
"""Part of an adapter's effect on log-probabilities that merging may change in types coarser than float32."""

NOT_MERGED = "Adapters are not merged into the base weights for generation"

ALORA = "aLoRA adapters act from their invocation tokens on"

Score = Callable[[], torch.Tensor]
"""Returns log-probabilities of some fixed tokens."""


def slower(consequence: str, reason: str) -> str:
    """The line of the log for a fast path that is not used."""
    return f"{consequence}: {reason}. Results are the same. This is slower."


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapted_layers(model: PeftModel) -> list[BaseTunerLayer]:
    """The layers that have adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def is_alora(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model has an adapter that acts on a part of a row: from its invocation tokens on."""
    return isinstance(model, PeftModel) and any(
        config.peft_type == PeftType.LORA and config.alora_invocation_tokens for config in model.peft_config.values()
    )


def sharing_refusal(model: PeftModel) -> str | None:
    """Why merging would change more than what the adapters change, or `None`."""
    if is_alora(model):
        return ALORA
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    own = [weight for layer in adapted_layers(model) for weight in layer.get_base_layer().parameters(recurse=False)]
    if any(uses[id(weight)] > 1 for weight in own):
        return "an adapted weight belongs to another layer too, as the embeddings do that are tied to the LM head"
    return None


def merge_refusal(model: PeftModel) -> str | None:
    """Why adapters cannot be merged for a while and taken out again, or `None`."""
    for config in model.peft_config.values():
        if config.peft_type != PeftType.LORA:
            return f"{config.peft_type.value} adapters cannot be taken out again"
        if config.target_parameters or config.lora_bias:
            return "adapters on `target_parameters` or with `lora_bias` cannot be taken out again"
    if reason := sharing_refusal(model):
        return reason
    if any(layer.get_base_layer().weight.requires_grad for layer in adapted_layers(model)):
        return "the adapted weights are trained too"
    return None


class AdapterMerge:
    """
    Merges LoRA adapters while generating and restores the base weights exactly.

    Subtracting the adapters again would leave rounding errors that grow with every step, so the base weights are
    copied back from host memory, to which they are copied at the first use.

    Args:
        model ([`~peft.PeftModel`]):
            Model with the adapters.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self.layers = adapted_layers(model)
        self.base_weights: list[torch.Tensor] | None = None

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merges the adapters within the block."""
        if self.base_weights is None:
            self.base_weights = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in self.layers]
        try:
            self.model.merge_adapter()
            yield
        finally:
            self.model.unmerge_adapter()
            with torch.no_grad():
                for layer, weight in zip(self.layers, self.base_weights, strict=True):
                    layer.get_base_layer().weight.copy_(weight)

    def free(self) -> None:
        """Frees the copy of the base weights until the next use."""
        self.base_weights = None


@contextmanager
def random_adapters(model: PeftModel) -> Iterator[None]:
    """
    Adds small random numbers to the adapters within the block, because a new adapter has no effect. The adapters are
    restored bit by bit, and PyTorch's random state does not change.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {id(w): w for layer in adapted_layers(model) for w in layer.parameters() if w.requires_grad}.values()
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def adapter_effect(model: PeftModel, with_adapters: torch.Tensor, score: Score) -> float:
    """Mean change of log-probabilities by the adapters, given the log-probabilities with them."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with model.disable_adapter():
        without = score()
    for weight in model.parameters():  # PEFT makes all weights of the adapters trained afterwards
        weight.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    return (with_adapters - without).abs().mean().item()


def inexact(difference: float, effect: float) -> str:
    """Says by how much merging changes a model, see [`merge_is_exact`]."""
    share = min(1.0, difference / effect) if effect > 0 else 1.0
    return f"merging them would distort {share:.0%} of what they have learned"


def merge_is_exact(difference: float, effect: float, exact: bool) -> bool:
    """
    Whether a model with merged adapters is the policy that is trained.

    Args:
        difference (`float`):
            Mean change of log-probabilities by merging.
        effect (`float`):
            Mean change of log-probabilities by the adapters.
        exact (`bool`):
            Whether weights and computation are in float32, where merging changes nothing but rounding.
    """
    return difference <= (1e-4 + 1e-3 * effect if exact else EXACT_SHARE * effect)  # not where it is NaN


def fixed_log_probs(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Log-probabilities of the tokens of a fixed row, as the model's own forward pass gives them."""
    size = model.config.get_text_config().vocab_size
    ids = torch.tensor([[(3 + max(1, size // 48) * place) % size for place in range(48)]], device=model.device)
    log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
    return log_probs.gather(1, ids[0, 1:].unsqueeze(1))


@torch.no_grad()
def merged_where_exact(load: Callable[[], PeftModel]) -> PreTrainedModel | PeftModel:
    """
    Loads a model with adapters and merges them, unless it is quantized, or merging would make it another model.

    Args:
        load (`Callable[[], PeftModel]`):
            Loads the model. It is called again if merging has changed too much.
    """
    model = load().eval()
    if is_prompt_learning(model) or "quantization_config" in vars(model.config):
        return model
    reason = sharing_refusal(model)
    if reason is None:
        apart = fixed_log_probs(model)
        effect = adapter_effect(model, apart, lambda: fixed_log_probs(model))
        exact = base_of(model).dtype == torch.float32
        merged = model.merge_and_unload()
        difference = (fixed_log_probs(merged) - apart).abs().mean().item()
        if merge_is_exact(difference, effect, exact):
            return merged
        del model, merged
        reason, model = inexact(difference, effect), load()
    logger.warning(slower(NOT_MERGED, reason))
    return model
