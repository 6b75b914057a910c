"""
Every fenced block of README and docs is executed, or marked as needing a GPU or the network.

Commands stay as they are written. What they name is small: directories called like models of the Hub hold tiny random
models, recipes have the settings of `TINY`, and `INSTEAD` replaces values. A block may rely on what stands above it in
the block, on a finished run in each of `RUNS`, and on what `FIRST` does.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from glob import glob
from io import StringIO
from pathlib import Path
from typing import Any

import certifi
import pytest
import torch
import transformers.utils.hub
import word_problems
import yaml
from doc_blocks import BLOCKS, ROOT, Block, read_blocks
from hub_server import HubServer
from models import hash_embedder, save_tiny_model
from safetensors.torch import load_file, save_file
from test_cli_bootstrap import ChatServer

from trl_sgpo import StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.bench import memory
from trl_sgpo.cli import train
from trl_sgpo.cli.main import main
from trl_sgpo.compare import arm_run as compare_run
from trl_sgpo.compare.config import read_comparison
from trl_sgpo.data.loading import load_data
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.inference.server import ServerModel
from trl_sgpo.recipe import read_recipe


MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "trl-sgpo/lab",
)
TINY = {
    "dtype": "float32",
    "bf16": False,
    "warmstart_traces": 4,
    "num_generations": 4,
    "max_strategy_length": 8,
    "max_completion_length": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "report_problems": 2,
    "log_completions": True,
    "num_completions_to_print": 0,
    "save_steps": 2,
    "disable_tqdm": True,
    "report_to": "none",
}
TINY_COMPARISON = {"seeds": [1], "budget": 100, "processes": 1, "samples": 1, "curve_points": 1, "curve_problems": 8}
INSTEAD = {
    "--max_steps 60": "--max_steps 2",
    "--max_steps 120": "--max_steps 3",
    "max_steps=100": "max_steps=1, max_strategy_length=8, max_completion_length=8, report_to='none'",
    "max_steps=200": "max_steps=1, max_completion_length=8, report_to='none', bf16=False, use_cpu=True",
    "size=300": "size=16",
    "--num_processes 2": "--num_processes 1",  # tests/test_cli.py has the others
    "--num_processes 4": "--num_processes 1",
    "bench step": "bench step --steps 1",
    "bench throughput": "bench throughput --steps 1",
    "bench speedups": "bench speedups --steps 1",
    "--limit 200": "--limit 16",
    "--max_problems 400": "--max_problems 8",
    "--config RECIPE": "--config recipes/quickstart.yaml",
    "/data/strategies": "data/strategies",
    "/etc/ssl/certs/ca-certificates.crt": "ca-certificates.crt",
    "<output_dir>": "runs/traces",
}
GRPO_PAGE = "docs/coming_from_grpo.md"
RUNS = ("runs/mine", "runs/first", "runs/second", "runs/third")
FIRST = {
    "user/model": "trl-sgpo push runs/quickstart user/model",
    "last-checkpoint": "trl-sgpo train --config recipes/quickstart.yaml --output_dir runs/pushed --push_to_hub true "
    "--hub_model_id user/model --hub_strategy checkpoint",
    "--model merged": "trl-sgpo export --model runs/quickstart --merge --output_dir merged",
    "runs/merged": "trl-sgpo export --model runs/quickstart --merge --output_dir runs/merged",
    "runs/eval/rows.jsonl": "trl-sgpo eval --model runs/quickstart --suites gsm8k --output_dir runs/eval",
    "<output_dir>": "trl-sgpo bootstrap --config my_recipe.yaml --output_dir runs/traces --max_problems 8",
    "SharedBank(": "chroma run --path data/strategies --host 127.0.0.1 --port 8000",
}
TYPED = {  # what is typed where a command asks
    "trl-sgpo init": "Qwen/Qwen2.5-0.5B-Instruct\nproblems.jsonl\n8\nn\nn\n",
    "trl-sgpo solve --model runs/quickstart": "What is 2 times 3?\n",
}
STATUS = {"config_qlora_16gb.yaml --vram 12": 1}  # of other commands 0
OWN_PAGES = ("your_own_data", "reward_design")
DRAWING = set("│―Σ►")


class Terminal(StringIO):
    """Standard input of a terminal."""

    def isatty(self) -> bool:
        return True


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the settings of `TINY` and few problems."""
    changes = {key: value for key, value in TINY.items() if key != "warmstart_traces" or key in recipe}
    if recipe.get("reward_funcs") == ["answer_reward"]:  # random text is sometimes right
        changes["reward_funcs"] = ["models.evenness", "answer_reward"]
    return yaml.safe_load(re.sub(r"(reasoning_gym/\w+\?size)=\d+", r"\1=16", yaml.safe_dump(recipe | changes)))


