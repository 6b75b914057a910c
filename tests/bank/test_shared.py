"""Banks of several jobs that exchange strategies through a Chroma server, and what the server may do to them."""

import gzip
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bank_helpers import PROVEN, hashed_words, make

from trl_sgpo.bank import Outcome, Strategy, StrategyBank, chroma_server, shared
from trl_sgpo.bank.chroma_server import ChromaServer, ServerError
from trl_sgpo.bank.shared import SharedBank, SyncReport
from trl_sgpo.errors import BankError


NOTHING = SyncReport(sent=0, received=0)


def few_words(texts):
    return hashed_words(texts)[:, :64] + 0.001


class Server:
    """`chroma run` on a directory and a port of its own."""

    def __init__(self, path):
        self.path = path
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        arguments = ["run", "--path", str(self.path), "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("chroma")), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/api/v2/heartbeat", timeout=1).read()
                return
            except OSError:
                assert time.monotonic() < deadline
                with pytest.raises(subprocess.TimeoutExpired):
                    self.process.wait(timeout=0.05)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def collection(self, name):
        import chromadb

        client = chromadb.HttpClient("127.0.0.1", self.port)
        return client.get_collection(name, embedding_function=None)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def name():
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def job(server, name, tmp_path):
    """Makes jobs, each with a bank of its own, that meet in one collection."""
    banks = []

    def make_job(directory, embedder=hashed_words, url=server.url, **kwargs):
        banks.append(StrategyBank(tmp_path / directory, embedder, **kwargs))
        return banks[-1], SharedBank(banks[-1], url, collection=name)

    yield make_job
    for bank in banks:
        bank.close()


def trusted(name, **kwargs):
    return make(name, trust="trusted", **kwargs)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def as_received(strategy, sender):
    return Strategy(
        strategy.text,
        strategy.problem_class,
        strategy.source_problems,
        strategy.parents,
        strategy.model,
        strategy.run,
        strategy.step,
        origin=f"shared:{sender.id[:8]}",
        trust="quarantine",
    )


# Exchange


def test_two_jobs_exchange_what_they_trust(job, caplog):
    (a, to_a), (b, to_b) = job("a"), job("b")
    ours = make("ours", parents=("0" * 16,), model="/home/me/models/m", run="r", step=7, **PROVEN)
    a.add([ours, make("candidate"), make("unproven", trust="quarantine"), trusted("gone")])
    a.update([Outcome(ours.id, "x", 0.5, 1), *(Outcome(make("gone").id, f"p{i}", 0, 1, 1.0) for i in range(9))])
    assert a.get(make("gone").id).trust == "retired"
    b.add([trusted("theirs")])
    assert to_a.sync() == SyncReport(sent=1, received=0)
    assert to_b.sync() == SyncReport(sent=1, received=1)
    assert to_a.sync() == SyncReport(sent=0, received=1)
    assert to_a.sync() == to_b.sync() == NOTHING
    assert b.get(ours.id) == as_received(replace(ours, model="m"), to_a)
    assert a.get(make("theirs").id) == as_received(make("theirs"), to_b)
    assert a.get(ours.id).trials == 21 and len(b) == 2 and len(a) == 4
    assert not warnings(caplog)


def test_what_a_bank_has_on_record_is_not_changed(job, server, name):
    """Neither by another job that has it too, nor when it was retired. The first to arrive stays."""
    (a, to_a), (b, to_b), (c, to_c) = job("a"), job("b"), job("c")
    a.add([trusted("both", source="from-a", run="a"), trusted("out")])
    b.add([make("BOTH", source="from-b", run="b"), make("out", run="b")])
    b.update([Outcome(make("out").id, f"p{i}", 0, 1, 1.0) for i in range(9)])
    before = b.strategies(), b.retired()
    assert len(before[1]) == 1
    to_a.sync()
    assert to_b.sync() == NOTHING and (b.strategies(), b.retired()) == before
    assert to_c.sync() == SyncReport(sent=0, received=2)
    b.update([Outcome(make("both").id, f"p{i}", 1) for i in range(9)])
    assert b.get(make("both").id).trust == "trusted"
    assert to_b.sync() == SyncReport(sent=1, received=0)
    assert to_a.sync() == to_c.sync() == NOTHING
    assert a.get(make("both").id).run == c.get(make("both").id).run == "a"
    assert server.collection(name).count() == 3
    (d, to_d) = job("d")
    assert to_d.sync().received == 2 and d.get(make("both").id) == as_received(a.get(make("both").id), to_a)


