"""A model outside training: it writes strategies, executes them, or answers at once, in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from ..errors import ModelError
from ..method.context_length import EXECUTION, STRATEGY, check_context_length, check_generated_length
from ..method.conversation import Conversation
from ..method.prompts import ParsedStrategy, Prompt
from ..speed.generation import left_padded
from ..speed.learned_prompts import is_prompt_learning, learned_prompt
from ..speed.merging import merged_where_exact
from .checked import checked_folder
from .loading import base_of, is_adapter, load_base
from .model_files import TOKENIZER
from .pretrained import load_adapter, load_model, load_tokenizer, loading
from .settings import TwoPhaseSettings
from .weights import require_model


if TYPE_CHECKING:
    from ..method.problem import Problem

Stream = Callable[[str], None]


@dataclass(frozen=True)
class Decoding:
    """
    How tokens are chosen.

    Args:
        greedy (`bool`, *optional*, defaults to `True`):
            Whether to take the likeliest token. If `False`, tokens are sampled.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that is sampled from.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42


class _Streamer(TextStreamer):
    """Passes on the text of one sequence while it is generated."""

    def __init__(self, tokenizer: Any, stream: Stream):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._stream(text)


def _own_generation(config: GenerationConfig, name: str) -> GenerationConfig:
    """What counts of a model's own settings of generation: its tokens. The others are those of training."""
    tokens = {key: vars(config).get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for key, value in tokens.items():
        if not all(type(token) is int and token >= 0 for token in _as_list(value)):
            raise ModelError(f"The generation config of {name} has `{key}: {value!r}`: it must be a token.")
    return GenerationConfig(**tokens)


def _check_lengths(settings: TwoPhaseSettings, config: Any, name: str) -> None:
    positions = vars(config.get_text_config()).get("max_position_embeddings")
    for key in ("max_strategy_length", "max_completion_length"):
        length = vars(settings)[key]
        if positions is not None and length > positions:
            raise ModelError(f"`{key}` of {name} is {length}, and the model has {positions} positions: lower it.")


def _as_list(tokens: Any) -> list[Any]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]


