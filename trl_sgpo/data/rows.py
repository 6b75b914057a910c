"""Rows of JSON, CSV, Parquet and Arrow files, converted to Arrow once. A text stays the text that it is."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm.auto import tqdm

from .._version import __version__
from ..checks.process import CHECKS
from ..errors import DataError
from ..files import durable_replace, unfinished_file
from .column_types import ColumnType, Kind, features_of, typed_array, with_times_as_text, without_many_keys
from .compressed import most_bytes
from .row_files import csv_rows, json_rows


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = logging.getLogger(__name__)

_BATCH = 1000  # rows that are converted at a time
MAX_COLUMNS = 1_000  # and keys within them, of JSON files: others stay JSON
MAX_LEAVES = 10_000  # columns of Parquet files, with those within them
MAX_ROWS, MAX_CELLS = 2_000_000, 100_000_000  # empty ones take no room in a file, and the same time and memory


@dataclass(frozen=True)
class Rows:
    """
    Rows as they are in a file.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        written ([`~datasets.Dataset`], *optional*):
            Columns of numbers and truth values as the texts that they are written with, where the values do not tell
            these texts, as 12.5 does not tell `12.50`.
    """

    dataset: "Dataset"
    written: "Dataset | None" = None

    @property
    def texts(self) -> "Dataset":
        """The rows, with texts for the columns in `written`."""
        from datasets import concatenate_datasets

        if self.written is None:
            return self.dataset
        others = [name for name in self.dataset.column_names if name not in self.written.column_names]
        parts = [self.dataset.select_columns(others), self.written] if others else [self.written]
        return concatenate_datasets(parts, axis=1).select_columns(self.dataset.column_names)

    def select_columns(self, names: Sequence[str]) -> "Rows":
        """Some of the columns."""
        written = [] if self.written is None else [name for name in self.written.column_names if name in names]
        dataset = self.dataset.select_columns(list(names))
        return Rows(dataset, self.written.select_columns(written) if self.written is not None and written else None)

    def select(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows."""
        return Rows(self.dataset.select(indices), None if self.written is None else self.written.select(indices))


@dataclass(frozen=True)
class RowFiles:
    """
    Files with rows of the same columns.

    Args:
        name (`str`):
            Their name in messages.
        form (`str`):
            `"json"`, `"csv"`, `"parquet"`, or `"arrow"` for files that the datasets library wrote.
        paths (`Sequence[str]`):
            The files.
        encoding (`str`, *optional*):
            Encoding of JSON and CSV files. If `None`, UTF-8, or UTF-16 and UTF-32 where the start of a file tells it.
        separator (`str`, *optional*, defaults to `","`):
            What stands between the cells of a CSV file.
        field (`str`, *optional*):
            Key of the rows in a JSON file that is an object.
        columns (`Sequence[str]`, *optional*):
            The columns of Parquet files to read. If `None`, all.
        own (`bool`, *optional*, defaults to `False`):
            Whether this package wrote the files.
    """

    name: str
    form: str
    paths: Sequence[str]
    encoding: str | None = None
    separator: str = ","
    field: str | None = None
    columns: Sequence[str] | None = None
    own: bool = False


def read_files(files: RowFiles) -> str:
    """
    Converts files to Arrow in the cache of the datasets library, unless it has them as they are now.

    Args:
        files ([`RowFiles`]):
            The files.

    Returns:
        `str`: Name in the cache, for [`cached_rows`].

    Raises:
        [`DataError`]: A file cannot be read, or the cache not be written. The message names the line where it can.
    """
    try:
        stats = [Path(path).stat() for path in files.paths]
    except OSError as error:
        raise DataError(f"{files.name} cannot be read: {error.strerror}.") from error
    if not stats:
        raise DataError(f"{files.name} holds no file: name a source with problems.")
    state = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    paths = [str(Path(path).resolve()) for path in files.paths]
    settings = [files.form, files.encoding, files.separator, files.field, files.columns]
    made_of = [__version__, *settings, paths, state]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
    rows, written = _cached(name)
    if not rows.is_file():
        try:
            rows.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(rows.with_suffix(".lock")):  # the processes of a run read the same files
                if rows.is_file():
                    return name
                most = most_bytes(sum(stat.st_size for stat in stats))
                if files.form in ("parquet", "arrow"):
                    _write(files, most, rows, *_tables(files, most))
                else:
                    _convert(files, most, rows, written)
        except RecursionError as error:
            raise _unreadable(files, files.paths[0], ValueError("a value is nested too deeply")) from error
        except OSError as error:
            raise DataError(
                f"The rows of {files.name} cannot be written to {rows.parent} ({error.strerror}): set HF_HOME to a "
                "directory on a disk with room."
            ) from error
    return name


