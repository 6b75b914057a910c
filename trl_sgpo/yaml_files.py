"""Reading YAML files that people write."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


def read_mapping(path: str) -> dict[str, Any]:
    """
    Reads a YAML file of keys and values.

    Raises:
        [`ConfigError`]: It cannot be read, is no YAML, or is no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values.")
    return content


def unknown_key(key: str, known: list[str], path: str) -> ConfigError:
    """The error for a key that a file may not have."""
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"the keys are {', '.join(known)}."
    return ConfigError(f"Unknown key `{key}` in {path}: {hint}")