def test_the_server_has_what_is_trusted_now(job, server, name):
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([trusted("stays"), trusted("changes"), trusted("falls")])
    assert to_a.sync().sent == 3 and to_b.sync().received == 3
    a.add([make("changes", source="another")])
    a.update([Outcome(make("falls").id, f"p{i}", 0, 1, 1.0) for i in range(9)])
    assert to_a.sync() == SyncReport(sent=1, received=0)
    rows = server.collection(name).get()
    assert sorted(rows["documents"]) == sorted(make(each).text for each in ("stays", "changes"))
    assert {row["source_problems"] for row in rows["metadatas"]} == {'["s0"]', '["another", "s0"]'}
    assert to_b.sync() == NOTHING and len(b) == 3  # what another job no longer trusts, each judges for itself
    b.update([Outcome(make("falls").id, f"p{i}", 1) for i in range(9)])
    assert to_b.sync() == SyncReport(sent=1, received=0)
    assert to_a.sync() == NOTHING and a.get(make("falls").id).trust == "retired"


def test_jobs_embed_for_themselves(job):
    (a, to_a), (b, to_b) = job("a"), job("b", few_words)
    a.add([trusted("ours")])
    b.add([trusted("theirs")])
    to_a.sync()
    assert to_b.sync() == SyncReport(sent=1, received=1) and to_a.sync() == SyncReport(sent=0, received=1)
    for bank, dimension in ((a, 256), (b, 64)):
        assert bank.dimension == dimension
        found = bank.retrieve([make("ours").text, make("theirs").text], exclude=[set()] * 2, trust=("quarantine",))
        assert sum(map(len, found)) >= 1 and found[0 if bank is b else 1][0].similarity > 0.99


def test_near_copies_are_left_out_and_not_asked_for_again(job, monkeypatch):
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([Strategy("one two three four five six seven eight nine ten", "algebra", (), trust="trusted")])
    b.add([Strategy("one two three four five six seven eight nine eleven", "algebra", ())])
    to_a.sync()
    assert to_b.sync() == NOTHING and len(b) == 1
    monkeypatch.setattr(ChromaServer, "_rows", None)
    assert to_b.sync() == NOTHING


def test_a_full_class_keeps_its_own(job):
    (a, to_a), (b, to_b) = job("a"), job("b", capacity_per_class=4)
    a.add([trusted(f"a{i}") for i in range(6)])
    b.add([trusted("b0"), make("b1"), make("b2")])
    before = b.strategies()
    to_a.sync()
    assert to_b.sync() == SyncReport(sent=1, received=1)
    assert [strategy for strategy in b.strategies() if strategy.trust != "quarantine"] == before and len(b) == 4
    assert to_b.sync() == NOTHING and len(b.retired()) == 5


def test_much_is_received_in_several_syncs(job, monkeypatch):
    monkeypatch.setattr(shared, "MAX_RECEIVED", 5)
    monkeypatch.setattr(chroma_server, "BATCH", 2)
    monkeypatch.setattr(chroma_server, "PAGE", 3)
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([trusted(f"a{i}") for i in range(12)])
    assert to_a.sync().sent == 12
    assert [to_b.sync().received for _ in range(4)] == [5, 5, 2, 0]
    assert {strategy.id for strategy in b.strategies()} == {strategy.id for strategy in a.strategies()}


