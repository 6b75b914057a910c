"""A lock on a bank's directory, which names the process that holds it."""

import json
import logging
import os
import platform
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..checks.json_text import read_json
from ..errors import BankError, BankInUseError
from ..files import write_file


logger = logging.getLogger(__name__)

LOCK = "bank.lock"
HOLDER = "holder.json"


class BankLock:
    """
    Holds a bank's directory until released. The operating system releases it when the process ends or is killed.

    Args:
        directory (`Path`):
            The bank.

    Raises:
        [`~trl_sgpo.errors.BankInUseError`]: If another process, or a part of this one, holds it. The message names it.
        [`~trl_sgpo.errors.BankError`]: If the directory cannot be written.
    """

    def __init__(self, directory: Path):
        self._lock = FileLock(directory / LOCK)
        self._holder = directory / HOLDER
        try:
            self._lock.acquire(timeout=0)
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            about = {"process": os.getpid(), "host": platform.node(), "since": now}
            write_file(self._holder, json.dumps(about))
        except Timeout:
            holder, is_this = self._named()
            if is_this:
                advice = "which is this one: call `close()` on what holds it, like `trainer.strategy_bank.close()`"
            else:
                advice = (
                    "end it or name another `bank_path`. To read the bank meanwhile, open the copy in a checkpoint of "
                    "the run"
                )
            message = f"The bank in {directory} is in use by {holder}"
            raise BankInUseError(f"{message}{',' if is_this else ':'} {advice}.", holder) from None
        except OSError as error:
            self._lock.release()
            raise BankError(
                f"The bank in {directory} cannot be locked: {error.strerror}. Name a directory you may write to."
            ) from error

    def _named(self) -> tuple[str, bool]:
        """Name of what holds the bank, and whether it is this process."""
        try:
            holder = read_json(self._holder)
            process, since, host = holder["process"], holder["since"], holder.get("host")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return "another process", False
        name = f"process {process}{f' on {host}' if host else ''} since {since}"
        return name, process == os.getpid() and host == platform.node()

    def release(self) -> None:
        """Let others open the bank."""
        if self._lock.is_locked:
            try:
                self._holder.unlink(missing_ok=True)
            except OSError as error:  # the directory may be read-only by now
                logger.warning("%s cannot be removed: %s", self._holder, error)
            finally:
                self._lock.release()
