"""
What results depend on. Stored results are continued only where it is the same.

A record maps names to values, or to digests of what is long: files of a model, sources, problems. [`depends_on`] has
what is common to all commands that store results; each adds its settings and problems.
"""

import ast
import hashlib
import inspect
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checks.json_text import read_object
from ..checks.repositories import weights_in
from ..inference.model_files import (
    ADAPTER_FILE,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
)
from ..inference.weights import require_model


if TYPE_CHECKING:
    from ..bank import StrategyBank

Record = dict[str, Any]

_MOST_NAMED = 12
_PACKAGE = Path(__file__).parents[1]
_TEMPLATE_KEY = "chat_template"  # in the tokenizer's config, where there is no file of it


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def depends_on(
    model: str | None = None,
    rewards: Sequence[Callable[..., Any] | str] = (),
    bank: "StrategyBank | None" = None,
    revision: str | None = None,
) -> Record:
    """
    Record of what results of any command depend on.

    Args:
        model (`str`, *optional*):
            Directory or Hub id of the model that writes. If `None`, there is none on this machine.
        rewards (`Sequence[Callable | str]`, *optional*):
            Reward functions, the verifier first, and names of reward models.
        bank ([`StrategyBank`], *optional*):
            Bank whose strategies are shown.
        revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub.

    Returns:
        `dict`: Name → digest.
    """
    record: Record = {"trl_sgpo": f"{__version__} {digest_of_files(_PACKAGE.rglob('*.py'))[:16]}"}
    if model is not None:
        record |= model_record(model, revision)
    for name, functions in (("verifier_source", rewards[:1]), ("reward_sources", rewards[1:])):
        if functions:
            record[name] = digest([_of_reward(each) for each in functions])[:16]
    record["bank"], record["bank_embeddings"] = (
        (None, None) if bank is None else (_of_bank(bank), bank.embedding_model)
    )
    return record


def changes(before: Record, now: Record) -> str | None:
    """
    Says how two records differ.

    Args:
        before (`dict`), now (`dict`):
            The records.

    Returns:
        `str` or `None`: Such as `"chat_template, seed was 1, is 2"`, `None` if the records are equal.
    """
    now = json.loads(json.dumps(now, default=str))
    parts = [_change(key, before[key], now.get(key)) for key in sorted(before) if before[key] != now.get(key)]
    if missing := sorted(now.keys() - before.keys()):
        parts.insert(0, f"an earlier version recorded no {', '.join(missing)}")
    more = f" and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return ", ".join(parts[:_MOST_NAMED]) + more or None


def _change(name: str, before: Any, now: Any) -> str:
    numbers = isinstance(before, int | float) and isinstance(now, int | float)
    return f"{name} was {before}, is {now}" if numbers else name


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files."""
    total = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


# Models


def model_record(name: str, revision: str | None = None) -> Record:
    """
    Digests of a model's weights, configurations, tokenizer and chat template.

    Args:
        name (`str`):
            A directory or Hub id. The digests of an adapter's base begin with `base_`.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        `dict`: Name → digest.
    """
    from ..inference.loading import adapter_base

    directory = _directory(name, revision)
    base = adapter_base(directory)
    above = {} if base is None else {f"base_{key}": value for key, value in model_record(base).items()}
    tokenizer = [path for path in _files(directory, TOKENIZER) if path.name not in (CHAT_TEMPLATE, TOKENIZER_CONFIG)]
    settings, template = _tokenizer_config(directory)
    record = {
        "weights": weights_digest(directory),
        "config": digest_of_files(_files(directory, (CONFIG,))),
        "generation_config": digest_of_files(_files(directory, (GENERATION_CONFIG,))),
    }
    record |= {"tokenizer": digest([digest_of_files(tokenizer), settings]), "chat_template": digest(template)}
    return above | {key: value[:16] for key, value in record.items()}


def weights_digest(directory: Path) -> str:
    """Digest of the weights in a folder, of an adapter without those of its base."""
    return digest_of_files([*_weights(directory), *_files(directory, (ADAPTER_FILE,))])[:16]


def measured_weights(results: Record) -> str | None:
    """Digest of the weights that the content of `results.json` is of, `None` if an earlier version wrote it."""
    return results.get("settings", {}).get("weights")


def of_other_weights(results: Record, directory: Path, digest_of: Callable[[Path], str] | None = None) -> bool:
    """
    Whether the content of `results.json` is, as far as it says, of other weights than those in a folder. `digest_of`
    may remember the digest of a folder for several results.
    """
    measured = measured_weights(results)
    return measured is not None and bool(_weights(directory)) and measured != (digest_of or weights_digest)(directory)


def _directory(name: str, revision: str | None) -> Path:
    from ..inference.checked import checked_folder

    found = require_model(name)
    place = {} if revision is None else {"revision": revision}
    return Path(found) if os.path.isdir(found) else checked_folder(found, place, weights=True)[0]


def _weights(directory: Path) -> list[Path]:
    """Files of weights that a library reads from a folder, also where a config or an index names them otherwise."""
    named = {*weights_in(directory), *_files(directory, WEIGHTS)}
    return [path for path in named if path.is_file()]


def _files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in directory.glob(pattern) if path.is_file()]


def _tokenizer_config(directory: Path) -> tuple[Record, Any]:
    """The tokenizer's config without its chat template, and the template."""
    path = directory / TOKENIZER_CONFIG
    settings = read_object(path) or {}
    template = settings.pop(_TEMPLATE_KEY, None)
    if (directory / CHAT_TEMPLATE).is_file():
        template = (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
    return settings, template


# Banks and reward functions


def _of_bank(bank: "StrategyBank") -> str:
    """Digest of what retrieval reads: strategies with their counts, and the executions that these are counts of."""
    return digest([[asdict(one), [asdict(each) for each in bank.executions(one.id)]] for one in bank.strategies()])[
        :16
    ]


def _of_reward(reward: Callable[..., Any] | str) -> Any:
    return model_record(reward) if isinstance(reward, str) else digest_of_files(_sources(reward))


def _sources(function: Callable[..., Any]) -> list[Path]:
    """Source files of a function's module and, if it is not installed, of what it imports and is not installed."""
    while isinstance(function, partial):
        function = function.func
    named = inspect.unwrap(function if inspect.isroutine(function) else type(function))
    found: dict[str, Path | None] = {}
    waiting = [named.__module__]
    while waiting:
        module = waiting.pop()
        if module in found or (found and not _is_own(module.split(".")[0])):
            continue
        spec = _spec(module)
        found[module] = path = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
        if path is not None and path.suffix == ".py" and _is_own(module.split(".")[0]):
            waiting += [module.rpartition(".")[0], *_imports(module, spec, path)]
    return [path for path in found.values() if path is not None]


def _spec(module: str) -> ModuleSpec | None:
    try:
        return find_spec(module) if module else None
    except (ImportError, AttributeError, ValueError):  # what is imported from a module may be no module
        return None


def _is_own(top: str) -> bool:
    """Whether a package or module is neither this one nor in a directory of installed packages."""
    spec = _spec(top)
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        return False
    places: list[str] = [*map(str, spec.submodule_search_locations or []), str(spec.origin)]
    path = Path(places[0]).resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(path.is_relative_to(directory) for directory in [*installed, _PACKAGE])


def _imports(module: str, spec: ModuleSpec | None, path: Path) -> Iterator[str]:
    package = module if spec is not None and spec.submodule_search_locations else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (source, *(f"{source}.{alias.name}" for alias in node.names))
