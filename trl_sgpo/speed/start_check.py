"""
Which fast paths a trainer may use: those that the model, the backend and the settings allow, and whose
log-probabilities are those of the plain path (`equivalence.py`), with adapters that have an effect.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
import transformers
from peft import PeftModel
from transformers import ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..errors import ModelError
from .equivalence import PathChecks, PathDiffers, Score
from .generation_settings import COUNTED, active, needs_whole_prompts
from .learned_prompts import is_prompt_learning
from .merging import (
    ALORA,
    NOT_MERGED,
    AdapterMerge,
    adapted_layers,
    adapter_effect,
    base_of,
    is_alora,
    random_adapters,
    slower,
)


logger = transformers.utils.logging.get_logger(__name__)

PACKED, PREFIXES, DROPPED = "shares_prompts", "shares_prefixes", "drops_finished_rows"
TRIMMED, MERGED = "trims_padding", "merges_adapters"

_CONSEQUENCES = {
    PACKED: "Rows of a prompt are trained apart",
    PREFIXES: "Prompts are read for each row in generation",
    DROPPED: "Finished rows stay in the batch",
    TRIMMED: "Micro-batches keep all padding",
    MERGED: NOT_MERGED,
}
_ZERO3 = "with DeepSpeed ZeRO-3 no rank has the weights that a check of the path needs"


def log_slower(refusals: dict[str, str]) -> None:
    """Logs a line for each path that is not used, or one for both uses of shared prompts if the reason is the same."""
    lines = {_CONSEQUENCES[path]: reason for path, reason in refusals.items()}
    if PACKED in refusals and refusals[PACKED] == refusals.get(PREFIXES):
        reason = refusals[PACKED]
        lines = {"Rows of a prompt are trained and generated apart": reason} | {
            line: other for line, other in lines.items() if other != reason
        }
    for line, reason in lines.items():
        logger.warning(slower(line, reason))


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


class StartCheck:
    """
    Compares the fast paths of a trainer with its plain path.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        score (`Callable`):
            Scores rows as it does in training, see [`~trl_sgpo.speed.equivalence.Score`].
        adapters ([`~trl_sgpo.speed.merging.AdapterMerge`], *optional*):
            Its adapters, if they can be merged.
    """

    def __init__(self, trainer: GRPOTrainer, score: Score, adapters: AdapterMerge | None):
        self.trainer, self.adapters = trainer, adapters
        self.starts = trainer.state.global_step == 0
        self.model, self.effect = trainer.model, 0.0
        self.checks = PathChecks(self.model, score, trainer.temperature, self._computes_in_float32())

    @torch.no_grad()
    def refusals(self, paths: Collection[str]) -> dict[str, str]:
        """
        Why paths cannot be used.

        Args:
            paths (`Collection[str]`):
                The paths that would be used.

        Returns:
            `dict[str, str]`: The reason for each path that cannot be used.

        Raises:
            [`ModelError`]: At the start, if training cannot compute the model's log-probabilities, or computes others
                than it has.
        """
        checks: dict[str, Callable[[], None]] = {
            MERGED: self._check_merged,
            TRIMMED: self._check_trimmed,
            PACKED: self._check_packed,
            DROPPED: self._check_dropped,
            PREFIXES: self._check_prefixes,
        }
        if is_deepspeed_zero3_enabled():
            return {PACKED: _ZERO3} if PACKED in paths else {}
        training, kwargs = self.model.training, self.trainer.args.gradient_checkpointing_kwargs
        self.model.eval()
        found: dict[str, str] = {}
        try:
            with ExitStack() as stack:
                stack.enter_context(disable_gradient_checkpointing(self.model, kwargs))
                if reason := self._reason(lambda: self._compute_plain(stack)):
                    if not self.starts or self._sharded():  # where weights may be NaN, or not all on a rank
                        return dict.fromkeys(paths, reason)
                    raise ModelError(
                        f"TRL cannot train {type(base_of(self.model)).__name__} with these settings, because it "
                        f"multiplies hidden states with `lm_head.weight` itself: {reason}. Use another model, or "
                        "train other modules of it."
                    )
                for path in filter(paths.__contains__, checks):
                    if path == PREFIXES and DROPPED in paths and DROPPED not in found:
                        continue  # it has been compared together with the other
                    if reason := self._reason(checks[path]):
                        found[path] = reason
        finally:
            self.model.train(training)
        if PREFIXES in found:
            found.pop(DROPPED, None)  # which needs it
        if MERGED in found and self.adapters is not None:
            self.adapters.free()
        return found

    def _compute_plain(self, stack: ExitStack) -> None:
        """
        Computes what the paths are compared with, with random adapters in the rest of a block if needed. At the start
        it is compared with the model's own logits itself.
        """
        self.checks.compute_expected()
        if self.starts and not self._sharded():
            self.checks.own_logits()
        if isinstance(self.model, PeftModel) and adapted_layers(self.model) and not self._sharded():
            self.effect = adapter_effect(self.model, self.checks.expected, self.checks.plain)
            if self.effect == 0:
                stack.enter_context(random_adapters(self.model))
                self.checks.compute_expected()

    def _reason(self, check: Callable[[], None]) -> str | None:
        try:
            check()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except PathDiffers as difference:
            return str(difference)
        except Exception as error:  # of a model's own code, which may assert or divide too
            name = type(base_of(self.model)).__name__
            return f"{name} raises {(str(error) or type(error).__name__).splitlines()[0]!r}"
        return None

    def _sharded(self) -> bool:
        return self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled

    def _computes_in_float32(self) -> bool:
        args, base = self.trainer.args, base_of(self.model)
        mixed = args.bf16 or args.fp16 or self.trainer.accelerator.mixed_precision != "no"  # a launcher's, too
        return base.dtype == torch.float32 and not mixed and "quantization_config" not in vars(base.config)

    # A check of each path

    def _check_merged(self) -> None:
        assert self.adapters is not None
        self.checks.merged_adapters(self.adapters, self.effect)

    def _check_trimmed(self) -> None:
        self.checks.trimmed_padding()

    def _check_packed(self) -> None:
        self._check_layers(("sdpa",))
        if self.trainer.aux_loss_enabled:
            raise PathDiffers("the router's loss counts the tokens of each row")
        self.checks.packed_rows()

    def _check_prefixes(self) -> None:
        self._check_generation(drop_finished=False)

    def _check_dropped(self) -> None:
        settings = self.trainer.generation_config, base_of(self.model).generation_config
        if counted := active(COUNTED, *settings):
            raise PathDiffers(f"{quoted(counted)} counts from where a call starts")
        self._check_generation(drop_finished=True)

    def _check_generation(self, drop_finished: bool) -> None:
        self._check_layers(("sdpa", "eager"))
        if settings := needs_whole_prompts(self.trainer.generation_config, base_of(self.model).generation_config):
            raise PathDiffers(f"this does not work with the generation setting {quoted(settings)}")
        self.checks.generation(drop_finished)

    def _check_layers(self, attention: tuple[str, ...]) -> None:
        config = self.model.config.get_text_config()
        kinds = set(vars(config).get("layer_types") or ()) - {"full_attention", "sliding_attention"}
        if isinstance(self.trainer.processing_class, ProcessorMixin):
            raise PathDiffers("the model has a processor, which may add images to a prompt")
        if kinds or base_of(self.model)._is_stateful:
            raise PathDiffers(f"layers without a KV cache of single tokens ({', '.join(kinds) or 'recurrent'})")
        if is_prompt_learning(self.model):
            raise PathDiffers("prompt learning puts virtual tokens before a prompt")
        if is_alora(self.model):
            raise PathDiffers(ALORA)
        if config._attn_implementation not in attention:
            raise PathDiffers(f"this needs `attn_implementation: sdpa`, and it is {config._attn_implementation}")
