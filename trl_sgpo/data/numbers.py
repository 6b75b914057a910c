"""Numbers as people and models write them, read exactly: never by a parser that evaluates text."""

import re
from dataclasses import dataclass
from fractions import Fraction

from .measures import NO_UNIT, Unit, compatible, read_unit


MAX_LENGTH = 400
MAX_EXPONENT = 300
ROUNDED_DIGITS = 6

# fmt: off
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "twelfth": 12, "twentieth": 20, "hundredth": 100, "thousandth": 1000, "millionth": 10**6,
}
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9,
    "trillion": 10**12, "quadrillion": 10**15,
}
# fmt: on
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_SEVERAL = {("halves" if word == "half" else f"{word}s"): part for word, part in _PARTS.items()}
_NUMERIC = frozenset([*_WORDS, *_SCALES, *(f"{scale}s" for scale in _SCALES), *_PARTS, *_SEVERAL])

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_SPACED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ '_]\d{3})+|\d+)"
_CURRENCY = r"(?:US\$|[$€£¥₹₩]|(?:USD|EUR|GBP|JPY|INR|CNY|CHF|CAD|AUD)\b|Rs\.?)"
_EXPONENT = r"(?:[eE](?P<e>[+-]?\d+)|\s*(?:x|×|\*|·|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<power>[+-]?\d+)\s*\}?)"
_SIMPLE = re.compile(r"[+-]?\d+(?:\.\d+)?")


def _numeral(digits: str) -> re.Pattern[str]:
    return re.compile(
        rf"""
        (?:
          (?:(?P<whole>{digits})(?:\s+|\s+and\s+|\s*(?=\\frac)))?
          (?:(?P<top>{digits})\s*/\s*(?P<bottom>\d+)
            |\\frac\s*(?:\{{\s*(?P<ltop>[+-]?{digits})\s*\}}|(?P<stop>\d))
                 \s*(?:\{{\s*(?P<lbottom>[+-]?{digits})\s*\}}|(?P<sbottom>\d)))
        | 10\s*\^\s*\{{?\s*(?P<ten>[+-]?\d+)\s*\}}?
        | (?P<fixed>\d*\.\d*)\\(?:overline|bar)\s*\{{?(?P<repeated>\d+)\}}?
        | (?P<decimal>{digits}(?:\.\d*)?|\.\d+)(?:{_EXPONENT})?
        )""",
        re.VERBOSE,
    )


