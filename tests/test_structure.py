"""The rules of the source tree, checked on syntax trees. Nothing of the package is run."""

import ast
from collections.abc import Iterator
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "trl_sgpo"

# Modules that may use names of TRL and transformers that are private
PRIVATE_NAMES_OF_TRL = {"sgpo_trainer", "speed.trainer", "speed.generation", "hub.trainer", "vram.worst_case"}
CHROMA = {"bank.index"}


def module_name(path: Path, package: Path) -> str:
    """`trl_sgpo.bank.index` for `bank/index.py`, `trl_sgpo.bank` for `bank/__init__.py`."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(package: Path) -> dict[str, Path]:
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


def imported(module: str, path: Path, modules: set[str]) -> Iterator[str]:
    """Modules that a file imports: at the top, within functions and for type checking alike."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in modules else source


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan, 1972), and modules that import themselves."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def import_graph(package: Path) -> dict[str, set[str]]:
    files = source_files(package)
    modules = set(files)
    graph = {
        module: {name for name in imported(module, path, modules) if name in modules} for module, path in files.items()
    }
    # A package imports its own modules; a module that imports from its package's `__init__` is not meant
    return graph


if __name__ == "__main__":
    for circle in circles(import_graph(PACKAGE)):
        print(len(circle), circle)
        g = import_graph(PACKAGE)
        for m in circle:
            print("  ", m, "->", sorted(g[m] & set(circle)))
