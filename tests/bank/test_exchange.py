"""Exports, and imports of what a stranger may have sent: all of it checked, nothing taken on trust, nothing partly."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from bank_helpers import hashed_words, make
from benchmarks.fuzz import malformed_export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_sgpo.bank import Execution, Outcome, Strategy, StrategyBank, export_files, rows
from trl_sgpo.bank.exchange import ImportReport, export_bank, import_bank
from trl_sgpo.bank.export_files import is_export, read_export
from trl_sgpo.bank.snapshot import embed_with
from trl_sgpo.errors import BankError


EVERYONE = ("trusted", "candidate", "quarantine")
SEEDS = 300


def fill(bank: StrategyBank) -> list[Strategy]:
    """Strategies of two classes: trusted and retired ones, candidates, and one in quarantine."""
    strategies = [
        make(f"s{i}", "even" if i % 2 == 0 else "odd", f"s{i}", step=i, model=f"org/m{i % 3}", run="r")
        for i in range(20)
    ]
    strategies[7] = replace(strategies[7], parents=(strategies[1].id, strategies[3].id), origin="seed")
    bank.record([*strategies, make("unsure", "odd", trust="quarantine")], shown={strategies[0].id: 3})
    bank.update([Outcome(s.id, f"p{i}", 1.0, 1, 0.5) for i in range(9) for s in strategies[:5]])
    bank.update([Outcome(s.id, f"p{i}", 0.1, 1, 0.9) for i in range(9) for s in strategies[5:7]])
    bank.update([Outcome(strategies[9].id, "p1", 1.5, 2, 1 / 3, "other"), Outcome(strategies[9].id, "s9", 1)])
    return bank.strategies()


@pytest.fixture
def other(tmp_path):
    with StrategyBank(tmp_path / "other", hashed_words) as bank:
        yield bank


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A bank to export, which no test changes."""
    with StrategyBank(tmp_path_factory.mktemp("source"), hashed_words) as bank:
        fill(bank)
        yield bank


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A bank that all that is refused leaves empty."""
    with StrategyBank(tmp_path_factory.mktemp("untouched"), hashed_words) as bank:
        yield bank
        assert bank.strategies() == []


@pytest.fixture
def exported(source, tmp_path):
    return export_bank(source, tmp_path / "export")


def all_executions(bank):
    return [execution for strategy in bank.strategies() for execution in bank.executions(strategy.id)]


def contents(bank):
    return bank.strategies(), bank.retired(), all_executions(bank), bank._store.ledger.state


def seal(directory, data=None, **changes):
    """Gives the manifest what the file of strategies became, and other changes."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    if data is not None:
        (directory / manifest["file"]).write_bytes(data)
        manifest |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_text(json.dumps(manifest | changes))


# Round trips


def test_a_bank_of_your_own_is_taken_over_as_it_is(source, other, tmp_path):
    states = ("candidate", "trusted", "retired", "quarantine")
    assert {s.trust for s in [*source.strategies(), *source.retired()]} == set(states)
    export_bank(source, tmp_path / "export", states=states)
    report = import_bank(other, tmp_path / "export", keep_trust=True)
    assert report == ImportReport(added=19, known=0, near_copies=0, quarantined=1, retired=2)
    assert other.strategies() == source.strategies() and other.retired() == source.retired()
    assert all_executions(other) == all_executions(source)
    before = contents(other)
    assert import_bank(other, tmp_path / "export", keep_trust=True).known == 21
    assert contents(other) == before


RETRIEVES = """
import json, sys
from bank_helpers import hashed_words
from trl_sgpo.bank import StrategyBank
from trl_sgpo.bank.exchange import import_bank
problems = json.load(sys.stdin)
with StrategyBank(sys.argv[1], hashed_words) as bank:
    import_bank(bank, sys.argv[2], keep_trust=True)
    found = [
        [[(hit.strategy.id, hit.score) for hit in hits] for hits in bank.retrieve(problems, 5, trust=trust)]
        for trust in (["trusted"], ["trusted", "candidate"])
    ]
    kept = [(s.id, s.trust, s.successes, s.trials, s.problems, s.solved, s.baseline) for s in bank.strategies()]
print(json.dumps([found, kept]))
"""


