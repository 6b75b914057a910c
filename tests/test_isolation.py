"""What a test changes is restored, its files are its own, and its processes are as those of a shell."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from footprint import files
from isolation import isolated
from processes import run, start


HOME = Path(huggingface_hub.constants.HF_HOME)  # of the session, as this is read before any test


def test_every_test_has_a_working_directory_and_a_home_of_its_own(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path
    home = Path(os.environ["HF_HOME"])
    assert home != HOME and home.is_dir()
    assert str(home) == huggingface_hub.constants.HF_HOME
    assert str(home / "hub") == huggingface_hub.constants.HF_HUB_CACHE
    assert Path(datasets.config.HF_DATASETS_CACHE) == home / "datasets"
    code = "import datasets.config as d, huggingface_hub.constants as h; print(h.HF_HUB_CACHE, d.HF_DATASETS_CACHE)"
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert told.split() == [str(home / "hub"), str(home / "datasets")]


def test_what_a_test_changes_is_restored(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        random_states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        settings = logging.root.level, logging.getLogger("transformers").level, torch.get_num_threads()
        homes = huggingface_hub.constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE)
        return os.getcwd(), dict(os.environ), [*sys.path], homes, settings, random_states, "of_a_test" in sys.modules

    before = state()
    for folder in ("test", "home", "elsewhere"):
        (tmp_path / folder).mkdir()
    with pytest.raises(RuntimeError), isolated(tmp_path / "test", tmp_path / "home", tmp_path / "weights"):
        os.environ["HF_HUB_OFFLINE"] = "0"
        del os.environ["PATH"]
        Path("of_a_test.py").write_text("")
        sys.path.insert(0, os.getcwd())
        __import__("of_a_test")
        os.chdir(tmp_path / "elsewhere")
        logging.root.setLevel(1)
        logging.getLogger("transformers").setLevel(1)
        torch.set_num_threads(torch.get_num_threads() + 1)
        random.random(), np.random.rand(), torch.rand(1)
        assert [a == b for a, b in zip(before, state(), strict=True)] == [False] * 7
        raise RuntimeError
    assert state() == before


def test_new_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "runs" / "__pycache__").mkdir(parents=True)
    before = files(tmp_path, tmp_path / "none")
    (tmp_path / "runs" / "__pycache__" / "module.pyc").touch()
    assert files(tmp_path) == before
    (tmp_path / "runs" / "model").touch()
    assert files(tmp_path) - before == {tmp_path / "runs" / "model"}


def test_a_session_that_leaves_files_fails(tmp_path: Path) -> None:
    """In the checkout, or in the caches of the user's home."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    (checkout / "tests").mkdir(parents=True)
    for name in ("conftest.py", "footprint.py", "isolation.py", "workers.py"):
        shutil.copy(Path(__file__).with_name(name), checkout / "tests")
    planted = "from pathlib import Path\ndef test_planted():\n    Path('in_its_directory').touch()\n"
    for left in (checkout / "runs" / "left", home / ".cache" / "huggingface" / "left"):
        planted += f"    Path({str(left)!r}).parent.mkdir(parents=True)\n    Path({str(left)!r}).touch()\n"
    (checkout / "tests" / "test_planted.py").write_text(planted)
    inherited = {"PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        env=inherited | {"PYTHONPATH": str(checkout / "tests")},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    told = done.stdout.split("came into being")[1].splitlines()
    assert done.returncode == 1 and "1 passed" in done.stdout
    assert told[1:3] == [f"  {checkout / 'runs' / 'left'}", f"  {home / '.cache' / 'huggingface' / 'left'}"]


class TestProcesses:
    def test_environment_directory_output_and_status(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = "import os, sys\nfrom huggingface_hub import constants\ndef main(arguments):\n"
        module += "    print(os.getcwd(), os.environ['OWN'], constants.HF_HOME, *arguments)\n"
        module += "    print('wrong', file=sys.stderr)\n    return 3\n"
        (tmp_path / "command.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("OWN", "value")
        done = run("command", "--option")
        told = [str(tmp_path), "value", os.environ["HF_HOME"], "--option"]
        assert (done.returncode, done.stdout.split(), done.stderr) == (3, told, "wrong\n")

    def test_an_error_has_a_traceback(self) -> None:
        done = run("no_such_module")
        assert done.returncode == 1 and "No module named 'no_such_module'" in done.stderr

    def test_kill(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "command.py").write_text("import signal\ndef main(arguments):\n    signal.pause()\n")
        monkeypatch.syspath_prepend(tmp_path)
        process = start("command")
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
