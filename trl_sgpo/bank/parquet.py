"""
Rows of exchanged strategies in Parquet.

A file that was made to harm can have pyarrow abort the process, or fill the memory with text for which a few bytes
stand. So pyarrow gets to see only files whose structure, read here before, is the plain one of an export.
"""

from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import pyarrow as pa

MAX_UNCOMPRESSED_BYTES = 256 * 2**20  # of all pages together, as JSONL of the same limit would be
MAX_VALUES = 4 * 2**20  # of one column: as many executions as JSONL of that size could hold
MAX_PAGES = 100_000  # pages of a mebibyte, as they are written, are far fewer
_MAX_FOOTER_BYTES = 2**20  # an export's has two thousand
_MAX_HEADER_BYTES = 1_000  # of a page, whose header has thirty
_BATCH_ROWS = 1_024
_MAGIC = b"PAR1"
_WRITER = b"parquet-cpp-arrow"
# Numbers by which Parquet's format names fields and values, without those that an export does not write
_FILE = {"version": 1, "schema": 2, "rows": 3, "groups": 4, "writer": 6, "orders": 7}
_GROUP = {"columns": 1, "bytes": 2, "rows": 3, "at": 5, "compressed": 6, "ordinal": 7}
_CHUNK = {"at": 2, "column": 3}
_COLUMN = {
    "type": 1,
    "encodings": 2,
    "path": 3,
    "codec": 4,
    "values": 5,
    "uncompressed": 6,
    "compressed": 7,
    "at": 9,
    "encoding_counts": 13,
    "sizes": 16,
}
_PAGE = {"type": 1, "uncompressed": 2, "compressed": 3, "checksum": 4, "data": 5}
_DATA = {"values": 1, "encoding": 2, "definition": 3, "repetition": 4, "statistics": 5}
_CODECS = (0, 6)  # none and zstd
_DATA_PAGE = _PLAIN = 0
# Of Thrift's compact protocol
_TRUE, _FALSE, _INTEGERS, _BINARY, _LIST, _STRUCT = 1, 2, (4, 5, 6), 8, 9, 12
_MAX_FIELD, _MAX_DEPTH = 16, 8


def schema() -> "pa.Schema":
    """The one schema of an exchanged file."""
    import pyarrow as pa

    def required(**types: Any) -> list[Any]:
        return [pa.field(name, kind, nullable=False) for name, kind in types.items()]

    def list_of(kind: Any) -> Any:
        return pa.list_(pa.field("element", kind, nullable=False))

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    execution = pa.struct(required(problem=text, problem_class=text, trials=whole, successes=real, baseline=real))
    return pa.schema(
        required(
            id=text,
            text=text,
            problem_class=text,
            source_problems=list_of(text),
            parents=list_of(text),
            model=text,
            run=text,
            step=whole,
            origin=text,
            trust=text,
            successes=real,
            trials=whole,
            problems=whole,
            solved=real,
            baseline=real,
            shown=whole,
            executions=list_of(execution),
        )
    )


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """
    Rows as a Parquet file.

    Args:
        rows (`list[dict[str, Any]]`):
            The rows, of the names and types of `schema`.

    Returns:
        `bytes`: The file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = BytesIO()
    # No dictionaries: with them a small file can stand for any amount of text
    with pq.ParquetWriter(
        file,
        schema(),
        compression="zstd",
        use_dictionary=False,
        store_schema=False,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema()))
    return file.getvalue()


def from_parquet(data: bytes, expected: int) -> Iterator[Any]:
    """
    The rows of a Parquet file as `to_parquet` writes it, read when asked for.

    Args:
        data (`bytes`):
            The file.
        expected (`int`):
            Number of rows.

    Returns:
        `Iterator[Any]`: The rows.

    Raises:
        `ValueError`: If it is anything else, or would be larger in memory than allowed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _expect_plain(data, expected)
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True)
        if not file.schema_arrow.equals(schema()):
            raise ValueError("its columns are not those of this format")
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
            batch.validate(full=True)
            yield from batch.to_pylist()
    except (pa.ArrowException, LookupError, MemoryError, OSError, TypeError) as error:
        reason = "".join(each for each in str(error).partition("\n")[0] if each.isprintable())
        raise ValueError(f"it is no intact Parquet file ({reason or type(error).__name__})") from error


