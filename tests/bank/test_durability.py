"""What the bank survives: a lost or damaged index, another embedder, torn snapshots, files that are no ledger."""

import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bank_helpers import EVERYONE, PROVEN, hashed_words, make

from trl_sgpo.bank import Execution, Outcome, Strategy, StrategyBank, contents
from trl_sgpo.bank.index import BankIndex, Index
from trl_sgpo.bank.manifest import is_snapshot
from trl_sgpo.errors import BankError


def reversed_words(texts):
    return hashed_words(texts)[:, 128:] + hashed_words([text[::-1] for text in texts])[:, :128]


def fill(bank):
    strategies = [make(f"s{i}", "even" if i % 2 == 0 else "odd", step=i, **PROVEN) for i in range(10)]
    bank.add(strategies)
    bank.update([Outcome(s.id, "x", 0.5, 1) for s in strategies[::3]])
    return bank.strategies()


def damage_ids(directory):
    index = Index(directory, 256)
    index.delete(index.ids()[:1])
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


# The index, which only large banks have


@pytest.fixture
def indexed(monkeypatch):
    """Every bank is a large one, whose searches use the index."""
    monkeypatch.setattr(contents, "EXACT", 0)


def search(bank):
    """What the bank retrieves for the text of each of its strategies."""
    problems = [strategy.text for strategy in bank.strategies()]
    return bank.retrieve(problems, k=2, exclude=[set()] * len(problems), trust=EVERYONE)


def indexed_ids(bank):
    return set(bank._store.index.ids())


def ids_of(strategies):
    return {strategy.id for strategy in strategies}


def test_a_small_bank_has_no_index(bank, monkeypatch):
    """It neither opens Chroma nor leaves a directory of it, whatever is done with it."""
    monkeypatch.setattr(Index, "__init__", None)
    stored = fill(bank)
    bank.retire([stored[0].id])
    found = search(bank)
    bank.snapshot(bank.path.parent / "copy")
    bank.load_snapshot(bank.path.parent / "copy")
    assert search(bank) == found and bank.damage() == []
    bank.close()
    assert sorted(path.name for path in bank.path.iterdir()) == ["bank.lock", "ledger.sqlite"]


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
def test_the_index_is_rebuilt_from_the_ledger(bank, damage, indexed):
    stored = fill(bank)
    found = search(bank)
    bank.close()
    damage(bank.path / "chroma")
    with StrategyBank(bank.path, hashed_words) as again:
        assert again.strategies() == stored
        assert search(again) == found
        assert indexed_ids(again) == ids_of(stored)
        assert again.damage() == []


def test_an_index_closed_well_is_not_rebuilt(bank, monkeypatch, indexed):
    """Neither at once nor after a run that only read."""
    stored = fill(bank)
    search(bank)
    monkeypatch.setattr(Index, "rebuild", None)
    for _ in range(2):
        bank.close()
        bank = StrategyBank(bank.path, hashed_words)
        assert bank.strategies() == stored and indexed_ids(bank) == ids_of(stored)
    bank.close()


def test_an_index_that_was_not_used_is_rebuilt_if_strategies_changed_since(bank, monkeypatch, caplog, indexed):
    """Counts are not in it: updates leave it sealed."""
    stored = fill(bank)
    search(bank)
    bank.close()
    with monkeypatch.context() as patch:
        patch.setattr(Index, "__init__", None)
        with StrategyBank(bank.path, hashed_words) as again:
            again.update([Outcome(stored[0].id, "y", 1)])
    with monkeypatch.context() as patch:
        patch.setattr(Index, "rebuild", None)
        with StrategyBank(bank.path, hashed_words) as again:
            assert indexed_ids(again) == ids_of(stored)
    with StrategyBank(bank.path, hashed_words) as again:
        again.add([make("later")])
    assert "rebuilding it" not in caplog.text
    with StrategyBank(bank.path, hashed_words) as again:
        assert indexed_ids(again) == ids_of(again.strategies()) > ids_of(stored)
    assert "has changed since: rebuilding it from the ledger" in caplog.text


