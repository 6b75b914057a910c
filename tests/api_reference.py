"""
Writes what is public to `tests/public_api.txt`, as signatures, and to `docs/api.md`, as reference:

    make reference
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

import trl_sgpo.bank
from trl_sgpo import SGPOConfig, SGPOPipeline, SGPOTrainer, SharedPromptGRPOTrainer, StrategyBank, errors
from trl_sgpo.bank import Execution, Outcome, Retrieved, Strategy, load_embedder, problem_id
from trl_sgpo.bank.exchange import ImportReport, export_bank, import_bank, push_bank
from trl_sgpo.bank.hub import pull_bank
from trl_sgpo.bank.shared import SharedBank, SyncReport
from trl_sgpo.cli.bench import SUBJECTS
from trl_sgpo.cli.main import COMMANDS
from trl_sgpo.data.answers import AnswerCheck, answer_reward, check_answer
from trl_sgpo.data.final_answers import final_answer
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.data.warmstart import warmstart
from trl_sgpo.data.worked import Trace
from trl_sgpo.evaluation.transfer_score import TransferReport, transfer_report
from trl_sgpo.hub.snippet import plain_snippet, transformers_snippet
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.inference.solution import Attempt, Solution
from trl_sgpo.method.problem import Problem
from trl_sgpo.recipe import SGPOScriptArguments


ROOT = Path(__file__).parents[1]
SIGNATURES = ROOT / "tests" / "public_api.txt"
REFERENCE = ROOT / "docs" / "api.md"
WIDTH = 110
PUBLIC: dict[str, list[Any]] = {
    "Training": [
        SGPOConfig, SGPOTrainer, SharedPromptGRPOTrainer, SGPOScriptArguments, warmstart, Trace,
        answer_reward, check_answer, AnswerCheck, final_answer, load_problems,
    ],
    "Strategy bank": [
        StrategyBank, Strategy, Outcome, Execution, Retrieved, problem_id, load_embedder, export_bank, import_bank,
        ImportReport, push_bank, pull_bank, SharedBank, SyncReport,
    ],
    "Solving": [
        SGPOPipeline, Solution, Attempt, Problem, Decoding, TwoPhaseModel, TwoPhaseSettings, transformers_snippet,
        plain_snippet,
    ],
    "Evaluation": [transfer_report, TransferReport],
    "Errors": [
        errors.SGPOError,
        errors.ConfigError,
        errors.DataError,
        errors.ModelError,
        errors.RewardError,
        errors.BankError,
    ],
}  # fmt: skip


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


# Signatures


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
        for item in items:
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


# Reference


def documented(item: Any) -> dict[str, list[str] | None]:
    return {name: given for name, given in members(item).items() if inspect.getattr_static(item, name).__doc__}


NAMES = {item.__name__ for items in PUBLIC.values() for item in items}
NAMES |= {f"{item.__name__}.{name}" for items in PUBLIC.values() for item in items for name in documented(item)}


def link(name: str) -> str:
    return f"[`{name}`](#{name.lower().replace('.', '')})"


def cross_reference(found: re.Match[str]) -> str:
    """A link, or the name as code where it leads out of the reference. Of a name after `~` the path is left out."""
    path = found[1].removeprefix("~")
    short = path.rpartition(".")[2]
    if path in NAMES or short in NAMES:
        return link(path if path in NAMES else short)
    return f"`{short if found[1].startswith('~') else path}`"


def markdown(docstring: str) -> list[str]:
    """A docstring in Hugging Face's form, with its sections as lists."""
    lines = [""]
    section = ""
    for line in docstring.splitlines():
        text = line.strip()
        if not text and not lines[-1]:
            continue
        if heading := re.fullmatch(r"(Args|Parameters|Raises|Returns|Example):", line):
            section = heading[1]
            lines += [f"**{'Arguments' if section in ('Args', 'Parameters') else section}**", ""]
        elif section == "Example" or not text:
            lines.append(line)
        elif text.startswith("> "):
            lines.append(f"*{text[2:]}*")
        elif section in ("Args", "Parameters") and (entry := re.fullmatch(r" {4}([\w*, ]+?)(?: \((.+)\))?:", line)):
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines.append(f"- {names}: {entry[2]}." if entry[2] else f"- {names}.")
        elif section == "Raises" and re.match(r" {4}\S", line):
            lines.append(f"- {text}")
        else:
            lines.append(f"  {text}" if section in ("Args", "Parameters", "Raises") else text)
    return [re.sub(r"\[`(~?[\w.]+)`\]", cross_reference, line) for line in lines]


def call(name: str, given: list[str]) -> list[str]:
    """A call in one line, or in one for each argument."""
    line = f"{name}({', '.join(given)})"
    return [line] if len(line) <= WIDTH else [f"{name}(", *(f"    {argument}," for argument in given), ")"]


def imported_from(item: Any) -> str:
    exported = {"trl_sgpo": trl_sgpo.__all__, "trl_sgpo.bank": trl_sgpo.bank.__all__}
    return next((path for path, names in exported.items() if item.__name__ in names), item.__module__)


def reference() -> str:
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `make reference`. Configuration classes are shown with what they add to those of "
        "TRL, whose keys they all take. Changes of what is here are in the [changelog](../CHANGELOG.md).",
        "",
        *(f"- {title}: {', '.join(link(item.__name__) for item in items)}" for title, items in PUBLIC.items()),
    ]
    for title, items in PUBLIC.items():
        lines += ["", f"## {title}"]
        for item in items:
            name = item.__name__
            shown = [f"class {name}({item.__bases__[0].__name__})"] if is_error(item) else call(name, arguments(item))
            code = [f"from {imported_from(item)} import {name}", "", *shown]
            lines += ["", f"### `{name}`", "", "```python", *code, "```", *markdown(inspect.getdoc(item))]
            for member, given in documented(item).items():
                path = f"{name}.{member}"
                code = [path] if given is None else call(path, given)
                doc = markdown(inspect.getdoc(inspect.getattr_static(item, member)))
                lines += ["", f"#### `{path}`", "", "```python", *code, "```", *doc]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SIGNATURES.write_text(signatures())
    REFERENCE.write_text(reference())
