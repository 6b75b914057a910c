"""A trial of a model's config and tokenizer in a process with limits, before this process reads them."""

import hashlib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from ..errors import ModelError
from ..files import write_file
from .process import CheckProcess


OPENING = CheckProcess(memory=8)  # with torch, so apart from the others
_READ = ("config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
         "*.model")  # fmt: skip


def check_opens(source: str | Path, directory: Path) -> None:
    """
    Lets another process read the config and the tokenizer of a model and build it without weights. This covers what no
    check of single settings knows: numbers from which a library makes lists, and steps that never end. What was read
    is remembered by its content, so that this takes its 5 seconds once.

    Args:
        source (`str` or `Path`):
            How the user named the model, for messages.
        directory (`Path`):
            Its folder.

    Raises:
        [`ModelError`]: It takes more than 60 seconds or 8 GiB, or a library prints control characters of a terminal.
    """
    from huggingface_hub import constants

    files = sorted({path for name in _READ for path in directory.glob(name) if path.is_file()})
    if not files:
        return
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    for path in files:
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    done = Path(constants.HF_HOME, "trl_sgpo", "opened", digest.hexdigest())
    if done.is_file():
        return
    prints_control = OPENING.ask("opens", str(directory.resolve()))
    if prints_control is None:
        raise ModelError(
            f"The config or the tokenizer of {source} takes more than 60 seconds or 8 GiB to open: use another model."
        )
    if prints_control:
        raise ModelError(f"Opening {source} prints control characters of a terminal: use another model.")
    with suppress(OSError):  # a cache that cannot be written
        done.parent.mkdir(parents=True, exist_ok=True)
        write_file(done, "")