class TwoPhaseModel:
    """
    A model that writes strategies for problems and executes them.

    The same inputs, decoding and batch size give the same texts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. It is set to evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        settings ([`TwoPhaseSettings`], *optional*):
            Prompts and limits.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts generated at a time.

    Attributes:
        generated_tokens (`int`): Tokens generated so far.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, settings: TwoPhaseSettings | None = None, batch_size: int = 32
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings or TwoPhaseSettings()
        self.batch_size = batch_size
        self.generated_tokens = 0
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def conversation(self) -> Conversation:
        """The conversation of the settings, in the model's tokens."""
        return self.settings.conversation(self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        settings: TwoPhaseSettings | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        **model_kwargs: Any,
    ) -> "TwoPhaseModel":
        """
        Loads a model, or an adapter with its base model, which is quantized as in training.

        Args:
            name (`str`):
                A directory or Hub id.
            settings ([`TwoPhaseSettings`], *optional*):
                Prompts and limits. If `None`, those saved beside the model.
            batch_size (`int`, *optional*, defaults to `32`):
                Texts generated at a time.
            device (`str` or `torch.device`, *optional*):
                Where to run. If `None`, the accelerator, if there is one.
            **model_kwargs:
                Passed on to `from_pretrained`, such as `dtype` or `quantization_config`, with precedence over the
                values saved with an adapter.

        Raises:
            [`ModelError`]: There are no such weights.
        """
        directory = require_model(name)
        saved = TwoPhaseSettings.load(directory)
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()

        def load() -> Any:
            if is_adapter(directory):
                model = load_adapter(load_base(weights, saved.trained_on, **{**model_kwargs, **place}), directory)
            else:
                model = load_model(weights, **{**model_kwargs, **place})
            model.generation_config = _own_generation(model.generation_config, name)
            return model if device is None or _is_quantized(model) else model.to(device)

        try:
            weights = base_of(directory) if is_adapter(directory) else directory
            place = _place_of(weights, model_kwargs)
            model = merged_where_exact(load) if is_adapter(directory) else load()
            _check_lengths(saved, model.config, name)
            own = is_adapter(directory) and any(Path(directory, file).is_file() for file in TOKENIZER)
            tokenizer = load_tokenizer(directory) if own else load_tokenizer(weights, **place)
            loaded = cls(model, tokenizer, settings or saved, batch_size)
            with loading(name):
                loaded._generate_batch([[0]], GenerationConfig(max_new_tokens=1, pad_token_id=0), None)
        except (OSError, ValueError) as error:
            raise ModelError(f"The model {name} cannot be loaded: {error}") from error
        return loaded

    def check_room(
        self,
        prompts: Sequence[Prompt],
        shown: int = 0,
        phases: Sequence[str] = (STRATEGY, EXECUTION),
        plain: bool = False,
    ) -> None:
        """
        Checks before long work that the model has positions for all that prompts can lead to, see
        [`~trl_sgpo.method.context_length.check_context_length`].

        Args:
            prompts (`Sequence[str | list[dict]]`):
                All problems.
            shown (`int`, *optional*, defaults to 0):
                Strategies of a bank that are shown with a problem.
            phases (`Sequence[str]`, *optional*):
                Limits of what is generated, in order.
            plain (`bool`, *optional*, defaults to `False`):
                Whether problems are answered without a strategy, at up to the length of both phases.

        Raises:
            [`ConfigError`]: It has not. The message names the settings to lower.
        """
        settings = self.settings
        if plain:
            settings, phases = replace(settings, max_completion_length=settings.max_plain_length), [EXECUTION]
        virtual = self.model.active_peft_config.num_virtual_tokens if is_prompt_learning(self.model) else 0
        check_context_length(self.model.config, self.conversation, prompts, settings, shown, virtual, phases)

    def write_strategies(
        self,
        problems: Sequence["Problem"],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
    ) -> list[ParsedStrategy]:
        """
        Writes a strategy for each problem.

        Args:
            problems (`Sequence[Problem]`):
                Problems with the strategies retrieved for them.
            decoding ([`Decoding`], *optional*):
                How to decode, greedily by default.
            progress (`str`, *optional*):
                Name of a progress bar. None is shown by default.
            stream (`Callable[[str], None]`, *optional*):
                Called with pieces of the text while it is generated. For one problem only.

        Returns:
            `list[ParsedStrategy]`: In the order of the problems.
        """
        conversation = self.conversation
        requests = [conversation.request(problem.prompt, problem.shown) for problem in problems]
        limit = self.settings.max_strategy_length
        written = self._generate(requests, limit, decoding or Decoding(), progress, stream)
        return [
            replace(
                conversation.parse(problem.prompt, ids, truncated=end is None and len(ids) > 0),
                sampled=ids if end is None else [*ids, end],
            )
            for problem, (ids, end) in zip(problems, written, strict=True)
        ]

    def execute(
        self,
        problems: Sequence["Problem"],
        strategies: Sequence[str | ParsedStrategy],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
    ) -> list[str]:
        """
        Executes a strategy on each problem.

        Args:
            problems (`Sequence[Problem]`):
                Problems with the strategies retrieved for them.
            strategies (`Sequence[str | ParsedStrategy]`):
                A strategy for each. A text may be empty or begin with a reasoning part. What
                [`TwoPhaseModel.write_strategies`] returned is executed as it was sampled.
            decoding ([`Decoding`], *optional*):
                How to decode, greedily by default.
            progress (`str`, *optional*):
                Name of a progress bar. None is shown by default.
            stream (`Callable[[str], None]`, *optional*):
                Called with pieces of the text while it is generated. For one problem only.

        Returns:
            `list[str]`: Executions.
        """
        return [text for text, _ in self.execute_to_limit(problems, strategies, decoding, progress, stream)]

    def execute_to_limit(
        self,
        problems: Sequence["Problem"],
        strategies: Sequence[str | ParsedStrategy],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
    ) -> list[tuple[str, bool]]:
        """As [`TwoPhaseModel.execute`], and for each execution whether the limit cut it off."""
        conversation = self.conversation
        contexts = [
            conversation.execution_request(
                problem.prompt, problem.shown, _turn(conversation, problem.prompt, strategy)
            )
            for problem, strategy in zip(problems, strategies, strict=True)
        ]
        return self._complete(contexts, decoding, progress, stream)

    def answer(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
        limit: int | None = None,
    ) -> list[str]:
        """
        Answers prompts as they are, without a strategy.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Texts or conversations.
            decoding ([`Decoding`], *optional*):
                How to decode, greedily by default.
            progress (`str`, *optional*):
                Name of a progress bar. None is shown by default.
            stream (`Callable[[str], None]`, *optional*):
                Called with pieces of the text while it is generated. For one problem only.
            limit (`int`, *optional*):
                Maximum number of tokens of an answer. If `None`, that of an execution.

        Returns:
            `list[str]`: Completions.
        """
        contexts = list(map(self.conversation.plain_request, prompts))
        return [text for text, _ in self._complete(contexts, decoding, progress, stream, limit)]

    def continue_from(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], decoding: Decoding | None = None
    ) -> list[str]:
        """
        Continues completions that have begun.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Texts or conversations.
            prefixes (`Sequence[Sequence[int]]`):
                The first tokens of a completion of each, which may be none.
            decoding ([`Decoding`], *optional*):
                How to decode, greedily by default.

        Returns:
            `list[str]`: Whole completions, from the prefix on, with the whitespace that surrounds them.
        """
        plain_request = self.conversation.plain_request
        contexts = [[*plain_request(prompt), *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)]
        generated = self._generate(contexts, self.settings.max_completion_length, decoding or Decoding(), None)
        return [self._decode([*prefix, *ids]) for prefix, (ids, _) in zip(prefixes, generated, strict=True)]

    def _complete(
        self,
        contexts: list[list[int]],
        decoding: Decoding | None,
        progress: str | None,
        stream: Stream | None = None,
        limit: int | None = None,
    ) -> list[tuple[str, bool]]:
        limit = self.settings.max_completion_length if limit is None else limit
        generated = self._generate(contexts, limit, decoding or Decoding(), progress, stream)
        return [(self._decode(ids), end is None) for ids, end in generated]

    def _decode(self, ids: list[int]) -> str:
        return self.conversation.text(ids)

    @torch.inference_mode()
    def _generate(
        self,
        prompts: list[list[int]],
        limit: int,
        decoding: Decoding,
        progress: str | None,
        stream: Stream | None = None,
    ) -> list[tuple[list[int], int | None]]:
        """Tokens generated after each prompt, without the end token, and the end token, if there was one."""
        own = self.model.generation_config
        ends = sorted({*_as_list(own.eos_token_id), *self.conversation.stop_ids})
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=not decoding.greedy,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=ends,
            bos_token_id=own.bos_token_id,
            repetition_penalty=self.settings.repetition_penalty,
            **({} if decoding.greedy else sampling),
        )
        check_generated_length(self.model.config, max(map(len, prompts), default=0), limit)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        results: list[tuple[list[int], int | None]] = [([], None)] * len(prompts)
        with (
            tqdm(total=len(prompts), desc=progress, unit="text", leave=False, disable=progress is None) as bar,
            torch.random.fork_rng(),
        ):
            torch.manual_seed(decoding.seed)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                generated = self._generate_batch([prompts[i] for i in batch], config, stream)
                for index, ids in zip(batch, generated, strict=True):
                    cut = next((position for position, token in enumerate(ids) if token in ends), None)
                    results[index] = (ids[:cut], None if cut is None else ids[cut])
                    self.generated_tokens += len(ids) if cut is None else cut + 1
                bar.update(len(batch))
        return results

    def _generate_batch(
        self, prompts: list[list[int]], config: GenerationConfig, stream: Stream | None
    ) -> list[list[int]]:
        ids, mask = left_padded(prompts, self.tokenizer.pad_token_id, self.model.device)
        streamer = None if stream is None else _Streamer(self.tokenizer, stream)
        try:
            with learned_prompt(self.model):
                output = self.model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer
                )
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)):
                raise
            raise ModelError(
                f"{len(prompts)} texts of up to {ids.size(1)} tokens, continued by up to {config.max_new_tokens}, "
                "take more memory than there is: lower `--batch_size`, or shorten the longest problem."
            ) from error
        return output[:, ids.size(1) :].tolist()


def _place_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that say where weights and tokenizer of a Hub id are read: both at one commit."""
    if Path(name).is_dir():
        return {}
    keys = ("revision", "token", "cache_dir", "local_files_only")
    asked: dict[str, Any] = {key: value for key, value in given.items() if key in keys}
    return asked | {"revision": checked_folder(name, asked)[0].name}


def _is_quantized(model: PreTrainedModel) -> bool:
    return "quantization_config" in vars(model.config)


def _turn(conversation: Conversation, prompt: Prompt, strategy: str | ParsedStrategy) -> str | Sequence[int]:
    """What precedes an execution: a text with its reasoning, or the tokens of a strategy that was sampled or given."""
    if isinstance(strategy, str):
        return strategy
    if strategy.sampled is not None:
        return strategy.sampled
    if strategy.reasoning:
        return strategy.as_written
    return conversation.reply(prompt, strategy.text, reasoning=False)
