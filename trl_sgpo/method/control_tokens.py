"""
Texts as tokens, none of which is a control token.

The model's own tokenizer says which tokens control: its special tokens, and of the others added to its vocabulary
those that its chat template writes or that are markup, such as `<tool_call>`. Where a text would give any of them, it
is encoded as if they had not been added. Other texts are encoded as always.

Tokenizers such as those of SentencePiece put a space before a text. A text that goes on after another one is encoded
without it, as within the whole: `after` says what precedes it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from ..errors import DataError
from .prompts import REASONING_END, REASONING_START, Prompt


Messages = list[dict[str, Any]]
_BATCH = 1000
_TRIES = 3  # a broken token can leave another one
# Noncharacters of Unicode, which enclose a text while a chat template is rendered
_START, _END = "\ufdd0", "\ufdd1"
ORDINARY = "."
"""Stands for a text that is no control token, as what precedes another one."""
_JOINTS = ("\n", ORDINARY, _END)  # of which at least one gives no token with what follows
REASONING_MARKS = (REASONING_START, REASONING_END)
_MARK = re.compile(f"({'|'.join(map(re.escape, REASONING_MARKS))})")


def _is_markup(token: str, template: str) -> bool:
    """Whether an added token is written by a template, or begins and ends with punctuation around a name."""
    if not any(character.isalnum() for character in token):
        return False
    return token in template or not (token[0].isalnum() or token[-1].isalnum())


def _texts_of(message: dict[str, Any]) -> list[str]:
    """
    The texts of a message.

    Raises:
        [`DataError`]: Its content is neither text nor a list of parts.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError("A message has a content that is neither text nor a list of parts: correct the dataset.")
    texts = [part["text"] for part in content if part.get("text")]
    if not all(isinstance(text, str) for text in texts):
        raise DataError("A message has a part whose `text` is no text: correct the dataset.")
    return texts


