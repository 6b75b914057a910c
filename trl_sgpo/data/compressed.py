"""Compressed files of datasets: a few bytes may unpack to any number, and fill the disk."""

import bz2
import gzip
import hashlib
import json
import lzma
import tarfile
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_file


MAX_RATIO, ALLOWANCE = 200, 2**28
_PIECE = 2**20
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
_ZSTANDARD, _LZ4 = b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
_OTHERS = (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c")
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


def most_bytes(size: int) -> int:
    """Bytes that a file of a size may become: 200 times as many, and 256 MiB."""
    return MAX_RATIO * size + ALLOWANCE


def check_unpacked(path: str, cache: Path) -> None:
    """
    Checks how large a file would be unpacked, before the datasets library does it. Nothing is written meanwhile.

    Args:
        path (`str`):
            The file.
        cache (`Path`):
            Directory where a mark is left for a file that was checked.

    Raises:
        [`DataError`]: It is more than 200 times as large and 256 MiB, cannot be read, or is packed otherwise than by
            gzip, xz, bzip2, Zstandard, LZ4, ZIP or tar.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(_OTHERS):
        raise DataError(f"{path} is a RAR or 7z archive: unpack it.")
    stat = Path(path).stat()
    made_of = json.dumps([str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns])
    mark = cache / f"{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.unpacked"
    if mark.is_file():
        return
    most = most_bytes(stat.st_size)
    try:
        for sizes in (_pieces(path, start), _members(path)):  # in this order: an archive may be compressed
            size = 0
            for each in sizes:
                size += each
                if size > most:
                    raise DataError(
                        f"{path} is {most >> 20:,} MiB or more when it is unpacked, {MAX_RATIO} times as large as it "
                        "is: unpack it if you trust it."
                    )
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path} cannot be unpacked ({' '.join(str(error).split())}): copy it again.") from error
    if start.startswith((*_OPENERS, _ZSTANDARD, _LZ4)):  # which takes as long as to unpack it
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, "")


def _pieces(path: str, start: bytes) -> Any:
    """Sizes of the pieces of a compressed file."""
    with ExitStack() as opened:
        if start.startswith(_ZSTANDARD):
            from zstandard import ZstdDecompressor

            packed = opened.enter_context(open(path, "rb"))
            file = ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        elif start.startswith(_LZ4):
            from lz4 import frame

            file = opened.enter_context(frame.open(path, "rb"))
        else:
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            if opener is None:
                return
            file = opened.enter_context(opener(path, "rb"))
        while piece := file.read(_PIECE):
            yield len(piece)


def _members(path: str) -> Any:
    """Sizes of the files of an archive, as it says: no more of them is unpacked. Sparse ones have no such bytes."""
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                yield member.size + tarfile.BLOCKSIZE
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            yield from (member.file_size for member in packed.infolist())
