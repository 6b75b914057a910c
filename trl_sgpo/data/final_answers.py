"""Where a solution states its final answer."""

import re


MAX_MARKS = 8
MAX_REST = 2000

_MARK = re.compile(r"####+|\\boxed\s*\{|\\boxed[ \t]+(?=[-+]?[\d\\.])|<answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswers?\b(?:[ \t]to[ \t][^.:\n]{0,80}?)?"
    r"(?:[ \t]{0,3}[*_]{0,3}[ \t]{0,3}[:=][ \t]{0,3}[*_]{0,3}|[ \t]{1,3}(?:is|are)\b[ \t]{0,3}:?)"
    r"|^[^\w\n]{0,10}(?:final[ \t]+)?answer[^\w\n]{0,10}$",
    re.IGNORECASE | re.MULTILINE,
)
_CHECKING = re.compile(r"\b(?:verify|check|confirm)\w*(?:[ \t]+(?:the|this|our|that))?[ \t]*$", re.IGNORECASE)
# What follows "the answer is" without stating it
_REMARK = re.compile(
    r"(?:correct|incorrect|wrong|verified|confirmed|reasonable|clear|consistent|in|not|as|what|that|given|found)\b",
    re.IGNORECASE,
)
_ADVERB = re.compile(r"(?:therefore|thus|then|hence|simply|just|indeed|clearly)[ \t,]+", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?:(?<=[a-z]{4})|(?<=[\d)}\]$*%]))\.[ \t]+(?=[A-Z])"
    r"|[ \t]+(?:because|since)\b|,[ \t]*(?:not|because|since|so|as)\b"
)
_CLOSING = re.compile(r"\s{0,3}#{4,}\s*$")
_OPENING = re.compile(r"(?:\\\[|\$\$|```\w*)[ \t]*$")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")


def final_answer(text: str, lines: int = 1) -> str | None:
    r"""
    Extracts the final answer of a solution.

    The last of the marks `#### 42` (four `#` or more), `\boxed{42}` (or `\boxed 42`) and `<answer>42</answer>`
    decides; without one, the last "answer is" or "Answer:"; without that, bold text in the last line. A reasoning
    part is not read: what is before `</think>`, or all of a text that begins with `<think>` and has no end of it.

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
    if text.lstrip().startswith("<think>"):
        return None
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
        if mark[0].startswith("#"):
            first = rest.split("\n", 1)[0].strip()
            content = "\n".join(rest.split("\n")[:lines]).strip() if first else rest.strip()
        elif mark[0].endswith("{"):
            content = _in_braces(rest) or ""
        elif mark[0].startswith("\\"):
            content = re.split(r"[\s$]", rest, maxsplit=1)[0].rstrip(".,;")
        else:
            content = re.split(r"</?answer>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()
        content = _CLOSING.sub("", content)
        if content:
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
    stated = None
    for phrase in list(_PHRASE.finditer(text))[-MAX_MARKS:]:
        if _CHECKING.search(text[max(0, phrase.start() - 40) : phrase.start()]) is None:
            found = _rest_of_sentence(text[phrase.end() : phrase.end() + MAX_REST])
            if found is not None and (stated is None or _REMARK.match(found) is None):
                stated = found
    return stated


def _rest_of_sentence(rest: str) -> str | None:
    lines = [line.strip() for line in _BOLD.sub(r"\1", rest).lstrip(" \t*_:").split("\n")]
    stated = [line for line in lines if line and not _OPENING.fullmatch(line)]
    if not stated:
        return None
    line = stated[0]
    line = _ADVERB.sub("", line, count=1) if _ADVERB.match(line) else line
    answer = _SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t*").rstrip(" .*")
    if answer.count(")") > answer.count("("):
        answer = answer.removesuffix(")").rstrip(" .*")  # of a remark in parentheses
    return answer or None


def _bold(text: str) -> str | None:
    lines = text.strip().rsplit("\n", 1)
    bold = _BOLD.findall(lines[-1])
    return bold[-1].strip() if bold and not bold[-1].strip().endswith(":") else None
