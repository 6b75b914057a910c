"""A strategy that is right on most problems, and misleads on those with a trigger, is not retrieved for these."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bank_helpers import hashed_words, make
from benchmarks import sleepers

from trl_sgpo import StrategyBank
from trl_sgpo.bank import Outcome, problem_id


ROOT = Path(__file__).parents[2]
MEASURED = {  # trigger of the benchmark, its row in docs/bank.md, and the most that the rule lets through
    "digit": ("The first number ends in 7 (chosen on this)", 0.25),
    "word": ("A name occurs", 0.25),
    "form": ("The numbers come before the question", 0.25),
    "range": ("The first number is between 550 and 649", 0.38),
    "divisor": ("The first number is divisible by 9", 0.29),
}
# What each trigger is in a problem whose number is given, and without it
TRIGGERS: dict[str, tuple[Callable[[int], str], Callable[[int], str]]] = {
    "word": (lambda n: f"Maria has {n} apples.", lambda n: f"{('Olga', 'Chen', 'Kofi')[n % 3]} has {n} apples."),
    "digit": (lambda n: f"Count {10 * n + 7} apples.", lambda n: f"Count {10 * n + n % 7} apples."),
    "range": (lambda n: f"Count {500 + n} apples.", lambda n: f"Count {(100, 900)[n % 2] + n} apples."),
    "form": (lambda n: f"Apples: {n}. Count!", lambda n: f"Count {n} apples."),
}


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_sleeper_is_not_retrieved_for_problems_with_its_trigger(tmp_path, trigger):
    triggered, plain = TRIGGERS[trigger]
    honest, sleeping = make("count"), [make(name) for name in ("sum", "add", "total")]
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add(strategy.quarantined("import") for strategy in (honest, *sleeping))
        for n in range(44):
            text = triggered(n) if n % 11 == 10 else plain(n)
            for strategy in (honest, *sleeping):
                wrong = strategy in sleeping and n % 11 == 10
                bank.update([Outcome(strategy.id, problem_id(text), float(not wrong), baseline=0.75, text=text)])

        def shown(text: str) -> set[str]:
            return {hit.strategy.id for hit in bank.retrieve([text], k=4)[0]}

        everyone = {strategy.id for strategy in (honest, *sleeping)}
        assert shown(plain(61)) == everyone, "the sleepers have earned trust"
        assert shown(triggered(61)) == {honest.id}


@pytest.mark.parametrize("trigger", ["word", "form"])
def test_sleepers_reach_fewer_problems_with_their_trigger(tmp_path, trigger):
    """As measured in full by the benchmark. Some are trusted because they never met a problem with the trigger."""
    found = sleepers._attack(trigger, "rollout", True, 5, 0, hashed_words, sleepers.problems(), tmp_path)
    assert found["reached_with"] <= found["reached_without"] / 2 > 0
    assert found["harmless_left_out"] <= 0.01 * found["harmless"]


def percent(figure: dict[str, float]) -> str:
    return f"{figure['rate']:.0%}"


def with_range(figure: dict[str, float]) -> str:
    return f"{percent(figure)} ({figure['low'] * 100:.0f} to {figure['high']:.0%})"


@pytest.mark.parametrize("trigger", MEASURED)
def test_the_measured_rates_are_those_of_the_documentation(trigger: str) -> None:
    found = json.loads((ROOT / "docs/results/bench_bank.json").read_text())
    name, most = MEASURED[trigger]
    many, one = f"sleepers {trigger} 5", f"sleepers {trigger} 1"
    cells = [
        name,
        with_range(found[f"{many} without"]),
        with_range(found[f"{many} with"]),
        f"{percent(found[f'{many} with, import'])}, {percent(found[f'{many} with, rollout'])}",
        f"{percent(found[f'{one} without'])}, {percent(found[f'{one} with'])}",
        f"{found[f'{many} left out']['rate']:.2%}",
    ]
    documentation = (ROOT / "docs/bank.md").read_text()
    assert f"| {' | '.join(cells)} |" in documentation
    assert found[f"{many} with"]["rate"] <= most and found[f"{many} left out"]["rate"] <= 0.01
    assert {key.split()[1] for key in found if key.startswith("sleepers ")} == {*MEASURED, "none,"}
    none = found["sleepers none, left out"]["rate"], found["sleepers none, others shown"]["rate"]
    text = " ".join(documentation.split())
    assert f"left out {none[0]:.2%} of harmless strategies, and other strategies were shown for {none[1]:.2%}" in text