def write_recipes(directory: Path) -> None:
    shutil.copytree(ROOT / "recipes" / "accelerate", directory / "accelerate")
    (directory / "lab").mkdir()
    for name in ("Qwen2.5-7B-Instruct/sgpo/config_qlora_12gb", "Llama-3.1-8B-Instruct/sgpo/config_qlora_16gb"):
        (directory / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / "recipes" / f"{name}.yaml", directory / f"{name}.yaml")
    for name in ("quickstart.yaml", "lab/sgpo.yaml"):
        (directory / name).write_text(yaml.safe_dump(small(yaml.safe_load((ROOT / "recipes" / name).read_text()))))
    comparison = yaml.safe_load((ROOT / "recipes/lab/compare.yaml").read_text()) | TINY_COMPARISON
    for suite in comparison["suites"]:
        size = 64 if suite["name"] == "seen" else 8  # transfer takes four problems of a class
        suite["path"] = re.sub(r"size=\d+", f"size={size}", suite["path"])
    comparison["arms"] = {name: comparison["arms"][name] for name in ("base", "grpo", "sgpo")}
    comparison["transfer"] |= {"suite": "seen", "problems": 1, "executions": 1, "classes": 2}
    for name in ("compare.yaml", "lab2.yaml"):
        (directory / "lab" / name).write_text(yaml.safe_dump(comparison, sort_keys=False))


