"""
Rules of the source tree, checked on source text: the package is not imported.

Each rule is a function from a package's directory to the violations in it. It is run on this package, and on a small
package with a planted violation. They do not find names that are computed at run time, a renamed `import_module`, or
private names of a library's object where a class of the package defines the same name.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "trl_sgpo"

# Files that use or override private names of TRL, transformers, peft and accelerate
PRIVATE_NAMES = {
    "bench/arms.py",
    "checks/origin.py",
    "compare/budget.py",
    "evaluation/named_sets.py",
    "hub/trainer.py",
    "inference/pretrained.py",
    "internalize/trainer.py",
    "method/conversation_trainer.py",
    "method/measuring.py",
    "run/trainer.py",
    "sgpo_trainer.py",
    "speed/lm_head.py",
    "speed/start_check.py",
    "speed/trainer.py",
    "vram/simulate.py",
    "vram/worst_case.py",
}
CHROMA = {"bank/index.py"}
CHAT_TEMPLATE = {"checks/worker.py"}
CHAT_TEMPLATE_FUNCTIONS = {"apply_chat_template", "maybe_apply_chat_template", "render_jinja_template"}
WRITING = {"files.py"}
UNFINISHED = {"unfinished_file", "unfinished_directory"}
LOADING = {"bench/fit.py", "checks/worker.py", "inference/pretrained.py"}  # the first one loads what it saved
OWN_LOADERS = {"SGPOPipeline", "StrategyBank", "TwoPhaseModel"}
MAX_FILES_ON_TOP = 9
MAX_LINES_OF_TRAINER = 350

LIBRARIES = ("trl", "transformers", "peft", "accelerate")
# Files of these libraries that define trainers, models and what they use
LIBRARY_SOURCES = {
    "trl": ["*.py", "cli/*.py", "generation/*.py", "models/*.py", "trainer/*.py"],
    "transformers": [
        "cache_utils.py", "configuration_utils.py", "generation/*.py", "modeling_utils.py", "trainer*.py",
    ],
    "peft": ["mixed_model.py", "peft_model.py", "tuners/lora/*.py", "tuners/tuners_utils.py"],
    "accelerate": ["accelerator.py", "data_loader.py", "state.py"],
}  # fmt: skip
DEFINITION = re.compile(r"(?:\bdef|\bself\.|^) *(_(?!_)\w+)(?= *\(| *:?[^=\n(]*= *[^=])", re.MULTILINE)


# Modules and their imports


def module_name(path: Path, package: Path) -> str:
    """`trl_sgpo.bank.index` for `bank/index.py`, `trl_sgpo.bank` for `bank/__init__.py`."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(package: Path) -> dict[str, Path]:
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def root_name(node: ast.expr) -> str:
    """`a` for `a.b.c`, an empty string for what does not start with a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def absolute(name: str, level: int, package: str) -> str:
    """Absolute name of a module that is imported with `level` dots within a package."""
    base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*base, *([name] if name else [])])


def imported_by_call(node: ast.Call, package: str) -> str | None:
    """Module that `import_module("…")` or `__import__("…")` imports."""
    if ast.unparse(node.func).split(".")[-1] not in ("import_module", "__import__"):
        return None
    for value in [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            name = value.value.lstrip(".")
            return absolute(name, len(value.value) - len(name), package)
    return None


def imported(module: str, path: Path, modules: set[str]) -> Iterator[str]:
    """
    Modules that a file imports: at the top, within functions and for type checking alike. After `import a`, `a.b`
    counts as an import of the module `a.b`.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    nodes = list(ast.walk(syntax_tree(path)))
    names: dict[str, str] = {}  # name in the file → what it stands for
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            for alias in node.names:
                top = alias.name.split(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node.module or "", node.level, package)
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in modules else source
                names[alias.asname or alias.name] = name
        elif isinstance(node, ast.Call) and (name := imported_by_call(node, package)):
            yield name
    for node in nodes:
        if isinstance(node, ast.Attribute) and (root := root_name(node)) in names:
            name = names[root] + ast.unparse(node).removeprefix(root)
            if name in modules:
                yield name


