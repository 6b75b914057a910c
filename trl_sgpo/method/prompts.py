"""Texts of both phases: the requests for a strategy and for its execution, and the parsing of strategies."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks.characters import misplaced
from ..data.columns import rows_in_short
from ..errors import ConfigError, DataError


Prompt = str | list[dict[str, Any]]

STRATEGY_PROMPT = (
    "{problem}\n\n{strategies}Do not solve it yet. Write a short, general strategy for problems of this kind: "
    "when it applies and what to do. Use no numbers of this problem and do not give its answer."
)
STEPS_PROMPT = (
    "{problem}\n\n{strategies}Do not solve it yet. Write a general strategy for problems of this kind as numbered "
    "steps, one a line. Name what changes from problem to problem in braces, like {first number}. Use no numbers of "
    "this problem and do not give its answer."
)
# The form that `answer_reward` and TRL's `accuracy_reward` read
EXECUTION_PROMPT = (
    "Now apply this strategy to the problem, step by step, and finish with the final answer in \\boxed{}."
)
REASONING_START, REASONING_END = "<think>", "</think>"
RETRIEVED_HEADER = "Strategies that worked on similar problems, quoted (adapt, combine or improve them):\n"

MAX_STRATEGY = 2**14  # characters: rewards read strategies with patterns that take the square of their length
_STEP = re.compile(r"^\s*(?:step\s*)?\d+\s*[.):]\s+(\S.*)$", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{[A-Za-z][^{}\n]*\}")


@dataclass(frozen=True)
class ParsedStrategy:
    """
    A strategy as read from the model's text.

    Args:
        text (`str`):
            The strategy without surrounding whitespace.
        steps (`tuple[str, ...]`):
            Its numbered steps, empty in free text.
        placeholders (`tuple[str, ...]`):
            Names in braces, without the braces.
        flaw (`str` or `None`):
            Why it is malformed, `None` when it is well formed.
        reasoning (`str`):
            The reasoning part before the strategy, up to its end mark and the white space after it.
        sampled (`Sequence[int]`, `str` or `None`):
            What the model generated, with which an execution goes on: tokens, or text if a server generated it. `None`
            if the strategy was not generated here.
    """

    text: str
    steps: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()
    flaw: str | None = None
    reasoning: str = ""
    sampled: Sequence[int] | str | None = field(default=None, compare=False, repr=False)

    @property
    def as_written(self) -> str:
        """Reasoning and strategy, as they precede the execution."""
        return self.reasoning + self.text


def split_reasoning(text: str, opened: bool = False) -> tuple[str, str]:
    """
    Splits a generated text after its reasoning part.

    Args:
        text (`str`):
            What the model wrote.
        opened (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends within a reasoning part, as some chat templates have it.

    Returns:
        `tuple[str, str]`: The reasoning with its end mark and the white space after it, and the rest. If the
        reasoning never ends, the rest is empty.
    """
    reasoning, mark, rest = text.rpartition(REASONING_END)
    if mark:
        content = rest.lstrip()
        return reasoning + mark + rest[: len(rest) - len(content)], content
    return (text, "") if opened or text.lstrip().startswith(REASONING_START) else ("", text)


def parse_strategy(
    text: str, strategy_format: str = "text", truncated: bool = False, reasoning_opened: bool = False
) -> ParsedStrategy:
    """
    Parses a strategy. A malformed one is returned with its flaw and raises no error.

    Args:
        text (`str`):
            What the model wrote in the strategy phase. A reasoning part at its start is cut off.
        strategy_format (`str`, *optional*, defaults to `"text"`):
            `"text"` accepts any non-empty text, `"steps"` requires at least two numbered lines and nothing else.
        truncated (`bool`, *optional*, defaults to `False`):
            Whether the phase ended by length.
        reasoning_opened (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends within a reasoning part.

    Returns:
        [`ParsedStrategy`]: Of a text of more than 16,384 characters, the first ones, with the flaw `"too long"`.
    """
    reasoning, text = split_reasoning(text.strip(), reasoning_opened)
    if not text:
        return ParsedStrategy(text, flaw="truncated" if truncated and reasoning else "empty", reasoning=reasoning)
    length, text = len(text), text[:MAX_STRATEGY]
    placeholders = tuple(match[1:-1].strip() for match in _PLACEHOLDER.findall(text))
    lines = [line for line in text.splitlines() if line.strip()]
    steps = tuple(match.group(1).strip() for line in lines if (match := _STEP.match(line)))
    flaw = None
    if truncated:
        flaw = "truncated"
    elif length > MAX_STRATEGY:
        flaw = "too long"
    elif strategy_format == "steps" and (len(steps) < 2 or len(steps) != len(lines)):
        flaw = "not numbered steps"
    return ParsedStrategy(text, steps, placeholders, flaw, reasoning)


def default_strategy_prompt(strategy_format: str) -> str:
    """Returns the strategy request for a `strategy_format`."""
    return STEPS_PROMPT if strategy_format == "steps" else STRATEGY_PROMPT


def check_strategy_prompt(template: str) -> None:
    """Raises [`ConfigError`] when a strategy template has no place for the problem, or several for strategies."""
    if template.count("{problem}") != 1:
        raise ConfigError(
            f"`strategy_prompt` must contain {{problem}} exactly once, got {template.count('{problem}')} times: "
            f"{template!r}. It may also contain {{strategies}}, where retrieved strategies go."
        )
    if template.count("{strategies}") > 1:
        raise ConfigError("`strategy_prompt` may contain {strategies} only once: leave out the others.")


def quote_strategies(retrieved: Sequence[tuple[str, str]]) -> str:
    """
    Renders retrieved strategies as quoted data.

    Args:
        retrieved (`Sequence[tuple[str, str]]`):
            Pairs of problem class and strategy text, best first.

    Returns:
        `str`: One quoted line a strategy and an empty line, or `""` when there are none.
    """
    if not retrieved:
        return ""
    flat = [(" ".join(problem_class.split()), " ".join(text.split())) for problem_class, text in retrieved]
    quoted = "".join(f"> [{problem_class}] {text}\n" for problem_class, text in flat)
    return f"{RETRIEVED_HEADER}{quoted}\n"


def strategy_request(template: str, problem: str, retrieved: Sequence[tuple[str, str]]) -> str:
    """Fills a strategy template; braces in the problem or in strategies are left as they are."""
    head, tail = template.split("{problem}")
    quoted = quote_strategies(retrieved)
    if "{strategies}" not in template:
        return f"{head}{problem}{tail}" if not quoted else f"{head}{problem}\n\n{quoted.rstrip()}{tail}"
    return head.replace("{strategies}", quoted) + problem + tail.replace("{strategies}", quoted)


def problem_text(prompt: Prompt) -> str:
    """Returns the problem in a prompt: the last user message's text, or the text itself."""
    if isinstance(prompt, str):
        return prompt
    content = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), prompt[-1]["content"])
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def check_prompt(prompt: Prompt, name: str = "The prompt") -> None:
    """
    Raises [`DataError`] when a prompt is neither text nor messages, or does not end in a user message, whose place the
    request takes, or holds half of a surrogate pair.
    """
    if found := misplaced(prompt, halves_only=True):
        raise DataError(f"{name} holds {found}: remove the character.")
    if isinstance(prompt, str):
        return
    if not is_conversation(prompt):
        raise DataError(f"{name} is neither text nor messages with `role` and `content`, but {prompt!r:.80}.")
    if not prompt:
        raise DataError(f"{name} has no messages: a prompt must end in a user message with the problem.")
    if prompt[-1]["role"] != "user":
        raise DataError(
            f"{name} ends in a message of the role `{prompt[-1]['role']}`: a prompt must end in a user message with "
            "the problem. Remove the messages after it."
        )


