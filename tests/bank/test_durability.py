"""What the bank survives: a lost or damaged index, another embedder, torn snapshots, files that are no ledger."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bank_helpers import hashed_words, make

from trl_sgpo.bank import Outcome, StrategyBank
from trl_sgpo.bank.index import Index
from trl_sgpo.errors import BankError


def reversed_words(texts):
    return hashed_words(texts)[:, 128:] + hashed_words([text[::-1] for text in texts])[:, :128]


def fill(bank):
    strategies = [make(f"s{i}", "even" if i % 2 == 0 else "odd", step=i) for i in range(10)]
    bank.add(strategies)
    bank.update([Outcome(s.id, 0.5, 1) for s in strategies[::3]])
    return bank.strategies()


def damage_ids(directory):
    index = Index(directory, 256)
    index.delete([next(iter(index.ids()))])
    index.close()


def damage_file(directory):
    with (directory / "chroma.sqlite3").open("r+b") as file:
        file.truncate(10_000)


def damage_dimension(directory):
    ids = [make(f"s{i}", "even" if i % 2 == 0 else "odd").id for i in range(10)]
    Index.rebuild(directory, 8, ids, np.ones((10, 8), dtype=np.float32), [{"problem_class": "x"}] * 10).close()


def damage_unnoticed_by_chroma(directory):
    vectors = next(directory.rglob("data_level0.bin"), directory / "chroma.sqlite3")
    content = bytearray(vectors.read_bytes())
    content[len(content) // 2] ^= 1
    vectors.write_bytes(content)


def damage_by_a_foreign_file(directory):
    (directory / "extra").write_text("x")


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        damage_ids,
        damage_file,
        damage_dimension,
        damage_unnoticed_by_chroma,
        damage_by_a_foreign_file,
    ],
)
def test_the_index_is_rebuilt_from_the_ledger(bank, damage):
    stored = fill(bank)
    problems = [strategy.text for strategy in stored]
    found = bank.retrieve(problems, k=2, exclude=[set()] * 10)
    bank.close()
    damage(bank.path / "chroma")
    with StrategyBank(bank.path, hashed_words) as again:
        assert again.strategies() == stored
        assert again.retrieve(problems, k=2, exclude=[set()] * 10) == found
        assert again._index.ids() == {strategy.id for strategy in stored}


def test_an_index_closed_well_is_not_rebuilt(bank, monkeypatch):
    """Neither at once nor after a run that only read."""
    stored = fill(bank)
    monkeypatch.setattr(Index, "rebuild", None)
    for _ in range(2):
        bank.close()
        bank = StrategyBank(bank.path, hashed_words)
        assert bank.strategies() == stored and bank._index.ids() == {s.id for s in stored}
    bank.close()


def test_an_index_that_failed_is_rebuilt(bank, monkeypatch):
    """What reached the ledger and not the index is found again after the next start."""
    fill(bank)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "add", lambda *args: (_ for _ in ()).throw(BankError("disk full")))
        with pytest.raises(BankError, match="disk full"):
            bank.add([make("later")])
    bank.close()
    with StrategyBank(bank.path, hashed_words) as again:
        assert again._index.ids() == {s.id for s in again.strategies()}
        assert again.retrieve([make("later").text], exclude=[set()])[0][0].strategy == make("later")


HOLDS_A_BANK = """
import sys
from bank_helpers import hashed_words, make
from trl_sgpo.bank import StrategyBank
bank = StrategyBank(sys.argv[1], hashed_words)
bank.add([make("theirs")])
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path, caplog):
    """The message names the holder. A holder that is killed leaves nothing locked and nothing lost."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_BANK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(BankError, match=rf"process {holder.pid} since 20.*bank_path"):
            StrategyBank(tmp_path, hashed_words)
    finally:
        holder.kill()
        holder.communicate()
    with StrategyBank(tmp_path, hashed_words) as bank:
        assert bank.strategies() == [make("theirs")]
        assert "rebuilding it" in caplog.text
        with pytest.raises(BankError, match=rf"process {os.getpid()} .*trainer.strategy_bank.close"):
            StrategyBank(tmp_path, hashed_words)
    with StrategyBank(tmp_path, hashed_words):
        pass


def test_a_bank_that_cannot_be_opened_is_not_held(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all " * 100)
    for _ in range(2):
        with pytest.raises(BankError, match="damaged or no strategy bank"):
            StrategyBank(tmp_path, hashed_words)


def test_index_pages_and_query(tmp_path):
    rows = np.random.default_rng(0).normal(size=(5_500, 4)).astype(np.float32)
    ids = [f"id{i}" for i in range(5_500)]
    index = Index(tmp_path / "chroma", 4)
    assert index.query(rows[:2], 3) == [[], []] and index.query(rows[:0], 3) == []
    index.add(ids, rows, [{"problem_class": "a"}] * 5_500)
    assert index.ids() == set(ids)
    index.delete(ids[5:])
    (hits,) = index.query(rows[:1], 50)
    assert len(hits) == 5 and hits[0] == ("id0", pytest.approx(1.0, abs=1e-5))
    with pytest.raises(BankError, match="rebuilt from the ledger"):
        index.query(np.ones((1, 5), dtype=np.float32), 1)
    index.close()


def test_another_embedder_embeds_everything_anew(bank, caplog):
    stored = fill(bank)
    bank.close()
    with StrategyBank(bank.path, reversed_words) as again:
        assert again.strategies() == stored
        hit = again.retrieve([stored[0].text])[0][0]
        assert hit.strategy == stored[0] and hit.similarity == pytest.approx(1, abs=1e-5)
    assert [record.message for record in caplog.records if "embedding it with" in record.message]
    caplog.clear()
    with StrategyBank(bank.path, reversed_words) as again:
        assert len(again) == 10
    assert not caplog.records


def test_a_snapshot_is_restored_exactly(bank, tmp_path):
    stored = fill(bank)
    problems = [strategy.text for strategy in stored]
    found = bank.retrieve(problems, exclude=[set()] * 10)
    bank.snapshot(tmp_path / "checkpoint-1")
    bank.record([make("later")], [Outcome(stored[0].id, 1, 1)])
    assert bank.strategies() != stored
    bank.load_snapshot(tmp_path / "checkpoint-1")
    assert bank.strategies() == stored
    assert bank.retrieve(problems, exclude=[set()] * 10) == found
    assert bank.add([make("later")])
    bank.snapshot(tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["count"] == 11
    with StrategyBank(tmp_path / "other", hashed_words) as other:
        other.load_snapshot(tmp_path / "checkpoint-1")
        assert other.strategies() == bank.strategies()


def test_reading_a_snapshot_in_place_leaves_it_intact(bank, tmp_path):
    stored = fill(bank)
    bank.snapshot(tmp_path / "copy")
    with StrategyBank.restore(tmp_path / "copy", hashed_words) as copy:
        assert copy.strategies() == stored
        assert copy.retrieve([stored[0].text])[0][0].strategy == stored[0]
    bank.load_snapshot(tmp_path / "copy")
    assert bank.strategies() == stored


def test_an_empty_bank_can_be_snapshot(bank, tmp_path):
    bank.snapshot(tmp_path / "copy")
    fill(bank)
    bank.load_snapshot(tmp_path / "copy")
    assert len(bank) == 0 and bank.retrieve(["x"]) == [[]]
    assert len(fill(bank)) == 10


def test_a_torn_snapshot_is_refused_and_the_bank_stays(bank, tmp_path):
    stored = fill(bank)
    copy = tmp_path / "copy"
    bank.snapshot(copy)
    with (copy / "ledger.sqlite").open("r+b") as file:
        file.truncate(8192)
    with pytest.raises(BankError, match="another checkpoint"):
        bank.load_snapshot(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BankError, match="another checkpoint"):
        bank.load_snapshot(copy)
    with pytest.raises(BankError, match="another checkpoint"):
        bank.load_snapshot(tmp_path / "missing")
    with pytest.raises(BankError, match="another directory"):
        bank.snapshot(bank.path)
    assert bank.strategies() == stored and bank.add([make("later")])


def test_files_that_are_no_ledger(bank, tmp_path):
    with pytest.raises(BankError, match="holds no strategy bank"):
        StrategyBank.restore(tmp_path / "missing", hashed_words)
    assert not (tmp_path / "missing").exists()

    fill(bank)
    bank.close()
    ledger = bank.path / "ledger.sqlite"
    intact = ledger.read_bytes()
    for content in (b"no database at all " * 100, intact[: len(intact) // 2]):
        ledger.write_bytes(content)
        with pytest.raises(BankError, match="resume_from_checkpoint"):
            StrategyBank(bank.path, hashed_words)

    for statement, message in [
        ("UPDATE meta SET value = '2' WHERE key = 'schema_version'", "upgrade"),
        ("DROP TABLE meta", "is a strategy bank"),
    ]:
        ledger.write_bytes(intact)
        connection = sqlite3.connect(ledger)
        connection.execute(statement)
        connection.commit()
        connection.close()
        with pytest.raises(BankError, match=message):
            StrategyBank(bank.path, hashed_words)


def test_a_failed_commit_stores_nothing(bank):
    stored = fill(bank)
    before = bank._ledger.count()
    with pytest.raises(BankError):
        bank._ledger.commit([(make("new"), np.zeros(256))], [], [object()])
    assert bank._ledger.count() == before and bank._ledger.all() == stored