def is_cached(name: str) -> bool:
    """Whether the cache has rows of a name."""
    return _cached(name)[0].is_file()


def cached_rows(name: str) -> Rows:
    """Rows in the cache."""
    from datasets import Dataset

    rows, written = _cached(name)
    return Rows(Dataset.from_file(str(rows)), Dataset.from_file(str(written)) if written.is_file() else None)


def cache() -> Path:
    """Where converted rows are kept."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_sgpo"


def _cached(name: str) -> tuple[Path, Path]:
    return cache() / f"{name}.arrow", cache() / f"{name}.written.arrow"


def _convert(files: RowFiles, most: int, target: Path, written: Path) -> None:
    """Reads JSON or CSV files twice: for the types of the columns, and for their values."""
    types: dict[str, ColumnType] = {}
    size = 0
    for row in tqdm(_rows(files, warn=True), desc=f"Columns of {files.name}", unit=" rows", delay=5):
        size += 1
        for name, value in row.items():
            if name not in types:
                types[name] = ColumnType()
            types[name].add(value)
        _check_number(files, len(types))
        _check_rows(files, size, len(types))

    def write(path: Path, kinds: Mapping[str, Kind]) -> None:
        rows = iter(tqdm(_rows(files), desc=f"Rows of {files.name}", unit=" rows", total=size, delay=5))
        batches = iter(lambda: list(islice(rows, _BATCH)), [])
        arrays = ([typed_array([row.get(name) for row in batch], kinds[name]) for name in kinds] for batch in batches)
        _write(files, most, path, features_of(kinds).arrow_schema, arrays)

    respelled = [name for name, column in types.items() if column.is_respelled]
    if respelled:
        write(written, dict.fromkeys(respelled, "text"))
    write(target, without_many_keys({name: column.kind for name, column in types.items()}, MAX_COLUMNS))


def _check_number(files: RowFiles, columns: int, most: int = MAX_COLUMNS) -> None:
    if columns > most:
        raise DataError(f"{files.name} has more than {most:,} columns: leave out those that are not needed.")


def _check_rows(files: RowFiles, rows: int, columns: int) -> None:
    if not files.own and (rows > MAX_ROWS or rows * columns > MAX_CELLS):
        raise DataError(
            f"{files.name} has more than {MAX_ROWS:,} rows or {MAX_CELLS:,} cells: keep the rows and columns that are "
            "needed."
        )


def _rows(files: RowFiles, warn: bool = False) -> Iterator[dict[str, Any]]:
    for path in files.paths:
        try:
            if files.form == "json":
                yield from json_rows(path, files.encoding, files.field)
            else:
                yield from csv_rows(path, files.encoding, files.separator, warn)
        except (OSError, ValueError, LookupError) as error:
            raise _unreadable(files, path, error) from error


def _tables(files: RowFiles, most: int) -> "tuple[pa.Schema, Iterator[list[pa.Array]]]":
    """The schema of Parquet or Arrow files, with one type of text, and their batches."""
    import pyarrow as pa
    from datasets import Features

    try:
        if files.form == "arrow":
            opened = [pa.ipc.open_stream(pa.memory_map(path)) for path in files.paths]
            stored = opened[0].schema
        else:
            opened = [_with_texts_once(path) for path in files.paths]
            stored = opened[0].schema_arrow
        _check_number(files, len(stored))
        if files.form == "parquet":
            _check_number(files, opened[0].metadata.num_columns, MAX_LEAVES)
            _check_rows(files, sum(each.metadata.num_rows for each in opened), len(stored))
        chosen = [field for field in stored if files.columns is None or field.name in files.columns]
        readable = [field for field in chosen if not _has(field.type, pa.types.is_map)]
        if left_out := [f"`{field.name}`" for field in chosen if field not in readable]:
            logger.warning(f"{files.name}: {', '.join(left_out)} hold mappings, which are not read.")
        plain = pa.schema([(field.name, _plain_type(field.type)) for field in readable])
        schema = with_times_as_text(Features.from_arrow_schema(plain)).arrow_schema
        if files.form == "parquet" and not files.own:
            _check_decoded(files, schema.names, most)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(files, files.paths[0], error) from error

    def batches() -> "Iterator[list[pa.Array]]":
        rows = 0
        for path, file in zip(files.paths, opened, strict=True):
            try:
                for batch in file if files.form == "arrow" else file.iter_batches(_BATCH, columns=schema.names):
                    rows += len(batch)
                    _check_rows(files, rows, len(schema))
                    if sum(map(_bytes_of_texts, batch.columns)) > most:
                        raise _too_large(files, most)
                    columns = [_in_decimal(batch.column(name)) for name in schema.names]
                    table = pa.Table.from_arrays(columns, schema.names).cast(schema)
                    table.validate(full=True)  # texts that are not UTF-8
                    yield from (part.columns for part in table.to_batches())
            except DataError:
                raise
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                raise _unreadable(files, path, error) from error

    return schema, batches()


def _check_decoded(files: RowFiles, columns: list[str], most: int) -> None:
    """A page or a list of a few bytes may hold any number of values, which Arrow decodes at once."""
    for path in files.paths:
        largest = CHECKS.ask("decodes", str(Path(path).resolve()), columns, _BATCH)
        if largest is None or largest > most:
            raise _too_large(files, most)


def _with_texts_once(path: str) -> Any:
    """
    Opens a Parquet file whose texts are read as references to different ones. A file of 4 KB may repeat one of 30 MB
    in each of its rows.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        leaves = [file.schema.column(place) for place in range(len(file.schema))]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    return parquet.ParquetFile(path, read_dictionary=texts)


