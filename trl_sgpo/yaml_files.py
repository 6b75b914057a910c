"""Reading YAML files that people write."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, refuse


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.YAMLError(
                        f"the key `{key.value}` is there twice, again in line {key.start_mark.line + 1}"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: str) -> dict[str, Any]:
    """
    Reads a YAML file of keys and values.

    Raises:
        [`ConfigError`]: It cannot be read, is no YAML, has a key twice, or is no mapping.
    """
    return _load(path, _Loader)


def read_texts(path: str) -> dict[str, Any]:
    """Reads the same file with all scalars as the text that is written, such as `no` and `1e-4`."""
    return _load(path, yaml.BaseLoader)


def _load(path: str, loader: Any) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values.")
    return content


def check_keys(keys: Iterable[Any], known: Collection[str], path: str) -> None:
    """
    Checks the keys of a file.

    Raises:
        [`ConfigError`]: There are others than `known`. The message lists all of them.
    """
    unknown = [key for key in map(str, keys) if key not in known]
    close = {key: get_close_matches(key, known, n=1) for key in unknown}
    if len(unknown) == 1 and not close[unknown[0]]:
        raise ConfigError(f"Unknown key `{unknown[0]}` in {path}: the keys are {', '.join(known)}.")
    problems = [
        f"Unknown key `{key}` in {path}{f': did you mean `{close[key][0]}`?' if close[key] else '.'}"
        for key in unknown
    ]
    refuse(f"{path}, whose keys are {', '.join(known)},", problems)
