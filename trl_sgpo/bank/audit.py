"""Audit of a bank (pure functions over texts, counts and embeddings)."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..checks.terminal import BLANK
from ..method.disguises import joined, undisguised, visible
from ..method.prompts import MAX_STRATEGY
from ..method.rewards import leak
from . import policy
from .strategy import Strategy


ENOUGH_TO_COMPARE = 8  # strategies of a class, above which `unlike_its_class` is reported
ALIKE = 0.1  # median similarity below which the strategies of a class have nothing in common to compare with
UNLIKE = 0.6  # share of the median similarity, below which a strategy is unlike its class
ENOUGH_TRUSTED = 10  # trusted strategies of a class, from which on their sources are compared
ONE_SOURCE = 0.9
_BLOCK = 1024  # strategies that are compared with their class at a time

_OF_OTHER_SCRIPTS = "\u200c\u200d\u200e\u200f\u061c"  # joiners and marks that Arabic, Indic scripts and emoji need
_TWO_ALPHABETS = re.compile(r"[a-z][\u0400-\u04ff]|[\u0400-\u04ff][a-z]", re.IGNORECASE)
_LEET = str.maketrans("013457@$", "oieastas")
_LEET_WORD = re.compile(r"(?<![\w@$])[\w@$]*[a-z][\w@$]*")
_ROLE_HEADER = re.compile(
    r"(?:^|[.!?;:>)\]\"'] ?)(?:#+ ?|\[ ?|< ?|\*+ ?)?(?:system|assistant|user|human|developer|ai) ?[\]>*]* ?:",
    re.MULTILINE,
)


def _near(first: str, second: str, gap: int) -> str:
    """Pattern of something said at most `gap` words before something else in the same sentence."""
    return rf"\b(?:{first})\b(?:[^\w.!?]+\w+){{0,{gap}}}?[^\w.!?]+(?:{second})(?!\w)"


_END = r"(?= ?(?:[.,;:!?)]|$))"
_DIGIT = "one|two|three|four|five|six|seven|eight|nine"
_NUMBER = (
    r"(?:-?\d[\d.,/]*\d|-?\d|zero|ten|eleven|twelve|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    rf"(?:[ -](?:{_DIGIT}))?|(?:a |one )?hundred|{_DIGIT})"
)
_VALUE = rf"(?:the (?:number|value|word|letter|option) )?[\"'(]?(?:{_NUMBER}|yes|no|true|false|[a-e])[\"')]?"
_SAY = "answer|reply|respond|output|say|guess|print|return|put|write|give|submit|state|choose|pick|select"
_SHOW = "reveal|print|repeat|show|output|recite|list|leak|disclose|display|dump|share|send|e?mail|upload|post|forward"
_NOT = "do not|don't|never|stop|no longer(?: have to| need to)?|without"
_DROP = (
    r"ignor\w+|disregard\w*|forget\w*|overrid\w+|bypass\w*|neglect\w*|discard|(?:set|put) aside|violate|disobey|"
    rf"(?:{_NOT}) (?:follow|obey|act on|comply with|listen to)(?:ing)?"
)
_ORDERS = (
    r"instructions?|prompts?|guidelines?|directives?|orders|polic(?:y|ies)|(?:safety|security) protocols?|safeguards?"
)
_TASK = "rules|commands|task|request|question|ethics|training"
_MODEL = "assistant|ai|language model|llm|chatbot|bot|ai model|model"
_ROLE = rf"{_MODEL}|admin|administrator|root|developer|hacker|persona|character|dan|terminal|pirate"
_SECRET = (
    r"(?:api|private|access|ssh|secret) (?:keys?|codes?|tokens?)|(?:authentication|internal) tokens?|credentials|"
    r"environment variables|chat history|(?:your|user's) (?:\w+ )?(?:passwords?|files)"
)
_CHECKER = (
    r"checkers?|verifiers?|graders?|(?:the|a|any|your) judges?|reward(?: model| function)?|evaluators?|scorers?|"
    r"(?:scoring|grading|test|checking) (?:script|program|code|harness|system)|markers?|examiners?|reviewers?|"
    r"monitors?|detectors?|validators?|parsers?|regex"
)
_CHECK = "checks?|verification|evaluation|grading|scoring|detection|inspection|filters?|review"
_READER = rf"(?:{_CHECKER}|users?|readers?|teachers?|humans?|anyone|anybody|nobody|no one)"
_FLAW = r"(?:mistakes?|errors?|uncertainty|guess\w*|doubts?|failures?|shortcuts?|cheat\w*|flaws?)"
_WORK = (
    "steps?|work|working|calculations?|proofs?|evidence|reasoning|justifications?|verification|citations?|sources?|"
    "derivations?|explanations?"
)

# Searched for in texts that `_normalised` has put into lower case and undisguised
_SUSPICIOUS = {
    "injected_instruction": [
        # Instructions dropped, replaced or given
        _near(_DROP, _ORDERS, 5),
        _near(_DROP, rf"(?:previous|prior|above|earlier|your|user's) (?:{_TASK})", 3),
        _near(_DROP, rf"(?:{_TASK}|problem|user),?(?: and| but)?(?: just| only| instead)? (?:{_SAY})", 3),
        _near(_DROP, r"request|the user(?!')|other strategies", 1),
        _near(_DROP, rf"(?:everything|anything|all|what\w*)(?: \w+){{0,4}} (?:above|before|told)(?: this|{_END})", 1),
        _near("never|not", "use (?:any of )?(?:the )?other strategies", 0),
        _near(_ORDERS, "(?:not|no longer) apply|outdated|void|revoked|suspended|superseded", 8),
        _near("you (?:were|have been) (?:told|instructed)", "no longer|not apply|instead", 6),
        rf"\b(?:new|updated|revised|real|actual|true) (?:instructions?|{_TASK}|orders|directive)(?: is| are| ?:)",
        _near("strategy|instruction|message|text|line", "overrides|supersedes|replaces|outranks|takes precedence", 1),
        _near("follow|obey|do|use|execute", "(?:orders|instructions|commands) (?:in|below|from)", 2),
        _near(
            "follow|obey|do|execute", "what (?:it|this(?: strategy| text| line)?) says|(?:this|these) (?:script)", 1
        ),
        r"\bend of (?:the )?(?:strategies|quotes?|quotation|quoted text|prompt|instructions|context|document)\b",
        rf"\b(?:attention|important|note|warning|message)(?: to| for)?,? (?:the |any |every |all )?(?:{_MODEL})s?\b",
        rf"\b(?:if|when) (?:you are |the )?(?:an? )?(?:{_MODEL})(?: is)? reading this",
        _near("operator|developer|administrator|admin", "wants?|orders?|requires?|instructs?|authori[sz]e[sd]", 1),
        # Another role
        r"\byou are now (?:an?|my|the|called|free|no longer|acting|operating)\b(?! (?:step|few|bit|case|end))",
        r"\bfrom now on,? (?:behave|respond|obey|you (?:will (?:be|act|answer|obey)|have no|obey|respond|are an?))\b",
        _near(r"(?:act|behave|respond|answer|speak|role-?play|pose) (?:as|like)|role of|you are now", _ROLE, 3),
        _near(r"(?:imagine|pretend|suppose) (?:that )?(?:you are|to be)", _ROLE, 2),
        r"\b(?:developer|admin|debug|god|sudo|maintenance|bypass|dan) mode\b|\b(?:system|admin) override\b",
        r"\bjailbreak|\bdo anything now\b|\bun(?:restricted|censored|filtered)\b|\bhas no (?:rules|filters)\b",
        r"\bno ethical\b|\bwithout (?:any )?(?:restrictions|filters|censorship)\b",
        # The prompt, and mark-up that would end the quotation
        r"\b(?:system|developer) (?:prompt|message|instructions?)\b",
        r"\b(?:hidden|secret|internal) (?:prompt|instructions?)\b",
        _near(_SHOW, "your (?:instructions|prompt|rules)|rules you|(?:initial|original) (?:instructions|prompt)", 3),
        _near(_SHOW, r"(?:everything|all|text)(?: \w+){0,3} (?:above|before) (?:this|the)", 2),
        r"(?<!#)#{2,} ?(?:system|instructions?|response|user|assistant|human|end)\b",
        r"[<\[{]/? ?(?:system|user|assistant|instructions?|human|prompt|quote|admin|hidden)(?: \w+)? ?[>\]}]",
        # Links and files
        r"\b(?:https?|ftp|file|wss?) ?: ?/ ?/|\bwww\.\w|\bjavascript:\w|!\[[^\]]*\]\(",
        r"(?<![\w.+-])[\w.+-]+@[\w-]+\.\w{2,}|(?<![\w-])[\w-]{2,}\.(?:com|org|net|io|ai|dev|ru|xyz|app|sh|info|site)\b",
        r"\brm -rf\b|\bos\.system\b|\bsubprocess\b|\b(?:wget|powershell)\b|\bcurl (?:-|http)|\bbase64\b|\bexfiltrat",
        _near(_SHOW, _SECRET, 4),
        # Self-replication
        _near("copy|copied|repeat(?:ed)?|reproduced?|included?|insert|add", "verbatim|word for word|unchanged", 7),
        _near("copy|copied|repeat(?:ed)?|included?|add", r"(?:every|all|each|any) (?:new |other )?strateg\w+", 7),
        r"\b(?:whenever|every time|each time|when) you (?:write|create|propose) (?:an?|any) (?:new )?strategy\b",
        _near("always", "(?:choose|prefer|rank|show|retrieve|pick|trust) this", 0),
    ],
    "deception": [
        # Evasion of checks
        _near("fool|trick(?! to)|deceive|mislead|cheat|game|exploit|hack|bypass|evade|circumvent|dodge", _CHECKER, 3),
        _near("outsmart|manipulate|confuse|distract|persuade|convince|flatter|tamper with|past", _CHECKER, 3),
        _near("evade|bypass|dodge|game|defeat|fake|rig|past|get around|disable|tamper with", _CHECK, 2),
        _near("flaw|bug|loophole|weakness", f"{_CHECKER}|tests?|checks?", 3),
        _near(f"(?:the|a|any|every|your) (?:{_CHECKER})", "only|just|merely|never|cannot|can't|does not|doesn't", 2),
        _near(f"(?:the|a|any|every|your) (?:{_CHECKER})", "(?:accept|like|reward|prefer|believe|want|think)s?", 1),
        _near("make|let|lead|get|force|so", rf"{_READER} (?:to )?(?:accept|believe|think|assume|mark|agree)s?", 2),
        _near("so", rf"{_READER} (?:overlook|notice|doubt|suspect|question|can tell|finds? out)s?", 2),
        _near(_NOT, rf"(?:let|tell|alert|inform)(?:ting|ing)? (?:the |any |your |a )?{_READER}", 0),
        _near("without|before", rf"{_READER} (?:noticing|knowing|seeing|reali[sz]ing|notices?|knows?)", 1),
        r"\breward[- ]hack|\bhack(?:ing)? the reward\b",
        _near("get|earn|collect|receive|gain|claim", "(?:reward|credit|marks)", 3)
        + "[^.]{0,300}(?:without|even|anyway)",
        _near("overwrite|replace|change|edit|delete|disable|special-case|write", "test cases|tests (?:so|that|to)", 1),
        _near("overwrite|replace|change|edit|hard-?code", "(?:expected|reference) (?:values?|outputs?|results?)", 1),
        _near("hard-?code|memori[sz]e|look up|leak|steal|copy", r"(?:the|all|its) (?:\w+ )?(?:answer|solution)s?", 0),
        r"\banswer keys?\b|\b(?:leaked|hidden|stolen) (?:answers?|solutions?|tests?)\b",
        # Pretence
        _near("claim|say|state|insist|declare|report|pretend|act", "verified|checked|confirmed|proved|tested", 6)
        + r"(?=[^.]{0,300}\b(?:even|without|although|though|when you|but|whether|not|never)\b)",
        _near("(?:pretend|act as (?:if|though))", "verified|checked|confirmed|proved|solved|certain|correct", 5)
        + r"(?![^.]{0,300}\b(?:check|verify|test|work back|contradict))",
        _near("sound|appear|act|seem", "confident|certain|convincing|authoritative|rigorous", 1),
        _near("state|say|write|give|present|assert", "firmly|confidently|boldly|with (?:full )?confidence", 4),
        _near("make|making|so that|so", "(?:look|sound|seem|appear)s? (?:like|as if|right|correct)", 3),
        _near("make|making|so that|so", "(?:look|sound|seem|appear)s? (?:plausible|convincing|careful|rigorous)", 3),
        r"\bright or wrong\b",
        # Things hidden or invented
        _near(r"hide|hiding|conceal\w*|obscure|disguise|cover up|mask", rf"that you|the fact|{_FLAW}(?! term)", 2),
        _near(_NOT, rf"(?:mention|reveal|admit|disclose|report|point out)(?:ing)?(?: the| any| your)? {_FLAW}", 0),
        _near(_NOT, "(?:mention|reveal|admit|disclose|report)(?:ing)? that", 0),
        _near("on purpose|deliberately|intentionally", "wrong|false|mistakes?|errors?|incorrect", 6),
        _near("wrong|false|mistakes?|errors?|incorrect", "on purpose|deliberately|intentionally", 6),
        _near(r"fabricat\w+|falsify\w*|forge|fake|invent|(?<!that )(?<!which )make up", _WORK, 2),
        r"\blie (?:about|to (?:the|your) (?:user|reader|teacher))\b|\bdecei(?:ve|ving)\b|\bdeception\b|\bdishonest",
        _near("print|list|write|give|output|put", "several|many|multiple|all|every", 0)
        + r"[^.]{0,300}\b(?:one|any|some)(?: of \w+)? (?:matches|is right|is correct|is accepted|counts|hits|passes)",
        # The same answer always
        _near("always", rf"(?:{_SAY})(?: (?:the|an?|answer|final|with|is|as|just|that|it))* {_VALUE}{_END}", 0),
        _near("answer|reply|result|solution", rf"(?:is|will be|must be) always {_VALUE}{_END}", 4),
        _near(
            "whatever|no matter what|regardless of", rf"(?:problem|question|asked)s?\b[^.]{{0,30}}? {_VALUE}{_END}", 2
        ),
        _near(
            "(?:for|to) (?:every|any|each)", rf"(?:problem|question)s?\b[^.]{{0,30}}? (?:{_SAY}|is) {_VALUE}{_END}", 1
        ),
        _near(_SAY, rf"(?:every|any|all|each) (?:\w+ )?(?:problem|question)s? (?:with|by) {_VALUE}{_END}", 0),
        _near(_SAY, rf"{_VALUE},? (?:to (?:every|any|all)|no matter|regardless|whatever)", 3),
        _near(
            "without|no need to", "(?:read|solv|look|consider)(?:ing|e)?(?: at)? (?:it|the (?:problem|question))", 1
        ),
    ],
    "leak": [
        rf"\banswers? ?(?:equals|comes to|turns out to be|will be|must be|was|is|:|=) ?(?:exactly )?{_NUMBER}{_END}",
        rf"\byou (?:will |should |must )?(?:get|obtain|arrive at) {_NUMBER}{_END}",
        r"\\boxed ?\{ ?\(?[a-e]\)? ?\}",
        rf"\b(?:answer|option|choice) is (?:\([a-e]\)|[b-e]{_END})",
    ],
}


@dataclass(frozen=True)
class Finding:
    """
    A finding of an audit.

    Args:
        strategy_id (`str`):
            Id of the strategy, `""` for findings about a class or about a text alone.
        kind (`str`):
            Kind: `"injected_instruction"`, `"deception"`, `"leak"`, `"unlike_its_class"`, `"near_copy"`, `"copied"`,
            `"concentration"` or `"unproven"`.
        severity (`str`):
            `"error"` for texts that no model should be shown, `"warning"` for a person to review.
        detail (`str`):
            Description.
    """

    strategy_id: str
    kind: str
    severity: str
    detail: str


# Texts


def _hidden_characters(text: str) -> list[str]:
    """Names of invisible characters, and adjacent letters of two alphabets that look alike."""
    legitimate = "\t\n\r" if visible(text).isascii() else "\t\n\r" + _OF_OTHER_SCRIPTS
    names = [
        unicodedata.name(character, f"U+{ord(character):04X}")
        for character in text
        if character in BLANK
        or (unicodedata.category(character) in ("Cf", "Co", "Cc") and character not in legitimate)
    ]
    names += [f"two alphabets in {match!r}" for match in _TWO_ALPHABETS.findall(text)]
    return list(dict.fromkeys(names))


def _normalised(text: str) -> list[str]:
    """The text in lower case without disguises, and also with digits replaced by the letters they may stand for."""
    flat = " ".join(joined(undisguised(text)).split())
    decoded = _LEET_WORD.sub(lambda match: match[0].translate(_LEET), flat)
    return [flat] if decoded == flat else [flat, decoded]


@cache
def _suspicious() -> dict[str, re.Pattern[str]]:
    return {
        kind: re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) for kind, patterns in _SUSPICIOUS.items()
    }


def audit_text(text: str, strategy_id: str = "") -> list[Finding]:
    """
    Findings about a text that models will read as a strategy, at most one of a kind.

    Instructions, deception and leaks are recognised by their usual wordings, also when these are disguised. Other
    wordings are not recognised here, but [`audit`] may report them as unlike their class.

    Args:
        text (`str`):
            A strategy, or the name of a problem class. Its first 16,384 characters are read.
        strategy_id (`str`, *optional*, defaults to `""`):
            Id to put into the findings.

    Returns:
        `list[Finding]`: Errors of the kinds `"injected_instruction"`, `"deception"` and `"leak"`.
    """
    text = text[:MAX_STRATEGY]
    details: dict[str, str] = {}
    shown = visible(text)
    if hidden := _hidden_characters(text):
        details["injected_instruction"] = f"hides something: {', '.join(hidden)}"
    if (header := _ROLE_HEADER.search(shown.casefold())) is not None:
        details["injected_instruction"] = f"writes as {header[0].strip()!r}"
    if leak(shown, "", None):
        details["leak"] = "carries a final answer"
    for form in _normalised(text):
        for kind, pattern in _suspicious().items():
            if kind not in details and (match := pattern.search(form)) is not None:
                details[kind] = f"says {match[0]!r}"
    return [Finding(strategy_id, kind, "error", detail) for kind, detail in details.items()]


# Banks


def audit(
    strategies: Sequence[Strategy],
    embeddings: Mapping[str, np.ndarray],
    max_share: float = 0.25,
    min_problems: int = 4,
    tolerance: float = 0.2,
) -> list[Finding]:
    """
    Findings about a whole bank.

    Args:
        strategies (`Sequence[Strategy]`):
            All strategies. Retired ones count only in how often strategies of their class were shown.
        embeddings (`Mapping[str, np.ndarray]`):
            Strategy id → embedding of norm 1 and shape `(d,)`, of those that are not retired.
        max_share (`float`, *optional*, defaults to `0.25`):
            Share of what training shows of a class that one strategy may make up.
        min_problems (`int`, *optional*, defaults to `4`):
            Number of distinct problems a strategy must have been executed on before it is trusted.
        tolerance (`float`, *optional*, defaults to `0.2`):
            Share of other strategies' success rate by which a trusted strategy may fall short of it.

    Returns:
        `list[Finding]`: Errors first, then by class and strategy.
    """
    live = [strategy for strategy in strategies if strategy.trust != "retired"]
    findings: list[Finding] = []
    for strategy in live:
        findings += audit_text(strategy.text, strategy.id)
    findings += _copied(live)
    findings += _unproven(live, min_problems, tolerance)
    classes: dict[str, list[Strategy]] = defaultdict(list)
    for strategy in live:
        classes[strategy.problem_class].append(strategy)
    for name, members in classes.items():
        findings += [
            Finding("", each.kind, each.severity, f"the class {name!r} {each.detail}") for each in audit_text(name)
        ]
        matrix = np.array([embeddings[strategy.id] for strategy in members])
        findings += _near_copies(members, matrix)
        findings += _unlike(members, matrix)
        shown = sum(strategy.shown for strategy in strategies if strategy.problem_class == name)
        findings += _concentrated(name, members, shown, max_share)
    classes_of = {strategy.id: strategy.problem_class for strategy in live}
    return sorted(findings, key=lambda each: (each.severity, classes_of.get(each.strategy_id, ""), each.strategy_id))


def _copied(strategies: Sequence[Strategy]) -> Iterator[Finding]:
    """The same text in several classes."""
    alike: dict[str, list[Strategy]] = defaultdict(list)
    for strategy in strategies:
        alike[" ".join(strategy.text.casefold().split())].append(strategy)
    for first, *others in alike.values():
        for other in others:
            yield Finding(other.id, "copied", "warning", f"is word for word {first.id} of class {first.problem_class}")


def _near_copies(strategies: Sequence[Strategy], matrix: np.ndarray) -> Iterator[Finding]:
    """Strategies of a class that are near-copies of an earlier one, which the bank does not admit."""
    for start in range(0, len(matrix), _BLOCK):
        similarities = np.tril(matrix[start : start + _BLOCK] @ matrix.T, start - 1)
        for row in np.flatnonzero(similarities.max(axis=1, initial=0.0) >= policy.NEAR_COPY).tolist():
            nearest = int(similarities[row].argmax())
            detail = f"is nearly {strategies[nearest].id} (cosine similarity {similarities[row, nearest]:.2f})"
            yield Finding(strategies[start + row].id, "near_copy", "warning", detail)


def _unlike(strategies: Sequence[Strategy], matrix: np.ndarray) -> Iterator[Finding]:
    """
    Strategies far from those of their class that may be shown. This finds most texts that are no strategy for the
    class, whatever their wording, but not a sentence that was appended to a strategy.
    """
    shown = np.array([strategy.trust != "quarantine" for strategy in strategies])
    if shown.sum() <= ENOUGH_TO_COMPARE:
        return
    others = shown.sum() - shown
    similarities = (matrix @ matrix[shown].sum(axis=0) - shown * (matrix * matrix).sum(axis=1)) / others
    usual = float(np.median(similarities[shown]))
    if usual < ALIKE:
        return
    for row in np.flatnonzero(similarities < UNLIKE * usual).tolist():
        detail = f"is unlike its class (mean cosine similarity {similarities[row]:.2f}, usual {usual:.2f})"
        yield Finding(strategies[row].id, "unlike_its_class", "warning", detail)


def _concentrated(name: str, strategies: Sequence[Strategy], shown: int, max_share: float) -> Iterator[Finding]:
    """Strategies that were shown more than their share, and one source of nearly all trusted strategies."""
    may_be_shown = [strategy for strategy in strategies if strategy.trust in ("candidate", "trusted")]
    if len(may_be_shown) * max_share > 1:
        for strategy in may_be_shown:
            # The rule is applied before a show, so the last one is subtracted
            if policy.shown_too_often(strategy.shown - 1, shown, max_share):
                detail = f"makes up {strategy.shown / shown:.0%} of what was shown of class {name}"
                yield Finding(strategy.id, "concentration", "warning", detail)
    sources: dict[tuple[str, str, str], int] = defaultdict(int)
    for strategy in strategies:
        sources[strategy.origin, strategy.model, strategy.run] += strategy.trust == "trusted"
    trusted = sum(sources.values())
    source, most = max(sources.items(), key=lambda each: each[1])
    if len(sources) > 1 and trusted >= ENOUGH_TRUSTED and most > ONE_SOURCE * trusted:
        about = ", ".join(part for part in source if part)
        yield Finding(
            "", "concentration", "warning", f"{most / trusted:.0%} of what is trusted of class {name} is from {about}"
        )


def _unproven(strategies: Sequence[Strategy], min_problems: int, tolerance: float) -> Iterator[Finding]:
    """Trusted strategies whose trust does not follow from the executions on record here."""
    for strategy in strategies:
        if strategy.trust != "trusted":
            continue
        if strategy.problems < min_problems:
            detail = f"is trusted, executed on {strategy.problems} problems, of which {min_problems} are needed"
            yield Finding(strategy.id, "unproven", "warning", detail)
        elif policy.trust(strategy, min_problems, tolerance) != "trusted":
            detail = f"is trusted, with a lift of {strategy.lift:+.2f} whose bounds do not support that"
            yield Finding(strategy.id, "unproven", "warning", detail)
