"""Units behind a number: what they measure, and words that tell two answers apart."""

import re
from dataclasses import dataclass
from fractions import Fraction

from .plain_text import substituted, substitutions


MAX_WORDS = 8

# A line for each dimension: its name, then units with their size and spellings. Units of one dimension convert.
_TABLE = """
money-usd   1 cent cents ¢ penny pennies; 5 nickel nickels; 10 dime dimes; 100 $ us$ usd dollar dollars buck bucks
money-eur   1 € eur euro euros
money-gbp   1 pence; 100 £ gbp quid
money-jpy   1 ¥ jpy yen
money-cny   1 yuan cny rmb
money-inr   1 ₹ inr rs rupee rupees
money-krw   1 ₩ krw won
money-mxn   1 peso pesos mxn
money-chf   1 chf franc francs
money-cad   1 cad
money-aud   1 aud
time        1/1000000 µs microsecond microseconds; 1/1000 ms millisecond milliseconds; 1 s sec secs second seconds
time        60 min mins minute minutes; 3600 h hr hrs hour hours; 86400 day days; 604800 week weeks
months      1 month months; 12 year years yr yrs; 120 decade decades; 1200 century centuries
length      1/1000 mm millimeter millimeters millimetre millimetres; 1 m meter meters metre metres
length      1/100 cm centimeter centimeters centimetre centimetres; 1000 km kilometer kilometers kilometre kilometres
length      254/10000 in inch inches; 3048/10000 ft foot feet; 9144/10000 yd yard yards; 1609344/1000 mi mile miles
mass        1/1000 mg milligram milligrams; 1 g gram grams; 1000 kg kilogram kilograms kilo kilos; 1000000 tonne tonnes
weight      1 oz ounce ounces; 16 lb lbs pound pounds; 32000 ton tons
volume      1/1000 ml milliliter milliliters millilitre millilitres; 1 l liter liters litre litres
cups        1/48 tsp teaspoon teaspoons; 1/16 tbsp tablespoon tablespoons; 1 cup cups; 2 pint pints; 4 quart quarts
cups        16 gallon gallons gal
power       1 w watt watts; 1000 kw kilowatt kilowatts; 1000000 mw megawatt megawatts
energy      1 j joule joules; 1000 kj kilojoule kilojoules
calories    1 cal calorie calories; 1000 kcal kilocalorie kilocalories
frequency   1 hz hertz; 1000 khz; 1000000 mhz; 1000000000 ghz
data        1 bit bits; 8 byte bytes; 8000 kb; 8000000 mb; 8000000000 gb
voltage     1 v volt volts
acres       1 acre acres
hectares    1 hectare hectares
angle       1 ° deg degree degrees
radians     1 rad radian radians
celsius     1 °c celsius
fahrenheit  1 °f fahrenheit
kelvin      1 kelvin
morning     1 am a.m
afternoon   1 pm p.m
"""
_MONEY = "money-"
_UNITS = {
    spelling: (line.split()[0], Fraction(unit.split()[0]))
    for line in _TABLE.strip().splitlines()
    for unit in line.split(maxsplit=1)[1].split(";")
    for spelling in unit.split()[1:]
}
_WHOLE = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "mps": "m/s", "mpg": "mi/gal"}

# Words of which one cannot stand for another
_GROUPS = [
    frozenset(words.split())
    for words in (
        "january february march april may june july august september october november december",
        "monday tuesday wednesday thursday friday saturday sunday",
        "north south east west northeast northwest southeast southwest",
        "profit loss",
        "gain loss",
        "more less fewer",
        "above below",
        "before after",
        "left right",
        "up down",
        "increase decrease",
        "black white red green blue yellow",
        "bc ad",
        "positive negative",
    )
]

# fmt: off
_NOT_UNITS = frozenset([
    "and", "or", "to", "plus", "minus", "times", "over", "by", "divided", "mod", "modulo", "x", "if", "not", "than",
    "but", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "gcd", "lcm", "point",
    "squared", "cubed", "factorial", "root", "negative", "positive", "short", "basis", "bps", "mille", "permille",
    "first",
])
# fmt: on
_SHORT_WORDS = frozenset(["a", "an", "of", "in"])
_ORDINALS = frozenset(["st", "nd", "rd", "th"])
_FORMS = substitutions(
    (r"\s*\^\s*\{?([23])\}?", r"^\1"),
    (r"\bdegrees?\s+(celsius|fahrenheit)\b", r"\1"),
    (r"\b(?:square|sq\.?)\s+(?!root)([^\W\d_]+)|\b([^\W\d_]+)\s+squared\b", r"\1\2^2"),
    (r"\b(?:cubic|cu\.?)\s+([^\W\d_]+)|\b([^\W\d_]+)\s+cubed\b", r"\1\2^3"),
    (r"(?:^|\s+)per\s+(?:an?\s+)?", "/"),
)
_WORD = re.compile(r"[^\W\d_][^\W\d_.'-]*(?:[.'-][^\W\d_.'-]+)*\.?(?:\^[23])?")
_PERCENT = re.compile(r"(?:%|percent(?:age)?s?\b|per cent\b|pct\b)")


