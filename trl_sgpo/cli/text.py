"""Text that commands print."""

from ..bank import Strategy


def printable(text: str) -> str:
    """Text with control characters and other unprintable ones written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def rate(strategy: Strategy) -> str:
    """Successes and trials of a strategy."""
    successes = f"{strategy.successes:.2f}".rstrip("0").rstrip(".")
    return f"{successes}/{strategy.trials}"
