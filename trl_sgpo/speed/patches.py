"""Changes to libraries that last as long as somebody uses them."""

from collections.abc import Callable
from threading import Lock
from typing import Any


class CountedPatch:
    """
    A context manager that sets a value of a library. Blocks may be nested, also in several threads: the first one sets
    the value, the last one restores what was there before.

    Args:
        read (`Callable`):
            Returns the present value.
        write (`Callable`):
            Sets the value.
        value (`Any`):
            Value within the blocks.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any):
        self._read, self._write, self._value = read, write, value
        self._lock = Lock()
        self._users = 0
        self._before: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._read()
                self._write(self._value)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._write(self._before)
