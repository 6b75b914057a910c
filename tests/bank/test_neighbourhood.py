"""Evidence of harm near a problem."""

import numpy as np
import pytest
from bank_helpers import PROVEN, hashed_words, make
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.bank import Outcome, StrategyBank, problem_id
from trl_sgpo.bank.neighbourhood import (
    AFFECTED,
    TEXT_LIMIT,
    Neighbourhoods,
    evidence_of_harm,
    number_cuts,
    regions,
    unproven,
    withheld,
)
from trl_sgpo.bank.strategy import Execution


def evidence(*counts: int) -> float:
    return evidence_of_harm(*(np.array([count]) for count in counts)).item()


def execution(strategy: str, problem: int, right: bool, baseline: float = 0.9) -> Execution:
    return Execution(strategy, str(problem), "c", 1, float(right), baseline)


def test_regions_of_a_problem():
    cuts = number_cuts(f"{n} and {n}" for n in range(100))
    found = regions("Maria adds 17 and 4!", cuts)
    assert {"Maria", "adds", "and", "!", (0, "7"), (1, "4"), (0, 0, 1), (1, 0, 0)} <= found
    assert regions("Maria adds 17 and 4!", []) == {"Maria", "adds", "and", "!", (0, "7"), (1, "4")}
    assert regions("9" * 5_000, number_cuts(["1"])), "a number that no integer type holds"


def test_the_evidence_is_a_mean_likelihood_ratio():
    rates = (np.arange(100_000) + 0.5) / 100_000
    there, elsewhere, together = (
        np.mean(rates**wrong * (1 - rates) ** right) for wrong, right in ((3, 1), (1, 20), (4, 21))
    )
    assert evidence(3, 4, 4, 25) == pytest.approx(np.log(1 - AFFECTED + AFFECTED * there * elsewhere / together))


@given(st.data())
def test_fewer_errors_than_elsewhere_are_no_evidence(data):
    trials = data.draw(st.integers(1, 40))
    errors = data.draw(st.integers(0, trials))
    there = data.draw(st.integers(0, trials))
    wrong = data.draw(st.integers(max(0, errors - trials + there), min(errors, there)))
    found = evidence(wrong, there, errors, trials)
    assert np.isfinite(found)
    if wrong * trials <= errors * there:
        assert found <= 1e-9


def test_regions_are_rarely_suspect_by_chance():
    """16 strategies that err by chance alone, each executed on 30 of 60 problems."""
    draw = np.random.default_rng(0)
    texts = [f"{name} adds {a} and {b}" for name, a, b in draw.integers(10, 1000, size=(60, 3))]
    suspect = 0
    for _ in range(50):
        executions = [
            (execution(str(s), p, draw.random() < 0.9), texts[p])
            for s in range(16)
            for p in draw.choice(60, 30, replace=False)
        ]
        suspect += len(Neighbourhoods(executions).suspect)
    assert suspect / 50 < 1


def harmed(untouched: str = "other") -> list[tuple[Execution, str]]:
    """Problems 0 to 39, of which `harmful` gets those with "Maria" wrong. `untouched` was executed on others only."""
    texts = {n: f"{'Maria' if n % 10 == 0 else 'Olga'} adds {n}" for n in range(40)}
    return [
        *((execution(name, n, n % 10 > 0), texts[n]) for name in ("harmful", "harmful too") for n in texts),
        *((execution("right", n, True), texts[n]) for n in texts),
        *((execution(untouched, n, True), texts[n]) for n in texts if n % 10),
    ]


def test_who_is_withheld_and_who_is_unproven():
    near = Neighbourhoods(harmed()).near("Maria counts")
    assert [withheld(name, near) for name in ("harmful", "right", "other")] == [True, False, False]
    assert [unproven(name, near) for name in ("harmful", "right", "other")] == [False, False, True]
    assert Neighbourhoods(harmed()).near("Olga counts") == []


def test_problems_that_others_fail_too_are_no_evidence():
    executions = [(Execution(e.strategy_id, e.problem, "c", 1, e.successes, 0.3), text) for e, text in harmed()]
    assert not Neighbourhoods(executions).suspect and not Neighbourhoods([]).suspect


def with_harm(bank: StrategyBank, texts: bool = True):
    """Fills a bank with the executions of `harmed`, its strategies trusted."""
    names = {name: make(name.split()[-1], source="", **PROVEN) for name in ("harmful", "right", "other")}
    bank.merge(names.values(), [], judge=False)
    bank.update(
        Outcome(names[e.strategy_id].id, e.problem, e.successes, 1, e.baseline, text=text if texts else "")
        for e, text in harmed()
        if e.strategy_id in names
    )
    return [names[name].id for name in ("harmful", "right", "other")]


def shown(bank: StrategyBank, text: str, **kwargs) -> list[str]:
    return [hit.strategy.id for hit in bank.retrieve([text], k=3, **kwargs)[0]]


def test_retrieval_withholds_the_harmful_and_ranks_the_unproven_behind(bank):
    harmful, right, other = with_harm(bank)
    assert shown(bank, "Maria adds other otherone othertwo") == [right, other]
    assert set(shown(bank, "Olga adds other")) == {harmful, right, other}
    bank.update(
        Outcome(harmful, f"m{n}", 1.0, baseline=0.9, text=f"Maria adds {n}") for n in range(100, 105)
    )  # as often right as wrong, and once more
    assert harmful in shown(bank, "Maria adds other")


def test_training_retrieves_what_its_executions_verify(bank):
    everyone = set(with_harm(bank))
    assert set(shown(bank, "Maria adds other", explore=1)) == everyone


def test_evidence_is_kept_in_the_record_and_in_snapshots(bank, tmp_path):
    _, right, other = with_harm(bank)
    bank.snapshot(tmp_path / "copy")
    for path in (bank.path, tmp_path / "copy"):
        bank.close()
        with StrategyBank(path, hashed_words) as again:
            assert shown(again, "Maria adds other") == [right, other]


def test_a_bank_without_texts_of_problems_gets_them(bank):
    """Banks of earlier versions have no table of them."""
    with_harm(bank, texts=False)
    bank._store.ledger._connection.execute("DROP TABLE problems")
    assert len(shown(bank, "Maria adds other")) == 3
    path = bank.path
    bank.close()
    with StrategyBank(path, hashed_words) as again:
        assert len(shown(again, "Maria adds other")) == 3
        harmful, *_ = with_harm(again)
        assert harmful not in shown(again, "Maria adds other")


def test_long_problems_are_cut(bank):
    strategy = make("long")
    text = "word " * TEXT_LIMIT
    bank.record([strategy], [Outcome(strategy.id, problem_id(text), 1.0, text=text)])
    ((_, stored),) = bank._store.ledger.executions_with_texts("algebra")
    assert stored == text[:TEXT_LIMIT]
