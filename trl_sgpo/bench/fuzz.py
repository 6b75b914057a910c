"""Imports files that are not what they should be."""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..bank import StrategyBank
from ..bank.exchange import import_bank
from ..bank.fuzz import malformed_export
from ..errors import BankError
from .synthetic import Clusters, made_up


def measure(inputs: int, directory: Path) -> dict[str, Any]:
    """
    Imports malformed exports into a bank. Anything but a [`BankError`] or an intact import ends the benchmark.

    Args:
        inputs (`int`):
            How many.
        directory (`Path`):
            An empty directory.

    Returns:
        `dict`: How many were `refused`, how many happened to be valid, and `partial_imports`.
    """
    outcomes = Counter[str]()
    start = time.perf_counter()
    with StrategyBank(directory / "bank", Clusters(8)) as bank:
        bank.add([made_up(number, "class") for number in range(8)])
        before = {strategy.id: strategy for strategy in bank.strategies()}
        for seed in tqdm(range(inputs), desc="Malformed imports"):
            source = directory / "export"
            malformed_export(seed, source)
            try:
                import_bank(bank, source)
                outcomes["valid"] += 1
                bank.clear()
                bank.add(before.values())
            except BankError:
                outcomes["refused"] += 1
                outcomes["partial"] += {strategy.id: strategy for strategy in bank.strategies()} != before
            shutil.rmtree(source)
    return {
        "malformed_imports": inputs,
        "refused": outcomes["refused"],
        "happened_to_be_valid": outcomes["valid"],
        "partial_imports": outcomes["partial"],
        "fuzz_seconds": time.perf_counter() - start,
    }
