"""One line for a file of a run that does not hold what a run writes: the folder may be of somebody else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, SGPOError


@contextmanager
def expect_readable(path: str | Path, fix: str = "delete it, or save it again") -> Iterator[None]:
    """
    Names a file in the error that reading a value of an unexpected type raises. It is a decorator too.

    Args:
        path (`str` or `Path`):
            The file, or its name within the run.
        fix (`str`, *optional*, defaults to `"delete it, or save it again"`):
            What the user can do.

    Raises:
        [`ConfigError`]: In place of what was raised.
    """
    try:
        yield
    except SGPOError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is damaged ({what}): {fix}.") from error
