"""
Strategies that someone else wrote change nothing of what the bank's own strategies have earned, and a bank of someone
else names no folder to load.
"""

from pathlib import Path

import pytest
from bank_helpers import PROVEN, hashed_words, make

from trl_sgpo import StrategyBank
from trl_sgpo.bank.exchange import export_bank, import_bank
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
