"""Where rows come from: generated problems, a local file, or a repository on the Hub or in a folder."""

import codecs
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ..checks.paths import FILE_ENDINGS, problem_file
from ..errors import DataError, SGPOError
from ..files import durable_replace, unfinished_file
from ..yaml_files import FEW_ALIASES
from .columns import as_answer, is_missing
from .compressed import unpacked
from .generated import GYM, LISTS, WORDS, materialise
from .own_files import OWN_PATTERNS, check_matched_files, check_own_files
from .rows import RowFiles, Rows, cache, cached_rows, is_cached, read_files


if TYPE_CHECKING:
    from datasets import DatasetBuilder

logger = logging.getLogger(__name__)

# Settings of a card that name its files, or change nothing here, where texts stay texts and empty cells are missing
_FIELDS = {"name", "version", "data_dir", "data_files", "description", "features"}
_FIELDS |= {"batch_size", "block_size", "chunksize", "engine", "memory_map", "use_threads", "verbose"}
_ENCODINGS = re.compile(
    r"utf-(?:8(?:-sig)?|(?:16|32)(?:-[lb]e)?)|ascii|iso8859-\d+|cp\d+|koi8-\w|mac-\w+|gb2312|gbk|gb18030|big5|"
    r"shift_jis|euc_\w+"
)
_FIELDS |= {"float_precision", "keep_default_na", "na_filter", "on_mixed_types", "parse_agent_traces"}


def load_rows(
    path: str, split: str, name: str | None = None, data_dir: str | None = None, data_files: Any = None
) -> Rows:
    """
    Loads rows as they are.

    Args:
        path (`str`):
            What [`~trl_sgpo.data.tasks.load_problems`] takes.
        split (`str`):
            A split, or a slice of one such as `train[:90%]`, or several with `+` between them.
        name (`str`, *optional*), data_dir (`str`, *optional*), data_files (*optional*):
            As in `datasets.load_dataset`.

    Returns:
        [`~trl_sgpo.data.rows.Rows`]

    Raises:
        [`DataError`]: There is no such source, it cannot be read, or has no rows for the split.
    """
    from datasets import ReadInstruction

    bases = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    whole = {base: _load_split(path, base, name, data_dir, data_files) for base in bases}
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({base: len(whole[base].dataset) for base in bases})
    except (ValueError, AssertionError) as error:
        raise DataError(f"The split `{split}` cannot be read ({error}): write it like `train[:90%]`.") from error
    parts = [whole[each.splitname].select(range(each.from_, each.to)) for each in slices if each.from_ < each.to]
    if not parts:
        raise DataError(f"{path} has no rows for the split `{split}`: name a source with problems.")
    return parts[0] if len(parts) == 1 else _joined(parts, split)


def _joined(parts: Sequence[Rows], split: str) -> Rows:
    from datasets import Dataset, Value, concatenate_datasets

    datasets = [part.dataset for part in parts]
    for name in datasets[0].column_names:
        if {str(each.features.get(name)) for each in datasets} == {str(Value("int64")), str(Value("float64"))}:
            datasets = [each.cast_column(name, Value("float64")) for each in datasets]
    try:
        rows = concatenate_datasets(datasets)
    except ValueError as error:
        raise DataError(
            f"The parts of `{split}` have columns of different types ({error}): load one of them."
        ) from error
    names = {name for part in parts if part.written is not None for name in part.written.column_names}
    texts = {name: [text for part in parts for text in _texts(part, name)] for name in sorted(names)}
    return Rows(rows, Dataset.from_dict(texts) if texts else None)


def _texts(rows: Rows, name: str) -> list[str | None]:
    return [None if is_missing(value) else as_answer(value) for value in rows.texts[name]]


def _load_split(path: str, base: str, name: str | None, data_dir: str | None, data_files: Any) -> Rows:
    """All rows of a split."""
    if path.startswith((GYM, LISTS, WORDS)):
        return _read(RowFiles(path, "parquet", [materialise(path, base)], own=True))
    file = problem_file(path)
    if file is None and os.path.isfile(os.path.expanduser(path)):
        raise DataError(f"The file {path} has none of the endings {', '.join(FILE_ENDINGS)}: save it as one of these.")
    if file is None:
        return _load_repository(path, base, name, data_dir, data_files)
    if not os.path.isfile(file):
        raise DataError(f"There is no file '{path}': check the path, relative to {os.getcwd()}.")
    if base != "train":
        raise DataError(
            f"'{path}' is one file and has no split '{base}': cut one off, like `dataset_train_split: train[:90%]` "
            "and `dataset_test_split: train[90%:]`."
        )
    form = Path(file).suffix.casefold().removeprefix(".").removesuffix("l")
    return _read(RowFiles(path, form, [file]))


def _read(files: RowFiles) -> Rows:
    return cached_rows(read_files(files))


# Repositories