def test_another_process_finds_the_same_in_the_same_order(source, tmp_path, exported):
    rng = np.random.default_rng(0)
    words = [word for strategy in source.strategies() for word in strategy.text.split()]
    problems = [" ".join(rng.choice(words, 6)) for _ in range(50)]
    found = [
        [[[hit.strategy.id, hit.score] for hit in hits] for hits in source.retrieve(problems, 5, trust=trust)]
        for trust in (["trusted"], ["trusted", "candidate"])
    ]
    assert all(found[1]) and sum(map(len, found[0])) > 50
    kept = [
        [s.id, s.trust, s.successes, s.trials, s.problems, s.solved, s.baseline]
        for s in source.strategies()
        if s.trust != "quarantine"
    ]
    output = subprocess.run(
        [sys.executable, "-c", RETRIEVES, str(tmp_path / "there"), str(exported)],
        input=json.dumps(problems),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    ).stdout
    assert json.loads(output) == [found, kept]


def test_imports_are_quarantined_and_count_for_nothing(source, other, exported):
    report = import_bank(other, exported)
    sent = [s for s in source.strategies() if s.trust != "quarantine"]
    assert report == ImportReport(added=18, known=0, near_copies=0, quarantined=18)
    assert other.strategies() == [
        replace(
            make("x"),
            **{
                name: vars(s)[name]
                for name in ("text", "problem_class", "source_problems", "parents", "model", "run", "step")
            },
            origin="import",
            trust="quarantine",
        )
        for s in sent
    ]
    assert not all_executions(other)
    assert other.retrieve([s.text for s in sent], trust=("trusted", "candidate")) == [[]] * 18
    tried = other.sample("even", 20, seed=0)
    assert {s.id for s in tried} == {s.id for s in sent if s.problem_class == "even"}
    assert {s.origin for s in other.strategies()} == {"import"}


@pytest.mark.parametrize("keep_trust", [False, True])
def test_origin_is_as_given(other, exported, keep_trust):
    import_bank(other, exported, keep_trust, origin="hub:me/bank@0123")
    assert {s.origin for s in other.strategies()} == {"hub:me/bank@0123"}
    import_bank(other, exported, keep_trust, origin="again")
    assert {s.origin for s in other.strategies()} == {"hub:me/bank@0123"}


def test_what_is_on_record_stays_as_it_is(other, exported):
    """Also its source problems, by which a stranger could have it hidden from problems, and its retirement."""
    strategies, _, _ = read_export(exported)
    known = replace(strategies[0], source_problems=("mine",), trust="trusted", successes=9, trials=9)
    retired = replace(strategies[1], trust="retired")
    close = Strategy(strategies[2].text + " too", strategies[2].problem_class, ("mine",))
    other.merge([known, retired, close], [])
    report = import_bank(other, exported)
    assert report == ImportReport(added=15, known=2, near_copies=1, quarantined=15)
    assert other.get(known.id) == known and other.get(retired.id) == retired and other.get(strategies[2].id) is None
    before = contents(other)
    assert import_bank(other, exported) == ImportReport(added=0, known=17, near_copies=1, quarantined=0)
    assert contents(other) == before


def test_a_full_class_keeps_its_own(tmp_path, exported):
    with StrategyBank(tmp_path / "small", hashed_words, capacity_per_class=4) as small:
        mine = [make(f"m{i}", "even") for i in range(3)]
        small.add(mine)
        report = import_bank(small, exported)
        held = small.strategies()
        assert set(mine) < set(held) and len(held) == 8
        assert report == ImportReport(added=5, known=0, near_copies=0, quarantined=5, retired=13)


