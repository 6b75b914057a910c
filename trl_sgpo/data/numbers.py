"""Numbers as people and models write them, read exactly: never by a parser that evaluates text."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction


MAX_LENGTH = 400
MAX_EXPONENT = 300
MAX_UNIT_WORDS = 8

# fmt: off
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Spellings of one measure. Numbers with different measures are different, whatever else is written behind them.
_MEASURES = {
    "dollar": "$ us$ usd dollar dollars buck bucks",
    "euro": "€ eur euro euros",
    "pound sterling": "£ gbp",
    "yen": "¥ jpy yen",
    "rupee": "₹ inr rs rupee rupees",
    "cent": "¢ cent cents",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms kilo kilos",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "l": "l liter liters litre litres",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "am": "am a.m a.m.",
    "pm": "pm p.m p.m.",
    "degree": "° deg degree degrees",
    "°c": "°c celsius",
    "°f": "°f fahrenheit",
    "mi/h": "mph",
    "km/h": "kmh kph",
    "m/s": "mps",
}
_MEASURE = {spelling: name for name, spellings in _MEASURES.items() for spelling in spellings.split()}
_ORDINALS = frozenset(("st", "nd", "rd", "th"))

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_FOLDED = str.maketrans({**dict.fromkeys("−–—‐‑‒﹣－⁻", "-"), **dict.fromkeys("’‘", "'"), "⁄": "/", "∕": "/"})
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|fbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
        (r"(?<!\\)\\!", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;: ]|~", " "),
        (r"\\([%$€£#&_])", r"\1"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
        (r"(?<!\\)\\[()\[\]]", " "),
    ]
]
_WRAPPERS = ("**", "__", "$$", "$", "`", "*", '"')

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
                 \s*(?:\{{\s*(?P<lbottom>{digits})\s*\}}|(?P<sbottom>\d)))
        | 10\s*\^\s*\{{?\s*(?P<ten>[+-]?\d+)\s*\}}?
        | (?P<decimal>{digits}(?:\.\d*)?|\.\d+)(?:{_EXPONENT})?
        )""",
        re.VERBOSE,
    )


_NUMERAL, _SPACED_NUMERAL = _numeral(_DIGITS), _numeral(_SPACED)
_LABEL = re.compile(
    r"(?:[A-Za-z](?:_\{?\w+\}?)?\s*)?=\s*|(?:≈|~|\\approx|about|approximately|exactly)\s*", re.IGNORECASE
)
_SIGN = re.compile(rf"(?:({_CURRENCY})\s*)?((?:[+-]|minus\b|negative\b)\s*)?(?:({_CURRENCY})\s*)?", re.IGNORECASE)
_UNIT_FORMS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\s*\^\s*\{?([23])\}?", r"^\1"),
        (r"\b(?:square|sq\.?)\s+([^\W\d_]+)|\b([^\W\d_]+)\s+squared\b", r"\1\2^2"),
        (r"\b(?:cubic|cu\.?)\s+([^\W\d_]+)|\b([^\W\d_]+)\s+cubed\b", r"\1\2^3"),
        (r"(?:^|\s+)per\s+(?:an?\s+)?", "/"),
    ]
]
_UNIT_WORD = re.compile(r"[^\W\d_][^\W\d_.'-]*(?:[.'-][^\W\d_.'-]+)*\.?(?:\^[23])?")
_PERCENT = re.compile(r"(?:%|percent(?:age)?s?\b|per cent\b|pct\b)")
# fmt: off
_NOT_UNITS = frozenset([
    "and", "or", "to", "plus", "minus", "times", "over", "by", "divided", "mod", "modulo", "x", "if", "not", "than",
    "but", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "gcd", "lcm",
    "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "tenth",
    "point", *_WORDS, *_SCALES,
])
# fmt: on
_SHORT_WORDS = frozenset(["a", "an", "of", "in"])


@dataclass(frozen=True)
class Number:
    """
    A number that was read from a text.

    Args:
        value (`Fraction`):
            Its exact value. `50%` has the value 50.
        percent (`bool`, *optional*, defaults to `False`):
            Whether a percent sign follows.
        measure (`str`, *optional*):
            What it measures, such as `"km/h"`, if that is in the table of measures.
        places (`int`, *optional*):
            Decimal places, `None` for a fraction.
    """

    value: Fraction
    percent: bool = False
    measure: str | None = None
    places: int | None = None


