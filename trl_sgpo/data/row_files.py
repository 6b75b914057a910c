"""Rows of JSON and CSV files, with numbers as the text that they are written with."""

import csv
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


logger = logging.getLogger(__name__)


class Number(str):
    """Text of a number."""

    __slots__ = ()


class Integer(Number):
    """Text of a whole number."""

    __slots__ = ()


class Real(Number):
    """Text of a number with a fraction or an exponent."""

    __slots__ = ()


class Constant(Number):
    """`NaN`, `Infinity` or `-Infinity`, which JSON does not have and Python writes."""

    __slots__ = ()


class Truth(str):
    """Text of a truth value in a CSV file."""

    __slots__ = ()


MAX_ROW, _PART = 2**24, 2**16  # characters
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_REAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_TRUTH = frozenset(["true", "True", "TRUE", "false", "False", "FALSE"])
_SPACES = " \t\r\n"
_SPACE = re.compile(f"[{_SPACES}]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def text_lines(path: str | Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """
    Reads a text file line by line. Lines end in a line feed only.

    Args:
        path (`str` or `Path`):
            A file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark or an ASCII character at its start.
        encoding (`str`, *optional*):
            Its encoding, if it is another one.

    Returns:
        `Iterator[tuple[int, str]]`: Lines and their numbers, counted from 1.

    Raises:
        `ValueError`: The file is in another encoding. The message is a clause without a full stop.
    """
    with _opened(path, encoding, "\n") as file:
        yield from _lines(file)


def json_rows(path: str | Path, encoding: str | None = None, field: str | None = None) -> Iterator[dict[str, Any]]:
    """
    Reads the rows of JSON lines, of an array of objects, or of objects after each other.

    Args:
        path (`str` or `Path`), encoding (`str`, *optional*):
            As in [`text_lines`].
        field (`str`, *optional*):
            Key of the array, where the file is an object that holds it.

    Returns:
        `Iterator[dict]`: Rows, whose numbers are [`Number`].

    Raises:
        `ValueError`: The file is no JSON or holds something else than objects. The message names the line.
    """
    for number, value in _json_values(path, encoding):
        if not isinstance(value, dict):
            raise ValueError(f"JSON parse error in line {number}: {value!r:.40} is no object with columns")
        if field is None:
            yield value
            continue
        rows = value.get(field)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"the object in line {number} has no list of objects as {field!r:.40}")
        yield from rows


def csv_rows(
    path: str | Path, encoding: str | None = None, separator: str = ",", warn: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Reads the rows of a CSV file with a header.

    Args:
        path (`str` or `Path`), encoding (`str`, *optional*):
            As in [`text_lines`].
        separator (`str`, *optional*, defaults to `","`):
            What stands between cells.
        warn (`bool`, *optional*, defaults to `False`):
            Whether to log what the file lacks: rows with too few cells, and columns with the name of another.

    Returns:
        `Iterator[dict]`: Rows of texts, of which those that look like numbers and truth values are [`Number`] and
        [`Truth`]. An empty cell is `None`.

    Raises:
        `ValueError`: The file is no CSV, or a row has more cells than the header. The message names the line.
    """
    limit = csv.field_size_limit(sys.maxsize)  # of the whole process
    try:
        with _opened(path, encoding, "") as file:
            reader = csv.reader((line for _, line in _lines(file)), delimiter=separator, strict=True)
            header: list[str] | None = None
            short = 0
            for cells in reader:
                if header is None:
                    header = _names(cells) if cells else None
                    named = zip(header or [], cells, strict=False)
                    if warn and (renamed := [name for name, cell in named if cell and name != cell]):
                        logger.warning(f"{path}: columns with the name of another one are called {renamed}.")
                    continue
                short += len(cells) < len(header) and any(cell.strip() for cell in cells)
                if len(cells) > len(header) and any(cells[len(header) :]):
                    raise ValueError(
                        f"line {reader.line_num} has {len(cells)} cells and the header {len(header)} (texts with "
                        "commas need quotation marks)"
                    )
                if cells:
                    cells += [""] * (len(header) - len(cells))
                    yield {name: _cell(cell) for name, cell in zip(header, cells, strict=False)}
            if warn and short:
                logger.warning(f"{path}: the cells that rows lack are empty. Rows with too few of them: {short}.")
    except csv.Error as error:
        raise ValueError(f"CSV parse error in line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _names(cells: list[str]) -> list[str]:
    """Names of columns, each different, as pandas gives them."""
    names: dict[str, None] = {}
    copies: Counter[str] = Counter()
    for place, cell in enumerate(cells):
        name = cell or f"Unnamed: {place}"
        while name in names:
            copies[cell] += 1
            name = f"{cell}.{copies[cell]}"
        names[name] = None
    return list(names)


def _cell(text: str) -> str | None:
    if not text:
        return None
    if text[-1].isdigit():
        if _INTEGER.fullmatch(text) is not None:
            return Integer(text)
        return Real(text) if _REAL.fullmatch(text) is not None else text
    return Truth(text) if text in _TRUTH else text


def _opened(path: str | Path, encoding: str | None, newline: str) -> TextIO:
    if encoding is None:
        with Path(path).open("rb") as file:
            encoding = json.detect_encoding(file.read(4))
    return Path(path).open(encoding=encoding, newline=newline)


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise _other_encoding(error, number) from error


def _other_encoding(error: UnicodeDecodeError, lines: int) -> ValueError:
    number = lines + error.object.count(b"\n", 0, error.start) + 1
    return ValueError(f"line {number} is not {error.encoding} (byte 0x{error.object[error.start]:02x})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"an object has the key {name!r:.40} twice")
        values[name] = value
    return values


# Without the `.0` of a whole number, which programs that know numbers with a fraction only write
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=Integer,
    parse_float=lambda text: Real(text.removesuffix(".0")),
    parse_constant=Constant,
)


def _json_values(path: str | Path, encoding: str | None) -> Iterator[tuple[int, Any]]:
    """The values of a file, with the numbers of their lines."""
    with _opened(path, encoding, "\n") as file:
        first = next(((number, line) for number, line in _lines(file) if line.strip()), None)
        if first is None:
            return
        try:
            one_a_line = not isinstance(_value_of_line(*first), list)
        except ValueError:
            one_a_line = False
        file.seek(0)
        if one_a_line:
            yield from ((number, _value_of_line(number, line)) for number, line in _lines(file) if line.strip())
            return
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise _other_encoding(error, 0) from error
    yield from _values(text)


def _value_of_line(number: int, line: str) -> Any:
    line = line.strip(_SPACES)
    value, end = _value_at(line, 0, number)
    if end < len(line):
        raise ValueError(f"JSON parse error in line {number}, column {end + 1}: Extra data")
    return value


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """The items of an array, or values after each other, with the numbers of their lines."""
    place = _skip(text, 0)
    in_array = text.startswith("[", place)
    place = _skip(text, place + in_array)
    number, counted = 1, 0
    ended = in_array and text.startswith("]", place)
    place = _skip(text, place + ended)
    while not ended and (in_array or place < len(text)):
        number, counted = number + text.count("\n", counted, place), place
        value, end = _value_at(text, place, 1)
        yield number, value
        place = _skip(text, end)
        if in_array:
            ended = text.startswith("]", place)
            if not ended and not text.startswith(",", place):
                raise ValueError(f"JSON parse error in line {_line_of(text, place)}: Expecting ',' delimiter")
            place = _skip(text, place + 1)
    if place < len(text):
        raise ValueError(f"JSON parse error in line {_line_of(text, place)}: Extra data")


def _value_at(text: str, place: int, number: int) -> tuple[Any, int]:
    """A value in a text that starts in a line, and where the value ends."""
    try:
        value, end = _decoded(text, place)
    except json.JSONDecodeError as error:
        at = error.pos
        if "delimiter" in error.msg or not text[at:].strip():
            at = len(text[:at].rstrip())  # the end of what precedes, which may be lines before
        column = at - text.rfind("\n", 0, at)
        where = f"line {number - 1 + _line_of(text, at)}, column {column}"
        raise ValueError(f"JSON parse error in {where}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"JSON parse error in line {number - 1 + _line_of(text, place)}: {reason}") from error
    if _SURROGATE.search(text, place, end) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            line = number - 1 + _line_of(text, place)
            raise ValueError(f"line {line} has half of a surrogate pair, which is no character") from error
    return value, end


def _decoded(text: str, place: int) -> tuple[Any, int]:
    """
    The value at a place and where it ends. A part of the text is read first: values of a long one may take a hundred
    times as much.
    """
    for size in (_PART, MAX_ROW):
        if len(text) - place <= size:
            break
        try:
            value, length = _DECODER.raw_decode(text[place : place + size])
        except json.JSONDecodeError as error:
            if error.pos < size - 100 and not error.msg.startswith("Unterminated"):
                break  # no end of a part
        else:
            return value, place + length
    else:
        raise ValueError(f"a row has more than {MAX_ROW >> 20} MiB")
    return _DECODER.raw_decode(text, place)


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _skip(text: str, place: int) -> int:
    """The place after white space."""
    match = _SPACE.match(text, place)
    return place if match is None else match.end()
