"""A trial of a model's config and tokenizer in a process with limits, before this process reads them."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from ..errors import ModelError
from ..files import write_file
from .process import CheckProcess


OPENING = CheckProcess(memory=8)  # with torch, so apart from the others
PER_BYTE, FEW = 8, 10**7  # parameters in a byte of weights of one bit, and parameters that may always be missing
MAX_BUFFERS = 2**30  # bytes that a model makes beside its weights: the largest known ones make 0.1 GiB
_MAX_DONE = 100
MAX_FILES, MAX_FILE, MAX_BYTES = 10_000, 2**28, 2**32  # of which a library reads none that is larger than the second
_OPENED = ("config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
           "*.model")  # fmt: skip
# Of a run, which no tokenizer or config is read from. Counted, each checkpoint would be another model
OF_A_RUN = (
    *("README.md", "adapter_config.json", "sgpo.json", "run.json", "training.json", "metrics.json", "settings.json"),
    *("report.json", "before.json", "report.html", "results.json", "trainer_state.json", "progress.jsonl"),
    *("warmstart.sha256", ".gitattributes", ".gitignore"),
)
OF_TRAINING = (".safetensors", ".pt", ".pth", ".bin", ".lock")


def check_opens(source: str | Path, directory: Path, files: Sequence[Path], weights: Sequence[Path]) -> None:
    """
    Lets another process read the config and the tokenizer of a model and build it without weights. This covers what no
    check of single settings knows: numbers from which a library makes lists, and steps that never end. What was read
    is remembered by the content of all files but weights and those of a run, so that this takes its 5 seconds once.

    A library makes weights that are missing, at the size that the config says, so files of weights must not be too
    small for it.

    Args:
        source (`str` or `Path`):
            How the user named the model, for messages.
        directory (`Path`):
            Its folder.
        files (`Sequence[Path]`):
            All that is in the folder, and in those below it that a library reads.
        weights (`Sequence[Path]`):
            Its files of weights, which may be missing.

    Raises:
        [`ModelError`]: It takes more than 60 seconds or 8 GiB, a library panics or prints control characters of a
            terminal, the model makes more than 1 GiB beside its weights, most weights are missing, or the files are
            too many.
    """
    from huggingface_hub import constants

    if not any(path.is_file() for name in _OPENED for path in directory.glob(name)):
        return
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    others = [path for path in files if path.name not in OF_A_RUN and path.suffix not in OF_TRAINING]
    read = sorted(path for path in others if path.is_file())
    small = [path for path in read if path.stat().st_size <= MAX_FILE]
    if len(read) > MAX_FILES or sum(path.stat().st_size for path in small) > MAX_BYTES:
        raise ModelError(
            f"There are more than {MAX_FILES:,} files, or {MAX_BYTES >> 30} GiB of them, beside the weights of "
            f"{source}: move the model to a folder of its own."
        )
    for path in read:
        name = os.fsencode(path.relative_to(directory))
        digest.update(b"%d %b %d " % (len(name), name, path.stat().st_size))
    for path in small:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    done = Path(constants.HF_HOME, "trl_sgpo", "opened", digest.hexdigest())
    try:
        parameters, buffers = (int(number) for number in done.read_text()[:_MAX_DONE].split())
    except (OSError, ValueError):  # not opened yet
        parameters, buffers = _opened(source, directory, done)
    if buffers > MAX_BUFFERS:
        raise ModelError(
            f"The config of {source} describes a model that makes {buffers / 2**30:.1f} GiB beside its weights, such "
            "as a mask of all its positions, or for a few tokens: use another model."
        )
    sizes = [path.stat().st_size for path in weights if path.is_file()]
    if 0 < len(sizes) == len(weights) and parameters > PER_BYTE * sum(sizes) + FEW:
        raise ModelError(
            f"The config of {source} describes a model of {parameters:,} parameters, of which most are not in its "
            "files: copy or download the files again, or use another model."
        )


def _opened(source: str | Path, directory: Path, done: Path) -> tuple[int, int]:
    """
    Opens a model in the other process, remembers that it can be opened, and returns its number of parameters and the
    bytes of its buffers, 0 after an error, which is left to the caller.
    """
    reply = OPENING.ask("opens", str(directory.resolve()))
    if reply is not None and reply[1] is None:  # what earlier models left there may be the cause
        OPENING.close()
        reply = OPENING.ask("opens", str(directory.resolve()))
    if reply is None:
        raise ModelError(
            f"The config or the tokenizer of {source} cannot be opened within 60 seconds and 8 GiB: use another model."
        )
    prints_control, parameters, buffers = reply[0], reply[1] or 0, reply[2] or 0
    if prints_control:
        raise ModelError(
            f"Opening {source} prints control characters of a terminal, or more than 1 MiB: use another model."
        )
    with suppress(OSError):  # a cache that cannot be written
        done.parent.mkdir(parents=True, exist_ok=True)
        write_file(done, f"{parameters} {buffers}")
    return parameters, buffers
