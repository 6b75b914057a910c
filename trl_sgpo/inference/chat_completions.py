"""Answers of OpenAI-compatible servers, whole or in events."""

import json
from dataclasses import dataclass, replace
from typing import Any

from .model import Stream


MAX_TOKENS = 10**9
_NOT_FINISHED = (None, "error", "abort")


class NoCompletion(ValueError):
    """An answer that no server of chat completions sends. The message is a clause without a full stop."""


class CompletionFailed(RuntimeError):
    """An answer that the server did not finish. The message is a clause without a full stop."""


@dataclass(frozen=True)
class Completion:
    """
    A completion.

    Args:
        text (`str`):
            Its text, without a reasoning part that the server separates.
        truncated (`bool`):
            Whether it was cut off by length.
        tokens (`int`):
            Its length as the server counts it.
        reasoned (`bool`, *optional*, defaults to `False`):
            Whether the server separated a reasoning part.
        filtered (`bool`, *optional*, defaults to `False`):
            Whether the server's content filter withheld text.
    """

    text: str
    truncated: bool
    tokens: int
    reasoned: bool = False
    filtered: bool = False

    def at_most(self, characters: int) -> "Completion":
        """The completion, cut off at a number of characters."""
        if len(self.text) <= characters:
            return self
        return replace(self, text=self.text[:characters], truncated=True)


def read_completion(content: bytes) -> Completion:
    """
    Reads a whole answer.

    Raises:
        [`NoCompletion`]: It is none.
        [`CompletionFailed`]: It holds an error.
    """
    answer = _event(content)
    choices = _choices(answer)
    if not choices:
        raise NoCompletion("it has no choices")
    choice = choices[0]
    message = _object(choice.get("message"), "message")
    finish = choice.get("finish_reason")
    if finish in _NOT_FINISHED[1:]:
        raise CompletionFailed(f"it ended before the answer was finished ({finish})")
    text = _text(choice["text"]) if "text" in choice else _text(message.get("content"))
    return Completion(text, finish == "length", _tokens(answer), _reasoning(message), finish == "content_filter")


class StreamedCompletion:
    """
    Reads server-sent events and passes on their text.

    Args:
        stream ([`~trl_sgpo.inference.model.Stream`]):
            Receives pieces of text.

    Attributes:
        started (`bool`): Whether an event was read.
    """

    def __init__(self, stream: Stream):
        self._stream = stream
        self._pieces: list[str] = []
        self._tokens = 0
        self._finish: Any = None
        self._reasoned = False
        self.started = False

    def read_line(self, line: bytes) -> None:
        """
        Reads a line.

        Raises:
            [`NoCompletion`]: It is no event of chat completions.
            [`CompletionFailed`]: It tells an error.
        """
        if not line.startswith(b"data:"):
            return
        self.started = True
        data = line.removeprefix(b"data:").strip()
        if data in (b"", b"[DONE]"):
            return
        event = _event(data)
        if "choices" not in event:
            raise CompletionFailed(f"it stopped with an error: {data[:200].decode(errors='replace')}")
        self._tokens = _tokens(event) or self._tokens
        for choice in _choices(event):
            delta = _object(choice.get("delta"), "delta")
            if piece := _text(choice.get("text")) or _text(delta.get("content")):
                self._pieces.append(piece)
                self._stream(piece)
            self._reasoned |= _reasoning(delta)
            self._finish = choice.get("finish_reason") or self._finish

    def completion(self) -> Completion:
        """
        The completion, after the last line.

        Raises:
            [`CompletionFailed`]: The server did not finish it.
        """
        if self._finish in _NOT_FINISHED:
            raise CompletionFailed("it ended before the answer was finished")
        text, filtered = "".join(self._pieces), self._finish == "content_filter"
        return Completion(text, self._finish == "length", self._tokens, self._reasoned, filtered)


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)  # halves of characters are replaced in texts
    except (ValueError, RecursionError) as error:
        raise NoCompletion(f"{str(error)[:100]}") from error
    event = _object(event, "answer")
    if event.get("error"):
        raise CompletionFailed(f"it stopped with an error: {json.dumps(event['error'])[:200]}")
    return event


def _object(value: Any, what: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise NoCompletion(f"its {what} is no object")
    return value or {}


def _choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    choices = event.get("choices")
    if not isinstance(choices, list):
        raise NoCompletion("it has no list of choices")
    return [_object(choice, "choice") for choice in choices]


def _text(content: Any) -> str:
    """A content: a text, or a list of parts, of which those that are text are joined."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    if not all(isinstance(part, dict) for part in parts):
        raise NoCompletion("a part of its content is no object")
    texts: list[Any] = [part.get("text") for part in parts if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise NoCompletion("its content is no text")
    return "".join(texts).encode(errors="replace").decode()  # without halves of characters


def _tokens(event: dict[str, Any]) -> int:
    tokens = _object(event.get("usage"), "usage").get("completion_tokens")
    if tokens is not None and not (type(tokens) is int and 0 <= tokens <= MAX_TOKENS):
        raise NoCompletion("its completion_tokens is no number of tokens")
    return tokens or 0


def _reasoning(message: dict[str, Any]) -> bool:
    return bool(message.get("reasoning_content") or message.get("reasoning"))
