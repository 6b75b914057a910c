"""Reading YAML files that people write."""

import os
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from .checks.characters import misplaced
from .checks.terminal import printable
from .errors import ConfigError, refuse
from .speed.patches import CountedPatch


MAX_BYTES = 2**20
MAX_NODES, MAX_NODES_OF_CARDS = 100_000, 1_000_000  # with aliases written out
MAX_DIGITS = 40


class _Limited:
    """Refuses a document whose aliases repeat too much, or contain themselves."""

    most = MAX_NODES

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()  # type: ignore[misc]
        if node is not None:
            _size(node, {}, self.most)
        return node


class _TextLoader(_Limited, yaml.BaseLoader): ...


class _CardLoader(_Limited, yaml.SafeLoader):
    most = MAX_NODES_OF_CARDS


def _safe_loader() -> type[yaml.SafeLoader]:
    return yaml.SafeLoader


def _set_safe_loader(loader: type[yaml.SafeLoader]) -> None:
    yaml.SafeLoader = loader  # type: ignore[misc]


FEW_ALIASES = CountedPatch(_safe_loader, _set_safe_loader, _CardLoader)
"""Within the context, `yaml.safe_load` refuses what no card of a dataset has."""


class _Loader(_Limited, yaml.SafeLoader):
    """Refuses a key that is written twice, of which PyYAML takes the last, and numbers of many digits."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                name = self.construct_object(key)
                if name in seen:
                    raise yaml.YAMLError(
                        f"the key `{key.value}` is there twice, again in line {key.start_mark.line + 1}"
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of more than {MAX_DIGITS} digits is in line {node.start_mark.line + 1}")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _size(node: yaml.Node, sizes: dict[int, int | None], most: int) -> int:
    """Number of nodes with aliases written out. `sizes` are those of nodes that were met, `None` for one within."""
    if id(node) not in sizes:
        sizes[id(node)] = None
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(_size(child, sizes, most) for child in children)
    size = sizes[id(node)]
    if size is None:
        raise yaml.YAMLError(f"an alias in line {node.start_mark.line + 1} contains itself")
    if size > most:
        raise yaml.YAMLError(f"its aliases repeat more than {most} values, in line {node.start_mark.line + 1}")
    return size


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file that `--config` names, and the command line without it."""
    parts = [
        part
        for argument in argv
        for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
    ]
    if "--config" not in parts:
        return None, parts
    position = parts.index("--config")
    if position + 1 == len(parts):
        raise ConfigError("`--config` needs the path of a recipe: `trl-sgpo init` writes one.")
    return os.path.expanduser(parts[position + 1]), parts[:position] + parts[position + 2 :]


def read_mapping(path: str) -> dict[str, Any]:
    """
    Reads a YAML file of keys and values.

    Raises:
        [`ConfigError`]: It cannot be read, is no YAML, has a key twice, or is no mapping.
    """
    return _load(path, _Loader)


def read_texts(path: str) -> dict[str, Any]:
    """Reads the same file with all scalars as the text that is written, such as `no` and `1e-4`."""
    return _load(path, _TextLoader)


def read_list(path: str) -> list[Any]:
    """
    Reads a YAML file of entries.

    Raises:
        [`ConfigError`]: It cannot be read, is no YAML, or is no list.
    """
    content = _parsed(path, _Loader)
    if not isinstance(content, list):
        raise ConfigError(f"{path} must be a list.")
    return content


def _parsed(path: str, loader: Any) -> Any:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise yaml.YAMLError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return yaml.load(data.decode(), loader)
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no file {path}: check the path, relative to {os.getcwd()}. `trl-sgpo init` writes a recipe."
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is no valid YAML: it is nested too deeply.") from error
    except yaml.MarkedYAMLError as error:  # its own text shows the line, which may hold a secret
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ConfigError(f"{path} is no valid YAML: {error.problem}{line}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error


def _load(path: str, loader: Any) -> dict[str, Any]:
    content = _parsed(path, loader)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values.")
    for key, value in content.items():
        within = {f"{key}.{name}": [name, each] for name, each in value.items()} if isinstance(value, dict) else {}
        for name, each in {key: key, **(within or {key: [key, value]})}.items():
            if found := misplaced(each):
                raise ConfigError(f"{path}: `{printable(str(name), kept='')}` holds {found}: remove the character.")
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
