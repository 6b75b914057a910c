"""Compressed files of datasets: a few bytes may unpack to any number, and an archive hold links to other files."""

import bz2
import gzip
import hashlib
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from ..errors import DataError
from ..files import durable_replace, unfinished_directory


MAX_RATIO, ALLOWANCE = 200, 2**28
_PIECE = 2**20
_BLOCK = 4096  # bytes on the disk that a file takes at least
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
_ZSTANDARD, _LZ4 = b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_UNSAFE = re.compile(r"[^\w.-]")
_OTHERS = (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c")


def most_bytes(size: int) -> int:
    """Bytes that a file of a size may become: 200 times as many, and 256 MiB."""
    return MAX_RATIO * size + ALLOWANCE


def unpacked(path: str, cache: Path) -> list[str]:
    """
    Unpacks a file, once for each state of it. What is packed within it stays packed, and links in it are left out.

    Args:
        path (`str`):
            The file.
        cache (`Path`):
            Directory where unpacked files are kept.

    Returns:
        `list[str]`: The files in it, sorted. The file itself if it is not packed.

    Raises:
        [`DataError`]: It becomes more than 200 times as large and 256 MiB, cannot be read, or is packed otherwise than
            by gzip, xz, bzip2, Zstandard, LZ4, ZIP or tar. Nothing is left of it.
    """
    with open(path, "rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith(_OTHERS):
        raise DataError(f"{path} is a RAR or 7z archive: unpack it.")
    if not start.startswith((*_OPENERS, _ZSTANDARD, _LZ4, *_ZIP)) and not _is_tar(start):
        return [path]
    stat = Path(path).stat()
    made_of = json.dumps([str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns])
    folder = cache / f"{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.unpacked"
    cache.mkdir(parents=True, exist_ok=True)
    left = most_bytes(stat.st_size)
    too_large = DataError(
        f"{path} is {left >> 20:,} MiB or more when it is unpacked, {MAX_RATIO} times as large as it is: unpack it if "
        "you trust it."
    )
    with FileLock(folder.with_suffix(".lock")):  # the processes of a run read the same files
        if not folder.is_dir():
            with unfinished_directory(folder) as unfinished:
                try:
                    for number, (name, packed) in enumerate(_files(path, start, left, too_large)):
                        left -= _BLOCK
                        with open(unfinished / f"{_UNSAFE.sub('_', name)[-100:]}.{number}", "wb") as target:
                            for piece in iter(partial(packed.read, _PIECE), b""):
                                left -= len(piece)
                                if left < 0:
                                    raise too_large
                                target.write(piece)
                except DataError:
                    raise
                except Exception as error:  # each way of packing has errors of its own
                    reason = " ".join(str(error).split())[:200]
                    raise DataError(f"{path} cannot be unpacked ({reason}): copy it again, or unpack it.") from error
                durable_replace(unfinished, folder)
    return sorted(map(str, folder.iterdir()))


class _Limited:
    """A file of which no more than some bytes are read, however long the headers in it are."""

    def __init__(self, file: Any, left: int, too_large: DataError) -> None:
        self.file, self.left, self.too_large = file, left, too_large

    def read(self, size: int) -> bytes:
        piece: bytes = self.file.read(min(size, _PIECE))
        self.left -= len(piece)
        if self.left < 0:
            raise self.too_large
        return piece


def _files(path: str, start: bytes, most: int, too_large: DataError) -> Iterator[tuple[str, Any]]:
    """The names and contents of the files in a packed one."""
    with ExitStack() as opened:
        if start.startswith(_ZIP):
            packed = opened.enter_context(zipfile.ZipFile(path))
            for entry in packed.infolist():
                if not entry.is_dir() and not _is_hidden(entry.filename):
                    with packed.open(entry) as file:
                        yield entry.filename, file
            return
        if not _is_tar(opened.enter_context(_opened(path, start)).read(tarfile.BLOCKSIZE)):
            yield Path(path).stem, opened.enter_context(_opened(path, start))
            return
        content = _Limited(opened.enter_context(_opened(path, start)), most, too_large)
        archive = opened.enter_context(tarfile.open(fileobj=content, mode="r|"))  # type: ignore[call-overload]
        for member in archive:
            if member.isfile() and not _is_hidden(member.name):
                yield member.name, archive.extractfile(member)


def _opened(path: str, start: bytes) -> Any:
    if start.startswith(_ZSTANDARD):
        from zstandard import ZstdDecompressor

        return ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
    if start.startswith(_LZ4):
        from lz4 import frame

        return frame.open(path, "rb")
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)(path, "rb")


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # type: ignore[attr-defined]
        return False
    return True


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)
