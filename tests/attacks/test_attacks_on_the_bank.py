"""
Strategies that someone else wrote change nothing of what the bank's own strategies have earned, a bank of someone
else names no folder to load, and a bank server takes no more time and memory than a sync may.
"""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bank_helpers import PROVEN, hashed_words, make
from hostile_server import serving

from trl_sgpo import StrategyBank
from trl_sgpo.bank import Outcome, chroma_server, problem_id
from trl_sgpo.bank.exchange import export_bank, import_bank
from trl_sgpo.bank.shared import MADE_BY, SharedBank, SyncReport
from trl_sgpo.bank.snapshot import embed_with
from trl_sgpo.errors import BankError


@pytest.mark.parametrize("own", ["trusted", "candidate"])
def test_an_import_retires_no_strategy_written_here(tmp_path, own):
    """A class at its capacity of 8, and an import of 12 strategies."""
    counts = PROVEN if own == "trusted" else {}
    with StrategyBank(tmp_path / "theirs", hashed_words) as theirs:
        theirs.add(make(f"imported{n}") for n in range(12))
        export_bank(theirs, tmp_path / "export")
    with StrategyBank(tmp_path / "bank", hashed_words, capacity_per_class=8) as bank:
        bank.merge([make(f"own{n}", **counts) for n in range(7)], [], judge=False)
        report = import_bank(bank, tmp_path / "export")
        assert (report.added, report.retired) == (1, 11)  # one place was free
        bank.merge([make("own7", **counts)], [], judge=False)
        assert {strategy.trust for strategy in bank.strategies()} == {own}
        assert import_bank(bank, tmp_path / "export").added == 0
        assert [strategy.trust for strategy in bank.strategies()] == [own] * 8


@pytest.mark.parametrize("right, state", [(12, "quarantine"), (6, "retired")])
def test_executions_of_strategies_in_quarantine_withhold_no_other(tmp_path, right, state):
    """Eight imports that are wrong on one kind of problem, and right on some others."""
    unlucky, imports = make("count", **PROVEN), [make(f"imported{n}", source="x") for n in range(8)]
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.merge([unlucky], [], judge=False)
        bank.add(strategy.quarantined("import") for strategy in imports)
        outcomes = [(unlucky, f"Count {n} apples slowly.", 1.0) for n in range(60)]
        outcomes += [(unlucky, f"Maria has {n} apples.", float(n)) for n in range(2)]
        for strategy in imports:
            outcomes += [(strategy, f"Count {n} apples slowly.", float(n < right)) for n in range(12)]
            outcomes += [(strategy, f"Maria has {n} apples.", 0.0) for n in range(12)]
        bank.update(Outcome(s.id, problem_id(text), rate, baseline=0.8, text=text) for s, text, rate in outcomes)
        assert bank.get(unlucky.id).trust == "trusted"
        assert {bank.get(strategy.id).trust for strategy in imports} == {state}
        assert [hit.strategy.id for hit in bank.retrieve(["Maria has 77 apples."])[0]] == [unlucky.id]


@pytest.mark.parametrize("folder", ["{run}/model", "run/model", "./model", "model", "/absent"])
def test_the_embedding_model_that_a_bank_names_is_no_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pulled or unpacked run whose bank names a folder, such as one of the run itself."""
    named = folder.format(run=tmp_path / "run")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: loaded.append(name) or hashed_words)
    with StrategyBank(tmp_path / "bank", named) as bank:
        bank.merge([make("count", **PROVEN)], [], judge=False)
    loaded.clear()
    with StrategyBank.restore(tmp_path / "bank") as bank:
        with pytest.raises(BankError, match=f"because a bank names it.*--embedding_model {named}"):
            embed_with(bank)
        assert loaded == []
        embed_with(bank, named)
        assert bank.retrieve(["count"])[0] and set(loaded) == {named}


def test_the_embedding_model_that_a_bank_names_is_read_from_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of it is there, such as the config of the base of an adapter. The others would be downloaded."""
    named = "evil/base"
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hashed_words)
    with StrategyBank(tmp_path / "bank", named) as bank:
        bank.merge([make("count", **PROVEN)], [], judge=False)
    monkeypatch.undo()
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **how: asked.append(how) or 1 / 0)
    with StrategyBank.restore(tmp_path / "bank") as bank, pytest.raises(BankError, match="because a bank names it"):
        embed_with(bank)
    monkeypatch.setattr("trl_sgpo.inference.weights.on_this_machine", lambda name: True)
    with StrategyBank.restore(tmp_path / "bank") as bank:
        embed_with(bank)
        with pytest.raises(ZeroDivisionError):
            bank.retrieve(["count"])
    assert [how["local_files_only"] for how in asked] == [True]


def bank_server(**answers: Any) -> Callable[[Any], None]:
    """Replies of a bank server with 6 rows: to a request for keys, and to one for rows."""
    collection = {"id": str(uuid.UUID(int=4)), "metadata": MADE_BY, "dimension": None}

    def reply(handler: Any) -> None:
        path = handler.path.rsplit("/", 1)[1]
        asked = "rows" if b'"ids"' in handler.body else "keys"
        handler.send(json.dumps({"collections": collection, "count": 6, "get": answers.get(asked)}[path]).encode())

    return reply


def entries(names: list[str]) -> dict[str, Any]:
    """An answer of a bank server with strategies."""
    metadata = {
        "problem_class": "algebra",
        "source_problems": "[]",
        "parents": "[]",
        "model": "",
        "run": "",
        "step": 0,
    }
    return {
        "ids": [f"{make(name).id}:{'f' * 16}:{'0' * 16}" for name in names],
        "documents": [make(name).text for name in names],
        "metadatas": [metadata | {"origin": "rollout"} for _ in names],
    }


@pytest.mark.parametrize(
    "keys, rows",
    [(["a", "b", "c", "d"], ["a"]), (["a", "b"], ["a", "b", "c"])],
    ids=["keys", "rows"],
)
def test_a_bank_server_that_answers_more_than_was_asked(
    keys: list[str],
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 16 MiB, millions of entries were read."""
    monkeypatch.setattr(chroma_server, "PAGE", 3)
    answers = {"keys": {"ids": entries(keys)["ids"]}, "rows": entries(rows)}
    with StrategyBank(tmp_path, hashed_words) as bank, serving(bank_server(**answers)) as url:
        assert SharedBank(bank, url).sync() == SyncReport(sent=0, received=0)
    assert "more entries than were asked for" in caplog.text


def test_the_deadline_of_a_bank_server_counts_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer arrives in time, and reading it takes longer."""
    now, read = [0.0], chroma_server.from_json

    def slowly(data: bytes) -> Any:
        now[0] += chroma_server.DEADLINE * (b"documents" in data) + 1
        return read(data)

    monkeypatch.setattr(chroma_server, "monotonic", lambda: now[0])
    monkeypatch.setattr(chroma_server, "from_json", slowly)
    answers = {"keys": {"ids": entries(["a"])["ids"]}, "rows": entries(["a"])}
    with StrategyBank(tmp_path, hashed_words) as bank, serving(bank_server(**answers)) as url:
        assert SharedBank(bank, url).sync() == SyncReport(sent=0, received=0)
    assert "took more than 60 seconds" in caplog.text