def test_a_search_sees_all_changes_before_it(bank, monkeypatch, indexed):
    stored = fill(bank)
    search(bank)
    monkeypatch.setattr(Index, "rebuild", None)
    bank.add([make("later"), make("latest")])
    bank.retire([stored[0].id, make("later").id])
    bank.add([make("later", source="another")])
    (hits,) = bank.retrieve([make("later").text], k=1, exclude=[set()], trust=EVERYONE)
    assert hits[0].strategy.id == make("later").id
    assert indexed_ids(bank) == ids_of(bank.strategies())
    bank.retire([stored[1].id])
    bank.close()
    with StrategyBank(bank.path, hashed_words) as again:
        assert indexed_ids(again) == ids_of(again.strategies())


def test_an_index_that_fails_is_rebuilt_and_nothing_is_lost(bank, monkeypatch, caplog, indexed):
    """Neither while it goes on failing nor after."""
    fill(bank)
    search(bank)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "add", lambda *args: (_ for _ in ()).throw(BankError("disk full")))
        for name in ("later", "latest"):
            bank.add([make(name)])
            with pytest.raises(BankError, match="disk full"):
                search(bank)
    assert "Rebuilding the index from the ledger. disk full" in caplog.text
    (hits,) = bank.retrieve([make("latest").text], exclude=[set()], trust=EVERYONE)
    assert hits[0].strategy.id == make("latest").id
    assert indexed_ids(bank) == ids_of(bank.strategies())
    bank.close()
    monkeypatch.setattr(Index, "rebuild", None)
    with StrategyBank(bank.path, hashed_words) as again:
        assert again.get(make("later").id) and again.get(make("latest").id)
        assert indexed_ids(again) == ids_of(again.strategies())


def test_an_index_that_fails_while_it_is_closed_is_not_sealed(bank, monkeypatch, indexed):
    fill(bank)
    search(bank)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "add", lambda *args: (_ for _ in ()).throw(BankError("disk full")))
        bank.add([make("later")])
        bank.close()
    assert not (bank.path / "chroma" / "seal.json").exists()
    with StrategyBank(bank.path, hashed_words) as again:
        assert indexed_ids(again) == ids_of(again.strategies())


def test_a_search_that_fails_is_repeated_on_a_new_index(bank, monkeypatch, indexed):
    fill(bank)
    found = search(bank)
    failing, query = bank._store.index._index, Index.query

    def fails_on_the_old_one(index, *args):
        if index is failing:
            raise BankError("segments are gone")
        return query(index, *args)

    monkeypatch.setattr(Index, "query", fails_on_the_old_one)
    assert search(bank) == found


def test_many_strategies_of_any_class_are_found_by_the_index(tmp_path, monkeypatch):
    """Where the index is asked, it finds what comparing with all embeddings does."""
    words = [f"word{i}" for i in range(40)]
    strategies = [
        Strategy(f"{words[i % 40]} {words[i % 37]} x{i}", f"c{i % 3}", (), trust=EVERYONE[i % 2]) for i in range(300)
    ]
    problems = [f"{words[i]} {words[-i]}" for i in range(20)]
    with StrategyBank(tmp_path, hashed_words, capacity_per_class=1000) as bank:
        bank.add(strategies)
        exact = bank.retrieve(problems)
        asked = []
        query = BankIndex.query
        monkeypatch.setattr(BankIndex, "query", lambda *args: asked.append(args) or query(*args))
        monkeypatch.setattr(contents, "EXACT", 50)
        found = bank.retrieve(problems)
        assert asked
    same = [len({h.strategy.id for h in a} & {h.strategy.id for h in b}) for a, b in zip(exact, found, strict=True)]
    assert sum(same) >= 0.95 * sum(map(len, exact))