def _load_repository(path: str, base: str, name: str | None, data_dir: str | None, data_files: Any) -> Rows:
    given = json.dumps([path, base, name, data_dir, data_files], sort_keys=True, default=str)
    record = cache() / f"{hashlib.sha256(given.encode()).hexdigest()[:24]}.read"
    try:
        builder = _builder(path, name, data_dir, data_files)
        reached = builder.name != "cache"  # where the library has it that cannot be reached
        if reached or not _was_read(record):
            if reached and data_files is None:
                of_a_format = data_dir is not None and builder.repo_id is None and not os.path.isdir(path)
                folder = os.path.expanduser(data_dir) if of_a_format and data_dir else path
                check_own_files(folder, builder.config.data_files or {})
            elif reached and builder.repo_id is None:
                place = path if os.path.isdir(path) else data_dir
                check_matched_files(place, _patterns(data_files), builder.config.data_files or {})
            read = read_files(_files_of(builder, path, base) if reached else _kept_files(builder, path, base))
            if reached and builder.repo_id is not None:
                with FileLock(record.with_suffix(".lock")), unfinished_file(record) as unfinished:
                    unfinished.write_text(read)
                    durable_replace(unfinished, record)
            return cached_rows(read)
    except ConnectionError as error:
        if not _was_read(record):
            raise _unreachable(path, error) from error
    except OSError as error:
        raise _unreachable(path, error) from error
    logger.warning(f"{path} cannot be reached: the rows are those that were read before.")
    return cached_rows(record.read_text())


def _patterns(data_files: Any) -> list[str]:
    """Names and patterns of files in `data_files`, which may be one, a list, or either for each split."""
    if isinstance(data_files, Mapping):
        return [*chain.from_iterable(map(_patterns, data_files.values()))]
    return [data_files] if isinstance(data_files, str) else [*map(str, data_files)]


def _was_read(record: Path) -> bool:
    return record.is_file() and is_cached(record.read_text())


def _builder(path: str, name: str | None, data_dir: str | None, data_files: Any) -> "DatasetBuilder":
    """The files and settings of a dataset. Of the files, at most the names in ZIP archives are read."""
    from datasets import load_dataset_builder
    from yaml import YAMLError

    try:
        with FEW_ALIASES, OWN_PATTERNS if data_files is None else nullcontext():
            return load_dataset_builder(path, name=name, data_dir=data_dir, data_files=data_files)
    except SGPOError:
        raise
    except (YAMLError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path} cannot be loaded ({reason}): correct its card, and name a configuration where it has several."
        ) from error


def _files_of(builder: "DatasetBuilder", path: str, base: str) -> RowFiles:
    """Downloads and unpacks the files of a split."""
    from datasets import DownloadConfig, DownloadManager

    if builder.name not in ("json", "csv", "parquet"):
        raise DataError(
            f"The format of {path} is `{builder.name}`, and JSON, CSV and Parquet are read: if you trust it, load it "
            "with the datasets library, save it with `Dataset.to_parquet`, and name that file."
        )
    read = _settings(builder, path)
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    download = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    packed = DownloadManager(builder.dataset_name, download_config=download).download(_split(splits, path, base))
    paths = [file for each in packed for file in unpacked(each, cache())]
    return RowFiles(path, builder.name, paths, **read)


def _settings(builder: "DatasetBuilder", path: str) -> dict[str, Any]:
    """The settings of a card that [`RowFiles`] has too."""
    settings, defaults = vars(builder.config), vars(type(builder.config)())
    changed = {key: value for key, value in settings.items() if key not in _FIELDS and value != defaults[key]}
    separator = changed.pop("sep", RowFiles.separator)
    if not isinstance(separator, str) or len(separator) != 1:  # a pattern, which may match for ever
        raise DataError(f"The card of {path} sets `sep` to {separator!r:.40}: set it to one character.")
    changed.pop("delimiter", None)  # which the library has made `sep`
    texts = {key: changed.pop(key) for key in ("encoding", "field") if isinstance(changed.get(key), str)}
    encoding = texts.get("encoding")
    if encoding is not None and not _is_plain(encoding):
        raise DataError(f"The card of {path} sets `encoding` to {encoding!r:.40}: save the files as UTF-8.")
    if encoding == "utf-8":
        del texts["encoding"]  # which may have a byte order mark
    columns = changed.get("columns")
    if isinstance(columns, list) and all(isinstance(column, str) for column in columns):
        del changed["columns"]
        texts["columns"] = columns
    if changed:
        others = ", ".join(f"`{key}`" for key in sorted(changed))
        raise DataError(
            f"The card of {path} sets {others}, which is not read here: save its rows as JSON lines, CSV or Parquet "
            "that needs no settings, and name that file."
        )
    return texts | {"separator": separator}


def _is_plain(encoding: str) -> bool:
    """Whether an encoding is of a few bytes a character. Others decode what they have kept again with each block."""
    try:
        return _ENCODINGS.fullmatch(codecs.lookup(encoding).name) is not None
    except (LookupError, ValueError):
        return False


def _kept_files(builder: "DatasetBuilder", path: str, base: str) -> RowFiles:
    """Files in the cache of the datasets library, where the user had it load them."""
    _split(builder.info.splits or {}, path, base)
    return RowFiles(path, "arrow", [file["filename"] for file in builder.as_dataset(split=base).cache_files])


def _split(splits: Mapping[str, Any], path: str, base: str) -> Any:
    if base not in splits:
        raise DataError(f"{path} has no split `{base}`: use one of {', '.join(splits)}.")
    return splits[base]


def _unreachable(path: str, error: OSError) -> DataError:
    reason = str(error).splitlines()[0][:300]
    return DataError(
        f"Cannot load {path} ({reason}): check the name and the network, or use a local .jsonl, .parquet or .csv "
        "file or `reasoning_gym/<family>`."
    )
