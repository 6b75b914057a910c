"""Strategies that someone else wrote change nothing of what the bank's own strategies have earned."""

import pytest
from bank_helpers import PROVEN, hashed_words, make

from trl_sgpo import StrategyBank
from trl_sgpo.bank.exchange import export_bank, import_bank


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
