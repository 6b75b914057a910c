"""Isolation: nothing that a test does is seen by another one, or outside the session's temporary folder."""

import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from footprint import files


ROOT = Path(__file__).parents[1]
SLOWEST = (
    *("test_docs.py", "test_cli_compare.py", "test_cli.py", "test_distributed.py", "test_release.py"),
    *("test_trainer.py", "test_estimate.py", "test_internalize_training.py", "test_same_policy.py", "test_runs.py"),
)
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # it inherits the environment that is made here
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
HOMES = {Path(os.environ.get("HF_HOME", CACHE / "huggingface")).expanduser(), CACHE / "huggingface"}
WATCHED = [ROOT, *HOMES, *(CACHE / name for name in ("chroma", "matplotlib", "torch"))]

# Before libraries are imported, which read them then
if not IS_WORKER:
    os.environ["TRL_SGPO_TESTS"] = tempfile.mkdtemp(prefix="trl_sgpo-tests-")
    os.environ["TRL_SGPO_TESTS_PID"] = str(os.getpid())
    for name in ("HF_HOME", "MPLCONFIGDIR", "TRACKIO_DIR", "XDG_CACHE_HOME"):
        os.environ[name] = os.path.join(os.environ["TRL_SGPO_TESTS"], name)
    for name in ("HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(name, None)  # they would count more than HF_HOME
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more
    os.environ.setdefault("CI", "1")  # TRL sends no telemetry from a run that says so
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Of processes that tests start in other directories
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bank")])
SESSION = Path(os.environ["TRL_SGPO_TESTS"])
BEFORE, NEW = pytest.StashKey[set[Path]](), pytest.StashKey[list[Path]]()


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path) -> Iterator[None]:
    from isolation import isolated
    from workers import forked

    with (
        tempfile.TemporaryDirectory(dir=SESSION) as home,
        isolated(tmp_path, Path(home), SESSION / "weights"),
        forked(),
    ):
        yield


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command starts by `multiprocessing` need not import either."""
    import processes

    context = SimpleNamespace(Pipe=processes.CONTEXT.Pipe, Process=processes.Process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as tests also wait for processes that they start."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_finish() -> None:
    """What was imported stays, so garbage collections, of which each call of `train` makes one, need not visit it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, so that workers end together. Within a file the order is that of pytest-randomly."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[BEFORE] = set() if IS_WORKER else files(*WATCHED)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session that leaves something behind."""
    if IS_WORKER:
        return
    session.config.stash[NEW] = sorted(files(*WATCHED) - session.config.stash[BEFORE])
    if session.config.stash[NEW]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(SESSION)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if new := config.stash.get(NEW, []):
        terminalreporter.section("files outside the temporary folder", red=True)
        terminalreporter.write_line("While the tests ran, these came into being in the checkout or the user's caches:")
        for path in new:
            terminalreporter.write_line(f"  {path}")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell makes processes that it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