def test_the_same_bank_gives_the_same_file(source, tmp_path):
    first, again = (export_bank(source, tmp_path / name) for name in ("first", "again"))
    assert (again / "strategies.jsonl").read_bytes() == (first / "strategies.jsonl").read_bytes()


def test_the_manifest_describes_the_export(source, tmp_path):
    directory = export_bank(source, tmp_path / "export", license="cc-by-4.0")
    manifest = json.loads((directory / "manifest.json").read_text())
    data = (directory / "strategies.jsonl").read_bytes()
    assert manifest.pop("created").startswith("20")
    assert manifest == {
        "format": "trl-sgpo-strategies",
        "format_version": 2,
        "file": "strategies.jsonl",
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "count": 18,
        "trust": {"candidate": 13, "trusted": 5},
        "classes": 2,
        "models": ["org/m0", "org/m1", "org/m2"],
        "embedding_model": "hashed_words",
        "license": "cc-by-4.0",
        "trl_sgpo_version": export_files.__version__,
    }
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "strategies.jsonl"]


@given(text=st.text(st.characters(), min_size=1, max_size=60), name=st.text(st.characters(), max_size=20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_exchanged_as_it_is_or_left_out(tmp_path, text, name):
    strategy = Strategy(text, name, ("s0",), model=name)
    try:
        export_files.from_row(export_files.to_row(strategy, []))
    except ValueError as error:
        assert re.search("character", str(error)) or not text.strip()
        return
    export_files.write_export(tmp_path / "export", *export_files.make_export([(strategy, [])], "embedder"))
    assert read_export(tmp_path / "export")[0] == [strategy]


def test_rows_have_all_that_a_strategy_has():
    assert set(rows.FIELDS) == {"id", "executions", *(field.name for field in fields(Strategy))}
    assert set(rows.EXECUTION_FIELDS) == {field.name for field in fields(Execution)} - {"strategy_id"}


# Exports that are not made


def test_what_no_bank_would_import_is_left_out(bank, tmp_path, caplog):
    fine = make("fine")
    bank.add([fine, make("x" * 2_000), make("bell\a"), replace(make("odd"), parents=("x",))])
    assert [s.id for s in read_export(export_bank(bank, tmp_path / "export"))[0]] == [fine.id]
    assert len([record for record in caplog.records if "is left out of the export" in record.message]) == 3
    assert "a parent must be" in caplog.text and "4000 characters" in caplog.text and "'\\x07'" in caplog.text


def test_paths_on_this_machine_are_not_told(tmp_path):
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        bank.add([make("a", model="/home/someone/models/small"), make("b", model="org/large")])
        embed_with(bank, str(tmp_path / "embedder"))
        bank._store.ledger.set_embeddings(bank.embedding_model, np.zeros(256), {})
        directory = export_bank(bank, tmp_path / "export")
    strategies, _, manifest = read_export(directory)
    assert [s.model for s in strategies] == ["small", "org/large"] and manifest["models"] == ["org/large", "small"]
    assert manifest["embedding_model"] == "embedder"
    assert str(tmp_path) not in (directory / "manifest.json").read_text()


def test_an_export_replaces_an_earlier_one_and_nothing_else(source, tmp_path):
    stored = source.strategies()
    directory = export_bank(source, tmp_path / "export")
    (directory / "strategies.parquet").write_bytes(b"of an earlier version")
    (directory / ".strategies.jsonl.0.unfinished").symlink_to(tmp_path / "elsewhere")
    assert export_bank(source, directory, states=["trusted"]) == directory
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "strategies.jsonl"]
    assert {s.id for s in read_export(directory)[0]} == {s.id for s in stored if s.trust == "trusted"}
    assert not (tmp_path / "elsewhere").exists()
    for name in ("ledger.sqlite", ".git", "README.md"):
        (directory / name).write_text("mine")
        with pytest.raises(BankError, match=f"has '{name}' in it: name a directory for nothing but the export"):
            export_bank(source, directory)
        (directory / name).unlink()
    with pytest.raises(BankError, match="name a directory for nothing but the export"):
        export_bank(source, source.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match="cannot be written"):
        export_bank(source, tmp_path / "file")


def test_a_crash_leaves_no_export_that_could_be_imported(source, other, tmp_path, monkeypatch):
    directory, replaced = export_bank(source, tmp_path / "export", states=["trusted"]), []

    def crash_at_the_second(temporary, target):
        replaced.append(target.name)
        if len(replaced) == 2:
            raise OSError(28, "No space left on device")
        os.replace(temporary, target)

    monkeypatch.setattr(export_files, "durable_replace", crash_at_the_second)
    with pytest.raises(BankError, match="No space left on device"):
        export_bank(source, directory)
    assert replaced == ["strategies.jsonl", "manifest.json"]
    with pytest.raises(BankError, match="cut off or changed"):
        import_bank(other, directory)
    monkeypatch.undo()
    assert import_bank(other, export_bank(source, directory)).added == 18


def test_an_empty_bank_can_be_exchanged(bank, other, tmp_path):
    directory = export_bank(bank, tmp_path / "export")
    assert import_bank(other, directory) == ImportReport(added=0, known=0, near_copies=0, quarantined=0)


def test_arguments_that_cannot_be(source, tmp_path, monkeypatch):
    for arguments, message in [
        ({"license": "mit\ntags: [x]"}, "apache-2.0"),
        ({"states": ["good"]}, "candidate, trusted, retired, quarantine, got 'good'"),
    ]:
        with pytest.raises(BankError, match=message):
            export_bank(source, tmp_path / "export", **arguments)
    monkeypatch.setattr(export_files, "MAX_ROWS", 10)
    with pytest.raises(BankError, match=r"18 strategies.*up to 10.*fewer trust states"):
        export_bank(source, tmp_path / "export")
    assert not (tmp_path / "export").exists()


# Imports that are refused


def refuse(bank, directory, message):
    """Importing fails with one line that has the message in it, and leaves the bank as it was."""
    before = contents(bank)
    for keep_trust in (False, True):
        with pytest.raises(BankError, match=message) as error:
            import_bank(bank, directory, keep_trust=keep_trust)
        assert "\n" not in str(error.value) and str(error.value).isprintable()
    assert contents(bank) == before


ROWS = [
    ({"text": ""}, "text must have at least one"),
    ({"text": " \n\t"}, "text must have at least one"),
    ({"text": "x" * 4001}, "at most 4000 characters"),
    ({"text": "a\0b"}, "control character"),
    ({"text": "a\x1b[31mb"}, "control character"),
    ({"text": "a\rb"}, "control character"),
    ({"text": "a\ud800b"}, "control character"),
    ({"text": 5}, "text must have"),
    ({"problem_class": "a\nb"}, "problem_class must be a line"),
    ({"problem_class": "x" * 201}, "at most 200 characters"),
    ({"text": "1. Another strategy"}, "its id is not that"),
    ({"id": "0" * 16}, "its id is not that"),
    ({"id": None}, "its id is not that"),
    ({"model": "a\u2028b"}, "model must be a line"),
    ({"run": ["r"]}, "run must be a line"),
    ({"origin": {}}, "origin must be a line"),
    ({"trust": "admin"}, "trust must be one of"),
    ({"step": -1}, "step must be a whole number"),
    ({"step": True}, "step must be a whole number"),
    ({"step": 1.0}, "step must be a whole number"),
    ({"trials": 2**53 + 1}, "trials must be a whole number"),
    ({"shown": "3"}, "shown must be a whole number"),
    ({"successes": float("nan")}, "NaN is no JSON"),
    ({"solved": float("inf")}, "Infinity is no JSON"),
    ({"baseline": -0.5}, "baseline must be a number"),
    ({"successes": 1e6}, "successes and baseline must be finite and between 0 and the number of executions"),
    ({"trials": 1, "successes": 1}, "add up to more than its counts"),
    ({"problems": 8, "solved": 5}, "add up to more than its counts"),
    ({"source_problems": "s0"}, "source_problems must be a list"),
    ({"source_problems": ["../x y"]}, "a problem's id"),
    ({"source_problems": ["é"]}, "a problem's id"),
    ({"parents": ["f" * 15]}, "a parent must be 16 hexadecimal digits"),
    ({"parents": [["f" * 16]]}, "a parent must be 16 hexadecimal digits"),
    ({"parents": ["f" * 16] * 100_001}, "at most 100000 elements"),
    ({"executions": None}, "executions must be a list"),
    ({"executions": [[]]}, "an execution must be an object"),
    ({"executions": [{"problem": "p"}]}, "an execution lacks 'baseline'"),
    ({"extra": 1}, "the row has 'extra', which this format does not know"),
]


@pytest.mark.parametrize(("changes", "message"), ROWS)
def test_rows_that_are_refused(untouched, exported, changes, message):
    lines = (exported / "strategies.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | changes)
    seal(exported, "".join(line + "\n" for line in lines).encode())
    refuse(untouched, exported, f"strategies.jsonl is refused.* row 3: .*{re.escape(message)}.*export again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "no trial"),
        ({"successes": 2.5}, "more successes than trials"),
        ({"baseline": 9}, "more successes than trials"),
        ({"problem": "p0"}, "on the same problem"),
        ({"more": 1}, "does not know"),
    ],
)
def test_executions_that_are_refused(untouched, exported, changes, message):
    lines = (exported / "strategies.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["executions"][1] |= changes
    lines[0] = json.dumps(row)
    seal(exported, "".join(line + "\n" for line in lines).encode())
    refuse(untouched, exported, f"row 1: .*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "it has 17 lines, where its manifest counts 18"),
        (lambda lines: [*lines, lines[0]], "it has 19 lines"),
        (lambda lines: [*lines[:-1], lines[0]], "row 18: it has the id of an earlier one"),
        (lambda lines: [*lines, b"{}"], "its last line is cut off"),
        (lambda lines: [b"\n", *lines[1:]], "row 1: Expecting value"),
        (lambda lines: [b"[1]\n", *lines[1:]], "row 1: the row must be an object"),
        (lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], "row 1: "),
        (lambda lines: [lines[0].replace(b"s0one", b"s0\xffone"), *lines[1:]], "row 1: 'utf-8' codec"),
        (lambda lines: [lines[0].replace(b"s0one", b"s0\xed\xa0\x80one"), *lines[1:]], "row 1: 'utf-8' codec"),
        (lambda lines: [lines[0].replace(b'"step": 0', b'"step": 0, "step": 0'), *lines[1:]], "same key twice"),
        (lambda lines: [lines[0].replace(b'"step": 0', b'"step": ' + b"9" * 5000), *lines[1:]], "more than 20 digits"),
        (lambda lines: [lines[0].replace(b'"step": 0', b'"step": 1e999'), *lines[1:]], "not inf"),
        (lambda lines: [b"[" * 200_000 + b"\n", *lines[1:]], "row 1: it is nested too deeply"),
        (lambda lines: [b" " * (16 * 2**20) + lines[0], *lines[1:]], "row 1: it is longer than 16 MiB"),
        (lambda lines: [b"\x80\x04cos\nsystem\n.", *lines[2:]], "row 1: "),
    ],
)
def test_jsonl_that_is_refused(untouched, exported, change, message):
    lines = (exported / "strategies.jsonl").read_bytes().splitlines(keepends=True)
    seal(exported, b"".join(change(lines)))
    refuse(untouched, exported, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "its format is not"),
        ({"format_version": 3}, "has format version 3.*upgrade trl-sgpo"),
        ({"format_version": 0}, "format_version must be 1"),
        ({"format_version": "1"}, "format_version must be a whole number"),
        ({"file": "../export/strategies.jsonl"}, "file must be strategies.jsonl"),
        ({"file": "/etc/passwd"}, "file must be"),
        ({"file": "strategies.jsonl\0"}, "file must be"),
        ({"file": ["strategies.jsonl"]}, "file must be"),
        ({"file": "strategies.parquet"}, "an export in Parquet.*export the bank again as JSONL"),
        ({"sha256": "0" * 64}, "cut off or changed"),
        ({"sha256": "0" * 63}, "64 hexadecimal digits"),
        ({"size": 7}, "cut off or changed"),
        ({"size": 2**40}, "size must be at most"),
        ({"count": 17}, "it has 18 lines, where its manifest counts 17"),
        ({"count": 10**6}, "count must be at most 200000"),
        ({"trust": {"trusted": 18}}, "does not fit strategies.jsonl: trust"),
        ({"trust": [18]}, "trust must be an object"),
        ({"classes": 1}, "does not fit strategies.jsonl: classes"),
        ({"models": ["someone/else"]}, "does not fit strategies.jsonl: models"),
        ({"models": "x"}, "models must be a list"),
        ({"license": "a: b"}, "license must be"),
        ({"embedding_model": None}, "embedding_model must be a line"),
        ({"created": "now\nthen"}, "created must be a line"),
        ({"command": "rm"}, "has 'command', which this format does not know"),
    ],
)
def test_manifests_that_are_refused(untouched, exported, changes, message):
    seal(exported, **changes)
    refuse(untouched, exported, message)


