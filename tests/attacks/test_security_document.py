"""The tests that SECURITY.md names are there."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_every_row_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    functions = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        functions |= set(re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(rows) >= 16
    for row in rows:
        names = re.findall(r"`([^`]+)`", row.split("|")[3])
        assert names, row
        for name in names:
            if name.endswith(".py"):
                assert (ROOT / name if "/" in name else Path(__file__).parent / name).is_file(), name
            else:
                assert name in functions, name