HOLDS_A_BANK = """
import sys
from bank_helpers import EVERYONE, hashed_words, make
from trl_sgpo.bank import StrategyBank, contents
contents.EXACT = 0
bank = StrategyBank(sys.argv[1], hashed_words)
bank.add([make("theirs")])
bank.retrieve(["x"], trust=EVERYONE)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path, caplog, indexed):
    """The message names the holder. A holder that is killed leaves nothing locked and nothing lost."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_BANK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(BankError, match=rf"process {holder.pid} on {platform.node()} since 20.*bank_path"):
            StrategyBank(tmp_path, hashed_words)
    finally:
        holder.kill()
        holder.communicate()
    with StrategyBank(tmp_path, hashed_words) as bank:
        assert bank.strategies() == [make("theirs")]
        assert indexed_ids(bank) == {make("theirs").id}
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
    assert sorted(index.ids()) == sorted(ids)
    index.delete(ids[5:])
    (hits,) = index.query(rows[:1], 50)
    assert len(hits) == 5 and hits[0] == ("id0", pytest.approx(1.0, abs=1e-5))
    with pytest.raises(BankError, match="rebuilt from the ledger"):
        index.query(np.ones((1, 5), dtype=np.float32), 1)
    index.close()


# Embedding models


def test_another_embedder_embeds_everything_anew(bank, caplog, indexed):
    stored = fill(bank)
    search(bank)
    bank.close()
    with StrategyBank(bank.path, reversed_words) as again:
        assert again.strategies() == stored
        hit = again.retrieve([stored[0].text])[0][0]
        assert hit.strategy == stored[0] and hit.similarity == pytest.approx(1, abs=1e-5)
        assert indexed_ids(again) == ids_of(stored)
        assert again.made_with == "reversed_words"
    assert len([record for record in caplog.records if "embedding it anew" in record.message]) == 1
    caplog.clear()
    with StrategyBank(bank.path, reversed_words) as again:
        assert again.retrieve([stored[0].text])[0][0] == hit
    assert not caplog.records


def test_the_embedder_is_known_by_how_it_embeds(bank, caplog):
    """The same name with other vectors is another embedder, and another name with the same vectors is not."""
    stored = fill(bank)
    bank.close()

    def narrow(texts):
        return hashed_words(texts)[:, :100]

    def renamed(texts):
        return hashed_words(texts)

    with StrategyBank(bank.path, renamed) as again:
        assert again.retrieve([stored[0].text])[0][0].strategy == stored[0]
    assert not caplog.records
    narrow.__name__ = hashed_words.__name__
    with StrategyBank(bank.path, narrow) as again:
        assert again.retrieve([stored[0].text])[0][0].similarity == pytest.approx(1, abs=1e-5)
        assert again.dimension == 100 and again.add([make("later")])
    assert "embedding it anew" in caplog.text


def test_an_embedder_that_changes_while_open_is_refused(bank):
    fill(bank)
    bank._embedder._function = lambda texts: hashed_words(texts)[:, :16]
    with pytest.raises(BankError, match="dimension 16 now"):
        bank.retrieve(["something else"])


def test_a_snapshot_is_restored_exactly(bank, tmp_path):
    stored = fill(bank)
    problems = [strategy.text for strategy in stored]
    found = bank.retrieve(problems, exclude=[set()] * 10)
    bank.snapshot(tmp_path / "checkpoint-1")
    bank.record([make("later")], [Outcome(stored[0].id, "z", 1)])
    assert bank.strategies() != stored
    bank.load_snapshot(tmp_path / "checkpoint-1")
    assert bank.strategies() == stored
    assert bank.retrieve(problems, exclude=[set()] * 10) == found
    assert bank.add([make("later")])
    bank.snapshot(tmp_path / "checkpoint-1")
    manifest = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())
    about = {"schema_version": 3, "count": 11, "embedding_model": "hashed_words", "dimension": 256}
    assert manifest.pop("sha256") and manifest == about
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