def test_a_bank_keeps_a_limited_number_of_others(job, monkeypatch, caplog):
    """A server that has new ones at every sync would fill the memory. Retired ones are kept on record, and count."""
    monkeypatch.setattr(shared, "MAX_SHARED", 8)
    (a, to_a), (b, to_b) = job("a"), job("b", capacity_per_class=3)
    for name in "pqr":
        a.add([trusted(f"{name}{i}") for i in range(4)])
        to_a.sync()
        to_b.sync()
    assert len(b.strategies()) + len(b.retired()) == 8 and len(b) == 3
    assert ["keeps 8 strategies of other jobs" in warning for warning in warnings(caplog)] == [True]
    to_b.sync()
    assert len(warnings(caplog)) == 1


def test_a_strategy_of_others_has_a_limited_number_of_sources(job, monkeypatch, caplog):
    (a, to_a), (_, to_b) = job("a"), job("b")
    many = tuple(f"p{number}" for number in range(5))
    a.add([Strategy("Use many steps.", "algebra", many, trust="trusted"), trusted("few")])
    to_a.sync()
    monkeypatch.setattr(shared, "MAX_SOURCES", 4)
    assert to_b.sync().received == 1 and "1 rows on the bank server" in warnings(caplog)[0]
    c, to_c = job("c")
    c.add([Strategy("Use more steps.", "algebra", many, trust="trusted")])
    to_c.sync()
    assert "is not sent, because other banks refuse it: source_problems has more than 4 items" in warnings(caplog)[-1]


def test_requests_are_of_limited_size(monkeypatch):
    monkeypatch.setattr(chroma_server, "BATCH_BYTES", 100)
    rows = [(str(i), {"text": "x" * 30}) for i in range(5)] + [("large", {"text": "x" * 500}), ("last", {})]
    assert [list(batch) for batch in chroma_server.batches(rows)] == [
        ["0", "1"],
        ["2", "3"],
        ["4"],
        ["large"],
        ["last"],
    ]
    assert list(chroma_server.batches([])) == []


def test_what_no_bank_would_take_is_not_sent(job, server, name, caplog):
    a, to_a = job("a")
    a.add([Strategy("long " * 1000, "algebra", (), trust="trusted"), trusted("short")])
    assert to_a.sync() == SyncReport(sent=1, received=0) and to_a.sync() == NOTHING
    (warning,) = warnings(caplog)
    assert "is not sent" in warning and "4000 characters" in warning
    assert server.collection(name).count() == 1


# Several at a time, crashes and snapshots


JOB = """
import sys
from bank_helpers import hashed_words, make
from trl_sgpo.bank import StrategyBank
from trl_sgpo.bank.shared import SharedBank
url, collection, directory, me = sys.argv[1:]
with StrategyBank(directory, hashed_words) as bank:
    jobs = SharedBank(bank, url, collection=collection)
    print("ready", flush=True)
    sys.stdin.readline()
    sent = 0
    for step in range(8):
        bank.add([make(f"job{me}step{step}{part}", trust="trusted", run=me, step=step) for part in "abc"])
        bank.add([make(f"common{step}", trust="trusted", run=me, step=step)])
        sent += jobs.sync().sent
    print(sent, flush=True)
    sys.stdin.readline()
    jobs.sync()
"""