def is_conversation(prompt: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )


def check_prompts(prompts: Iterable[Prompt]) -> None:
    """[`check_prompt`] for a dataset's prompts, none of which may be empty."""
    prompts = list(prompts)
    for index, prompt in enumerate(prompts):
        if prompt is not None:
            check_prompt(prompt, f"The prompt of row {index}")
    check_none_empty(prompts)


def check_none_empty(prompts: Sequence[Prompt | None]) -> None:
    """Raises [`DataError`] for problems without text."""
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt or not _has_problem(prompt)]
    if empty:
        are, them = ("is", "it") if len(empty) == 1 else ("are", "them")
        raise DataError(
            f"{len(empty)} of {len(prompts)} problems {are} empty ({rows_in_short(empty)}): remove {them}."
        )


def _has_problem(prompt: Prompt) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    message = next((message for message in reversed(prompt) if message["role"] == "user"), prompt[-1])
    return message["content"] is not None and bool(problem_text([message]).strip())


def as_text(prompt: Prompt) -> str:
    """Returns a prompt as text for a model without a chat template: its messages, an empty line between them."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(problem_text([message]) for message in prompt)


def system_prompt_of(prompt: Prompt) -> str | None:
    """Returns the system message of a prompt, `None` if it has none."""
    if isinstance(prompt, str) or not prompt or prompt[0]["role"] != "system":
        return None
    return problem_text(prompt[:1])


def with_system_prompt(prompt: Prompt, system_prompt: str | None) -> Prompt:
    """Puts a system message before a conversation that has none. Texts stay as they are."""
    if system_prompt is None or isinstance(prompt, str) or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": system_prompt}, *prompt]


def strategy_prompt(prompt: Prompt, template: str, retrieved: Sequence[tuple[str, str]], chat: bool) -> Prompt:
    """
    Builds the prompt of the strategy phase.

    Args:
        prompt (`str` or `list[dict]`):
            The dataset's prompt. Of a conversation, the last message becomes the request.
        template (`str`):
            Strategy template with `{problem}`.
        retrieved (`Sequence[tuple[str, str]]`):
            Class and text of the strategies shown.
        chat (`bool`):
            Whether the tokenizer has a chat template. Without one, conversations are flattened to text.

    Returns:
        `str` or `list[dict]`: A text, or messages that end in a user turn.

    Raises:
        [`DataError`]: The prompt does not end in a user message.
    """
    check_prompt(prompt)
    request = strategy_request(template, problem_text(prompt), retrieved)
    if isinstance(prompt, str):
        return f"{request}\n\nStrategy:"
    messages = [*prompt[:-1], {"role": "user", "content": request}]
    if chat:
        return messages
    return f"{as_text(messages)}\n\nStrategy:"


def plain_answer(strategy: str, execution: str) -> str:
    """Strategy and execution as one plain answer."""
    return f"{strategy}\n\n{execution}" if strategy else execution


def plain_bridge(execution_prompt: str) -> str:
    """The text between a strategy and its execution for prompts that are not conversations."""
    return f"\n\n{execution_prompt}\n\nExecution:"
