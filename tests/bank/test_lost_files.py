"""A bank whose files are deleted, moved, replaced or cannot be written while it is open."""

import logging
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from bank_helpers import PROVEN, hashed_words, make

from trl_sgpo import SGPOConfig
from trl_sgpo.bank import Outcome, Strategy, StrategyBank, contents
from trl_sgpo.bank.session import BankSession, Observation
from trl_sgpo.errors import BankError, BankStorageError


FIRST, SECOND = make("first", **PROVEN), make("second")


@pytest.fixture
def indexed(monkeypatch):
    """Every bank is a large one, whose searches use the index."""
    monkeypatch.setattr(contents, "EXACT", 0)


def delete(directory):
    shutil.rmtree(directory)


def delete_with_parent(directory):
    shutil.rmtree(directory.parent)


def move(directory):
    directory.rename(directory.parent.with_name("moved"))


def delete_the_ledger(directory):
    for file in directory.glob("ledger.sqlite*"):
        file.unlink()


LOSSES = [delete, delete_with_parent, move, delete_the_ledger]


@contextmanager
def full_disk():
    """No file of this process may grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def bank(tmp_path):
    bank = StrategyBank(tmp_path / "out" / "bank", hashed_words)
    bank.record([FIRST], [Outcome(FIRST.id, "before", 1)])
    yield bank
    bank.close()


def open_elsewhere(directory):
    """Opens a bank in another process, which fails where this one still holds the lock."""
    code = (
        "import sys; from bank_helpers import hashed_words; from trl_sgpo import StrategyBank\n"
        "with StrategyBank.restore(sys.argv[1], hashed_words) as bank: print(len(bank), bank.damage())"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True)
    return ran.stdout.strip() or ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("lose", LOSSES)
def test_lost_files_are_written_again_at_the_next_commit(bank, caplog, lose):
    lose(bank.path)
    assert bank.record([SECOND], [Outcome(FIRST.id, "after", 0)]) == [SECOND.id]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(bank.path) in warning and "written again" in warning
    assert "in use by process" in open_elsewhere(bank.path)
    bank.update([Outcome(SECOND.id, "later", 1)])
    stored = bank.strategies()
    bank.close()
    assert open_elsewhere(bank.path) == "2 []"
    with StrategyBank.restore(bank.path, hashed_words) as again:
        assert again.strategies() == stored
        assert {each.problem for each in again.executions(FIRST.id)} == {"before", "after"}
        assert len(again.executions(SECOND.id)) == 1
    assert len(caplog.records) == 1


def test_lost_files_are_noticed_by_a_commit_that_changes_nothing(bank, caplog):
    delete(bank.path)
    bank.record([])
    assert "written again" in caplog.text and (bank.path / "ledger.sqlite").exists()


def test_a_bank_with_an_index_is_written_again(bank, indexed):
    assert bank.retrieve([FIRST.text])[0][0].strategy.id == FIRST.id
    delete(bank.path)
    bank.add([SECOND])
    found = bank.retrieve([SECOND.text], trust=("trusted", "candidate"))[0]
    assert {hit.strategy.id for hit in found} == {FIRST.id, SECOND.id}
    bank.close()
    assert open_elsewhere(bank.path) == "2 []"


@pytest.mark.parametrize("lose", LOSSES)
def test_closing_a_bank_whose_files_are_lost_lets_the_lock_go(bank, indexed, lose):
    bank.retrieve([FIRST.text])
    lose(bank.path)
    bank.close()
    with StrategyBank(bank.path, hashed_words) as again:
        assert len(again) == 0
    assert not (bank.path / "holder.json").exists()


def test_a_moved_bank_is_complete_where_it_is_now(bank, tmp_path):
    move(bank.path)
    bank.add([SECOND])
    bank.close()
    assert open_elsewhere(tmp_path / "moved") == "1 []"


def test_another_bank_in_its_place_is_not_overwritten(bank, tmp_path):
    bank.path.rename(tmp_path / "moved")
    with StrategyBank(bank.path, hashed_words) as other:
        other.add([make("theirs")])
    with pytest.raises(BankStorageError, match="replaced by another file"):
        bank.add([SECOND])
    bank.close()
    assert open_elsewhere(bank.path) == "1 []"


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with StrategyBank("bank", hashed_words) as bank:
        bank.add([FIRST])
        monkeypatch.chdir(tmp_path / "elsewhere")
        bank.add([SECOND])
    assert not caplog.records and not list((tmp_path / "elsewhere").iterdir())
    assert open_elsewhere(tmp_path / "bank") == "2 []"


def test_a_full_disk_is_an_error_that_keeps_the_bank_as_it_was(bank):
    with full_disk(), pytest.raises(BankStorageError, match=r"disk is writable and not full"):
        bank.record([SECOND], [Outcome(FIRST.id, "after", 1)])
    assert len(bank) == 1 and len(bank.executions(FIRST.id)) == 1
    bank.add([SECOND])
    bank.close()
    assert open_elsewhere(bank.path) == "2 []"


# In training


@pytest.fixture
def session(bank, tmp_path):
    return BankSession(bank, SGPOConfig(output_dir=str(tmp_path / "out"), report_to="none", bf16=False), len)


def observe(session, name, problem):
    session.note(Observation([make(name)], [Outcome(FIRST.id, problem, 1)], [FIRST.id]))


def test_training_goes_on_while_the_disk_is_full_and_writes_what_was_kept(session, bank, caplog):
    with full_disk():
        for name in ("second", "third"):
            observe(session, name, name)
            session.commit()
    assert len(bank) == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "kept in memory" in warning
    observe(session, "fourth", "fourth")
    session.commit()
    assert len(bank) == 4 and bank.get(FIRST.id).shown == 3
    assert {each.problem for each in bank.executions(FIRST.id)} == {"before", "second", "third", "fourth"}
    assert "writes its bank again" in caplog.records[-1].getMessage() and len(caplog.records) == 2
    session.commit()
    assert bank.get(FIRST.id).shown == 3


def test_what_could_not_be_written_is_counted_when_training_ends(session, bank, caplog):
    with full_disk():
        observe(session, "second", "x")
        session.end()
    assert "lacks 1 outcomes and up to 1 strategies" in caplog.records[-1].getMessage()


def test_other_errors_of_a_commit_end_training(session):
    session.note(Observation([Strategy(" ", "algebra", ())], [], []))
    with pytest.raises(BankError, match="without text"):
        session.commit()


def test_a_saved_model_has_a_bank_whose_files_were_deleted_after_the_last_commit(tmp_path):
    with StrategyBank(tmp_path / "out" / "strategy_bank", hashed_words) as bank:
        session = BankSession(bank, SGPOConfig(output_dir=str(tmp_path / "out"), report_to="none", bf16=False), len)
        bank.add([FIRST])
        delete(bank.path)
        session.save(tmp_path / "out")
    assert open_elsewhere(tmp_path / "out" / "strategy_bank") == "1 []"


def test_a_snapshot_is_loaded_although_the_files_were_deleted(bank, tmp_path):
    bank.snapshot(tmp_path / "snapshot")
    bank.add([SECOND])
    delete(bank.path)
    bank.load_snapshot(tmp_path / "snapshot")
    bank.close()
    assert open_elsewhere(bank.path) == "1 []"


def test_the_warning_is_logged(bank, caplog):
    delete(bank.path)
    bank.add([SECOND])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
