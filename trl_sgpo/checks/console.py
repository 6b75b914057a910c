"""Tables and colours on the terminal, in which texts are escaped."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .terminal import printable, unescaped


class EscapingConsole(Console):
    """A console that escapes texts, not its own colours, and takes no text for markup."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Raises the error, which `run_command` tells as it does without a console."""
        raise


def console(**settings: Any) -> Console:
    """Returns a console for standard output."""
    return EscapingConsole(file=unescaped(sys.stdout), markup=False, emoji=False, **settings)
