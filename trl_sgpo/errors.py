"""Errors a user can act on. Every message names the fix."""


class SGPOError(Exception):
    """Base of all errors raised by `trl_sgpo`."""


class ConfigError(SGPOError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(SGPOError, ValueError):
    """A dataset that lacks what training or evaluation needs."""


class ModelError(SGPOError, OSError):
    """A model or embedder whose weights cannot be found or used."""


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
