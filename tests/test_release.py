"""The release: what wheel and sdist hold, and a user's way from the installed wheel to a published model and back."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sgpo import __version__


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCAL = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
METADATA = f"trl_sgpo-{__version__}.dist-info"


def build(source: Path, kind: str) -> Path:
    """Builds a `wheel` or `sdist` with the installed setuptools."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", source / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, without what earlier builds left, which setuptools would pack again."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("release") / "source", ignore=LOCAL))


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "wheel")


@pytest.fixture(scope="module")
def unpacked(source: Path, wheel: Path) -> Path:
    """The sdist, unpacked. It is built after the wheel, so that it must not hold what that left."""
    built = build(source, "sdist")
    shutil.unpack_archive(built, source.parent / "sdist", filter="data")
    return source.parent / "sdist" / f"trl_sgpo-{__version__}"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tree(directory: Path) -> dict[str, bytes]:
    """The files below a directory, by their paths from its parent."""
    files = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(directory.parent)): path.read_bytes() for path in files}


def metadata(wheel: Path) -> Message:
    return email.message_from_bytes(contents(wheel)[f"{METADATA}/METADATA"])


class TestFiles:
    def test_wheel_holds_the_package_and_nothing_else(self, wheel: Path) -> None:
        assert wheel.name == f"trl_sgpo-{__version__}-py3-none-any.whl"
        found = contents(wheel)
        package = {name: data for name, data in found.items() if not name.startswith(f"{METADATA}/")}
        assert package == tree(ROOT / "trl_sgpo")
        assert {"trl_sgpo/report/template.html", "trl_sgpo/vram/architectures.json"} < package.keys()
        names = {name.removeprefix(f"{METADATA}/") for name in found.keys() - package.keys()}
        assert names == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
        assert found[f"{METADATA}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
        assert found[f"{METADATA}/top_level.txt"] == b"trl_sgpo\n"

    def test_version_is_the_same_in_every_file_that_names_it(self) -> None:
        assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
        releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
        assert releases[0] == __version__

    def test_metadata(self, wheel: Path) -> None:
        found = metadata(wheel)
        assert (found["Name"], found["Version"]) == ("trl-sgpo", __version__)
        assert found["Requires-Python"] == PROJECT["requires-python"]
        assert found["License-Expression"] == "Apache-2.0" and found["License-File"] == "LICENSE"
        assert found["Summary"] == PROJECT["description"]
        assert found["Description-Content-Type"] == "text/markdown"
        assert found.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
        assert set(found.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
        required = [text for text in found.get_all("Requires-Dist", []) if "extra ==" not in text]
        assert len(required) == len(PROJECT["dependencies"])

    def test_sdist_holds_the_source_and_builds_the_same_wheel(self, wheel: Path, unpacked: Path) -> None:
        for name in ("docs", "recipes", "tests", "trl_sgpo"):
            assert tree(unpacked / name) == tree(ROOT / name)
        given = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md", "mkdocs.yml"}
        given |= {"CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"}
        made = {"PKG-INFO", "setup.cfg", "trl_sgpo.egg-info"}
        folders = {"docs", "recipes", "tests", "trl_sgpo"}
        assert {path.name for path in unpacked.iterdir()} == given | made | folders
        assert contents(build(unpacked, "wheel")) == contents(wheel)


REWARDS = """
def evenness(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [float(sum(map(text.count, "aeiou")) % 2 == 0) for text in texts]
"""
TOGETHER = """
import contextlib, io, json, sys
from trl_sgpo.cli.main import main

told = []
for command in json.loads(sys.argv[1]):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(command)
    if status:
        sys.exit(f"{command}: {errors.getvalue()[-1500:]}")
    told.append((out.getvalue(), errors.getvalue()))
print(json.dumps(told))
"""
PROBLEM = "Find the Least Common Multiple (LCM) of these numbers: 10, 15"  # larger ones than in the recipe
REPO = "tester/model"


def save_talking_model(directory: Path) -> str:
    """A tiny model that writes random printable characters, as an export of strategies has to be, and soon ends."""
    save_tiny_model(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    texts = AutoTokenizer.from_pretrained(directory).batch_decode([[token] for token in range(model.vocab_size)])
    bias = [0.0 if text.isascii() and text.isprintable() else -2.0 for text in texts]
    bias[model.config.eos_token_id] = 0.3
    # Constant in the embeddings, and so about the root of the hidden size, 5.7, after the last norm
    model.model.embed_tokens.weight.data[:, 0] = 1
    model.lm_head.weight.data[:, 0] = torch.tensor(bias)
    model.save_pretrained(directory)
    return str(directory)


class User:
    """Somebody with an environment into which the wheel was installed, and nothing else of this project."""

    def __init__(self, home: Path, wheel: Path, hub: HubServer) -> None:
        self.folder = home / "work"
        self.folder.mkdir()
        self.bin = home / "venv" / "bin"
        self.environment = {"HOME": str(home), "PATH": os.environ["PATH"], "CI": "1", "OMP_NUM_THREADS": "1"} | hub.env
        venv.create(home / "venv")
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        # Without the tests' own import path, on which pip finds the package of the checkout and installs nothing
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, env=plain)
        # Dependencies are those installed here. An editable install of the package is not among them: the .pth file
        # that makes it one counts in its own environment only.
        (packages,) = (home / "venv").glob("lib/python*/site-packages")
        dependencies = Path(pytest.__file__).parents[1]
        (packages / "dependencies.pth").write_text(f"{dependencies}\n")

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.bin / program, *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.folder,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    def told(self, *arguments: str) -> str:
        return self.run("trl-sgpo", *arguments).stdout

    def told_together(self, *commands: list[str]) -> list[tuple[str, str]]:
        """Output and errors of commands in one process, so that libraries are imported once."""
        return json.loads(self.run("python", "-c", TOGETHER, json.dumps(commands)).stdout)


class TestInstalled:
    def test_train_solve_report_search_push_and_pull(self, wheel: Path, tmp_path: Path) -> None:
        with HubServer() as hub:
            user = User(tmp_path, wheel, hub)
            code = "import sys, trl_sgpo; print(trl_sgpo.__file__, *{'torch', 'chromadb'} & set(sys.modules))"
            where = Path(user.run("python", "-c", code).stdout.strip())
            assert where.is_relative_to(tmp_path / "venv") and where.name == "__init__.py"
            assert "trl-sgpo COMMAND [options]" in user.told("--help")

            # The quickstart with a tiny model, a reward that random text can earn, and trust that is soon given
            recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
            (user.folder / "rewards.py").write_text(REWARDS)
            changes = {
                "model_name_or_path": save_talking_model(tmp_path / "tiny"),
                "reward_funcs": ["rewards.evenness", "answer_reward"],
                "warmstart_traces": 8,
                "max_steps": 2,
                "report_problems": 4,
                "bank_min_problems": 1,
                "bank_tolerance": 0.99,
                "output_dir": "run",
            }
            (user.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
            told = user.told("train", "--config", "recipe.yaml")
            assert "Model and strategy bank saved to run." in told and "strategy transfer score" in told
            run = user.folder / "run"
            assert (run / "adapter_model.safetensors").is_file() and (run / "warmstart").is_dir()

            arguments = ["--num_retrieved", "2", "--temperature", "1", "--json", PROBLEM]
            search, solve, report = user.told_together(
                ["bank", "search", "run", PROBLEM, "-k", "2", "--json"],
                ["solve", "--model", "run", *arguments],
                ["report", "run"],
            )
            found = json.loads(search[0])
            assert len(found) == 2 and {each["trust"] for each in found} == {"trusted"}

            solved = json.loads(solve[0])
            assert [each["id"] for each in solved["retrieved"]] == [each["id"] for each in found]
            assert solved["problem"] == PROBLEM and solved["strategy"] and solved["execution"]

            assert "Written to run/report.html" in report[0]
            page = (run / "report.html").read_text()
            assert "<title>run: SGPO report</title>" in page and "rewards.evenness" in page
            assert "Find the Least Common Multiple" in page
            assert all(f'id="s-{each["id"]}"' in page for each in found)

            assert not hub.requests  # all of that is local
            run.rename(user.folder / "elsewhere")  # what is pulled cannot be read from it
            push, pulled = user.told_together(
                ["push", "elsewhere", REPO],
                ["solve", "--model", REPO, *arguments],
            )
            sha = hub.head(REPO)
            assert f"Pushed to {REPO} as {sha}" in push[0]
            files = hub.files(REPO)
            assert {"README.md", "model.safetensors", "report.json", "sgpo.json", "training.json"} < files.keys()
            pushed = [json.loads(line) for line in files["strategy_bank/strategies.jsonl"].splitlines()]
            assert {each["id"] for each in found} <= {each["id"] for each in pushed}

            assert f"Pulled {REPO}@{sha}." in pulled[1]
            assert json.loads(pulled[0])["retrieved"] == solved["retrieved"]
