"""
The conversation of both phases as tokens: request, strategy, turn, execution.

The only file that asks for chat templates to be rendered (`templates.py`). Training, warm start, evaluation, solving,
export checks and the code in model cards build their tokens here, so that a model is used with the tokens it was
trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from ..errors import ConfigError, DataError
from .control_tokens import ORDINARY, Messages, TextEncoder
from .prompts import (
    REASONING_END,
    REASONING_START,
    ParsedStrategy,
    Prompt,
    as_text,
    parse_strategy,
    plain_bridge,
    strategy_prompt,
)
from .templates import TemplateRefusal, render


_MARK = "\u2021strategy\u2021"  # stands in for a content, to find what a template writes around it


def execution_messages(request: Messages, strategy: str, execution_prompt: str) -> Messages:
    """Returns the messages that ask for the execution of a strategy: request, strategy, execution prompt."""
    return [*request, {"role": "assistant", "content": strategy}, {"role": "user", "content": execution_prompt}]


def prompt_ids(tokenizer: Any, prompt: Prompt, chat_template_kwargs: dict[str, Any] | None = None) -> list[int]:
    """
    Returns the tokens of a text, or of a conversation up to the start of the assistant's next turn. Control tokens are
    those of the chat template only.
    """
    return _encoded(TextEncoder(tokenizer), prompt, chat_template_kwargs)


def prompts_ids(
    tokenizer: Any, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Returns the tokens of several prompts, see [`prompt_ids`]."""
    encoder = TextEncoder(tokenizer)
    return [_encoded(encoder, prompt, chat_template_kwargs) for prompt in prompts]