@pytest.mark.parametrize(
    "change",
    [
        lambda bank: bank.add([make("later")]),
        lambda bank: bank.update([Outcome(make("s0", "even").id, "y", 1)]),
        lambda bank: bank.retire([make("s0", "even").id]),
        lambda bank: bank.set_note("key", "text"),
        lambda bank: bank.clear(),
        lambda bank: bank.load_snapshot(bank.path.parent / "other"),
    ],
)
def test_a_snapshot_that_is_continued_is_one_no_more(bank, tmp_path, change):
    fill(bank)
    for name in ("copy", "other"):
        bank.snapshot(tmp_path / name)
    with StrategyBank(tmp_path / "copy", hashed_words) as copy:
        search(copy)
        assert is_snapshot(copy.path)
        change(copy)
    assert not is_snapshot(tmp_path / "copy") and is_snapshot(tmp_path / "other")


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
        ("UPDATE meta SET value = '4' WHERE key = 'schema_version'", "upgrade"),
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
    before = bank._store.ledger.count()
    with pytest.raises(BankError):
        bank._store.ledger.commit([(make("new"), np.zeros(256))], [], [Execution(None, "p", "c", 1, 1, 0)])
    assert bank._store.ledger.count() == before and bank._store.ledger.all() == stored
    assert bank._store.ledger.executions("p") == []


# Banks of earlier versions


