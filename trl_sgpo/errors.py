"""Errors a user can act on. Every message names the fix."""

from collections.abc import Sequence


class SGPOError(Exception):
    """Base of all errors raised by `trl_sgpo`."""


class ConfigError(SGPOError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class SettingsError(ConfigError):
    """
    Several settings that cannot work.

    Args:
        place (`str`):
            Where they are, such as the name of a file.
        problems (`Sequence[str]`):
            What is wrong with each, and the fix.
    """

    def __init__(self, place: str, problems: Sequence[str]):
        self.problems = [" ".join(problem.split()) for problem in problems]
        super().__init__("\n  - ".join([f"{place} has {len(problems)} problems:", *self.problems]))


class DataError(SGPOError, ValueError):
    """A dataset that lacks what training or evaluation needs."""


class ModelError(SGPOError, OSError):
    """A model or embedder whose weights cannot be found or used."""


class RewardError(SGPOError, ValueError):
    """A reward function that returns what cannot be trained on."""


class BankError(SGPOError, RuntimeError):
    """A strategy bank that cannot be opened, read or written."""


class BankInUseError(BankError):
    """
    A strategy bank that is open elsewhere.

    Attributes:
        holder (`str`): What has it open: process, machine and since when.
    """

    def __init__(self, message: str, holder: str):
        super().__init__(message)
        self.holder = holder


class BankStorageError(BankError, OSError):
    """Files of a strategy bank that cannot be read or written now, as on a full disk."""


def refuse(place: str, problems: Sequence[str]) -> None:
    """Raises an error if there are problems: [`ConfigError`] for one, [`SettingsError`] for several."""
    if problems:
        raise ConfigError(problems[0]) if len(problems) == 1 else SettingsError(place, problems)