def write_rows(path: Path, rows: list[dict[str, Any]], config: str | None = None) -> None:
    """Writes a file of problems, or a directory that loads as a dataset of the Hub does."""
    if not path.suffix:
        files = {"config_name": config or "default", "data_files": [{"split": "test", "path": "test.jsonl"}]}
        path.mkdir(parents=True)
        (path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [files]})}---\n")
        path = path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_problems(directory: Path) -> None:
    sums = [(f"What is {a} + {a // 2}?", str(a + a // 2)) for a in range(20, 136)]
    rows = [{"prompt": q, "solution": a, "problem_class": f"kind-{a[-1] > '4'}"} for q, a in sums]
    worked = [{"question": q, "answer": f"It is {a}.\n#### {a}"} for q, a in sums[:6]]
    write_rows(directory / "problems.jsonl", rows)
    write_rows(directory / "word_problems.jsonl", word_problems.svamp(24))
    write_rows(directory / "openai/gsm8k", worked, "main")
    math = [
        {"problem": q, "solution": rf"It is $\boxed{{{a}}}$.", "answer": a, "subject": "sums"} for q, a in sums[:6]
    ]
    write_rows(directory / "HuggingFaceH4/MATH-500", math)
    topics = [row | {"topic": row["problem_class"]} for row in rows[:24]]
    write_rows(directory / "my_org/my_problems", topics, "main")


def write_own_recipe(directory: Path) -> None:
    """The recipe of docs/your_own_data.md and the reward function of docs/reward_design.md."""
    pages = {page: [block.text for block in BLOCKS if block.page == f"docs/{page}.md"] for page in OWN_PAGES}
    recipe = next(yaml.safe_load(text) for text in pages["your_own_data"] if "model_name_or_path:" in text)
    (directory / "my_recipe.yaml").write_text(yaml.safe_dump(small(recipe)))
    rewards = next(text for text in pages["reward_design"] if "my_rewards.py" in text)
    (directory / "my_rewards.py").write_text(rewards)


def write_grpo_recipe(directory: Path) -> None:
    """The first recipe of docs/coming_from_grpo.md, and its problems."""
    recipe = yaml.safe_load(
        next(block.text for block in BLOCKS if block.page == GRPO_PAGE and block.language == "yaml")
    )
    small = {
        "dtype": "float32", "bf16": False, "num_generations": 4, "max_completion_length": 8, "max_steps": 1,
        "report_to": "none",
    }  # fmt: skip
    (directory / "grpo.yaml").write_text(yaml.safe_dump(recipe | small))
    problems = directory / recipe["dataset_name"]
    problems.mkdir(parents=True)
    rows = [{"prompt": [{"role": "user", "content": f"{a} + {a}?"}], "solution": str(2 * a)} for a in range(24)]
    write_rows(problems / "train.jsonl", rows)


def give_bank(run: Path) -> None:
    """A finished run whose adapter matters and whose bank has strategies that are shown."""
    adapter = run / "adapter_model.safetensors"
    torch.manual_seed(1)
    weights = load_file(adapter)
    weights |= {name: torch.randn_like(weight) * 0.1 for name, weight in weights.items() if "lora_B" in name}
    save_file(weights, adapter, {"format": "pt"})
    with StrategyBank(run / "strategy_bank", hash_embedder) as bank:
        bank.add(
            [
                Strategy("List the multiples of the larger number and take the first common one.", "lcm", ("a",)),
                Strategy("Divide by common factors, then multiply all of it.", "lcm", ("b",), trust="trusted"),
                Strategy("Subtract the smaller from the larger until both are equal.", "gcd", ("c",), trust="trusted"),
            ]
        )


@pytest.fixture(scope="module", autouse=True)
def substitutes() -> Iterator[None]:
    """No embedding model, and no processes for what can be done in this one: each would import for ten seconds."""

    def compare_in_process(command: list[str], environment: dict[str, str], log: Path, running: set[Any]) -> int:
        return compare_run.main(command[3:])

    def memory_in_process(arm: str, arguments: list[str], equal_lengths: bool) -> dict[str, float]:
        sent: list[dict[str, float]] = []
        memory._send_peaks(arm, arguments, equal_lengths, type("Pipe", (), {"send": staticmethod(sent.append)}))
        return sent[0]

    def launch(arguments: argparse.Namespace) -> None:
        assert arguments.num_processes == 1 and main(arguments.training_script_args) == 0

    with pytest.MonkeyPatch.context() as change:
        change.setattr(train, "launch_command", launch)
        for module in ("trl_sgpo.bank.embedding", "trl_sgpo.data.classes"):
            change.setattr(f"{module}.load_embedder", lambda name: hash_embedder)
        change.setattr("trl_sgpo.cli.compare._run", compare_in_process)
        change.setattr("trl_sgpo.bench.memory._in_new_process", memory_in_process)
        change.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, substitutes: None) -> tuple[Path, str]:
    """A directory with all that blocks find there, and what training printed."""
    directory, printed = tmp_path_factory.mktemp("workshop"), StringIO()
    for name in MODELS:
        save_tiny_model(directory / name)
    (directory / "recipes").mkdir()
    write_recipes(directory / "recipes")
    write_problems(directory)
    write_grpo_recipe(directory)
    shutil.copy(certifi.where(), directory / "ca-certificates.crt")
    shutil.copy(certifi.where(), directory / "root.crt")
    with pytest.MonkeyPatch.context() as change:
        change.chdir(directory)
        with redirect_stdout(printed):
            assert main(["train", "--config", "recipes/quickstart.yaml"]) == 0
    give_bank(directory / "runs/quickstart")
    return directory, printed.getvalue()


class Shell:
    """Executes what blocks say, in a directory of their own."""

    def __init__(self, directory: Path, change: pytest.MonkeyPatch, stack: ExitStack, instead: dict[str, str]) -> None:
        self.directory, self.change, self.stack, self.instead = directory, change, stack, instead

    def adapt(self, text: str) -> str:
        """The text with the values of the tables."""
        for old, new in self.instead.items():
            text = text.replace(old, new)
        return text

    def run(self, line: str) -> None:
        """Executes a line of a `bash` block."""
        typed = next((keys for command, keys in TYPED.items() if line == command), "")
        words = [
            found
            for word in shlex.split(self.adapt(line), comments=True)
            for found in (sorted(glob(word)) if "*" in word and "/sgpo/" in word else [word])
        ]
        match words[0]:
            case "trl-sgpo" if "--watch" in words:
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                self.serve([*words, "--port", str(port)])
            case "trl-sgpo" | ".venv/bin/trl-sgpo":
                with self.change.context() as change:
                    change.setattr("sys.stdin", Terminal(typed) if typed else StringIO())
                    status = main(words[1:])
                expected = next((number for part, number in STATUS.items() if part in line), 0)
                assert status == expected, f"exit status {status}: {line}"
            case "make":
                subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, stdout=subprocess.DEVNULL)
            case "hf":
                subprocess.run([Path(sys.executable).with_name("hf"), *words[1:]], check=True)
            case "chroma" | "transformers":
                self.serve(words)
            case "cat" | "export":
                self.source(self.adapt(line))
            case command:
                pytest.fail(f"There is no way to execute {command!r}: {line}")

    def serve(self, words: list[str]) -> None:
        """Starts a server that is stopped after the block."""
        program = Path(sys.executable).with_name(words[0])
        process = subprocess.Popen([program, *words[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)
        address = ("127.0.0.1", int(words[words.index("--port") + 1]))
        while process.poll() is None:
            try:
                socket.create_connection(address, timeout=5).close()
                return
            except ConnectionRefusedError:
                try:
                    process.wait(timeout=0.05)
                except subprocess.TimeoutExpired:
                    continue
        pytest.fail(f"{shlex.join(words)} ended with status {process.returncode}")

    def source(self, line: str) -> None:
        """Executes a line by `bash`, and exports here what it exports."""
        done = subprocess.run(["bash", "-ec", f"{line}\nenv -0"], check=True, capture_output=True, text=True)
        for name, value in (entry.split("=", 1) for entry in done.stdout.split("\0") if entry):
            if name.isupper():
                self.change.setenv(name, value)

    def python(self, block: Block) -> None:
        """Executes a `python` block as a program."""
        path = self.directory / "block.py"
        path.write_text(self.adapt(block.text))
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def shell(
    request: pytest.FixtureRequest, workshop: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    """A copy of the workshop, where what the block of the test relies on is done."""
    block: Block = request.getfixturevalue("block")
    directory = Path(shutil.copytree(workshop[0], tmp_path / "work"))
    for name in RUNS:
        if name in block.text:
            shutil.copytree(directory / "runs/quickstart", directory / name)
    monkeypatch.chdir(directory)
    with ExitStack() as stack:
        instead = INSTEAD
        if "3f2a" in block.text:
            with StrategyBank.restore("runs/quickstart/strategy_bank") as bank:
                instead = INSTEAD | {"3f2a": next(iter(bank.strategies())).id[:4]}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if "my_recipe.yaml" in block.text or "<output_dir>" in block.text:
            write_own_recipe(directory)
            chat = ChatServer()  # a random model would write no strategies
            stack.callback(chat.close)
            port = int(chat.url.split(":")[2].split("/")[0])
            monkeypatch.setattr("trl_sgpo.cli.bootstrap._load_writer", lambda *_: ServerModel(chat.url, "chat"))
        if "user/" in block.text:
            hub = stack.enter_context(HubServer())
            hub.user = "user"
            hub.connect(monkeypatch)
            monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        shell = Shell(directory, monkeypatch, stack, instead | {"8000": str(port)})
        for fragment, command in FIRST.items():
            if fragment in block.text and not block.text.startswith(command):
                shell.run(command)
        if "COMMIT" in block.text:
            shell.run("trl-sgpo bank push runs/quickstart user/arithmetic-strategies --license apache-2.0")
            shell.instead["COMMIT"] = hub.head("user/arithmetic-strategies", "dataset")
        yield shell


# What is done with a block


def run_bash(block: Block, shell: Shell, printed: str) -> None:
    for line in block.commands:
        shell.run(line)


def run_python(block: Block, shell: Shell, printed: str) -> None:
    shell.python(block)


def check_yaml(block: Block, shell: Shell, printed: str) -> None:
    """A comparison, an evaluation, or keys of a recipe."""
    content, path = yaml.safe_load(block.text), Path("block.yaml")
    path.write_text(block.text)
    if "arms" in content:
        compare_run.check(read_comparison(str(path)))
    elif "suites" in content:
        shell.run(f"trl-sgpo eval --config {path}")
    else:
        if "model_name_or_path" not in content:
            content = yaml.safe_load(Path("recipes/quickstart.yaml").read_text()) | content
        path.write_text(yaml.safe_dump(content))
        load_data(read_recipe(["--config", str(path)], "test"))


def check_json(block: Block, shell: Shell, printed: str) -> None:
    """A problem, or what `trl-sgpo solve` writes about one."""
    row, path = json.loads(block.text), Path("block.jsonl")
    if "prompt" in row:
        path.write_text(json.dumps(row))
        assert load_problems(str(path))[0]["solution"] == row["solution"]
        return
    shell.run(f"trl-sgpo solve --model runs/quickstart --input problems.jsonl@train[:1] --output {path}")
    written = json.loads(path.read_text().splitlines()[0])
    assert written.keys() == row.keys()
    assert all(entry.keys() == row["retrieved"][0].keys() for entry in written["retrieved"])


def check_braces(block: Block, shell: Shell, printed: str) -> None:
    """The configuration of a server that the tests do not have: braces match, statements of nginx end."""
    depth = 0
    for line in block.text.splitlines():
        depth += line.count("{") - line.count("}")
        assert depth >= 0 and (block.language != "nginx" or line.rstrip()[-1] in "{};"), line
    assert depth == 0


def check_plain(block: Block, shell: Shell, printed: str) -> None:
    """A list of files, a list of commands with their options, a drawing, or what training prints."""
    lines = block.text.splitlines()
    if re.fullmatch(r"\S+/", lines[0]):
        check_files(block, shell)
    elif all(line.startswith("trl-sgpo ") for line in lines):
        for line in lines:
            check_usage(line)
    elif not DRAWING & set(block.text):
        for cell in (cell for line in lines for cell in re.split(r"\s{2,}", line.strip())):
            pattern = re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(cell))
            assert re.search(pattern, printed), f"nothing that training prints: {cell}"


def check_files(block: Block, shell: Shell) -> None:
    """Every file that is named at the start of a line, and every module, is there."""
    root = Path()
    for line in block.text.splitlines():
        name, indent = shell.adapt(line).split()[0], len(line) - len(line.lstrip())
        if indent == 0:
            tops = (Path(),) if name.startswith("runs/") else (ROOT, Path(), Path("runs/quickstart"))
            root = next(top / name for top in tops if (top / name).exists())  # a checkout may hold runs of its own
        elif indent == 2:
            assert list(root.glob(name)), f"{root} has no {name}"
        for module in re.findall(r"\w+\.py\b", line):
            assert list(ROOT.glob(f"trl_sgpo/**/{module}")), f"there is no {module}"


def check_usage(line: str) -> None:
    """The commands of a line have its options."""
    command, _, rest = line.removeprefix("trl-sgpo ").partition(" ")
    subjects = re.findall(r"\w+", rest.partition("-")[0].partition("[")[0]) if command in ("bench", "bank") else []
    for words in [[command, subject] for subject in subjects] or [[command]]:
        check_options(words, rest)


def check_options(words: list[str], text: str) -> None:
    """A command has the options that a text names."""
    shown = StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        assert main([*words, "--help_all" if words[0] in ("train", "warmstart") else "--help"]) == 0
    for option in set(re.findall(r"--\w+", text)) - {"--key", "--config"}:  # TRL's parser does not show `--config`
        assert option in shown.getvalue(), f"trl-sgpo {' '.join(words)} has no {option}"
    assert f"trl-sgpo {words[0]}" in shown.getvalue()


CHECKS: dict[str, Callable[[Block, Shell, str], None]] = {
    "bash": run_bash,
    "python": run_python,
    "yaml": check_yaml,
    "json": check_json,
    "nginx": check_braces,
    "caddy": check_braces,
    "": check_plain,
}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs is None], ids=str)
def test_block(block: Block, shell: Shell, workshop: tuple[Path, str]) -> None:
    CHECKS[block.language](block, shell, workshop[1])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs is not None], ids=str)