def test_no_manifest_no_import(source, untouched, tmp_path, exported):
    manifest = exported / "manifest.json"
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"PK\x03\x04", b'{"format": NaN}'):
        manifest.write_bytes(content)
        refuse(untouched, exported, "manifest.json is no manifest of exported strategies")
    with manifest.open("wb") as file:
        file.truncate(2**20 + 1)
    refuse(untouched, exported, "at most 1048576 are read")
    manifest.unlink()
    refuse(untouched, exported, "manifest.json cannot be read: No such file.* export or a pull wrote")
    refuse(untouched, tmp_path / "missing", "There is no directory .*missing with an export")
    refuse(untouched, source.path, "cannot be read")


@pytest.mark.parametrize("name", ["manifest.json", "strategies"])
def test_only_regular_files_are_opened(untouched, tmp_path, exported, name):
    path = next(exported.glob(f"{name}*"))
    path.rename(tmp_path / "real")
    for make_path in (
        lambda: path.symlink_to(tmp_path / "real"),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/"),
    ):
        make_path()
        refuse(untouched, exported, f"{path.name} (cannot be read|is no regular file)")
        path.unlink()
    path.mkdir()
    refuse(untouched, exported, f"{path.name} (cannot be read|is no regular file)")


def test_other_files_are_not_opened(source, exported, monkeypatch):
    """Neither an index, nor a pickle, an archive or a pipe beside an export."""
    before, opened, really_open = read_export(exported), [], os.open
    (exported / "chroma").mkdir()
    (exported / "chroma" / "chroma.sqlite3").write_bytes(b"SQLite format 3")
    (exported / "strategies.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")
    os.mkfifo(exported / "strategies.zip")
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(Path(path).name) or really_open(path, *args))
    assert read_export(exported) == before
    assert opened == ["manifest.json", before[2]["file"]]