def import_graph(package: Path) -> dict[str, set[str]]:
    files = source_files(package)
    modules = set(files)
    return {module: set(imported(module, path, modules)) & modules for module, path in files.items()}


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


# Private names of libraries


@cache
def library_names() -> frozenset[str]:
    """Names with one underscore that the libraries define as functions, methods or attributes."""
    found: set[str] = set()
    for library, patterns in LIBRARY_SOURCES.items():
        spec = find_spec(library)
        assert spec is not None and spec.submodule_search_locations
        for pattern in patterns:
            for path in Path(spec.submodule_search_locations[0]).glob(pattern):
                found.update(DEFINITION.findall(path.read_text(encoding="utf-8")))
    return frozenset(found)


def library_classes(package: Path) -> set[str]:
    """Names of the package's classes that inherit from a library's class, directly or through each other."""
    bases: dict[str, set[str]] = {}
    found: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
                found |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(ast.unparse(base).split(".")[-1] for base in node.bases)
    # A mixin of a trainer inherits from no trainer itself
    found |= {name for name in bases if name.endswith("Trainer")}
    while more := {name for name, its in bases.items() if its & found} - found:
        found |= more
    return found & bases.keys()


class PrivateNames(ast.NodeVisitor):
    """Collects a file's uses of private names of the libraries, as `line: name`."""

    def __init__(self, of_libraries: frozenset[str], subclasses: set[str], own: set[str]):
        self.of_libraries, self.subclasses, self.own = of_libraries, subclasses, own
        self.modules: set[str] = set()  # names that stand for a module or object of a library
        self.in_subclass = [False]
        self.found: list[str] = []

    def note(self, node: ast.AST, name: str) -> None:
        self.found.append(f"{node.lineno}: {name}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in LIBRARIES:
                self.modules.add(alias.asname or alias.name.split(".")[0])
                if any(is_private(part) for part in alias.name.split(".")):
                    self.note(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module.split(".")[0] not in LIBRARIES:
            return
        for alias in node.names:
            self.modules.add(alias.asname or alias.name)
            if any(is_private(part) for part in f"{node.module}.{alias.name}".split(".")):
                self.note(node, f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.in_subclass.append(node.name in self.subclasses)
        for item in node.body if self.in_subclass[-1] else ():
            for name in defined(item):
                if name in self.of_libraries and is_private(name):
                    self.note(item, name)
        self.generic_visit(node)
        self.in_subclass.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        if root_name(node.value) in self.modules:
            self.modules |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = ast.unparse(node.value)
        if owner == "self":
            of_library = self.in_subclass[-1]
        else:
            of_library = node.attr not in self.own or (self.in_subclass[-1] and owner.startswith("super("))
        if is_private(node.attr) and (
            root_name(node) in self.modules or (of_library and node.attr in self.of_libraries)
        ):
            self.note(node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """`setattr(trainer, "_name", …)`"""
        if isinstance(node.value, str) and is_private(node.value) and node.value in self.of_libraries - self.own:
            self.note(node, repr(node.value))


def defined(item: ast.stmt) -> list[str]:
    """Names that a statement of a class body defines."""
    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
        return [item.name]
    if isinstance(item, ast.AnnAssign):
        return [ast.unparse(item.target)]
    return [ast.unparse(target) for target in item.targets] if isinstance(item, ast.Assign) else []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(package: Path, subclasses: set[str]) -> set[str]:
    """Private names that classes of the package define which inherit from no library."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.ClassDef) and node.name not in subclasses:
                for item in ast.walk(node):
                    if isinstance(item, ast.FunctionDef):
                        found.add(item.name)
                    elif isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
                        found.add(item.attr)
    return {name for name in found if is_private(name)}


def private_names(package: Path) -> dict[str, list[str]]:
    """Uses of private names of the libraries in each file that has some."""
    subclasses = library_classes(package)
    own = own_names(package, subclasses)
    found = {}
    for path in sorted(package.rglob("*.py")):
        visitor = PrivateNames(library_names(), subclasses, own)
        visitor.visit(syntax_tree(path))
        if visitor.found:
            found[path.relative_to(package).as_posix()] = visitor.found
    return found


# Rules

Rule = Callable[[Path], list[str]]


def private_names_only_where_listed(package: Path) -> list[str]:
    found = private_names(package)
    stale = [f"{name} uses no private name" for name in sorted(PRIVATE_NAMES - found.keys()) if package == PACKAGE]
    return [f"{name}:{use}" for name, uses in found.items() if name not in PRIVATE_NAMES for use in uses] + stale


def chroma_only_in_the_index(package: Path) -> list[str]:
    files = source_files(package)
    return [
        f"{path.relative_to(package).as_posix()} imports {name}"
        for module, path in files.items()
        for name in imported(module, path, set(files))
        if name.split(".")[0] == "chromadb" and path.relative_to(package).as_posix() not in CHROMA
    ]


def commands(package: Path) -> set[str]:
    """Modules of the commands that `cli/main.py` lists."""
    for node in syntax_tree(package / "cli" / "main.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            return {f"{package.name}.cli.{name}" for name in ast.literal_eval(node.value)}
    raise AssertionError("cli/main.py has no dict COMMANDS")


def nothing_imports_commands(package: Path) -> list[str]:
    """Only `cli` imports from `cli`, and there only helpers, not commands: `main` finds these by name."""
    cli = f"{package.name}.cli"
    found = []
    for module, names in import_graph(package).items():
        within = module == cli or module.startswith(f"{cli}.")
        wrong = {name for name in names if name == cli or name.startswith(f"{cli}.")}
        found += [f"{module} imports {name}" for name in sorted(wrong & commands(package) if within else wrong)]
    # A command may name itself, as the launcher in `cli/train.py` does
    for module, path in source_files(package).items():
        within = module == cli or module.startswith(f"{cli}.")
        others = commands(package) - {module} if within else {cli}
        pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(others)))
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and (name := pattern.search(node.value)):
                found.append(f"{module}:{node.lineno} names {name[0]}")
    return found


def no_import_circles(package: Path) -> list[str]:
    return [", ".join(circle) for circle in circles(import_graph(package))]


def nothing_imports_tests(package: Path) -> list[str]:
    files = source_files(package)
    helpers = {"tests", *(path.stem for path in TESTS.rglob("*.py"))}
    return [
        f"{module} imports {name}"
        for module, path in files.items()
        for name in imported(module, path, set(files))
        if name.split(".")[0] in helpers
    ]


def chat_templates_are_applied_in_one_file(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for node in ast.walk(syntax_tree(path)) if name not in CHAT_TEMPLATE else ():
            match node:
                case ast.Attribute(attr=used) | ast.alias(name=used) | ast.Constant(value=used):
                    if used in CHAT_TEMPLATE_FUNCTIONS:
                        found.append(f"{name}:{node.lineno}")
    return found


def models_are_loaded_in_one_place(package: Path) -> list[str]:
    """Only `inference/pretrained.py` loads from repositories, and its functions pass what `_safe` returns."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for node in ast.walk(syntax_tree(path)):
            match node:
                case ast.Attribute(attr="from_pretrained") if root_name(node) not in OWN_LOADERS:
                    loads = True
                case ast.Attribute(attr="create_model_from_path") | ast.alias(name="create_model_from_path"):
                    loads = True
                case ast.Call(func=ast.Name(id="SentenceTransformer") | ast.Attribute(attr="SentenceTransformer")):
                    loads = True
                case ast.Constant(value="from_pretrained"):
                    loads = True
                case _:
                    loads = False
            if loads and name not in LOADING:
                found.append(f"{name}:{node.lineno} loads from a repository")
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("AutoModel"):
                safe = any(ast.unparse(keyword) == "trust_remote_code=False" for keyword in node.keywords)
                if ast.unparse(node.func).endswith(".from_config") and not safe:
                    found.append(f"{name}:{node.lineno} may run code")
    for name in sorted(LOADING & {path.relative_to(package).as_posix() for path in package.rglob("*.py")}):
        for function in ast.walk(syntax_tree(package / name)):
            text = ast.unparse(function) if isinstance(function, ast.FunctionDef) else ""
            calls = re.findall(r"\bAuto\w+\)?\.from_pretrained\([^)]*\)", text)
            auto = (
                any("trust_remote_code=False" not in call for call in calls) and "kwargs = _safe(kwargs)" not in text
            )
            sentence = "SentenceTransformer(" in text and "trust_remote_code=False" not in text
            weights = re.search(r"AutoModel\w*\)\.from_|SentenceTransformer\(", text) and "use_safetensors" not in text
            if auto or sentence or weights:
                found.append(f"{name}:{function.lineno} may run code")
    return found


def opens_for_writing(node: ast.Call) -> bool:
    """Whether a call writes a file, or opens one to do so. A mode in a variable is not seen."""
    match node.func:
        case ast.Attribute(attr="write_text" | "write_bytes" | "savefig" | "truncate" | "touch"):
            return True
        case ast.Name(id="open") | ast.Attribute(attr="open" | "fdopen", value=ast.Name(id="os" | "io" | "gzip")):
            mode = node.args[1:2]
        case ast.Attribute(attr="open"):
            mode = node.args[:1]
        case _:
            return False
    mode += [keyword.value for keyword in node.keywords if keyword.arg in ("mode", "flags")]
    text = "".join(map(ast.unparse, mode))
    if isinstance(node.func, ast.Attribute) and root_name(node.func) == "os":
        return re.search("O_(WRONLY|RDWR|CREAT|APPEND|TRUNC)", text) is not None
    constants = [part.value for each in mode for part in ast.walk(each) if isinstance(part, ast.Constant)]
    return any(isinstance(value, str) and re.fullmatch("[rwaxbt+]*[wax+][rwaxbt+]*", value) for value in constants)


def files_are_written_in_one_place(package: Path) -> list[str]:
    """
    Outside `files.py` only paths of `unfinished_file` and `unfinished_directory` are written to: no link waits there.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in WRITING:
            continue
        nodes = list(ast.walk(syntax_tree(path)))
        unfinished = {
            ast.unparse(node.optional_vars)
            for node in nodes
            if isinstance(node, ast.withitem) and node.optional_vars is not None
            if isinstance(node.context_expr, ast.Call) and ast.unparse(node.context_expr.func) in UNFINISHED
        }
        for node in nodes:
            if isinstance(node, ast.Call) and opens_for_writing(node):
                receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
                used = {
                    part.id
                    for part in (*receiver, *node.args[:1])
                    for part in ast.walk(part)
                    if isinstance(part, ast.Name)
                }
                if not used & unfinished:
                    found.append(f"{name}:{node.lineno} writes a file")
    return found


def few_files_on_top(package: Path) -> list[str]:
    names = sorted(path.name for path in package.glob("*.py"))
    return names if len(names) > MAX_FILES_ON_TOP else []


def the_trainer_is_short(package: Path) -> list[str]:
    lines = len((package / "sgpo_trainer.py").read_text(encoding="utf-8").splitlines())
    return [f"{lines} lines"] if lines > MAX_LINES_OF_TRAINER else []


# Rule, file of the planted violation, its text
PLANTED: list[tuple[Rule, str, str]] = [
    (private_names_only_where_listed, "bank/policy.py", "def f(trainer):\n    return trainer._metrics\n"),
    (private_names_only_where_listed, "bank/policy.py", "from trl.trainer.utils import _use_triton\n"),
    (private_names_only_where_listed, "bank/policy.py", "import trl\n\ntrl.trainer.utils._use_triton = None\n"),
    (private_names_only_where_listed, "bank/policy.py", 'def f(trainer):\n    setattr(trainer, "_generate", 1)\n'),
    (
        private_names_only_where_listed,
        "compare/methods.py",
        "from trl import GRPOTrainer\n\nclass A(GRPOTrainer): ...\n\nclass B(A):\n    def _generate(self): ...\n",
    ),
    (
        private_names_only_where_listed,
        "compare/methods.py",
        "from trl import GRPOTrainer\n\nclass A(GRPOTrainer):\n    def f(self):\n        super()._metrics\n",
    ),
    (
        private_names_only_where_listed,
        "compare/methods.py",
        'from trl import GRPOTrainer\n\nclass A(GRPOTrainer):\n    _tag_names = ["a"]\n',
    ),
    (
        private_names_only_where_listed,
        "compare/methods.py",
        "from trl import GRPOTrainer\n\nclass A(GRPOTrainer):\n    _tag_names: list[str] = []\n",
    ),
    (private_names_only_where_listed, "bank/policy.py", "import trl\n\nu = trl.trainer\nu.utils._unknown\n"),
    (chroma_only_in_the_index, "bank/shared.py", "def connect():\n    import chromadb.config\n"),
    (chroma_only_in_the_index, "bank/shared.py", 'import importlib\n\nimportlib.import_module("chromadb.config")\n'),
    (chroma_only_in_the_index, "bank/shared.py", '__import__("chromadb")\n'),
    (nothing_imports_commands, "vram/check.py", "def f():\n    from ..cli.train import main\n"),
    (nothing_imports_commands, "vram/check.py", 'COMMAND = ["-m", "trl_sgpo.cli.train"]\n'),
    (nothing_imports_commands, "vram/check.py", 'COMMAND = "python -m trl_sgpo.cli.train"\n'),
    (nothing_imports_commands, "vram/check.py", "import trl_sgpo\n\ntrl_sgpo.cli.train.main()\n"),
    (nothing_imports_commands, "vram/check.py", "import trl_sgpo as package\n\npackage.cli.train.main()\n"),
    (nothing_imports_commands, "vram/check.py", 'import_module("..cli.train", __package__)\n'),
    (nothing_imports_commands, "cli/eval.py", "from .train import main\n"),
    (nothing_imports_commands, "cli/eval.py", 'import_module(".train", package=__package__)\n'),
    (nothing_imports_commands, "cli/eval.py", 'COMMAND = "python -m trl_sgpo.cli.train"\n'),
    (nothing_imports_commands, "cli/text.py", "from . import train\n"),
    (no_import_circles, "bank/policy.py", "def f():\n    from .index import g\n"),
    (
        no_import_circles,
        "bank/policy.py",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from . import index\n",
    ),
    (no_import_circles, "bank/policy.py", 'def f():\n    import_module(".index", __package__)\n'),
    (no_import_circles, "bank/policy.py", '__import__("trl_sgpo.bank.index")\n'),
    (no_import_circles, "bank/policy.py", "import trl_sgpo\n\ndef f():\n    trl_sgpo.bank.index.g()\n"),
    (nothing_imports_tests, "bank/policy.py", "from tests.models import tiny\n"),
    (nothing_imports_tests, "bank/policy.py", 'import_module("tests.models")\n'),
    (nothing_imports_tests, "bank/policy.py", "def f():\n    import conftest\n"),
    (
        chat_templates_are_applied_in_one_file,
        "cli/solve.py",
        "def f(tokenizer):\n    tokenizer.apply_chat_template([])\n",
    ),
    (
        chat_templates_are_applied_in_one_file,
        "cli/solve.py",
        'def f(tokenizer):\n    getattr(tokenizer, "apply_chat_template")([])\n',
    ),
    *[
        (chat_templates_are_applied_in_one_file, "cli/solve.py", text)
        for name in sorted(CHAT_TEMPLATE_FUNCTIONS)
        for text in (f"import trl\n\ntrl.data_utils.{name}([])\n", f"from trl.data_utils import {name} as f\n")
    ],
    *[
        (models_are_loaded_in_one_place, "cli/solve.py", text)
        for text in (
            "import transformers\n\ntransformers.AutoTokenizer.from_pretrained('a')\n",
            "from peft import PeftModel\n\nload = PeftModel.from_pretrained\n",
            "from sentence_transformers import SentenceTransformer\n\nSentenceTransformer('a')\n",
            "def f(kind):\n    return getattr(kind, 'from_pretrained')('a')\n",
            "from trl.trainer.utils import create_model_from_path\n",
            "from transformers import AutoModelForCausalLM\n\nAutoModelForCausalLM.from_config(None)\n",
        )
    ],
    *[
        (models_are_loaded_in_one_place, "inference/pretrained.py", f"def f(source, **kwargs):\n    {text}\n")
        for text in (
            "return AutoTokenizer.from_pretrained(source, **kwargs)",
            "return SentenceTransformer(source, model_kwargs={'use_safetensors': True})",
            "kwargs = _safe(kwargs)\n    return (kind or AutoModel).from_pretrained(source, **kwargs)",
        )
    ],
    *[
        (files_are_written_in_one_place, "bank/policy.py", f"def f(path, text):\n    {line}\n")
        for line in (
            "path.write_text(text)",
            "(path / 'a').write_bytes(text)",
            "open(path, 'w').write(text)",
            "open(path, mode='a').write(text)",
            "path.open('a' if text else 'w').write(text)",
            "path.open('r+b').truncate(3)",
            "path.open(mode='x').write(text)",
            "os.open(path, os.O_WRONLY | os.O_CREAT)",
            "os.truncate(path, 3)",
            "figure.savefig(path)",
            "path.touch()",
            "with unfinished_file(path) as temporary:\n        path.write_text(text)",
            "with TemporaryDirectory(dir=path) as temporary:\n        (temporary / 'a').write_text(text)",
        )
    ],
    (few_files_on_top, "one_more.py", ""),
    (the_trainer_is_short, "sgpo_trainer.py", "x = 1\n" * 351),
]
RULES = dict.fromkeys(rule for rule, _, _ in PLANTED)


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """A package that keeps all rules."""
    package = tmp_path / "trl_sgpo"
    for name, text in {
        "sgpo_trainer.py": (
            "from trl import GRPOTrainer\n\n\nclass SGPOTrainer(GRPOTrainer):\n    def _generate(self):\n"
            "        return self._metrics\n"
        ),
        "bank/index.py": "import chromadb\nfrom . import policy\n\n\ndef g():\n    return chromadb, policy\n",
        "bank/policy.py": "class Own:\n    def __init__(self):\n        self._metrics = self._step = 0\n",
        "cli/main.py": 'COMMANDS = {"train": "", "eval": "", "solve": ""}\nFOUND = "trl_sgpo.cli.{}"\n',
        "cli/train.py": "from .text import printable\nfrom ..vram.check import check\n",
        "cli/eval.py": "from .text import printable\n",
        "cli/text.py": "def printable(): ...\n",
        "compare/methods.py": "",
        "checks/worker.py": "def f(tokenizer):\n    tokenizer.apply_chat_template([])\n",
        "inference/pretrained.py": (
            "def f(source, **kwargs):\n    kwargs = _safe(kwargs)\n"
            "    return AutoConfig.from_pretrained(source, **kwargs)\n"
        ),
        "vram/check.py": "def check(): ...\n",
        "files.py": "def append_file(path):\n    return path.open('a')\n",
        "report/page.py": (
            "def f(path, figure):\n    path.open(), open(path, 'rb'), os.open(path, os.O_RDONLY)\n"
            "    with unfinished_file(path) as temporary, unfinished_directory(path) as directory:\n"
            "        (directory / 'a').write_text('')\n        figure.savefig(temporary, format='png')\n"
        ),
        **{f"top_{number}.py": "" for number in range(MAX_FILES_ON_TOP - 2)},
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    assert rule(PACKAGE) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_what_it_allows(rule: Rule, small_package: Path) -> None:
    assert rule(small_package) == []


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_rule_finds_a_planted_violation(rule: Rule, name: str, text: str, small_package: Path) -> None:
    (small_package / name).write_text(text)
    assert rule(small_package) != []


def test_the_design_page_names_rooms_and_private_names() -> None:
    page = (TESTS.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rule = page[page.index("1. Private names") : page.index("2. Chroma is")]
    assert sorted(re.findall(r"`([\w/]+\.py)`", rule)) == sorted(PRIVATE_NAMES)
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"`(\w+/)`", page))


if __name__ == "__main__":
    graph = import_graph(PACKAGE)
    for circle in circles(graph):
        print(f"circle of {len(circle)}:")
        for module in circle:
            print(f"  {module} → {', '.join(sorted(graph[module] & set(circle)))}")
    for name, uses in private_names(PACKAGE).items():
        print(f"{name}: {', '.join(uses)}")