def _bytes_of_texts(column: "pa.Array") -> int:
    """How large the texts of a column are when each row has its own."""
    import pyarrow as pa
    from pyarrow import compute, types

    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if types.is_dictionary(column.type):
        if not _is_text(column.type.value_type):
            return 0
        lengths = compute.binary_length(column.dictionary)
        return compute.sum(lengths.take(column.indices)).as_py() or 0
    if types.is_struct(column.type):
        return sum(_bytes_of_texts(part) for part in column.flatten())
    return _bytes_of_texts(column.flatten()) if _is_list(column.type) else 0


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _too_large(files: RowFiles, most: int) -> DataError:
    return DataError(f"{files.name} is {most >> 20:,} MiB or more when it is read: name a smaller one.")


def _plain_type(kind: "pa.DataType") -> "pa.DataType":
    """A type without the variants that pandas and Polars write for texts, categories, lists and numbers."""
    import pyarrow as pa

    is_type = pa.types
    if is_type.is_large_string(kind) or is_type.is_string_view(kind):
        return pa.string()
    if _is_short(kind):
        return pa.float64()
    if is_type.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if _is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if is_type.is_struct(kind):
        return pa.struct([(field.name, _plain_type(field.type)) for field in kind])
    return kind


def _is_list(kind: "pa.DataType") -> bool:
    from pyarrow import types

    kinds = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(is_kind(kind) for is_kind in kinds)


def _is_short(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return types.is_float32(kind) or types.is_float16(kind)


def _has(kind: "pa.DataType", is_kind: "Callable[[pa.DataType], bool]") -> bool:
    """Whether a type is of a kind, such as the mappings that Spark and Trino write, or has one within it."""
    return is_kind(kind) or any(_has(kind.field(place).type, is_kind) for place in range(kind.num_fields))


def _in_decimal(column: "pa.Array") -> "pa.Array":
    """
    A column of 32-bit or 16-bit numbers as the decimal numbers that they were made of: 0.1, not 0.10000000149011612.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import compute

    kind = column.type
    if not _has(kind, _is_short):
        return column
    if _is_list(kind):
        lists = column.cast(pa.list_(kind.value_type))
        ends = np.cumsum([0, *compute.list_value_length(lists).fill_null(0).to_pylist()])
        values = _in_decimal(lists.flatten())
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=lists.is_null())
    if pa.types.is_struct(kind):
        parts = [_in_decimal(part) for part in column.flatten()]
        return pa.StructArray.from_arrays(parts, [field.name for field in kind], mask=column.is_null())
    if pa.types.is_float16(kind):  # Arrow writes all digits of them
        texts = pa.array([None if value is None else str(np.float16(value)) for value in column.to_pylist()])
    else:
        texts = column.cast(pa.string())
    stored = column.cast(pa.float64())
    is_whole = compute.and_(compute.equal(stored, compute.floor(stored)), compute.less(compute.abs(stored), 2.0**53))
    return compute.if_else(is_whole, stored, texts.cast(pa.float64()))


def _write(files: RowFiles, most: int, target: Path, schema: "pa.Schema", batches: "Iterable[list[pa.Array]]") -> None:
    import pyarrow as pa

    with unfinished_file(target) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for arrays in batches:
                stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
                if sink.tell() > most:
                    raise _too_large(files, most)
        durable_replace(unfinished, target)


def _unreadable(files: RowFiles, path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    name = files.name if len(files.paths) == 1 else f"{files.name} ({Path(path).name})"
    return DataError(f"{name} cannot be read: {reason}. Correct the file, and save texts in UTF-8.")
