"""Makes Markdown of docstrings in Hugging Face's form, for the API reference of the site."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object


PUBLIC = re.findall(r"^::: (\S+)$", (Path(__file__).parent / "api.md").read_text(), re.MULTILINE)
PATHS = {path.rpartition(".")[2]: path for path in PUBLIC}


def cross_reference(found: re.Match[str]) -> str:
    """A link, or the name as code where it leads out of the reference. Of a name after `~` the path is left out."""
    path = found[1].removeprefix("~")
    short = path.rpartition(".")[2]
    name, _, member = path.partition(".")
    if target := PATHS.get(short) or (name in PATHS and f"{PATHS[name]}.{member}"):
        return f"[`{short if short in PATHS else path}`][{target}]"
    return f"`{short if found[1].startswith('~') else path}`"


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
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
    return "\n".join(re.sub(r"\[`(~?[\w.]+)`\]", cross_reference, line) for line in lines)


class HuggingFaceDocstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