@dataclass(frozen=True)
class Unit:
    """
    A unit behind a number.

    Args:
        percent (`bool`, *optional*, defaults to `False`):
            Whether it is percent.
        dimension (`str`, *optional*):
            What it measures, such as `"length/time"`, `None` if that is not in the table.
        size (`Fraction`, *optional*, defaults to `1`):
            Its size in the dimension's own unit.
        words (`frozenset[str]`, *optional*):
            All its words.
    """

    percent: bool = False
    dimension: str | None = None
    size: Fraction = Fraction(1)
    words: frozenset[str] = frozenset()


NO_UNIT = Unit()


def read_unit(text: str, not_units: frozenset[str], currency: str | None = None) -> Unit | None:
    """
    Reads what stands behind a number.

    Args:
        text (`str`):
            The text, with the white space before it.
        not_units (`frozenset[str]`):
            Words that make it something else, such as names of numbers.
        currency (`str`, *optional*):
            Currency in front of the number.

    Returns:
        [`Unit`] or `None`: `None` if the text is no unit.
    """
    spaced = text[:1].isspace()
    text = text.strip().lower()
    if text.startswith("(") and text.endswith(")"):
        text, spaced = text[1:-1].strip(), True
    if hyphen := re.match(r"-(?=[^\W\d_]{3})", text):
        text, spaced = text[hyphen.end() :], True
    percent = _PERCENT.match(text)
    if percent is not None:
        text, spaced = text[percent.end() :].strip(), True
    text = substituted(text, _FORMS)
    parts = [part.split() for part in text.replace(",", " ").replace("*", " ").split("/")]
    words = [word for part in parts for word in part]
    if len(words) > MAX_WORDS:
        return None
    for place, word in enumerate(words):
        spelling, _, power = word.partition("^")
        spelling = spelling.rstrip(".")
        known = (spelling in _UNITS or spelling in _WHOLE) and power in ("", "2", "3")
        if spelling in _NOT_UNITS | not_units or not (known or _WORD.fullmatch(word)):
            return None
        # Letters right behind a number, and single letters, may be variables
        if place == 0 and not spaced:
            if not (known and not (len(spelling) == 1 and spelling.isalpha())) and spelling not in _ORDINALS:
                return None
        elif not known and len(spelling) < 3 and (spelling not in _SHORT_WORDS or (not place and spelling != "of")):
            return None
    if currency is not None:
        named = _unit_of(parts[0][0]) if parts[0] else (None, 1)
        if percent is not None or (named[0] is not None and named != _unit_of(currency)):
            return None
        parts[0] = [currency]
    elif parts[0] and parts[0][0] in _WHOLE:
        parts = [[part] for part in _WHOLE[parts[0][0]].split("/")]
    dimension, size = _measured(parts)
    return Unit(percent is not None, dimension, size, frozenset(word.rstrip(".") for word in words))


def _unit_of(word: str) -> tuple[str | None, Fraction]:
    spelling, _, power = word.partition("^")
    dimension, size = _UNITS.get(spelling.rstrip("."), (None, Fraction(1)))
    if dimension is None or not power:
        return dimension, size
    return f"{dimension}^{power}", size ** int(power)


def _measured(parts: list[list[str]]) -> tuple[str | None, Fraction]:
    """Dimension and size of a unit whose parts are divided by each other, each known by its first word."""
    if not parts[0]:
        return None, Fraction(1)
    dimension, size = _unit_of(parts[0][0])
    if dimension is None:
        return None, Fraction(1)
    for part in parts[1:]:
        if part:
            below, its_size = _unit_of(part[0])
            dimension, size = f"{dimension}/{below or part[0].rstrip('s')}", size / its_size
    return dimension, size


def compatible(first: Unit, second: Unit) -> bool:
    """
    Whether numbers with these units may be the same answer. They may not if they measure different things, or have
    words of which one cannot stand for the other, such as two months. A currency may lack its rate.

    Args:
        first, second ([`Unit`]):
            The units.
    """
    for group in _GROUPS:
        own, other = first.words & group, second.words & group
        if own and other and own != other:
            return False
    measured = [unit.dimension for unit in (first, second) if unit.dimension is not None]
    if len(measured) == 2:
        left, right = measured
        rates = "/" in left and "/" in right
        money = left.startswith(_MONEY)
        return left == right or (money and not rates and left.partition("/")[0] == right.partition("/")[0])
    return not (measured and (first.percent or second.percent))