def test_four_jobs_at_a_time_lose_and_repeat_nothing(server, name, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, server.url, name, str(tmp_path / me), me],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        )
        for me in "0123"
    ]
    try:
        for expected in ("ready\n", None, ""):
            answers = [process.stdout.readline() for process in processes]
            if expected is None:
                sent = list(map(int, answers))
            else:
                assert answers == [expected] * 4, [process.stderr.read() for process in processes]
            for process in processes:
                if expected != "":
                    process.stdin.write("\n")
                    process.stdin.flush()
    finally:
        for process in processes:
            process.kill()
        errors = [process.communicate()[1] for process in processes]
    assert errors == [""] * 4
    own = {make(f"job{me}step{step}{part}").id for me in "0123" for step in range(8) for part in "abc"}
    common = {make(f"common{step}").id for step in range(8)}
    keys = [key.split(":") for key in server.collection(name).get(include=[])["ids"]]
    assert {key for key, *_ in keys} == own | common
    assert len(keys) == sum(sent) and len({bank for _, bank, _ in keys}) == 4
    assert sum(key in own for key, *_ in keys) == len(own)
    assert len({(key, bank) for key, bank, _ in keys}) == len(keys)
    for me in "0123":
        with StrategyBank(tmp_path / me, hashed_words) as bank:
            assert {strategy.id for strategy in bank.strategies()} == own | common
            assert all((s.run == me) == (s.trust == "trusted") for s in bank.strategies())


def test_the_server_is_killed_started_again_and_emptied(name, tmp_path, caplog):
    server = Server(tmp_path / "server")
    try:
        with StrategyBank(tmp_path / "a", hashed_words) as a, StrategyBank(tmp_path / "b", hashed_words) as b:
            to_a, to_b = (SharedBank(bank, server.url, collection=name) for bank in (a, b))
            a.add([trusted("a0")])
            assert to_a.sync().sent == 1
            server.kill()
            a.add([trusted("a1")])
            before = a.strategies()
            assert to_a.sync() == to_b.sync() == NOTHING and a.strategies() == before and len(b) == 0
            assert [("Training goes on" in warning, "next sync" in warning) for warning in warnings(caplog)] == [
                (True, True)
            ] * 2
            caplog.clear()
            server.start()
            assert to_b.sync().received == 1 and to_a.sync().sent == 1 and to_b.sync().received == 1
            server.kill()
            shutil.rmtree(server.path)
            server.start()
            assert to_b.sync() == NOTHING and to_a.sync().sent == 2
            assert not warnings(caplog)
    finally:
        server.kill()


def test_a_sync_that_is_cut_off_is_only_repeated(job, server, name, monkeypatch, caplog):
    """Whether the answer to a request or the request itself was lost."""
    (a, to_a), (b, to_b) = job("a"), job("b")
    b.add([trusted("theirs")])
    to_b.sync()
    a.add([trusted(f"a{i}") for i in range(5)])
    monkeypatch.setattr(chroma_server, "BATCH", 2)
    write = ChromaServer.write
    calls = []

    def cut_off(self, rows):
        calls.append(rows)
        write(self, rows)
        if len(calls) == 2:
            raise ServerError("connection reset")

    monkeypatch.setattr(ChromaServer, "write", cut_off)
    assert to_a.sync() == SyncReport(sent=2, received=1)
    assert len(warnings(caplog)) == 1
    restarted = SharedBank(a, server.url, collection=name)
    assert restarted.sync() == SyncReport(sent=1, received=0)
    assert to_b.sync() == SyncReport(sent=0, received=5)
    assert server.collection(name).count() == 6


def test_rows_missed_while_others_vanish_come_with_the_next_sync(job, monkeypatch):
    """Pages are counted from the start: what is deleted from a page that was read shifts the ones after it."""
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([trusted(f"a{i}", step=i) for i in range(6)])
    to_a.sync()
    monkeypatch.setattr(chroma_server, "PAGE", 2)
    keys = ChromaServer._keys

    def read_and_delete(self, offset, limit):
        found = keys(self, offset, limit)
        monkeypatch.setattr(ChromaServer, "_keys", keys)
        first = a.strategies()[0]
        a.update([Outcome(first.id, f"p{i}", 0, 1, 1.0) for i in range(9)])
        to_a.sync()
        return found

    monkeypatch.setattr(ChromaServer, "_keys", read_and_delete)
    assert to_b.sync().received < 5
    to_b.sync()
    assert {strategy.id for strategy in a.strategies()} <= {strategy.id for strategy in b.strategies()}