def plain_text(text: str) -> str:
    r"""
    A short answer without mark-up: emphasis, math delimiters, `\text{}`, a trailing period, runs of white space.

    Args:
        text (`str`):
            A final answer.

    Returns:
        `str`: The text in one line, with one form of each sign, in its own case.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(_FOLDED)
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    if "\\" in text or "~" in text or "{," in text:
        text = _without_latex(text)
    text = re.sub(r"(?<!\w)\*\*([^*]+)\*\*(?!\w)", r"\1", " ".join(text.split()))
    while (stripped := _unwrapped(text)) != text:
        text = stripped
    return text


def _without_latex(text: str) -> str:
    for _ in range(3):  # \text{} may be nested
        before = text
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
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
    text = text[label.end() :] if (label := _LABEL.match(text)) else text
    sign = _SIGN.match(text)
    assert sign is not None  # every part of the pattern is optional
    currency = sign[1] or sign[3]
    body = text[sign.end() :]
    match = (_SPACED_NUMERAL if spaced else _NUMERAL).match(body)
    read = _in_digits(match) if match else _in_words(body)
    if read is None:
        return None
    value, places, end = read
    if match is None and currency is not None:
        return None
    rest = body[end:]
    if scale := re.match(r"\s+(hundred|thousand|million|billion|trillion|dozen)\b", rest, re.IGNORECASE):
        value, places = value * _SCALES[scale[1].lower()], None
        rest = rest[scale.end() :]
    unit = _unit(rest)
    if unit is None:
        return None
    percent, measure = unit
    if currency is not None:
        named = _MEASURE.get(currency.lower().rstrip("."), currency.lower())
        if percent or (measure is not None and measure.partition("/")[0] != named):
            return None
        measure = measure or named
    negative = sign[2] is not None and sign[2].strip().lower() != "+"
    return Number(-value if negative else value, percent, measure, places)


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
    top = next(integer(name) for name in ("top", "ltop", "stop") if groups[name] is not None)
    bottom = next(integer(name) for name in ("bottom", "lbottom", "sbottom") if groups[name] is not None)
    if bottom == 0 or (groups["whole"] is not None and not 0 <= top < bottom):
        return None
    whole = integer("whole") if groups["whole"] is not None else 0
    return whole + Fraction(top, bottom), None, match.end()


def _in_words(text: str) -> tuple[Fraction, int | None, int] | None:
    """The number that a text begins with, in words, and where it ends."""
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


def _unit(text: str) -> tuple[bool, str | None] | None:
    """Whether the unit behind a number is percent, and what it measures. `None` if the text is no unit."""
    spaced = text[:1].isspace()
    text = text.strip().lower()
    if text.startswith("(") and text.endswith(")"):
        text, spaced = text[1:-1].strip(), True
    if hyphen := re.match(r"-(?=[^\W\d_]{3})", text):
        text, spaced = text[hyphen.end() :], True
    percent = _PERCENT.match(text)
    if percent is not None:
        text, spaced = text[percent.end() :].strip(), True
    for pattern, replacement in _UNIT_FORMS:
        text = pattern.sub(replacement, text)
    parts = [part.split() for part in text.replace(",", " ").replace("*", " ").split("/")]
    words = [word for part in parts for word in part]
    if len(words) > MAX_UNIT_WORDS:
        return None
    for place, word in enumerate(words):
        spelling = word.partition("^")[0].rstrip(".")
        known = spelling in _MEASURE
        if spelling in _NOT_UNITS or not (known or _UNIT_WORD.fullmatch(word)):
            return None
        # Letters right behind a number, and single letters, may be variables
        if place == 0 and not spaced:
            if not (known and not (len(spelling) == 1 and spelling.isalpha())) and spelling not in _ORDINALS:
                return None
        elif not known and len(spelling) < 3 and (spelling not in _SHORT_WORDS or (not place and spelling != "of")):
            return None
    measured = [_measure(part[0]) if part else None for part in parts]
    measure = None if measured[0] is None else "/".join(name for name in measured if name is not None)
    return percent is not None, measure


def _measure(word: str) -> str | None:
    spelling, _, power = word.partition("^")
    name = _MEASURE.get(spelling.rstrip("."))
    return name if name is None or not power else f"{name}^{power}"


def same_number(first: Number, second: Number) -> bool:
    """
    Whether two numbers are the same, with `50%` the same as `50` and as `0.5`.

    A decimal with at least six places is the same as a fraction that rounds to it. Numbers of different measures, such
    as `5 dollars` and `5 cents`, are not the same.

    Args:
        first, second ([`Number`]):
            The numbers.
    """
    if first.measure is not None and second.measure is not None:
        rates = "/" in first.measure and "/" in second.measure
        measures = (first.measure, second.measure)
        if len({measure if rates else measure.partition("/")[0] for measure in measures}) > 1:
            return False
    if first.value == second.value:
        return True
    if first.percent != second.percent:
        share, other = (first, second) if first.percent else (second, first)
        return share.value / 100 == other.value
    places = max((number.places or 0 for number in (first, second)), default=0)
    rounded = places >= 6 and None in (first.places, second.places)
    return rounded and abs(first.value - second.value) <= Fraction(1, 2 * 10**places)