def test_marked_block_is_a_command(block: Block) -> None:
    """Only what is executed can need something."""
    assert block.language in ("bash", "python")


def test_notebook_has_commands_that_exist() -> None:
    """It is for a GPU: its commands have the options they are given, and its Python is Python."""
    cells = json.loads((ROOT / "docs/notebooks/sgpo_16gb.ipynb").read_text())["cells"]
    checked = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        lines = "".join(cell["source"]).replace("\\\n", " ").splitlines()
        commands = [line.removeprefix("!") for line in lines if line.startswith("!trl-sgpo")]
        for command in commands:
            words = command.split()
            check_options(words[1 : 3 if words[1] == "bank" else 2], command)
        checked += len(commands)
        compile("\n".join(line for line in lines if line[:1] not in ("!", "%")), "notebook", "exec")
    assert checked == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- needs: time -->\n```bash\nls\n```", "not '<!-- needs: time -->'"),
        ("<!-- not executed -->\n```bash\nls\n```", "not '<!-- not executed -->'"),
        ("<!-- needs: gpu -->\n\n```bash\nls\n```", "right before"),
        ("```bash\nls", "no end"),
    ],
)
def test_other_marks_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_blocks("page.md", text))


def test_a_withdrawn_claim_is_withdrawn_wherever_its_figure_stands() -> None:
    """That GRPO ends at 0.00 on held-out compositions held for one build of the laboratory's model only."""
    figure = re.compile(r"GRPO.{0,12}0\.00")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.yaml")]
    with_figure = {path for path in pages if figure.search(path.read_text())}
    assert ROOT / "docs" / "comparison.md" in with_figure
    assert "is [withdrawn](docs/comparison.md#withdrawn)" in (ROOT / "README.md").read_text()
    for path in with_figure:
        text = path.read_text()
        assert "0.74, 0.01, 0.71, 0.71, 0.10" in text and "withdrawn" in text, path
    recipe = (ROOT / "recipes" / "lab" / "compare.yaml").read_text()
    assert "depends on the build of the laboratory's model" in recipe
