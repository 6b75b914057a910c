"""Rows that are longer than the table of positions of a model, such as GPT-2, OPT or MPT, refused before long work."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import ConfigError, DataError
from .conversation import Conversation
from .prompts import Prompt, problem_text


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..inference.settings import TwoPhaseSettings
    from ..sgpo_config import SGPOConfig

logger = logging.get_logger(__name__)

_CANDIDATES = 16  # longest problems by characters, among which the longest by tokens are chosen

STRATEGY, EXECUTION = "max_strategy_length", "max_completion_length"
"""Settings that limit the two phases."""


def shown_strategies(args: "SGPOConfig") -> int:
    """Strategies of the bank that training shows with a problem."""
    return args.num_retrieved if args.use_bank else 0


def longest_requests(
    prompts: Sequence[Prompt], count: int, conversation: Conversation, max_strategy_length: int, shown: int
) -> list[list[int]]:
    """
    The longest requests for a strategy.

    Args:
        prompts (`list`):
            Problems.
        count (`int`):
            Number of requests wanted, of different problems where there are as many.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens.
        max_strategy_length (`int`), shown (`int`):
            Maximum length and number of the strategies that are shown.

    Returns:
        `list[list[int]]`: Token ids, longest first.
    """
    strategies = [("", "step " * max_strategy_length)] * shown
    candidates = _longest(prompts, count)
    requests = sorted((conversation.request(prompt, strategies) for prompt in candidates), key=len, reverse=True)
    return [requests[index % len(requests)] for index in range(count)]


def _longest(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: len(problem_text(prompt)), reverse=True)[: max(count, _CANDIDATES)]


def position_limit(config: "PreTrainedConfig") -> int | None:
    """
    The length of a model's table of positions.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.

    Returns:
        `int` or `None`: `None` if positions are computed, as rotary ones are.
    """
    text = config.get_text_config()
    known: dict[str, Any] = vars(text)
    if known.get("rope_parameters"):
        return None
    name = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return known.get(name, known.get("max_seq_len"))


def rotary_limit(config: "PreTrainedConfig") -> int | None:
    """
    The length from which a model's rotary frequencies change with the longest row of a forward pass.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.

    Returns:
        `int` or `None`: `None` if they never do, as with any `rope_type` but `dynamic` and `longrope`.
    """
    text = config.get_text_config()
    parameters: dict[str, Any] = vars(text).get("rope_parameters") or {}
    of_layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = {
        "dynamic": lambda rope: text.max_position_embeddings,
        "longrope": lambda rope: rope["original_max_position_embeddings"],
    }
    return min(
        (limits[rope["rope_type"]](rope) for rope in of_layers if rope.get("rope_type") in limits), default=None
    )


def check_context_length(
    config: "PreTrainedConfig",
    conversation: Conversation,
    prompts: Sequence[Prompt],
    settings: "TwoPhaseSettings | SGPOConfig",
    shown: int = 0,
    virtual: int = 0,
    phases: Sequence[str] = (STRATEGY, EXECUTION),
    vllm_limit: int | None = None,
) -> None:
    """
    Checks that the longest row that the prompts can lead to has positions in the model, and warns if the model reads
    rows of that length with other rotary frequencies.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens of the prompts.
        prompts (`list`):
            Problems.
        settings ([`~trl_sgpo.inference.settings.TwoPhaseSettings`] or [`SGPOConfig`]):
            Limits of the two phases.
        shown (`int`, *optional*, defaults to 0):
            Strategies of a bank that are shown with a problem.
        virtual (`int`, *optional*, defaults to 0):
            Virtual tokens that an adapter puts before a row.
        phases (`Sequence[str]`, *optional*):
            Limits of what is generated, in order. With that of the execution only, prompts are answered as they are.
        vllm_limit (`int`, *optional*):
            Length at which vLLM ends rows.

    Raises:
        [`ConfigError`]: It has not. The message names the settings to lower.
    """
    limit, rotary = position_limit(config), rotary_limit(config)
    if (limit is None and rotary is None and vllm_limit is None) or not prompts:
        return
    if STRATEGY in phases:
        (request,) = longest_requests(prompts, 1, conversation, settings.max_strategy_length, shown)
    else:
        request = max(map(conversation.plain_request, _longest(prompts, 1)), key=len)
    parts = {f"`{name}`": vars(settings)[name] for name in phases}
    lower = f"Lower {' or '.join(parts)}{', `num_retrieved`' if shown else ''}"
    if len(phases) > 1:
        parts["the turn between the phases"] = len(conversation.turn(prompts[0]).bridge)
    if virtual:
        parts["the learned prompt"] = virtual
    longest = len(request) + sum(parts.values())
    counted = (
        f"{len(request)} of the longest request, {', '.join(f'{count} of {name}' for name, count in parts.items())}"
    )
    if limit is not None and longest > limit:
        raise ConfigError(
            f"A row can have {longest} tokens, and the model has {limit} positions: {counted}. {lower}, or leave out "
            "the longest problems."
        )
    if vllm_limit is not None and longest > vllm_limit:
        raise ConfigError(
            f"A row can have {longest} tokens ({counted}), and vLLM ends rows at {vllm_limit}: raise "
            f"`vllm_max_model_length`. Or {lower[0].lower()}{lower[1:]}."
        )
    if rotary is not None and longest > rotary:
        logger.warning_once(
            f"A row can have {longest} tokens ({counted}). Above {rotary} tokens this model's rotary frequencies "
            "follow the longest row of a batch: log-probabilities then depend on the rows beside, and those of "
            f"sampling are not those of training. {lower}, or leave out the longest problems."
        )


def check_generated_length(config: "PreTrainedConfig", longest: int, max_new_tokens: int) -> None:
    """Raises [`ConfigError`] if a model has no positions for prompts of this length and what is generated."""
    limit = position_limit(config)
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError(
            f"A text of {longest} tokens is to be continued by up to {max_new_tokens}, and the model has {limit} "
            f"positions: lower `{STRATEGY}` or `{EXECUTION}`, or shorten the problem."
        )


def check_trace_length(config: "PreTrainedConfig", longest: int) -> None:
    """Raises [`DataError`] if a model has no positions for traces of this length."""
    limit = position_limit(config)
    if limit is not None and longest > limit:
        raise DataError(
            f"A trace of the warm start has {longest} tokens, and the model has {limit} positions: shorten it in the "
            "file of `warmstart_file`, or leave out its problem (`max_problem_tokens`)."
        )
