"""A model outside training: it writes strategies, executes them, or answers at once, in batches."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, TextStreamer
from trl.data_utils import is_conversational

from .bank.strategy import problem_id
from .errors import ConfigError, ModelError
from .hub import SETTINGS_FILE
from .offline import require_model
from .prompts import (
    EXECUTION_PROMPT,
    ParsedStrategy,
    Prompt,
    chat_bridge,
    check_strategy_prompt,
    default_strategy_prompt,
    parse_strategy,
    plain_bridge,
    problem_text,
    strategy_prompt,
    system_prompt_of,
)
from .trained import base_of, is_adapter, load_base


if TYPE_CHECKING:
    from .bank import StrategyBank
    from .rollout import Problem
    from .sgpo_config import SGPOConfig

Stream = Callable[[str], None]


@dataclass(frozen=True)
class TwoPhaseSettings:
    """
    What a model's two phases look like. Every run saves it beside its model, as `sgpo.json`.

    Args:
        strategy_prompt (`str`, *optional*):
            Template of the request for a strategy. If empty, the one for `strategy_format`.
        execution_prompt (`str`, *optional*):
            The turn between strategy and execution.
        strategy_format (`str`, *optional*, defaults to `"text"`):
            `"text"` or `"steps"`.
        max_strategy_length (`int`, *optional*, defaults to `128`):
            Maximum number of tokens of a strategy.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of an execution, or of an answer without strategy.
        num_retrieved (`int`, *optional*, defaults to `1`):
            Strategies of a bank shown with each problem.
        embedding_model (`str`, *optional*):
            What that bank embeds with.
        system_prompt (`str`, *optional*):
            System message of the problems that the model was trained on, `None` if they had none.
        trained_on (`dict`, *optional*):
            Data type and quantization of the weights that an adapter was trained on. `None` if the model is whole.
    """

    strategy_prompt: str = ""
    execution_prompt: str = EXECUTION_PROMPT
    strategy_format: str = "text"
    max_strategy_length: int = 128
    max_completion_length: int = 256
    num_retrieved: int = 1
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    system_prompt: str | None = None
    trained_on: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.strategy_prompt:
            object.__setattr__(self, "strategy_prompt", default_strategy_prompt(self.strategy_format))
        check_strategy_prompt(self.strategy_prompt)

    @classmethod
    def from_config(cls, config: "SGPOConfig", prompt: Prompt = "") -> "TwoPhaseSettings":
        """Takes the settings of a training configuration, and the system message of one of its problems."""
        names = [item.name for item in fields(cls) if item.name not in ("system_prompt", "trained_on")]
        return cls(**{name: config.__dict__[name] for name in names}, system_prompt=system_prompt_of(prompt))

    def save(self, directory: str | Path) -> None:
        Path(directory, SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, directory: str | Path) -> "TwoPhaseSettings":
        """Reads the settings of a trained model's directory or Hub repository; the defaults where it has none."""
        path = Path(directory, SETTINGS_FILE)
        if not Path(directory).is_dir():
            try:
                path = Path(hf_hub_download(str(directory), SETTINGS_FILE))
            except EntryNotFoundError:
                return cls()
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): delete it to use the default prompts.") from error


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
    """Hands on the text of one sequence while it is generated."""

    def __init__(self, tokenizer: Any, stream: Stream):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._stream(text)


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
        Loads a model, or an adapter together with the model it belongs to, which is quantized as it was in training.

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
                Passed on to `from_pretrained`, such as `dtype` or `quantization_config`, and winning over what is
                saved beside an adapter.

        Raises:
            [`ModelError`]: There are no such weights.
        """
        directory = require_model(name)
        saved = TwoPhaseSettings.load(directory)
        try:
            if is_adapter(directory):
                from peft import PeftModel

                base = load_base(base_of(directory), saved.trained_on, **model_kwargs)
                model = PeftModel.from_pretrained(base, directory)
                if "quantization_config" not in vars(model.config):
                    model = model.merge_and_unload()
            else:
                model = AutoModelForCausalLM.from_pretrained(directory, **model_kwargs)
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise ModelError(f"The model {name} cannot be loaded: {error}") from error
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        if device is not None and "quantization_config" not in vars(model.config):
            model = model.to(device)
        return cls(model, tokenizer, settings or saved, batch_size)

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
        requests = [self._request_ids(problem) for problem in problems]
        limit = self.settings.max_strategy_length
        written = self._generate(requests, limit, decoding or Decoding(), progress, stream)
        return [
            parse_strategy(self._decode(ids), self.settings.strategy_format, not ended and len(ids) > 0)
            for ids, ended in written
        ]

    def execute(
        self,
        problems: Sequence["Problem"],
        strategies: Sequence[str],
        decoding: Decoding | None = None,
        progress: str | None = None,
        stream: Stream | None = None,
    ) -> list[str]:
        """
        Executes a strategy on each problem.

        Args:
            problems (`Sequence[Problem]`):
                Problems with the strategies retrieved for them.
            strategies (`Sequence[str]`):
                A strategy for each, which may be empty.
            decoding ([`Decoding`], *optional*):
                How to decode, greedily by default.
            progress (`str`, *optional*):
                Name of a progress bar. None is shown by default.
            stream (`Callable[[str], None]`, *optional*):
                Called with pieces of the text while it is generated. For one problem only.

        Returns:
            `list[str]`: Executions.
        """
        contexts = []
        for problem, strategy in zip(problems, strategies, strict=True):
            ids = [*self._ids(strategy), self.tokenizer.eos_token_id]
            bridge = self._bridge_ids(problem.prompt)
            contexts.append(self._request_ids(problem) + ids + (bridge[1:] if bridge[0] == ids[-1] else bridge))
        return self._complete(contexts, decoding, progress, stream)

    def answer(
        self, prompts: Sequence[Prompt], decoding: Decoding | None = None, progress: str | None = None
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

        Returns:
            `list[str]`: Completions.
        """
        return self._complete([self._prompt_ids(self._as_text(prompt)) for prompt in prompts], decoding, progress)

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
        pairs = list(zip(prompts, prefixes, strict=True))
        contexts = [self._prompt_ids(self._as_text(prompt)) + list(prefix) for prompt, prefix in pairs]
        generated = self._generate(contexts, self.settings.max_completion_length, decoding or Decoding(), None)
        return [self._decode([*prefix, *ids]) for prefix, (ids, _) in zip(prefixes, generated, strict=True)]

    def _complete(
        self,
        contexts: list[list[int]],
        decoding: Decoding | None,
        progress: str | None,
        stream: Stream | None = None,
    ) -> list[str]:
        limit = self.settings.max_completion_length
        generated = self._generate(contexts, limit, decoding or Decoding(), progress, stream)
        return [self._decode(ids).strip() for ids, _ in generated]

    def _as_text(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str) or self.tokenizer.chat_template is not None:
            return prompt
        return "\n\n".join(problem_text([message]) for message in prompt)

    def _request_ids(self, problem: "Problem") -> list[int]:
        shown = [(strategy.problem_class, strategy.text) for strategy in problem.retrieved]
        chat = self.tokenizer.chat_template is not None
        return self._prompt_ids(strategy_prompt(problem.prompt, self.settings.strategy_prompt, shown, chat))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)

    def _bridge_ids(self, prompt: Prompt) -> list[int]:
        chat = is_conversational({"prompt": prompt}) and self.tokenizer.chat_template is not None
        execution_prompt = self.settings.execution_prompt
        return self._ids(chat_bridge(self.tokenizer, execution_prompt) if chat else plain_bridge(execution_prompt))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.inference_mode()
    def _generate(
        self,
        prompts: list[list[int]],
        limit: int,
        decoding: Decoding,
        progress: str | None,
        stream: Stream | None = None,
    ) -> list[tuple[list[int], bool]]:
        """Tokens generated after each prompt, without the end token, and whether there was one."""
        own = self.model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ends = sorted({token for token in (*ends, self.tokenizer.eos_token_id) if token is not None})
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=not decoding.greedy,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=ends,
            bos_token_id=own.bos_token_id,
            **({} if decoding.greedy else sampling),
        )
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        results: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
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
                    results[index] = (ids[:cut], cut is not None)
                    self.generated_tokens += len(ids) if cut is None else cut + 1
                bar.update(len(batch))
        return results

    def _generate_batch(
        self, prompts: list[list[int]], config: GenerationConfig, stream: Stream | None
    ) -> list[list[int]]:
        longest, padding = max(map(len, prompts)), self.tokenizer.pad_token_id
        device = self.model.device
        ids = torch.tensor([[padding] * (longest - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        streamer = None if stream is None else _Streamer(self.tokenizer, stream)
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
        return output[:, longest:].tolist()


def as_problem(row: dict[str, Any], class_column: str = "problem_class") -> "Problem":
    """Reads a dataset row as a problem. A class it lacks is `""`."""
    from .rollout import Problem

    name = row.get(class_column)
    answer = row.get("solution")
    return Problem(row["prompt"], "" if name is None else str(name), None if answer is None else str(answer))


def with_retrieved(problems: Sequence["Problem"], bank: "StrategyBank", num_retrieved: int) -> list["Problem"]:
    """
    Adds to problems what a bank has for them, as in evaluation during training: trusted strategies of their class,
    none of which was written for the problem itself. The bank is not written.

    Args:
        problems (`Sequence[Problem]`):
            The problems.
        bank ([`~trl_sgpo.bank.StrategyBank`]):
            The bank.
        num_retrieved (`int`):
            Number of strategies a problem.

    Returns:
        `list[Problem]`: In the order of the problems.
    """
    if num_retrieved == 0:
        return list(problems)
    retrieved = bank.retrieve(
        [problem.text for problem in problems],
        k=num_retrieved,
        classes=[problem.problem_class or None for problem in problems],
        exclude=[{problem_id(problem.prompt)} for problem in problems],
    )
    return [
        replace(problem, retrieved=tuple(found.strategy for found in row))
        for problem, row in zip(problems, retrieved, strict=True)
    ]


Verifier = Callable[..., list[float | None]]


def verify(verifier: Verifier, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[float]:
    """
    Checks texts with a TRL reward function.

    Args:
        verifier (`Callable`):
            Reward function, such as [`~trl_sgpo.data.tasks.answer_reward`].
        rows (`Sequence[dict]`):
            The problems' rows, of equal columns.
        texts (`Sequence[str]`):
            A completion for each.

    Returns:
        `list[float]`: Outcomes in [0, 1], NaN where the verifier cannot tell.
    """
    if not rows:
        return []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    completions: list[Any] = list(texts)
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    outcomes = verifier(prompts=prompts, completions=completions, completion_ids=[[]] * len(rows), **columns)
    return [float("nan") if outcome is None else min(max(float(outcome), 0.0), 1.0) for outcome in outcomes]