def test_a_job_that_resumes_from_a_snapshot(job, server, name, tmp_path):
    """What it lost is received again, what it wrote since then is taken back, and what it writes now is seen."""
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([trusted("kept")])
    to_a.sync()
    a.snapshot(tmp_path / "checkpoint")
    a.add([trusted(f"lost{i}") for i in range(3)])
    b.add([trusted("theirs")])
    assert to_a.sync().sent == 3 and to_b.sync() == SyncReport(sent=1, received=4)
    assert to_a.sync().received == 1
    a.load_snapshot(tmp_path / "checkpoint")
    resumed = SharedBank(a, server.url, collection=name)
    assert resumed.id == to_a.id
    assert resumed.sync() == SyncReport(sent=0, received=1)
    documents = server.collection(name).get()["documents"]
    assert sorted(documents) == sorted([make("kept").text, make("theirs").text])
    a.add([trusted("lost0", run="again"), trusted("new")])
    assert resumed.sync() == SyncReport(sent=2, received=0)
    assert to_b.sync() == SyncReport(sent=0, received=1) and b.get(make("new").id)
    assert b.get(make("lost0").id).run == "" and len(b) == 6


def test_jobs_that_start_from_copies_of_a_bank_are_told_apart(job, tmp_path):
    a, to_a = job("a")
    a.add([trusted("old")])
    to_a.sync()
    a.snapshot(tmp_path / "checkpoint")
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "b")
    a.close()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    jobs = [job(each) for each in "abc"]
    assert jobs[0][1].id == to_a.id and len({to.id for _, to in jobs}) == 3
    for (bank, _), new in zip(jobs, "xyz", strict=True):
        bank.add([trusted(new)])
    for _ in range(2):
        for _, to in jobs:
            to.sync()
    assert [len(bank) for bank, _ in jobs] == [4, 4, 4]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"id": 1, "inode": 0}', '{"inode": 1}'])
def test_an_identity_that_cannot_be_read_is_made_anew(job, tmp_path, content):
    _, to_a = job("a")
    (tmp_path / "a" / shared.IDENTITY).write_text(content)
    again = shared._identity(tmp_path / "a")
    assert again != to_a.id and len(again) == 16 and shared._identity(tmp_path / "a") == again


# Strangers


def good_metadata(**changes):
    metadata = {"problem_class": "algebra", "model": "", "run": "", "step": 0, "origin": "rollout", "parents": "[]"}
    return metadata | {"source_problems": '["s0"]'} | changes


def key_of(strategy, bank="f" * 16, content="0" * 16):
    return f"{strategy.id}:{bank}:{content}"


STRANGE_METADATA = [
    None,
    {"a": 1},
    good_metadata(step="7"),
    good_metadata(step=True),
    good_metadata(step=-1),
    good_metadata(step=0.5),
    good_metadata(step=2**63 - 1),
    good_metadata(sequence=2**63 - 1),
    good_metadata(trust="trusted", successes=9, trials=9),
    good_metadata(parents="[1]"),
    good_metadata(parents='["up/../../../etc/passwd"]'),
    good_metadata(source_problems=7),
    good_metadata(source_problems="s0"),
    good_metadata(source_problems='{"a": 1}'),
    good_metadata(source_problems="[" * 100_000),
    good_metadata(source_problems='["' + "x" * 1000 + '"]'),
    good_metadata(problem_class="x" * 201),
    good_metadata(problem_class="two\nlines"),
    good_metadata(origin="a\x00b"),
    good_metadata(run=3),
]
STRANGE_TEXTS = [None, "", " \n", "x" * 1_000_000, "\x1b[2J"]


