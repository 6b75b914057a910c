"""A bank that is empty."""

import pytest
from bank_helpers import hashed_words

from trl_sgpo.bank import StrategyBank


@pytest.fixture
def bank(tmp_path):
    with StrategyBank(tmp_path / "bank", hashed_words) as bank:
        yield bank
