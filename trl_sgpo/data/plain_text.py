"""Short answers as plain text: one form of each sign, without mark-up."""

import re
import unicodedata
from collections.abc import Sequence


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FOLDED = str.maketrans(
    {**dict.fromkeys("−–—‐‑‒﹣－⁻", "-"), **dict.fromkeys("’‘", "'"), **dict.fromkeys("“”", '"'), "⁄": "/", "∕": "/"}
)


def substitutions(*pairs: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """Patterns, compiled, and what replaces them."""
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def substituted(text: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """The text with each pattern replaced, in order."""
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


_LATEX = substitutions(
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|fbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\\[A-Za-z]+|\w)\s*(\\[A-Za-z]+|\w)", r"\\frac{\1}{\2}"),
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
    (r"(?<!\\)\\!", ""),
    (r"\{,\}", ","),
    (r"(?<!\\)\\[,;: ]|~", " "),
    (r"\\([%$€£#&_])", r"\1"),
    (r"\^\s*+(?:\{\s*+)?\\circ\s*+\}?|\\degree(?![A-Za-z])", "°"),
    (r"(?<!\\)\\[()\[\]]", " "),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
)
# Mathematics without LaTeX
_SIGNS = substitutions(
    (r"√\s*\(([^()]*)\)|(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)|√\s*(\w+)", r"\\sqrt{\1\2\3}"),
    (r"(?<![A-Za-z\\])(?:pi|π)(?![A-Za-z])|π", r"\\pi "),
    (r"∞|(?<![A-Za-z\\])(?:infinity|infty)(?![A-Za-z])", r"\\infty "),
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"),
    (r"≤", r"\\le "),
    (r"≥", r"\\ge "),
    (r"∪", r"\\cup "),
    (r"±", r"\\pm "),
)
_BOLD = re.compile(r"(?<!\w)\*\*([^*]+)\*\*(?!\w)")
_MAX_MARKS = 100  # around an answer
_WRAPPERS = ("**", "__", "$$", "$", "`", "*", '"', "'")


def plain_text(text: str) -> str:
    r"""
    A short answer without mark-up: emphasis, math delimiters, quotation marks, `\text{}`, a trailing period, runs of
    white space. Signs of mathematics, such as `√` and `π`, become LaTeX.

    Args:
        text (`str`):
            A final answer.

    Returns:
        `str`: The text in one line, with one form of each sign, in its own case.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"[₀-₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(_FOLDED)
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    if "\\" in text or "~" in text or "{," in text:
        text = _without_latex(text)
    text = _BOLD.sub(r"\1", " ".join(text.split()))
    text = substituted(text, _SIGNS)
    for _ in range(_MAX_MARKS):
        before, text = text, _unwrapped(text)
        if text == before:
            break
    return text


def _without_latex(text: str) -> str:
    for _ in range(3):  # \text{} may be nested
        before, text = text, substituted(text, _LATEX)
        if text == before:
            break
    return text


def _unwrapped(text: str) -> str:
    text = text.strip().rstrip(".,;:").strip()
    for mark in _WRAPPERS:
        inner = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark) and mark not in inner:
            return inner
    for mark in ("**", "*", "`", "__"):  # a mark whose partner was cut off
        if text.count(mark) == 1:
            text = text.removeprefix(mark).removesuffix(mark)
    if text.endswith("$") and not text.startswith("$"):
        text = text.removesuffix("$")
    return text.strip()