def test_rows_of_strangers_do_no_harm(job, server, name, caplog):
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([trusted("good")])
    b.add([trusted("known", source="s1"), make("here", source="s1")])
    to_a.sync()
    rows = server.collection(name)
    problems = [f"p{i}" for i in range(8)]
    b.update([Outcome(make("known").id, problem, 1) for problem in problems])
    before = b.strategies()

    strange = [
        (key_of(make(f"m{i}", (metadata or {}).get("problem_class", "algebra"))), make(f"m{i}").text, metadata)
        for i, metadata in enumerate(STRANGE_METADATA)
    ]
    strange += [
        (key_of(Strategy(text or "", "algebra", ()), content=f"{i:016x}"), text, good_metadata())
        for i, text in enumerate(STRANGE_TEXTS)
    ]
    strange += [(key_of(make("another")), make("not that text").text, good_metadata())]
    strange += [
        (key, "x", good_metadata()) for key in ("x", "x" * 100_000, key_of(make("y")).upper(), "a:b:c", "é:" * 9)
    ]
    # About strategies that are known: against the evidence for one, and as if the bank itself had sent them
    claims = good_metadata(source_problems=json.dumps(problems))
    silent = [(key_of(strategy), strategy.text, claims) for strategy in before]
    silent += [(key_of(make("mine"), to_b.id), make("mine").text, good_metadata())]
    silent += [(key_of(make("known"), to_b.id), make("known").text, claims)]
    for key, text, metadata in strange + silent:
        rows.upsert(
            ids=[key],
            documents=None if text is None else [text],
            metadatas=None if metadata is None else [metadata],
            embeddings=[[1.0]],
        )

    assert to_b.sync() == SyncReport(sent=1, received=1)
    (warning,) = warnings(caplog)
    assert f"{len(strange)} rows" in warning and "left out" in warning
    assert b.strategies()[:2] == before and b.get(make("good").id).trust == "quarantine" and len(b) == 3
    assert b.damage() == []
    assert to_b.sync() == NOTHING and len(warnings(caplog)) == 1
    a.add([trusted("later")])
    to_a.sync()
    assert to_b.sync() == SyncReport(sent=0, received=1)
    found = rows.get(ids=[key for key, *_ in silent[-2:]])
    assert found["ids"] == []


def test_rows_too_large_for_an_answer_hide_no_others(job, server, name, caplog, monkeypatch):
    (a, to_a), (b, to_b) = job("a"), job("b")
    a.add([trusted("first")])
    to_a.sync()
    rows = server.collection(name)
    monkeypatch.setattr(chroma_server, "MAX_ANSWER_BYTES", 10_000)
    for i in range(3):
        rows.upsert(
            ids=[key_of(make(f"l{i}"))], documents=["x" * 20_000], metadatas=[good_metadata()], embeddings=[[1.0]]
        )
        rows.upsert(ids=["x" * 20_000 + str(i)], embeddings=[[1.0]])
    a.add([trusted("last")])
    to_a.sync()
    assert to_b.sync() == SyncReport(sent=0, received=2) and len(b) == 2
    assert "6 rows" in warnings(caplog)[-1]


def test_more_rows_than_anyone_needs(job, monkeypatch, caplog):
    a, to_a = job("a")
    a.add([trusted(f"a{i}") for i in range(3)])
    to_a.sync()
    monkeypatch.setattr(chroma_server, "MAX_ROWS", 2)
    assert to_a.sync() == NOTHING
    assert "3 rows" in warnings(caplog)[0]


@pytest.mark.parametrize("foreign", [{"metadata": None}, {"metadata": shared.MADE_BY, "dimension": 3}])
def test_a_collection_made_by_something_else(job, server, name, foreign, caplog):
    import chromadb

    client = chromadb.HttpClient("127.0.0.1", server.port)
    collection = client.create_collection(name, metadata=foreign["metadata"], embedding_function=None)
    if "dimension" in foreign:
        collection.add(ids=["x"], embeddings=[[1.0] * foreign["dimension"]])
    a, to_a = job("a")
    a.add([trusted("a0")])
    with pytest.raises(BankError, match=r"made by something else: delete that, or use another server"):
        to_a.sync()
    client.delete_collection(name)
    assert to_a.sync().sent == 1
    client.delete_collection(name)
    client.create_collection(name, embedding_function=None)
    assert to_a.sync() == NOTHING  # no longer ends a training that has begun
    assert "made by something else" in warnings(caplog)[0] and len(a) == 1