def _with_texts(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": change(content)}
    if isinstance(content, list):
        return message | {
            "content": [part | {"text": change(part["text"])} if part.get("text") else part for part in content]
        }
    return message


def _without_texts(messages: Messages, kept: Sequence[str]) -> Messages:
    """The messages with a letter in place of each text, between the marks of reasoning of an assistant."""

    def letters(text: str, own: bool) -> str:
        parts = _MARK.split(text) if own else [text]
        return "".join(part if place % 2 or not part.strip() else "a" for place, part in enumerate(parts))

    def changed(message: dict[str, Any]) -> dict[str, Any]:
        own = message.get("role") == "assistant"
        return _with_texts(message, lambda text: text if text in kept else letters(text, own))

    return [changed(message) for message in messages]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from (str(key), *_strings(part))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


class TextEncoder:
    """
    Encodes texts with a model's tokenizer, without control tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._segments: dict[str, list[int]] = {}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that a text must not give."""
        template = str(self.tokenizer.chat_template)
        added = self.tokenizer.added_tokens_decoder.items()
        named = {index for index, token in added if token.special or _is_markup(token.content, template)}
        return frozenset({*named, *self.tokenizer.all_special_ids})

    @cached_property
    def _unknown_id(self) -> int | None:
        """Token of unknown characters, which controls nothing unless it has another role too."""
        token = self.tokenizer.unk_token_id
        return None if token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id) else token

    def holds_control(self, text: str, but: Sequence[str] = ()) -> bool:
        """
        Whether the tokenizer makes control tokens of a text.

        Args:
            text (`str`):
                Any text.
            but (`Sequence[str]`, *optional*):
                Tokens that do not count.
        """
        return self._any_control(text, self.raw_ids(text), but)

    def count(self, prompts: Sequence[Prompt]) -> int:
        """
        Number of prompts with texts of which the tokenizer makes control tokens.

        Raises:
            [`DataError`]: A message holds control tokens outside its content.
        """
        count = 0
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            texts = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in batch]
            encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for prompt, text, ids in zip(batch, texts, encoded, strict=True):
                if self._any_control(text, ids):
                    count += isinstance(prompt, str) or self.enclosed(prompt) != prompt
        return count

    def raw_ids(self, text: str, add_special_tokens: bool = False, after: str = "") -> list[int]:
        """Tokens of a text of a chat template, control tokens among them."""
        for joint in (after, *_JOINTS) if after and self.puts_space else ():
            head, whole = self.raw_ids(joint), self.raw_ids(joint + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    @cached_property
    def puts_space(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        return self.raw_ids("\na") != [*self.raw_ids("\n"), *self.raw_ids("a")]

    def text(self, ids: Sequence[int]) -> str:
        """Returns generated tokens as text, without special tokens. A space that they begin with is kept."""
        before = self.raw_ids("\n") if self.puts_space else []
        start = len(self.tokenizer.decode(before)) if before else 0
        return self.tokenizer.decode([*before, *ids], skip_special_tokens=True)[start:]

    def ids(self, text: str, add_special_tokens: bool = False, after: str = "") -> list[int]:
        """
        Returns the tokens of a text, without control tokens in it.

        Args:
            text (`str`):
                Any text.
            add_special_tokens (`bool`, *optional*, defaults to `False`):
                Whether the tokenizer's own tokens, such as BOS, are put around it.
            after (`str`, *optional*, defaults to `""`):
                What precedes the text, or the end of it.
        """
        if self.holds_control(text):
            return self._plain_ids(text, add_special_tokens, after)
        return self.raw_ids(text, add_special_tokens, after)

    def turn_ids(self, text: str, after: str = "") -> list[int]:
        """Returns the tokens of what an assistant wrote, where the marks of a reasoning part are tokens."""
        if not self.holds_control(text, REASONING_MARKS):
            return self.raw_ids(text, after=after)
        encoded: list[int] = []
        for place, part in enumerate(_MARK.split(text)):  # marks are at odd places
            encoded += self.raw_ids(part, after=after) if place % 2 else self.ids(part, after=after)
            after = (part if place % 2 else ORDINARY) if part else after
        return encoded

    def broken(self, text: str, but: Sequence[str] = ()) -> str:
        """
        Returns a text with a space in each control token, for a server that encodes texts itself.

        Args:
            text (`str`):
                Any text.
            but (`Sequence[str]`, *optional*):
                Tokens that stay.

        Raises:
            [`DataError`]: Control tokens cannot be broken, or the tokenizer is not a fast one.
        """
        for _ in range(_TRIES):
            if not self.holds_control(text, but):
                return text
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            places = [
                end - len(found.lstrip()) + 1
                for token, (start, end) in spans
                if token in self.control_ids and (found := text[start:end]).strip() not in but
            ]
            ends = [0, *sorted(set(places)), len(text)]
            text = " ".join(text[start:end] for start, end in pairwise(ends))
        raise DataError("A text holds control tokens of the model that cannot be broken: remove them.")

    def conversation_ids(
        self,
        messages: Messages,
        render: Callable[[Messages], str],
        after: str = "",
        kept: Sequence[str] = (),
    ) -> list[int]:
        """
        Returns the tokens of a rendered conversation, in which control tokens are those of the chat template only.

        Args:
            messages (`list[dict]`):
                The conversation.
            render (`Callable[[list[dict]], str]`):
                Applies the chat template. It may return a part of the text.
            after (`str`, *optional*, defaults to `""`):
                What precedes that part, or the end of it.
            kept (`Sequence[str]`, *optional*):
                Contents that `render` looks for.

        Raises:
            [`DataError`]: A message holds control tokens outside its content, or the template cuts one that has some.
        """
        enclosed = self.enclosed(messages)
        text = render(enclosed)
        if enclosed == messages:
            ids = self.raw_ids(text, after=after)
            control = self._control(ids)
            if control == self._control_of_template(text, messages):
                return ids
            # The template changes messages, or shows a part: it may have made control tokens of them
            if control == self._control(self.raw_ids(render(_without_texts(messages, kept)), after=after)):
                return ids
            enclosed = [self._with_contents(message, self._enclosed) for message in messages]
            text = render(enclosed)
        parts = re.split(f"({_START}|{_END})", text)
        if parts[1::2] != [_START, _END] * (len(parts) // 4):
            raise DataError(
                "A message holds control tokens of the model, and its chat template cuts the message, so that it "
                "cannot be encoded as plain text: remove them from the dataset or the problem."
            )
        encoded: list[int] = []
        # The template's text, a mark, a message's text, a mark, the template's text ...
        for place, part in enumerate(parts[::2]):
            encoded += self._plain_ids(part, after=after) if place % 2 else self.raw_ids(part, after=after)
            after = (ORDINARY if place % 2 else part) if part else after
        return encoded

    def enclosed(self, messages: Messages) -> Messages:
        """
        Encloses contents that hold control tokens in marks.

        Args:
            messages (`list[dict]`):
                A conversation.

        Raises:
            [`DataError`]: A message holds control tokens outside its content.
        """
        enclosed = [self._enclosed_message(message) for message in messages]
        if enclosed != messages and {_START, _END} & set(json.dumps(messages, ensure_ascii=False, default=str)):
            raise DataError(
                "A conversation holds control tokens of the model and the noncharacters U+FDD0 or U+FDD1: remove them."
            )
        return enclosed

    def _control(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control_ids and token != self._unknown_id]

    def _control_of_template(self, text: str, messages: Messages) -> list[int] | None:
        """Control tokens of what a template puts around contents, `None` if it does not show them as they are."""
        found: list[int] = []
        position = 0
        for message in messages:
            for content in filter(None, map(str.strip, _texts_of(message))):
                at = text.find(content, position)
                if at < 0:
                    return None
                found += self._segment(text[position:at])
                position = at + len(content)
        return found + self._segment(text[position:])

    def _segment(self, text: str) -> list[int]:
        if text not in self._segments:
            if len(self._segments) >= _BATCH:
                self._segments.clear()
            self._segments[text] = self._control(self.raw_ids(text))
        return self._segments[text]

    def _any_control(self, text: str, ids: Sequence[int], but: Sequence[str] = ()) -> bool:
        found = self.control_ids.intersection(ids)
        if self._unknown_id in found and self.tokenizer.unk_token not in text:
            found -= {self._unknown_id}
        if found and but:
            added = self.tokenizer.get_added_vocab()
            found -= {added[token] for token in but if token in added}
        return bool(found)

    def check_fields(self, message: dict[str, Any]) -> None:
        """
        Checks a message's role and other fields beside its texts.

        Raises:
            [`DataError`]: One holds control tokens, or the content is neither text nor a list of parts.
        """
        _texts_of(message)
        marks = REASONING_MARKS if message.get("role") == "assistant" else ()
        others = _with_texts(message, lambda _: "")
        if any(self.holds_control(text, marks) for text in _strings(others)):
            raise DataError(
                "A message holds control tokens of the model outside its content, such as in its role, where they "
                "cannot be encoded as plain text: remove them."
            )

    def _enclosed_message(self, message: dict[str, Any]) -> dict[str, Any]:
        self.check_fields(message)
        marks = REASONING_MARKS if message.get("role") == "assistant" else ()
        texts = _texts_of(message)
        if not any(self.holds_control(text, marks) for text in {*texts, "".join(texts)}):
            return message
        return self._with_contents(message, self._enclosed)

    @staticmethod
    def _with_contents(message: dict[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
        return _with_texts(message, lambda text: change(text, message.get("role") == "assistant"))

    @staticmethod
    def _enclosed(text: str, with_reasoning: bool) -> str:
        parts = _MARK.split(text) if with_reasoning else [text]
        return "".join(part if place % 2 or not part else f"{_START}{part}{_END}" for place, part in enumerate(parts))

    @cached_property
    def _without_added(self) -> Any:
        """The tokenizer without added tokens."""
        from tokenizers import Tokenizer

        if not self.tokenizer.is_fast:
            raise DataError(
                "A text holds control tokens of the model, and its tokenizer has no fast version, which is needed to "
                "encode them as plain text: remove them."
            )
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**state, "added_tokens": [], "truncation": None, "padding": None}))

    def _plain_ids(self, text: str, add_special_tokens: bool = False, after: str = "") -> list[int]:
        goes_on = self.puts_space and after and self.raw_ids("a", after=after) != self.raw_ids("a")
        plain: list[int] = []
        for token, piece, own in self._pieces(text, add_special_tokens, bool(goes_on)):
            if own or token not in self.control_ids or token == self._unknown_id:
                plain.append(token)
            else:  # the word is in the vocabulary itself
                for character in piece:
                    pieces = self._pieces(character, goes_on=self.puts_space)
                    plain += [part for part, _, _ in pieces if part not in self.control_ids]
        return plain

    def _pieces(
        self, text: str, add_special_tokens: bool = False, goes_on: bool = False
    ) -> list[tuple[int, str, bool]]:
        """Tokens without those that were added, what each stands for, and whether it is one that is put around."""
        for joint in (*_JOINTS, "") if goes_on else ("",):
            whole, size = joint + text, len(joint)
            encoding = self._without_added.encode(whole, add_special_tokens=add_special_tokens)
            spans = list(zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True))
            if not any(start < size < end for _, (start, end), _ in spans):
                break
        return [(token, whole[start:end], bool(own)) for token, (start, end), own in spans if own or start >= size]