_NUMERAL, _SPACED_NUMERAL = _numeral(_DIGITS), _numeral(_SPACED)
_ANY_NUMERAL = re.compile(
    rf"(?<![\w.])-?(?:\\frac\{{\d+\}}\{{\d+\}}|{_DIGITS}(?:\.\d+)?(?:e[+-]?\d+)?(?:/\d+)?)(?!\w|\.\d)"
)
_ANY_WORD = rf"(?:{'|'.join([*_WORDS, *_SCALES])})s?"
_ANY_WORDS = re.compile(rf"\b{_ANY_WORD}(?:[ -](?:and )?{_ANY_WORD})*\b", re.IGNORECASE)
_MOST_USUAL = 12
_LABEL = re.compile(
    r"([A-Za-z](?:_\{?\w+\}?)?)?\s*=\s*|(?:≈|~|\\approx|about|approximately|exactly)\s*", re.IGNORECASE
)
_SIGN = re.compile(rf"(?:({_CURRENCY})\s*)?((?:[+-]|minus\b|negative\b)\s*)?(?:({_CURRENCY})\s*)?", re.IGNORECASE)
_SCALE = re.compile(rf"\s+({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_SHARE = re.compile(rf"(?:an?[\s-]+)?({'|'.join(_PARTS)})\b(?:\s+an?\b)?", re.IGNORECASE)
_PART = re.compile(rf"[\s-]+({'|'.join([*_PARTS, *_SEVERAL])})\b", re.IGNORECASE)
_AND_PART = re.compile(rf"\s+and\s+(?:an?|one)[\s-]+({'|'.join(_PARTS)})\b", re.IGNORECASE)


_STATEMENT = re.compile(
    r"[A-Za-z][A-Za-z' ]{0,80}?(?::|\b(?:is|are|was|were|be|has|have|had|gets?|got|costs?|needs?|makes?|made|takes?"
    r"|equals?|sold|bought|spent|paid|earns?|earned|leaves|left|remain|remains)\b(?: a total of| exactly| only)?)\s+",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|no|never|than|least|most|between|or|about|around|nearly|almost|if|step|cannot|wrong|incorrect|false|"
    r"except|excluding|but|unlike|neither|nor)\b|n't|[!<>≠]",
    re.IGNORECASE,
)


_SEVERAL_EQUATIONS = re.compile(r"=[^=,;]*?(?:[,;]|\\cup|\\text|\\quad|\b(?:and|or)\b)[^=]*=")


@dataclass(frozen=True)
class Number:
    """
    A number that was read from a text.

    Args:
        value (`Fraction`):
            Its exact value. `50%` has the value 50.
        places (`int`, *optional*):
            Decimal places, `None` for a fraction.
        unit ([`~trl_sgpo.data.measures.Unit`], *optional*):
            What stands behind it.
        label (`str`, *optional*):
            The letter that it is the value of, as in `x = 5`.
    """

    value: Fraction
    places: int | None = None
    unit: Unit = NO_UNIT
    label: str | None = None


def read_number(text: str, spaced: bool = True) -> Number | None:
    r"""
    Reads a text that is one number, with or without a unit.

    Signs, separators of thousands, decimals, fractions, mixed fractions, exponents (`1e3`, `1.2 \times 10^3`), words
    (`twenty-one`), currencies, percent and units (`9 apples`, `9 (apples)`, `6 cm^2`) are read.

    Args:
        text (`str`):
            A text as [`plain_text`] leaves it.
        spaced (`bool`, *optional*, defaults to `True`):
            Whether `1 234` is 1234. Otherwise it is no number.

    Returns:
        [`Number`] or `None`: `None` if the text is anything else, such as a sum, or longer than 400 characters.
    """
    if _SIMPLE.fullmatch(text) and len(text) <= MAX_LENGTH:
        return Number(Fraction(text), places=len(text.partition(".")[2]))
    if not text or len(text) > MAX_LENGTH:
        return None
    if text.startswith("(") and text.endswith(")") and "," not in text and "(" not in text[1:]:
        text = text[1:-1].strip()
    label = _LABEL.match(text)
    text = text if label is None else text[label.end() :]
    sign = _SIGN.match(text)
    assert sign is not None  # every part of the pattern is optional
    currency = sign[1] or sign[3]
    body = text[sign.end() :]
    match = (_SPACED_NUMERAL if spaced else _NUMERAL).match(body)
    read = _in_digits(match) if match else _in_words(body)
    if read is None or (match is None and currency is not None):
        return None
    value, places, end = read
    while scale := _SCALE.match(body, end):
        value, places, end = value * _SCALES[scale[1].lower()], None, scale.end()
    if more := _AND_PART.match(body, end):
        value, places, end = value + Fraction(1, _PARTS[more[1].lower()]), None, more.end()
    elif part := _PART.match(body, end):
        name = part[1].lower()
        if (name in _PARTS) != (value == 1) or value.denominator != 1:
            return None  # such as twenty-third
        value, places, end = value / (_PARTS | _SEVERAL)[name], None, part.end()
    rest = body[end:]
    if (remark := re.fullmatch(r"\s*\((.+)\)", rest)) is not None:
        again = read_number(remark[1])
        if again is not None and again.value == value:
            rest = ""  # such as 5 (five apples)
    unit = read_unit(rest, _NUMERIC, None if currency is None else currency.lower().rstrip("."))
    if unit is None:
        return None
    negative = sign[2] is not None and sign[2].strip().lower() != "+"
    return Number(-value if negative else value, places, unit, None if label is None else label[1])


def numbers_in(text: str) -> set[Fraction]:
    """
    The values of the numbers in a text, with and without a sign. Numbers in words count above twelve: smaller ones are
    part of the language.

    Args:
        text (`str`):
            A text as [`~trl_sgpo.data.plain_text.plain_text`] leaves it.
    """
    read = [read_number(match[0]) for match in _ANY_NUMERAL.finditer(text)]
    values = {value for number in read if number is not None for value in (number.value, abs(number.value))}
    spelled = [read_number(match[0]) for match in _ANY_WORDS.finditer(text)]
    return values | {number.value for number in spelled if number is not None and number.value > _MOST_USUAL}


def has_several_equations(text: str) -> bool:
    """Whether a text states several results, such as `x = 2 or x = 3`. `a = 1 + 2 = 3` is one."""
    return _SEVERAL_EQUATIONS.search(text) is not None


def read_stated_number(text: str) -> Number | None:
    """
    Reads the number that an equation or a short sentence states, such as `12 + 5 = 17 apples`, `total: 17` or `Noor
    has 17 apples left`.

    Args:
        text (`str`):
            A text as [`~trl_sgpo.data.plain_text.plain_text`] leaves it.

    Returns:
        [`Number`] or `None`: `None` if the text states no number, or says another thing about it, such as `not 17`.
    """
    if len(text) > MAX_LENGTH:
        return None
    if has_several_equations(text):
        return None
    left, equals, right = text.rpartition("=")
    stated = read_number(right.strip()) if equals else None
    if stated is not None and (number := read_number(left.strip())) is not None and number.label is None:
        return stated if same_number(number, stated) or _rounds_to(number, stated) else None  # such as 18 = 17
    if stated is not None and _DENIED.search(left) is None:
        return stated
    if (statement := _STATEMENT.match(text)) is None or _DENIED.search(text) is not None:
        return None
    return read_number(text[statement.end() :])


def _in_digits(match: re.Match[str]) -> tuple[Fraction, int | None, int] | None:
    groups = match.groupdict()

    def integer(name: str) -> int:
        return int(re.sub(r"[ ,'_]", "", groups[name]))

    if groups["decimal"] is not None:
        exponent = int(groups["e"] or groups["power"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        digits = re.sub(r"[ ,'_]", "", groups["decimal"])
        places = len(digits.partition(".")[2])
        value = Fraction(digits.rstrip(".") if digits.endswith(".") else digits) * Fraction(10) ** exponent
        return value, places if exponent == 0 else None, match.end()
    if groups["ten"] is not None:
        exponent = integer("ten")
        return None if abs(exponent) > MAX_EXPONENT else (Fraction(10) ** exponent, None, match.end())
    if groups["repeated"] is not None:
        fixed, repeated = groups["fixed"], groups["repeated"]
        shift = Fraction(10) ** len(fixed.partition(".")[2])
        value = Fraction(int(fixed.replace(".", "") or 0)) + Fraction(int(repeated), 10 ** len(repeated) - 1)
        return value / shift, None, match.end()
    top = next(integer(name) for name in ("top", "ltop", "stop") if groups[name] is not None)
    bottom = next(integer(name) for name in ("bottom", "lbottom", "sbottom") if groups[name] is not None)
    if bottom == 0 or (groups["whole"] is not None and not 0 <= top < bottom):
        return None
    whole = integer("whole") if groups["whole"] is not None else 0
    return whole + Fraction(top, bottom), None, match.end()


def _in_words(text: str) -> tuple[Fraction, int | None, int] | None:
    """The number that a text begins with, in words, and where it ends."""
    if share := _SHARE.match(text):
        return Fraction(1, _PARTS[share[1].lower()]), None, share.end()
    total = current = 0
    seen, end = False, 0
    previous = ""
    for match in re.finditer(r"[A-Za-z]+", text):
        between, word = text[end : match.start()], match[0].lower()
        if between.strip(" -") or (seen and not between):
            break
        if word in _WORDS:
            follows = previous in _TENS and word in _SMALL[1:10]
            if previous in _WORDS and not follows:
                break
            current += _WORDS[word]
        elif word in _SCALES and (seen or previous in ("a", "an")):
            if _SCALES[word] <= 100:
                current = max(current, 1) * _SCALES[word]
            else:
                total, current = total + max(current, 1) * _SCALES[word], 0
        elif word == "and" and previous in _SCALES:
            following = re.match(r"\s+([A-Za-z]+)", text[match.end() :])
            if following is None or following[1].lower() not in _WORDS:
                break
            previous, end = word, match.end()
            continue
        elif word in ("a", "an") and not seen and not previous:
            previous, end = word, match.end()
            continue
        else:
            break
        seen, previous, end = True, word, match.end()
    return (Fraction(total + current), 0, end) if seen else None


def same_number(first: Number, second: Number) -> bool:
    """
    Whether two numbers are the same, with `50%` the same as `50` and as `0.5`, and `1 hour` as `60 minutes`.

    A decimal with at least six places and digits is the same as a fraction that rounds to it. Numbers with units that
    measure different things, such as `5 dollars` and `5 euros`, are not the same.

    Args:
        first, second ([`Number`]):
            The numbers.
    """
    if first.label is not None and second.label is not None and first.label != second.label:
        return False
    if not compatible(first.unit, second.unit):
        return False
    value, other = first.value, second.value
    if first.unit.dimension == second.unit.dimension:
        value, other = value * first.unit.size, other * second.unit.size
    if value == other:
        return True
    if first.unit.percent != second.unit.percent:
        share, whole = (value, other) if first.unit.percent else (other, value)
        return share / 100 == whole
    if (first.places is None) == (second.places is None):
        return False
    places = first.places if first.places is not None else second.places or 0
    decimal = abs(first.value if first.places is not None else second.value)
    enough = places >= ROUNDED_DIGITS and decimal * 10**places >= 10 ** (ROUNDED_DIGITS - 1)
    return enough and abs(first.value - second.value) <= Fraction(1, 2 * 10**places)


def _rounds_to(number: Number, rounded: Number) -> bool:
    """Whether a number is rounded to two decimal places or more, as in `1/3 = 0.33`."""
    if rounded.places is None or rounded.places < 2 or not compatible(number.unit, rounded.unit):
        return False
    return abs(number.value - rounded.value) <= Fraction(1, 2 * 10**rounded.places)
