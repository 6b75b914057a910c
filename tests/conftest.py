import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and files run beside each other
os.environ.setdefault("CI", "1")  # TRL sends no telemetry from a run that says so
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SLOWEST = ("test_cli_compare.py", "test_docs.py", "test_cli.py", "test_distributed.py", "test_release.py")


def pytest_collection_modifyitems(items):
    """The slowest files first, so that workers end together."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