def test_files_beyond_the_limits_are_not_read(untouched, exported, monkeypatch):
    size = next(exported.glob("strategies*")).stat().st_size
    monkeypatch.setattr(export_files, "MAX_FILE_BYTES", size - 1)
    refuse(untouched, exported, f"size must be at most {size - 1}")
    seal(exported, size=1)
    refuse(untouched, exported, f"has {size} bytes, and at most {size - 1} are read")


def test_an_embedder_that_fails_leaves_the_bank_as_it_was(tmp_path, exported):
    def fails(texts):
        return hashed_words(texts) * (float("nan") if any("s9" in text for text in texts) else 1)

    with StrategyBank(tmp_path / "failing", fails) as failing:
        failing.add([make("mine")])
        refuse(failing, exported, "one finite vector a text")


def test_an_export_in_parquet_of_the_version_before(untouched, tmp_path):
    """The message names the fix. The same bank's export in JSONL is read."""
    with tarfile.open(Path(__file__).parent / "before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    before = tmp_path / "before"
    assert is_export(before / "parquet")
    refuse(untouched, before / "parquet", "is of an export in Parquet.*export the bank again as JSONL")
    assert len(read_export(before / "jsonl")[0]) == 7


# Fuzzing


def outcome(bank, directory):
    """Imports an export. Returns whether it was valid, having checked that it was, or that nothing was imported."""
    before = contents(bank)
    try:
        strategies, executions, manifest = read_export(directory)
    except BankError as error:
        with pytest.raises(BankError):
            import_bank(bank, directory)
        assert "\n" not in str(error) and contents(bank) == before
        return False
    data = (directory / manifest["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest["sha256"]
    assert len({s.id for s in strategies}) == len(strategies) == manifest["count"]
    for strategy in strategies:
        assert 0 < len(strategy.text) <= 4000 and "<|" not in strategy.text
        assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in strategy.text)
        assert 0 <= strategy.solved <= strategy.problems <= 2**53 and 0 <= strategy.successes <= strategy.trials
        assert all(len(name) <= 200 for name in (strategy.problem_class, strategy.model, strategy.run))
    assert {execution.strategy_id for execution in executions} <= {strategy.id for strategy in strategies}
    report = import_bank(bank, directory)
    assert report.added + report.known + report.near_copies + report.retired == len(strategies)
    assert all(bank.get(s.id).trust == "quarantine" for s in strategies if bank.get(s.id) is not None)
    return True


def test_malformed_exports_crash_nothing_and_import_nothing(bank, tmp_path):
    bank.add([make("mine", "algebra")])
    valid = 0
    for seed in range(SEEDS):
        malformed_export(seed, tmp_path / "export")
        valid += outcome(bank, tmp_path / "export")
        shutil.rmtree(tmp_path / "export")
    assert 0 < valid < SEEDS / 5


def test_malformed_exports_are_the_same_for_the_same_seed(tmp_path):
    for seed in range(20):
        directories = [tmp_path / f"{seed}-{copy}" for copy in range(2)]
        for directory in directories:
            malformed_export(seed, directory)
        first, second = (
            {path.name: path.is_file() and not path.is_symlink() and path.read_bytes() for path in directory.iterdir()}
            for directory in directories
        )
        for files in (first, second):
            files["manifest.json"] = re.sub(rb'"created": "[^"]*"', b"", files["manifest.json"])
        assert first == second


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
slow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(data=st.data())
@slow
def test_any_value_in_the_place_of_another(bank, source, tmp_path, data):
    directory = export_bank(source, tmp_path / "export")
    values = [json.loads(line) for line in (directory / "strategies.jsonl").read_text().splitlines()]
    row = data.draw(st.sampled_from(values))
    container = data.draw(st.sampled_from([row, *row["executions"]]))
    container[data.draw(st.sampled_from(sorted(container)))] = data.draw(json_values)
    seal(directory, "".join(json.dumps(row) + "\n" for row in values).encode())
    outcome(bank, directory)
    seal(
        directory,
        **{data.draw(st.sampled_from(["trust", "models", "count", "license", "file"])): data.draw(json_values)},
    )
    outcome(bank, directory)


@given(content=st.binary(max_size=300))
@slow
def test_any_bytes_in_the_place_of_strategies(bank, tmp_path, content):
    directory = export_bank(bank, tmp_path / "export")
    seal(directory, content)
    assert outcome(bank, directory) == (not content)


def test_nothing_heavy_is_loaded_before_it_is_needed():
    code = (
        "import sys; import trl_sgpo.bank.exchange, trl_sgpo.bank.hub, trl_sgpo.bank.shared; "
        "print(sorted({'pyarrow', 'huggingface_hub', 'datasets', 'torch', 'httpx', 'chromadb'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
