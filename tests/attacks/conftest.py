"""What attacks share."""

import signal
import sys
from collections.abc import Callable, Iterator

import pytest


class TookTooLong(Exception):
    pass


@pytest.fixture
def ten_seconds_each() -> Iterator[Callable[[], object]]:
    """Starts ten seconds of computation, after which the test fails. Patterns can be interrupted."""
    if sys.platform == "win32":
        pytest.skip("no timer of computation there")

    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, stop)
    yield lambda: signal.setitimer(signal.ITIMER_PROF, 10)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