@pytest.fixture
def before(tmp_path):
    """
    What trl-sgpo wrote when every bank had an index: `first`, its `snapshot`, a bank `continued` from that with one
    strategy more, and what `first` retrieved.
    """
    with tarfile.open(Path(__file__).parent / "before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "before"


def retrieved(bank, problems):
    return [
        [[hit.strategy.id, hit.similarity, hit.score] for hit in hits]
        for trust in (("trusted",), ("trusted", "candidate"))
        for hits in bank.retrieve(problems, k=3, exclude=[set()] * len(problems), trust=trust)
    ]


@pytest.mark.parametrize("name", ["first", "snapshot"])
def test_a_bank_of_the_version_before_opens_unchanged(before, name, caplog):
    expected = json.loads((before / "found.json").read_text())
    with StrategyBank(before / name, hashed_words) as bank:
        found = [
            [s.id, s.trust, s.trials, s.successes, s.problems, s.shown] for s in (*bank.strategies(), *bank.retired())
        ]
        assert found == expected["strategies"] and bank.note("n") == "text"
        assert retrieved(bank, expected["problems"]) == expected["found"]
        assert bank.damage() == [] and not caplog.records
        assert bank.add([make("later")]) and len(bank) == 8


def test_an_index_of_the_version_before_is_rebuilt(before, indexed):
    """Its seal is not signed."""
    with StrategyBank(before / "first", hashed_words) as bank:
        expected = json.loads((before / "found.json").read_text())
        assert [[hit[0] for hit in hits] for hits in retrieved(bank, expected["problems"])] == [
            [hit[0] for hit in hits] for hits in expected["found"]
        ]
        assert indexed_ids(bank) == ids_of(bank.strategies())


def test_a_bank_that_the_version_before_continued_is_no_snapshot(before):
    """It still has the manifest of the snapshot, which does not fit it any more."""
    assert is_snapshot(before / "snapshot") and not is_snapshot(before / "continued")
    with StrategyBank(before / "continued", hashed_words) as bank:
        assert len(bank) == 8
        bank.load_snapshot(before / "snapshot")
        assert len(bank) == 7
    assert not is_snapshot(before / "continued")


VERSION_1 = """
CREATE TABLE strategies (
    id TEXT PRIMARY KEY, text TEXT NOT NULL, problem_class TEXT NOT NULL, source_problems TEXT NOT NULL,
    parents TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL, step INTEGER NOT NULL, origin TEXT NOT NULL,
    trust TEXT NOT NULL, successes REAL NOT NULL, trials INTEGER NOT NULL, lift REAL NOT NULL, embedding BLOB NOT NULL
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO meta VALUES
    ('schema_version', '1'), ('embedding_model', 'hashed_words'), ('dimension', '256'), ('state', 'x');
"""


def test_a_bank_of_the_first_version_is_migrated(tmp_path, caplog):
    tried, untried, gone = make("tried"), make("untried", parents=("p",)), make("gone")
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.executescript(VERSION_1)
    for strategy, trust, successes, trials, lift in (
        (tried, "candidate", 1.5, 2, -0.25),
        (untried, "candidate", 0, 0, 0.5),
        (gone, "retired", 1, 4, 0.5),
    ):
        provenance = (strategy.id, strategy.text, "algebra", '["s0"]', json.dumps(strategy.parents), "m", "r", 3)
        vector = hashed_words([strategy.text])[0]
        blob = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
        connection.execute(
            f"INSERT INTO strategies VALUES ({', '.join('?' * 14)})",
            (*provenance, "rollout", trust, successes, trials, lift, blob),
        )
    connection.commit()
    connection.close()
    for _ in range(2):
        with StrategyBank(tmp_path, hashed_words) as bank:
            known = {"model": "m", "run": "r", "step": 3}
            stored = bank.get(tried.id)
            assert stored == replace(tried, successes=1.5, trials=2, problems=1, solved=0, baseline=0.25, **known)
            assert stored.lift == -0.25
            assert bank.get(untried.id) == replace(untried, **known)
            assert (bank.get(gone.id).trust, bank.get(gone.id).lift, len(bank)) == ("retired", 0.5, 2)
            assert bank.retrieve([tried.text], trust=EVERYONE, exclude=[set()])[0][0].strategy == stored
            assert bank.damage() == []
    assert "embedding it anew" not in caplog.text


def test_a_changed_record_is_found(bank):
    stored = fill(bank)
    assert bank.damage() == []
    bank.close()
    connection = sqlite3.connect(bank.path / "ledger.sqlite")
    connection.execute("UPDATE strategies SET model = 'another' WHERE id = ?", (stored[3].id,))
    connection.commit()
    connection.close()
    with StrategyBank(bank.path, hashed_words) as again:
        (damage,) = again.damage()
        assert stored[3].id in damage and "not what was written" in damage


@pytest.mark.parametrize(
    "statement, message",
    [
        ("UPDATE strategies SET text = 'other' WHERE id = ?", "do not have the ids of their texts"),
        ("UPDATE strategies SET source_problems = '[broken' WHERE id = ?", "a value that cannot be"),
        ("UPDATE strategies SET trials = -1 WHERE id = ?", "number of executions"),
        ("UPDATE strategies SET trust = 'believed' WHERE id = ?", "candidate, trusted"),
    ],
)
def test_an_edited_record_is_refused(bank, statement, message):
    stored = fill(bank)
    bank.close()
    connection = sqlite3.connect(bank.path / "ledger.sqlite")
    connection.execute(statement, (stored[3].id,))
    connection.commit()
    connection.close()
    for _ in range(2):
        with pytest.raises(BankError, match=message):
            StrategyBank(bank.path, hashed_words)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "bank.lock").mkdir()
    with pytest.raises(BankError, match="cannot be locked"):
        StrategyBank(tmp_path, hashed_words)


def test_filling_an_index_shows_how_far_it_is(tmp_path, capsys):
    """Of 100,000 strategies it takes minutes."""
    count = 6_000
    vectors = np.eye(16, dtype=np.float32)[np.arange(count) % 16]
    ids, metadatas = [f"{number:016x}" for number in range(count)], [{"problem_class": "any"}] * count
    Index.rebuild(tmp_path / "index", 16, ids, vectors, metadatas).close()
    told = capsys.readouterr().err
    assert "6000/6000" in told and "strategy/s" in told
