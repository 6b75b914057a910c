"""Where a solution states its final answer."""

import re


MAX_MARKS = 8

_MARK = re.compile(r"####|\\boxed\s*\{|<answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswers?\b(?:\s+to\s[^.:\n]{0,80}?)?(?:\s*[*_]*\s*[:=]\s*[*_]*|\s+(?:is|are)\b\s*:?)"
    r"|^\W*(?:final\s+)?answer\W*$",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<=[a-z]{4}|\d\d\d\d)\.\s+(?=[A-Z])|(?<=[\d)}\]$*%])\.\s+(?=[A-Z])")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")


def final_answer(text: str, lines: int = 1) -> str | None:
    r"""
    Extracts the final answer of a solution.

    The last of the marks `#### 42`, `\boxed{42}` and `<answer>42</answer>` decides; without one, the last "answer is"
    or "Answer:"; without that, bold text in the last line. A reasoning part that ends in `</think>` is not read.

    Args:
        text (`str`):
            A solution.
        lines (`int`, *optional*, defaults to `1`):
            Lines of the answer, such as rows of a grid, if it follows `####`.

    Returns:
        `str` or `None`: What follows the last `####` on its line (or, if that is empty, on all lines after it), the
        content of `\boxed{...}` or `<answer>`, or the rest of the sentence after the phrase. `None` if no answer is
        stated.
    """
    text = text.rpartition("</think>")[2]
    stated = _marked(text, lines)
    if stated is None:
        stated = _phrased(text) or _bold(text)
    while stated is not None and (inner := _marked(stated, lines) or _phrased(stated)) is not None:
        stated = inner  # such as \boxed{} after ####
    return stated


def _marked(text: str, lines: int) -> str | None:
    """Content of the last mark that has any."""
    for mark in reversed(list(_MARK.finditer(text))[-MAX_MARKS:]):
        rest = text[mark.end() :]
        if mark[0] == "####":
            first = rest.split("\n", 1)[0].strip()
            content = "\n".join(rest.split("\n")[:lines]).strip() if first else rest.strip()
        elif mark[0].startswith("\\"):
            content = _in_braces(rest) or ""
        else:
            content = re.split(r"</?answer>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()
        if content.strip("# "):
            return content
    return None


def _in_braces(rest: str) -> str | None:
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position].strip()
    return None


def _phrased(text: str) -> str | None:
    """Rest of the sentence after the last phrase that states an answer."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    rest = text[phrases[-1].end() :].lstrip(" \t*_:")
    line = rest.split("\n", 1)[0].strip() or next(iter(rest.strip().split("\n")), "")
    answer = _SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t*").rstrip(" .*")
    if answer.count(")") > answer.count("("):
        answer = answer.removesuffix(")").rstrip(" .*")  # of a remark in parentheses
    return answer or None


def _bold(text: str) -> str | None:
    lines = text.strip().rsplit("\n", 1)
    bold = _BOLD.findall(lines[-1])
    return bold[-1].strip() if bold and not bold[-1].strip().endswith(":") else None