# Servers that fail


@contextmanager
def answering(respond):
    """A server that answers every request by `respond(handler, path, headers)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with suppress(OSError):
                respond(self)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler, status, body, **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        threading.Event().wait(0.05)


def trickle_of_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(200):
        handler.wfile.write(b"x")
        threading.Event().wait(0.05)


OPENED = json.dumps({"id": str(uuid.UUID(int=4)), "metadata": shared.MADE_BY, "dimension": None}).encode()
BAD_ANSWERS = {
    "no JSON": lambda h: send(h, 200, b"<html>"),
    "no UTF-8": lambda h: send(h, 200, b"\xff\xfe"),
    "nested": lambda h: send(h, 200, b"[" * 200_000),
    "empty": lambda h: send(h, 200, b""),
    "a list": lambda h: send(h, 200, b"[]"),
    "no collection": lambda h: send(h, 200, b"{}"),
    "another id": lambda h: send(h, 200, OPENED.replace(b"0000", b"/../")),
    "500": lambda h: send(h, 500, b"\x1b[2J" * 1000),
    "503": lambda h: send(h, 503, b""),
    "404": lambda h: send(h, 404, b"{}"),
    "redirect": lambda h: send(h, 302, b"", Location="http://127.0.0.1:1/"),
    "closed": lambda h: h.connection.close(),
    "no HTTP": lambda h: h.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "cut off": lambda h: send(h, 200, OPENED, **{"Content-Length": str(len(OPENED) + 1)}),
    "silent": lambda h: threading.Event().wait(1),
    "trickle": trickle,
    "trickle of headers": trickle_of_headers,
    "compressed": lambda h: send(h, 200, gzip.compress(OPENED), **{"Content-Encoding": "gzip"}),
    "endless": lambda h: (
        [h.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")] + [h.wfile.write(b"x" * 2**20) for _ in range(99)]
    ),
    "no count": lambda h: send(h, 200, OPENED if h.path.endswith("collections") else b'"many"'),
    "no columns": lambda h: send(h, 200, OPENED if h.path.endswith("collections") else b"1"),
}


@pytest.mark.parametrize("fault", BAD_ANSWERS)
def test_a_server_that_answers_rubbish(bank, fault, monkeypatch, caplog):
    monkeypatch.setattr(chroma_server, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(chroma_server, "DEADLINE", 0.6)
    bank.add([trusted("a0")])
    before = bank.strategies()
    with answering(BAD_ANSWERS[fault]) as url:
        start = time.monotonic()
        assert SharedBank(bank, url).sync() == NOTHING
        assert time.monotonic() - start < 5
    (warning,) = warnings(caplog)
    assert ("took more than" in warning) == ("trickle" in fault)
    assert "Training goes on" in warning and url in warning and len(warning) < 600 and warning.isprintable()
    assert bank.strategies() == before and bank.damage() == []


def test_a_server_that_answers_what_was_not_asked(bank):
    asked, other, gone, lost = (make(name) for name in ("asked", "other", "gone", "lost"))

    def respond(handler):
        path = handler.path.rsplit("/", 1)[1]
        rows = {
            "ids": [key_of(asked), key_of(other), []],
            "documents": [asked.text, other.text, ""],
            "metadatas": [good_metadata()] * 3,
        }
        keys = {"ids": [key_of(asked), key_of(gone), key_of(lost), None, [], 7]}
        counted.append(path)
        answer = {"collections": json.loads(OPENED), "count": 6, "get": keys if counted.count("get") == 1 else rows}
        send(handler, 200, json.dumps(answer[path]).encode())

    counted = []
    with answering(respond) as url:
        assert SharedBank(bank, url).sync() == SyncReport(sent=0, received=1)
    assert [strategy.id for strategy in bank.strategies()] == [asked.id]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid:8000", "https://127.0.0.1:1/x"])
def test_a_server_that_is_not_there(bank, url, caplog):
    assert SharedBank(bank, url).sync() == NOTHING
    assert len(warnings(caplog)) == 1


def test_a_server_that_wants_a_token(bank, monkeypatch, caplog, server, name):
    """The token reaches the server and no message. Only at the first meeting does a refusal end anything."""
    seen = []

    def respond(handler):
        seen.append(handler.headers["Authorization"])
        if handler.headers["Authorization"] != "Bearer secret":
            return send(handler, 401, b"")
        body = {"count": b"0", "upsert": b"{}"}.get(handler.path.rsplit("/", 1)[1], OPENED)
        return send(handler, 200, body)

    bank.add([trusted("a0")])
    with answering(respond) as url:
        with pytest.raises(BankError, match="401: set TRL_SGPO_BANK_TOKEN"):
            SharedBank(bank, url).sync()
        monkeypatch.setenv("TRL_SGPO_BANK_TOKEN", "wrong-token\n")
        with pytest.raises(BankError) as refused:
            SharedBank(bank, url).sync()
        assert "wrong-token" not in str(refused.value)
        monkeypatch.setenv("TRL_SGPO_BANK_TOKEN", "secret")
        shared_bank = SharedBank(bank, f"{url}/behind/")
        assert shared_bank.sync() == SyncReport(sent=1, received=0)
        shared_bank._headers["Authorization"] = "Bearer revoked"
        assert shared_bank.sync() == NOTHING
        assert SharedBank(bank, url, headers={"Authorization": "Bearer secret"}).sync().sent == 1
    assert seen[0] is None and seen[1] == "Bearer wrong-token"
    assert len(warnings(caplog)) == 1 and "revoked" not in caplog.text and "secret" not in caplog.text


# Arguments


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "localhost:8000", "ftp://host", "http://", "http://:8000", "http://host:port", "http://h:0",
     "http://h:99999", "http://[::1", "http://h/a b", "http://h?x=1", "http://h#x", "http://h\n:8000", "http://höst"],
)  # fmt: skip
def test_addresses_that_cannot_be_one(bank, url):
    with pytest.raises(BankError, match=r"like http://127\.0\.0\.1:8000"):
        SharedBank(bank, url)


def test_arguments_that_cannot_work(bank, monkeypatch, caplog):
    with pytest.raises(BankError) as error:
        SharedBank(bank, "http://me:secret@host:8000")
    assert "secret" not in str(error.value) and "TRL_SGPO_BANK_TOKEN" in str(error.value)
    for collection in ("", "ab", "a/b", "-abc", "a" * 513):
        with pytest.raises(BankError, match="letters, digits"):
            SharedBank(bank, "http://host", collection=collection)
    for headers in ({"A": "secret\nB: c"}, {"A": "sécret"}, {"A": ""}, {"A:": "secret"}, {"": "secret"}):
        with pytest.raises(BankError, match="header") as error:
            SharedBank(bank, "http://host", headers=headers)
        assert "cret" not in str(error.value)
    monkeypatch.setenv("TRL_SGPO_BANK_TOKEN", "sec\nret")
    with pytest.raises(BankError, match="TRL_SGPO_BANK_TOKEN"):
        SharedBank(bank, "http://host")
    assert not warnings(caplog)
    monkeypatch.setenv("TRL_SGPO_BANK_TOKEN", "secret")
    SharedBank(bank, "http://localhost:8000"), SharedBank(bank, "https://host")
    assert not warnings(caplog)
    SharedBank(bank, "http://host")
    (warning,) = warnings(caplog)
    assert "unencrypted" in warning and "secret" not in warning
