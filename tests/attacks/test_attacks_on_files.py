"""What is written goes through no link that waits under a name that can be foreseen."""

import ast
import os
import re
import stat
from pathlib import Path

from bank_helpers import hashed_words, make

from trl_sgpo import StrategyBank
from trl_sgpo.bank.exchange import export_bank
from trl_sgpo.bank.shared import SharedBank
from trl_sgpo.evaluation.tables import write_results
from trl_sgpo.files import unfinished_directory, unfinished_file, write_file
from trl_sgpo.report.page import write_report
from trl_sgpo.report.records import Run


PACKAGE = Path(__file__).parents[2] / "trl_sgpo"
NOTHING = {"suites": {}, "transfer": {}, "kinds": {}, "settings": {}}


def plant(directory: Path, *names: str) -> Path:
    """A file of the victim, and links to it under names that could be foreseen."""
    directory.mkdir(exist_ok=True)
    victim = directory.parent / "victim"
    victim.write_text("precious")
    for name in names:
        (directory / name).symlink_to(victim)
    return victim


def test_results(tmp_path):
    victim = plant(tmp_path / "out", "results.json.tmp", "results.md.tmp")
    write_results(tmp_path / "out", NOTHING, plots=False)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out" / "results.json").is_symlink()


def test_report(tmp_path):
    victim = plant(tmp_path / "out", "report.html.tmp")
    write_report(Run(tmp_path), tmp_path / "out" / "report.html")
    assert victim.read_text() == "precious"


def test_snapshot_of_a_bank(tmp_path):
    victim = plant(tmp_path / "snapshot", "manifest.json.tmp")
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a")])
        bank.snapshot(tmp_path / "snapshot")
    assert victim.read_text() == "precious"


def test_snapshot_that_is_loaded(tmp_path):
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a")])
        bank.snapshot(tmp_path / "snapshot")
        victim = plant(tmp_path / "bank", "ledger.sqlite.tmp")
        bank.load_snapshot(tmp_path / "snapshot")
        assert len(bank) == 1
    assert victim.read_text() == "precious"


def test_export_and_identity_of_a_bank(tmp_path):
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a")])
        export_bank(bank, tmp_path / "export")
        victim = plant(tmp_path / "bank", "shared.tmp")
        SharedBank(bank, "http://host")
    assert victim.read_text() == "precious"


def test_directories(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("precious")
    (tmp_path / "model.unfinished").symlink_to(tmp_path / "elsewhere")
    with unfinished_directory(tmp_path / "model") as directory:
        (directory / "kept").write_text("new")
        os.replace(directory, tmp_path / "model")
    assert (tmp_path / "elsewhere" / "kept").read_text() == "precious"
    assert (tmp_path / "model" / "kept").read_text() == "new"


def test_names_differ_and_nothing_is_left(tmp_path):
    names = set()
    for _ in range(3):
        with unfinished_file(tmp_path / "a") as path:
            names.add(path.name)
    assert len(names) == 3 and list(tmp_path.iterdir()) == []
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (tmp_path / ".a.0000000000000000.unfinished").write_text("of a killed process")
    (tmp_path / ".a.1111111111111111.unfinished").symlink_to(outside)
    write_file(tmp_path / "a", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outside"] and (outside / "kept").exists()


def test_rights(tmp_path):
    mask = os.umask(0o022)
    try:
        write_file(tmp_path / "a", "text")
        write_file(tmp_path / "b", "text", private=True)
    finally:
        os.umask(mask)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o644, 0o600]


def test_such_names_are_made_in_one_file():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"\.(tmp|unfinished|new|part)", str(node.value)):
                found.add(path.name)
    assert found == {"files.py"}
