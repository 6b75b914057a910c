"""
The boundary to the terminal: what is printed there cannot control it.

Errors, warnings, logs and texts hold what strangers wrote: servers, models, datasets, recipes. [`escaped_output`]
escapes, in all that is written to standard output and standard error, characters that a terminal acts on or does not
show. Progress bars may still move the cursor, and [`~trl_sgpo.checks.console.console`] writes in colour.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast
from unicodedata import category

from .secrets import without_credentials


_MOVES = re.compile(r"\r|\n*(\x1b\[A)*\Z")
"""What a progress bar writes to move the cursor: to the start of its line, or to the line of another bar."""


BLANK = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\U0001d159\U00016fe4"
    + "".join(map(chr, [*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)]))
)
"""Characters that count as printable and show nothing: fillers, blanks and variation selectors but those of emoji."""
_MARKS = 4  # combining marks in a row; more of them cover other lines


def printable(text: str, kept: str = "\n", marks: int = 0) -> str:
    """
    The text with escapes for all characters that a terminal would act on, or not show.

    Args:
        text (`str`):
            Any text.
        kept (`str`, *optional*, defaults to a line feed):
            Control characters to keep.
        marks (`int`, *optional*, defaults to 0):
            Combining marks that the text follows.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for c in text:
        marks = marks + 1 if category(c) in ("Mn", "Me") else 0
        is_shown = c in kept or (c.isprintable() and c not in BLANK and marks <= _MARKS)
        shown.append(c if is_shown else c.encode("unicode_escape").decode())
    return "".join(shown)


def _marks_at_end(text: str, before: int) -> int:
    """Combining marks in a row at the end of a text that follows `before` of them."""
    end = next((index for index, c in enumerate(reversed(text)) if category(c) not in ("Mn", "Me")), None)
    return before + len(text) if end is None else end


class EscapedStream:
    """
    Writes to a stream without what a terminal acts on, and without credentials where it is for messages.

    Args:
        stream (`TextIO`):
            Standard output or standard error.
        messages (`bool`):
            Whether it is standard error, which shows messages and progress bars.
    """

    def __init__(self, stream: TextIO, messages: bool):
        self.stream, self.messages = stream, messages
        self._marks = 0  # at the end of what was written: a server may send them one by one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text, escaped."""
        moves = ""
        caller = sys._getframe().f_back  # none where the interpreter prints a traceback
        # Bars of libraries write to standard error as everything else does: only the caller tells them apart
        if self.messages and caller is not None and caller.f_globals["__name__"].partition(".")[0] == "tqdm":
            moves = _MOVES.match(text)[0]  # type: ignore[index]
        shown = text[len(moves) :]
        shown = without_credentials(shown) if self.messages else shown
        self.stream.write(moves + printable(shown, kept="\n\t", marks=self._marks))
        self._marks = _marks_at_end(shown, self._marks)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes texts, escaped."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """Whether to draw bars. Standard output is no terminal to libraries, whose colours would be escaped."""
        return self.messages and self.stream.isatty()


def unescaped(stream: TextIO) -> TextIO:
    """The stream beneath, for a writer that escapes texts itself."""
    return stream.stream if isinstance(stream, EscapedStream) else stream


@contextmanager
def escaped_output() -> Iterator[None]:
    """
    Within the context, standard output and standard error are written to without what a terminal acts on. After an
    error they stay so, because its traceback is printed later.
    """
    before = sys.stdout, sys.stderr
    escaped = [cast(TextIO, EscapedStream(unescaped(each), each is sys.stderr)) for each in before]
    sys.stdout, sys.stderr = escaped
    _redirect_handlers(dict(zip(before, escaped, strict=True)))
    yield
    sys.stdout, sys.stderr = before
    _redirect_handlers(dict(zip(escaped, before, strict=True)))


def _redirect_handlers(streams: dict[TextIO, TextIO]) -> None:
    """Lets handlers of logs, which keep the stream they were made with, write to another one."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {each for logger in loggers if isinstance(logger, logging.Logger) for each in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            handler.setStream(streams[handler.stream])
