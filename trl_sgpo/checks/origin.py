"""
Whose error is it: a setting that a user can mend, or a bug?

Decided by the kind of an exception and the place it comes from, not by its message. An error of the operating system
about a file, such as a full disk, is told in one line wherever it is raised. So is what a library raises about its
arguments, while they are parsed and while model, optimizer and trainer are made. What is raised in a training step,
an evaluation or a generation, or in this package's or the user's own code, keeps its traceback. What a tokenizer
raises is told in one line wherever that is, because its file is to blame. Its library raises `Exception` itself, or
`PanicException`, which is no `Exception`. The two errors of torch that a model's own files cause within a step are
known by their message.
"""

import errno
import re
import sysconfig
from traceback import walk_tb
from types import FrameType

from ..errors import SGPOError


LIBRARIES = ("trl", "transformers", "peft", "accelerate", "datasets")
KINDS = (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError)
RUNNING = {"_run_epoch", "training_step", "evaluation_loop", "generate"}
"""Functions of the libraries within which work is under way."""
PLACES = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT,
    errno.ENAMETOOLONG,
}  # fmt: skip
"""Errors of files that say something about the user's disk, not about a program."""
FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_OF_TORCH = re.compile(r"inline_container\.cc:\d+\] \. (unexpected pos|PytorchStreamWriter failed)")

_PANIC = ("pyo3_runtime", "PanicException")
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OWN = __name__.partition(".")[0]


def what_to_mend(error: BaseException) -> str | None:
    """
    Returns an error as one line, if a user can mend it, otherwise `None`.

    Args:
        error (`BaseException`):
            A caught exception.
    """
    if isinstance(error, SGPOError):
        return str(error)
    if isinstance(error, OSError) and error.errno in PLACES and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if (text := _of_disk(error)) is not None:
        return text
    if (text := _of_weights(error)) is not None:
        return text
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if _is_of_a_tokenizer(error, frames):
        return f"the tokenizer cannot be used: {' '.join(str(error).split())}. Save it again, or name another model."
    deliberate = isinstance(error, KINDS) or type(error).__module__ != "builtins"  # a type that a package defines
    if not deliberate or any(frame.f_code.co_name in RUNNING for frame in frames):
        return None
    origin = next((name for frame in reversed(frames) if (name := _package(frame)) is not None), None)
    if origin not in LIBRARIES:
        return None
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text if " " in text else f"{origin}: {type(error).__name__} {text}".rstrip()


def _is_of_a_tokenizer(error: BaseException, frames: list[FrameType]) -> bool:
    """Whether the library of tokenizers raised it. It has no frames, the last one is that of its caller."""
    kind = type(error)
    if not frames or (kind is not Exception and (kind.__module__, kind.__name__) != _PANIC):
        return False
    package, _, module = str(frames[-1].f_globals.get("__name__", "")).partition(".")
    return package in ("transformers", _OWN) and "token" in module


def _of_disk(error: BaseException) -> str | None:
    """What an error says of the disk that does not name the file, or comes from a library that is not in Python."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.strerror}: free some of it, or write to another disk."
    text = " ".join(str(error).split())
    found = _OF_RUST.search(text)
    if found is not None and int(found[1]) in PLACES:
        return f"{text}."
    if isinstance(error, RuntimeError) and _OF_TORCH.search(text):
        return f"A file could not be written, as without space left on the disk ({text})."
    return None


def _of_weights(error: BaseException) -> str | None:
    """What torch raises within a forward pass or a generation because of the model's own files."""
    if isinstance(error, RuntimeError) and str(error).startswith("probability tensor contains"):
        return (
            "the model's logits are not finite: its weights are damaged, or its training diverged. Load other "
            "weights, or train again from an earlier checkpoint with a lower `learning_rate`."
        )
    if isinstance(error, IndexError) and str(error) == "index out of range in self":
        return "the tokenizer has tokens that the model has no embedding for: load the two that belong together."
    return None


def _package(frame: FrameType) -> str | None:
    """The package that a frame belongs to, an empty string for a user's code, `None` for other installed code."""
    name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if name == _OWN or name in LIBRARIES:
        return name
    path = frame.f_code.co_filename
    return "" if path.endswith(".py") and not path.startswith(_INSTALLED) else None
