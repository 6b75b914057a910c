"""`sgpo.json`: prompts, limits and conversation format of a model's two phases."""

import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..bank.strategy import DEFAULT_EMBEDDING_MODEL
from ..checks.json_text import parse_json
from ..checks.ranges import RANGES
from ..errors import ConfigError
from ..files import write_file
from ..method.conversation import Conversation
from ..method.prompts import (
    EXECUTION_PROMPT,
    Prompt,
    check_strategy_prompt,
    default_strategy_prompt,
    system_prompt_of,
)
from .model_files import SETTINGS_FILE


if TYPE_CHECKING:
    from ..sgpo_config import SGPOConfig


MAX_BYTES = 2**17  # its prompts are read with every problem
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_NAME = re.compile(r"[\w.\-]+")
# What a `BitsAndBytesConfig` writes
_QUANTIZATION = {
    "quant_method",
    *(f"{prefix}load_in_{bits}bit" for prefix in ("", "_") for bits in (4, 8)),
    *(f"llm_int8_{name}" for name in ("threshold", "skip_modules", "enable_fp32_cpu_offload", "has_fp16_weight")),
    *(f"bnb_4bit_{name}" for name in ("compute_dtype", "quant_type", "use_double_quant", "quant_storage")),
}


@dataclass(frozen=True)
class TwoPhaseSettings:
    """
    Prompts, limits and conversation format of the two phases. Every run saves them with its model, as `sgpo.json`.

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
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty of repetition in training, with which texts are generated whatever the base's own settings say.
        embedding_model (`str`, *optional*):
            Embedding model of that bank.
        system_prompt (`str`, *optional*):
            System message of the problems that the model was trained on, `None` if they had none.
        trained_on (`dict`, *optional*):
            Data type and quantization of the weights that an adapter was trained on. `None` if the model is whole.
        chat_template_kwargs (`dict`, *optional*):
            Passed on to the chat template, such as `{"enable_thinking": False}`.
        turn_end (`str`, *optional*):
            Token that ends an assistant's turn. If `None`, it is read off the chat template.
        plain_text (`bool`, *optional*, defaults to `False`):
            Whether the model was trained on texts. Conversations are flattened to text then.
        opens_reasoning (`bool`, *optional*, defaults to `False`):
            Whether the chat template starts an assistant's turn within a reasoning part.
        merged_classes (`dict[str, str]`, *optional*):
            Classes that training merged with others (`small_classes: merge`), whose strategies they are shown.
    """

    strategy_prompt: str = ""
    execution_prompt: str = EXECUTION_PROMPT
    strategy_format: str = "text"
    max_strategy_length: int = 128
    max_completion_length: int = 256
    num_retrieved: int = 1
    repetition_penalty: float = 1.0
    embedding_model: str = DEFAULT_EMBEDDING_MODEL
    system_prompt: str | None = None
    trained_on: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    turn_end: str | None = None
    plain_text: bool = False
    opens_reasoning: bool = False
    merged_classes: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.strategy_prompt:
            object.__setattr__(self, "strategy_prompt", default_strategy_prompt(self.strategy_format))
        check_strategy_prompt(self.strategy_prompt)

    @property
    def max_plain_length(self) -> int:
        """Tokens of a plain answer that is compared with a strategy and its execution: as many as both."""
        return self.max_strategy_length + self.max_completion_length

    @classmethod
    def from_config(cls, config: "SGPOConfig", prompt: Prompt | None = None) -> "TwoPhaseSettings":
        """Takes the settings of a training configuration, and system message and kind of one of its prompts."""
        of_the_model = ("system_prompt", "trained_on", "turn_end", "plain_text", "opens_reasoning", "merged_classes")
        names = [item.name for item in fields(cls) if item.name not in of_the_model]
        return cls(
            **{name: config.__dict__[name] for name in names if name != "repetition_penalty"},
            repetition_penalty=float(config.repetition_penalty),
            system_prompt=None if prompt is None else system_prompt_of(prompt),
            plain_text=isinstance(prompt, str),
        )

    def of_model(self, tokenizer: Any) -> "TwoPhaseSettings":
        """Returns the settings with end of turn and opened reasoning of a tokenizer's template, to be saved."""
        conversation = self.conversation(tokenizer)
        return replace(self, turn_end=conversation.end_token, opens_reasoning=conversation.opens_reasoning)

    def conversation(self, tokenizer: Any) -> Conversation:
        """Returns the conversation of these settings, in the tokens of a tokenizer."""
        return Conversation(
            tokenizer,
            self.strategy_prompt,
            self.execution_prompt,
            self.strategy_format,
            self.chat_template_kwargs,
            self.turn_end,
            self.plain_text,
        )

    def save(self, directory: str | Path) -> None:
        write_file(Path(directory, SETTINGS_FILE), json.dumps(asdict(self), indent=2))

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
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES >> 10} KiB: delete it to use the default prompts.")
        try:
            written = parse_json(path.read_text(encoding="utf-8"))
            _check(written)
            return cls(**written)
        except ValueError as error:
            raise ConfigError(f"{path} cannot be read ({error}): delete it to use the default prompts.") from error


def _check(written: Any) -> None:
    """Raises a `ValueError` if settings have unknown keys or values that no run writes."""
    if not isinstance(written, dict):
        raise ValueError("it is no JSON object")
    kinds = {item.name: get_args(item.type) or (item.type,) for item in fields(TwoPhaseSettings)}
    for name, value in written.items():
        if name not in kinds:
            raise ValueError(f"it has the unknown key {name!r}")
        if type(value) not in [get_origin(kind) or kind for kind in kinds[name]]:
            raise ValueError(f"`{name}` has a value of the type {type(value).__name__}")
        if type(value) is int and not 0 <= value <= RANGES[name].high:
            raise ValueError(f"`{name}` must be between 0 and {RANGES[name].high:,}")
    if not 0 < written.get("repetition_penalty", 1.0) < math.inf:
        raise ValueError("`repetition_penalty` must be above 0")
    if written.get("strategy_format", "text") not in ("text", "steps"):
        raise ValueError("`strategy_format` must be text or steps")
    merged = written.get("merged_classes") or {}
    if not all(isinstance(name, str) for name in merged.values()):
        raise ValueError("`merged_classes` must hold names of classes")
    trained_on = written.get("trained_on") or {}
    quantization = trained_on.get("quantization_config")
    if other := trained_on.keys() - {"dtype", "quantization_config"}:
        raise ValueError(f"`trained_on` has the key {min(other)!r}, and may have dtype and quantization_config only")
    if trained_on.get("dtype", "float32") not in _DTYPES:
        raise ValueError(f"`dtype` in `trained_on` must be one of {', '.join(_DTYPES)}")
    if "quantization_config" in trained_on and not isinstance(quantization, dict):
        raise ValueError("`quantization_config` in `trained_on` is no JSON object")
    skipped = (quantization or {}).get("llm_int8_skip_modules") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in skipped):
        # transformers takes them for patterns
        raise ValueError("`llm_int8_skip_modules` in `trained_on` must be names of modules")
    if other := (quantization or {}).keys() - _QUANTIZATION:
        raise ValueError(f"`quantization_config` in `trained_on` has the key {min(other)!r}, unknown to bitsandbytes")