def answer_ids(
    tokenizer: Any, prompts: Sequence[Prompt], completions: Sequence[Any], chat_template_kwargs: dict[str, Any] | None
) -> list[list[int]]:
    """
    Returns the tokens of answered prompts that a reward model reads: a conversation without control tokens in its
    texts, or prompt and answer as one text.
    """
    encoder = TextEncoder(tokenizer)
    return [
        encoder.raw_ids(prompt + completion)
        if isinstance(prompt, str)
        else encoder.conversation_ids(
            [*prompt, *completion], lambda messages: rendered(tokenizer, messages, chat_template_kwargs)
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _encoded(encoder: TextEncoder, prompt: Prompt, chat_template_kwargs: dict[str, Any] | None) -> list[int]:
    if isinstance(prompt, str):
        ids = encoder.ids(prompt, add_special_tokens=True)
    else:
        ids = encoder.conversation_ids(
            prompt,
            lambda messages: rendered(encoder.tokenizer, messages, chat_template_kwargs, add_generation_prompt=True),
        )
    if not ids:
        raise DataError(
            "The model's tokenizer makes no tokens of a prompt: use another model, or leave empty ones out."
        )
    return ids


def rendered(
    tokenizer: Any,
    messages: Messages,
    chat_template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Returns a conversation as the text that the chat template makes of it."""
    return render(tokenizer, messages, chat_template_kwargs, add_generation_prompt)


def check_system_role(tokenizer: Any, prompt: Prompt, chat_template_kwargs: dict[str, Any] | None = None) -> None:
    """
    Checks that the chat template writes the system message of a prompt, if there is one.

    Raises:
        [`ConfigError`]: It refuses the message, or leaves it out.
    """
    if isinstance(prompt, str) or tokenizer.chat_template is None or prompt[0]["role"] != "system":
        return
    try:
        text = rendered(tokenizer, [{**prompt[0], "content": _MARK}, *prompt[1:]], chat_template_kwargs)
        reason = "leaves system messages out"
    except TemplateRefusal as error:
        text, reason = "", f"refuses system messages ({error.reason})"
    if _MARK not in text:
        raise ConfigError(
            f"The model's chat template {reason}: remove `system_prompt`, and write its text into the prompts or into "
            "`strategy_prompt`."
        )


@dataclass(frozen=True)
class Turn:
    """
    The tokens between a strategy and its execution.

    Args:
        end (`int`):
            Token that ends the assistant's turn.
        bridge (`list[int]`):
            What follows the content of a strategy, up to the start of the execution. Starts with `end` where the chat
            template writes it.
        unended (`list[int]`, *optional*):
            The bridge after a strategy without `end`, where it is another one.
    """

    end: int
    bridge: list[int]
    unended: list[int] | None = None

    def after(self, strategy: Sequence[int]) -> list[int]:
        """Returns the tokens that follow a strategy: the bridge, without the token that the strategy ends with."""
        if strategy and strategy[-1] == self.bridge[0]:
            return self.bridge[1:]
        if self.unended is not None and strategy and strategy[-1] != self.end:
            return self.unended
        return self.bridge


@dataclass(frozen=True)
class Conversation:
    """
    Builds the tokens of both phases.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        strategy_prompt (`str`):
            Template of the request for a strategy.
        execution_prompt (`str`):
            The user turn between strategy and execution.
        strategy_format (`str`, *optional*, defaults to `"text"`):
            `"text"` or `"steps"`.
        chat_template_kwargs (`dict`, *optional*):
            Passed on to the chat template.
        turn_end (`str`, *optional*):
            Token that ends the assistant's turn. If `None`, or unknown to the tokenizer, it is read off the chat
            template; without one it is the tokenizer's EOS token.
        plain_text (`bool`, *optional*, defaults to `False`):
            Whether the model was trained on texts. Conversations are flattened to text then.
    """

    tokenizer: Any
    strategy_prompt: str
    execution_prompt: str
    strategy_format: str = "text"
    chat_template_kwargs: dict[str, Any] | None = None
    turn_end: str | None = None
    plain_text: bool = False

    def request(self, prompt: Prompt, shown: Sequence[tuple[str, str]] = ()) -> list[int]:
        """
        Returns the tokens that ask for a strategy.

        Args:
            prompt (`str` or `list[dict]`):
                The problem.
            shown (`Sequence[tuple[str, str]]`, *optional*):
                Class and text of the retrieved strategies.
        """
        return self._prompt_ids(strategy_prompt(prompt, self.strategy_prompt, shown, self._has_template))

    def plain_request(self, prompt: Prompt) -> list[int]:
        """Returns the tokens of the problem alone, to be answered without a strategy."""
        return self._prompt_ids(prompt if self._has_template else as_text(prompt))

    def content(self, prompt: Prompt, text: str, reasoning: bool = True) -> list[int]:
        """
        Returns the tokens of a strategy, execution or answer given as text, without the end of the turn.

        Args:
            prompt (`str` or `list[dict]`):
                The problem.
            text (`str`):
                The text.
            reasoning (`bool`, *optional*, defaults to `True`):
                Whether the text may have a reasoning part, whose marks are control tokens of some models.
        """
        after, before = self._opening if self._is_chat(prompt) else ORDINARY, ""
        if self._is_chat(prompt) and self._template_opens_reasoning and not (reasoning and REASONING_END in text):
            before = f"\n{REASONING_END}\n\n"
        elif self._is_chat(prompt):
            text = self._space_of_turn + text
        if reasoning or not self._encoder.holds_control(text):
            return self._encoder.turn_ids(before + text, after)
        return [*self._encoder.raw_ids(before, after=after), *self._encoder.ids(text, after=after + before)]

    def text(self, ids: Sequence[int]) -> str:
        """Returns a generated execution or answer as text, without special tokens."""
        return self._encoder.text(ids)

    def reply(self, prompt: Prompt, text: str, reasoning: bool = True) -> list[int]:
        """Returns the tokens of an assistant's turn given as text, with its end. See [`Conversation.content`]."""
        return [*self.content(prompt, text, reasoning), self.turn(prompt).end]

    def turn(self, prompt: Prompt) -> Turn:
        """
        Returns the turn between strategy and execution of a problem.

        Raises:
            [`ConfigError`]: The chat template changes or drops what the assistant said before.
        """
        return self._chat_turn if self._is_chat(prompt) else self._plain_turn

    def execution_request(
        self, prompt: Prompt, shown: Sequence[tuple[str, str]], strategy: str | Sequence[int]
    ) -> list[int]:
        """
        Returns the tokens that ask for an execution.

        Args:
            prompt (`str` or `list[dict]`):
                The problem.
            shown (`Sequence[tuple[str, str]]`):
                Class and text of the retrieved strategies.
            strategy (`str` or `Sequence[int]`):
                Text of the strategy, or its tokens as they were generated.
        """
        ids = self.reply(prompt, strategy) if isinstance(strategy, str) else list(strategy)
        return [*self.request(prompt, shown), *ids, *self.turn(prompt).after(ids)]

    def parse(self, prompt: Prompt, ids: Sequence[int], truncated: bool = False) -> ParsedStrategy:
        """Reads the strategy that was generated for a problem. `truncated` says that it was cut off by length."""
        text = self._decoded(ids)
        opened = self._is_chat(prompt) and self._template_opens_reasoning
        return parse_strategy(text, self.strategy_format, truncated, opened)

    @property
    def end_token(self) -> str:
        """The token that ends an assistant's turn."""
        return self.tokenizer.convert_ids_to_tokens(self._chat_end if self._has_template else self._eos)

    @property
    def opens_reasoning(self) -> bool:
        """Whether a strategy starts within a reasoning part."""
        return self._has_template and self._template_opens_reasoning

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generation: the end of the turn and the tokenizer's EOS token."""
        ends = [self._eos] if self.tokenizer.chat_template is None else [self._eos, self._chat_end]
        return [token for token in dict.fromkeys(ends) if token is not None]

    @property
    def _has_template(self) -> bool:
        return self.tokenizer.chat_template is not None and not self.plain_text

    def _is_chat(self, prompt: Prompt) -> bool:
        return self._has_template and not isinstance(prompt, str)

    @property
    def _eos(self) -> int:
        return self.tokenizer.eos_token_id

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    def _decoded(self, ids: Sequence[int]) -> str:
        """Returns generated tokens as text, without special tokens other than the marks of a reasoning part."""
        marks = self._special_marks
        return "".join(
            mark * len(list(group)) if mark else self.tokenizer.decode(list(group), skip_special_tokens=True)
            for mark, group in groupby(ids, marks.get)
        )

    @cached_property
    def _special_marks(self) -> dict[int, str]:
        """Marks of a reasoning part that are special tokens, which decoding would leave out."""
        added = self.tokenizer.get_added_vocab()
        marks = {added[mark]: mark for mark in (REASONING_START, REASONING_END) if mark in added}
        return {token: mark for token, mark in marks.items() if token in self._special_ids}

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return _encoded(self._encoder, prompt, self.chat_template_kwargs)

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> str:
        return rendered(self.tokenizer, messages, self.chat_template_kwargs, add_generation_prompt)

    @cached_property
    def _plain_turn(self) -> Turn:
        text = plain_bridge(self.execution_prompt)
        unended = self._encoder.ids(text, after=ORDINARY)
        return Turn(self._eos, self._encoder.ids(text, after=self.tokenizer.eos_token), unended)

    @cached_property
    def _chat_turn(self) -> Turn:
        messages = execution_messages([{"role": "user", "content": "problem"}], _MARK, self.execution_prompt)
        bridge = self._encoder.conversation_ids(messages, self._after_strategy, after=_MARK, kept=(_MARK,))
        before = self._before_end
        return Turn(self._chat_end, bridge[len(before) :] if bridge[: len(before)] == before else bridge)

    def _after_strategy(self, messages: Messages) -> str:
        text = self._rendered(messages, add_generation_prompt=True)
        if text.count(_MARK) != 1:
            raise ConfigError(
                "The chat template does not show earlier assistant turns, so an execution could not see its "
                "strategy. Give the tokenizer a template that does, or use plain-text prompts."
            )
        return text.partition(_MARK)[2]

    @cached_property
    def _chat_end(self) -> int:
        saved = None if self.plain_text else self.turn_end
        if saved is not None and saved in self.tokenizer.get_added_vocab():
            return self.tokenizer.convert_tokens_to_ids(saved)
        return next((token for token in self._after_reply if token in self._special_ids), self._eos)

    @property
    def _before_end(self) -> list[int]:
        """What the template writes between an assistant's text and the end of the turn, such as a space."""
        ids = self._after_reply
        return ids[: ids.index(self._chat_end)] if self._chat_end in ids else []

    @cached_property
    def _after_reply(self) -> list[int]:
        """What the template writes after the text of the last assistant turn."""
        messages = [{"role": "user", "content": "problem"}, {"role": "assistant", "content": _MARK}]
        text = self._rendered(messages, add_generation_prompt=False).partition(_MARK)[2]
        return self._encoder.raw_ids(text, after=_MARK)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special)

    @cached_property
    def _template_opens_reasoning(self) -> bool:
        """Whether the template starts the assistant's turn within a reasoning part."""
        return self._opening.rfind(REASONING_START) > self._opening.rfind(REASONING_END)

    @cached_property
    def _opening(self) -> str:
        """What the template writes between a problem and the assistant's turn."""
        return self._rendered([{"role": "user", "content": _MARK}], add_generation_prompt=True).rpartition(_MARK)[2]

    @cached_property
    def _space_of_turn(self) -> str:
        """
        White space that the template writes before the text of an earlier assistant turn. It is a part of the first
        token that a model generates where the tokenizer puts a space before a text.
        """
        if not self._encoder.puts_space:
            return ""
        request = [{"role": "user", "content": "problem"}]
        opened = self._rendered(request, add_generation_prompt=True)
        messages = execution_messages(request, _MARK, self.execution_prompt)
        before = self._rendered(messages, add_generation_prompt=True).partition(_MARK)[0]
        space = before.removeprefix(opened)
        return space if before.startswith(opened) and space.isspace() else ""