def _expect_plain(data: bytes, expected: int) -> None:
    """
    Raises an error unless a file has the expected number of rows in plain pages that are small together.

    What the footer says of sizes and encodings is a claim only; what is decompressed is what the pages say.
    """
    size = int.from_bytes(data[-8:-4], "little")
    end_of_pages = len(data) - 8 - size
    if data[:4] != _MAGIC or data[-4:] != _MAGIC or end_of_pages < 4 or size > _MAX_FOOTER_BYTES:
        raise ValueError("it is no Parquet file, or one with a footer beyond all need")
    footer = _named(_read_struct(data[end_of_pages:-8], 0)[0], _FILE)
    if footer["writer"][: len(_WRITER)] != _WRITER:
        raise ValueError("it was written by something else than an export")
    if footer["rows"] != expected:
        raise ValueError(f"it has {footer['rows']} rows, where its manifest counts {expected}")
    uncompressed = pages = 0
    for group in footer["groups"]:
        for chunk in _named(group, _GROUP)["columns"]:
            column = _named(_named(chunk, _CHUNK)["column"], _COLUMN)
            at, values = column["at"], 0
            end = at + column["compressed"]
            if column["codec"] not in _CODECS or not 4 <= at <= end <= end_of_pages:
                raise ValueError("a column is not compressed as an export does it, or lies outside of its pages")
            while at < end:
                fields, length = _read_struct(data[at : at + _MAX_HEADER_BYTES], 0)
                page = _named(fields, _PAGE)
                header = _named(page["data"], _DATA)
                if page["type"] != _DATA_PAGE or header["encoding"] != _PLAIN:
                    raise ValueError("a page of it is not plain")
                if min(page["uncompressed"], page["compressed"], header["values"]) < 0:
                    raise ValueError("a page of it has a negative size")
                at += length + page["compressed"]
                uncompressed += page["uncompressed"]
                values += header["values"]
                pages += 1
                if uncompressed > MAX_UNCOMPRESSED_BYTES or values > MAX_VALUES or pages > MAX_PAGES:
                    raise ValueError(
                        f"it holds more than {MAX_UNCOMPRESSED_BYTES >> 20} MiB, {MAX_VALUES} values a column or "
                        f"{MAX_PAGES} pages"
                    )
            if at != end:
                raise ValueError("a page of it crosses the end of its column")


def _named(fields: dict[int, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """Fields of a struct by their names, all of which must have one."""
    if type(fields) is not dict or not fields.keys() <= set(numbers.values()):
        raise ValueError("it has dictionaries, statistics or other parts that an export does not write")
    return {name: fields[number] for name, number in numbers.items() if number in fields}


def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Fields of a struct by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        number += head >> 4
        # Field numbers of the long form, or that wrap around, could be read otherwise by pyarrow
        if head < 16 or number > _MAX_FIELD:
            raise ValueError("a structure of it is malformed")
        fields[number], at = _read_value(data, at + 1, head & 15, depth)
    return fields, at + 1


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in _INTEGERS:
        zigzag, at = _read_varint(data, at)
        return (zigzag >> 1) ^ -(zigzag & 1), at
    if kind == _BINARY:
        length, at = _read_varint(data, at)
        return data[at : at + length], at + length
    if kind == _STRUCT and depth < _MAX_DEPTH:
        return _read_struct(data, at, depth + 1)
    if kind != _LIST or data[at] & 15 in (_TRUE, _FALSE, _LIST):
        raise ValueError("a structure of it is malformed")
    kind, length, at = data[at] & 15, data[at] >> 4, at + 1
    if length == 15:
        length, at = _read_varint(data, at)
    values = []
    for _ in range(length):
        value, at = _read_value(data, at, kind, depth)
        values.append(value)
    return values, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a structure of it has a number beyond 64 bits")
