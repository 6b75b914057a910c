"""Work in chunks: each finished chunk is written to disk, so that interrupted work can continue."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tqdm.auto import tqdm

from ..checks.damaged import expect_readable
from ..checks.json_text import parse_json, read_json, read_lines
from ..checks.shapes import Check, count, record, text
from ..errors import ConfigError
from ..files import append_file, write_file
from .digest import changes


ROWS = "rows.jsonl"
SETTINGS = "settings.json"
RESULTS_FILE = "results.json"

Chunk = dict[str, Any]
RunChunk = Callable[[str, int, Callable[[], Chunk], Check], Chunk]

_FIX = "move it away, or drop it with `--overwrite`"
_CHUNK = record({"key": text, "texts": count})


def run_now(key: str, texts: int, compute: Callable[[], Chunk], check: Check) -> Chunk:
    """Computes a chunk without writing it to disk."""
    return compute()


class ChunkLog:
    """
    Finished chunks of an evaluation, one a line of `rows.jsonl`.

    A process that is killed loses the chunk it is working on. A last line that was cut off is dropped.

    Args:
        directory (`Path`):
            Output directory. It is created if it does not exist.
        settings (`dict`):
            Everything that the chunks depend on.
        texts (`int`):
            Total number of generated texts, for the progress bar.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete results of other settings in the directory.

    Raises:
        [`ConfigError`]: If the directory holds an evaluation with other settings, or a damaged one.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], texts: int, overwrite: bool = False):
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / ROWS
        if overwrite:
            self.path.unlink(missing_ok=True)
            (directory / SETTINGS).unlink(missing_ok=True)
        _check_settings(directory, json.loads(json.dumps(settings)))
        self.done, length = _read(self.path)
        self._file = append_file(self.path, length)
        self._bar = tqdm(
            total=texts,
            initial=sum(chunk["texts"] for chunk in self.done.values()),
            desc="evaluating",
            unit="text",
            dynamic_ncols=True,
        )

    def run(self, key: str, texts: int, compute: Callable[[], Chunk], check: Check) -> Chunk:
        """
        Returns a chunk from disk, or computes it.

        Args:
            key (`str`):
                Name of the chunk.
            texts (`int`):
                Texts that it generates.
            compute (`Callable`):
                Computes it. Its result must be JSON.
            check (`Callable`):
                Checks what is read from disk, see [`~trl_sgpo.checks.shapes`].

        Raises:
            [`ConfigError`]: The chunk on disk is damaged.
        """
        if key not in self.done:
            line = json.dumps({"key": key, "texts": texts, **compute()}, allow_nan=False)
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.done[key] = json.loads(line)
            self._bar.update(texts)
        else:
            with expect_readable(self.path, _FIX):
                check(self.done[key], key)
        return self.done[key]

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / SETTINGS
    if path.is_file():
        with expect_readable(path):
            before = read_json(path)
            changed = changes(_without_labels(before), _without_labels(settings))
        if changed:
            raise ConfigError(
                f"{directory} holds an evaluation with other settings ({changed}): choose another `--output_dir`, or "
                "drop what is there with `--overwrite`."
            )
    elif (directory / ROWS).exists():
        raise ConfigError(
            f"{directory} has a {ROWS} and no {SETTINGS}: choose another `--output_dir`, or drop it with "
            "`--overwrite`."
        )
    write_file(path, json.dumps(settings, indent=2, sort_keys=True))


def _without_labels(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the kinds of suites, on which no chunk depends."""
    suites = settings.get("suites", {})
    chunks = {name: {key: value for key, value in suite.items() if key != "kind"} for name, suite in suites.items()}
    return settings | {"suites": chunks}


def _read(path: Path) -> tuple[dict[str, Chunk], int]:
    """Finished chunks by name, and the length of their lines: the last one may be torn."""
    chunks: dict[str, Chunk] = {}
    length = 0
    with expect_readable(path, _FIX):
        for line in read_lines(path) if path.exists() else ():
            chunk = parse_json(line)
            _CHUNK(chunk, f"line {len(chunks) + 1}")
            chunks[chunk["key"]] = chunk
            length += len(line)
    return chunks, length
