"""
What is public: the names that `docs/api.md` lists. Writes their signatures to `tests/public_api.txt`:

    make signatures
"""

import inspect
import re
from argparse import ArgumentParser, _SubParsersAction
from dataclasses import is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from trl_sgpo.cli.bench import SUBJECTS
from trl_sgpo.cli.main import COMMANDS


ROOT = Path(__file__).parents[1]
SIGNATURES = ROOT / "tests" / "public_api.txt"


def public() -> dict[str, dict[str, Any]]:
    """Classes and functions by the path that `docs/api.md` imports them from, under its headings."""
    found: dict[str, dict[str, Any]] = {}
    for title, path in re.findall(r"^(?:## (.+)|::: (\S+))$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        if title:
            section = found.setdefault(title, {})
        else:
            module, _, name = path.rpartition(".")
            section[path] = getattr(import_module(module), name)
    return found


PUBLIC = public()


def arguments(item: Any, bound: bool = False) -> list[str]:
    """Arguments without annotations. Of a dataclass only its own fields are named, not those it inherits."""
    parameters = list(inspect.signature(item).parameters.values())[1 if bound else 0 :]
    if is_dataclass(item):
        parameters = [each for each in parameters if each.name in item.__annotations__]
    found = [str(each.replace(annotation=each.empty)).replace("'", '"') for each in parameters]  # as ruff quotes
    kinds = [each.kind for each in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        found.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return found


def is_error(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, Exception)


def members(item: Any) -> dict[str, list[str] | None]:
    """Methods that a class and its bases in this package define, with their arguments, and properties with `None`."""
    found: dict[str, list[str] | None] = {}
    bases = (
        [each for each in reversed(item.__mro__) if each.__module__.startswith("trl_sgpo")]
        if isinstance(item, type)
        else []
    )
    for name, member in (pair for base in bases for pair in vars(base).items()):
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(member, property | cached_property):
            found[name] = None
        elif isinstance(member, FunctionType | classmethod | staticmethod):
            found[name] = arguments(getattr(item, name), bound=isinstance(member, FunctionType))
    return found


def options(parser: ArgumentParser, command: str) -> list[str]:
    """A line for each command below a parser, with its long options."""
    own = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    below = [action.choices for action in parser._actions if isinstance(action, _SubParsersAction)]
    lines = [line for each in below for name, sub in each.items() for line in options(sub, f"{command} {name}")]
    return lines or [" ".join([command, *own])]


def signatures() -> str:
    lines = []
    for title, items in PUBLIC.items():
        lines += ["", f"# {title}"]
        for item in items.values():
            known = [base.__name__ for base in item.__bases__] if is_error(item) else arguments(item)
            lines.append(f"{item.__name__}({', '.join(known)})")
            for name, given in members(item).items():
                lines.append(f"{item.__name__}.{name}" + ("" if given is None else f"({', '.join(given)})"))
    lines += ["", "# Command line"]
    for command in COMMANDS:
        if command == "bench":
            lines += [f"trl-sgpo bench {subject}" for subject in SUBJECTS]
        elif command in ("train", "warmstart"):
            lines.append(f"trl-sgpo {command} --config, and the keys of recipes")
        else:
            lines += options(import_module(f"trl_sgpo.cli.{command}")._parser(), f"trl-sgpo {command}")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    SIGNATURES.write_text(signatures())
