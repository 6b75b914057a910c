"""Checks of options that several commands have."""

import argparse

from ..errors import ConfigError


def check_at_least(options: argparse.Namespace, **limits: int) -> None:
    """Raises an error for the first option that is given and below its limit."""
    for name, least in limits.items():
        value = vars(options)[name]
        if value is not None and value < least:
            raise ConfigError(f"`--{name}` must be at least {least}, got {value}.")
