"""What the bank stores, merges, evicts and finds."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from bank_helpers import EVERYONE, PROVEN, hashed_words, make

from trl_sgpo.bank import Execution, Outcome, Strategy, StrategyBank, problem_id
from trl_sgpo.bank.embedding import FINGERPRINT_TEXT
from trl_sgpo.errors import BankError


def test_round_trip(bank):
    strategy = make("isolate", parents=("p0", "p1"), model="m", run="r", step=7, origin="seed")
    assert bank.add([strategy]) == [strategy.id]
    bank.update([Outcome(strategy.id, "p9", 1.5, 2, baseline=0.5), Outcome("unknown", "p9", 1)])
    expected = replace(strategy, successes=1.5, trials=2, problems=1, solved=0.75, baseline=0.5)
    assert bank.get(strategy.id) == expected and expected.lift == 0.25
    bank.record([], [Outcome(strategy.id, "p9", 0, 1, baseline=0.2)], {strategy.id: 3, "unknown": 1})
    expected = replace(expected, trials=3, solved=0.5, baseline=bank.get(strategy.id).baseline, shown=3)
    assert expected.baseline == pytest.approx(0.4)
    assert bank.executions(strategy.id) == [Execution(strategy.id, "p9", "algebra", 3, 1.5, pytest.approx(1.2))]
    bank.close()
    with StrategyBank.restore(bank.path, hashed_words) as again:
        assert again.strategies() == [expected]
        assert len(again) == 1 and again.get("unknown") is None
        assert again.made_with == "hashed_words"


def test_an_exact_duplicate_adds_its_source_problems_only(bank):
    strategy = make("isolate", source="s0", successes=1, trials=2)
    bank.add([strategy])
    twin = Strategy(strategy.text.upper(), "algebra", ("s1", "s0"), successes=5, trials=5)
    assert bank.add([twin, twin]) == []
    assert bank.strategies() == [replace(strategy, source_problems=("s0", "s1"))]


def test_problems_it_was_written_for_do_not_count_for_trust(bank):
    """Also those that turn out to be so after it was executed on them."""
    strategy = make("isolate", source="s0")
    bank.record([strategy], [Outcome(strategy.id, name, 1, 1, baseline=0.5) for name in ("s0", "s1", "s2")])
    stored = bank.get(strategy.id)
    assert (stored.successes, stored.trials, stored.problems, stored.solved, stored.baseline) == (3, 3, 2, 2, 1)
    bank.add([make("isolate", source="s1")])
    stored = bank.get(strategy.id)
    assert (stored.successes, stored.trials, stored.problems, stored.solved, stored.baseline) == (3, 3, 1, 1, 0.5)
    bank.update([Outcome(strategy.id, "s1", 0, 1, baseline=1)])
    assert (bank.get(strategy.id).trials, bank.get(strategy.id).problems) == (4, 1)


def verified(strategy, n, outcome, baseline=0.5, first=0):
    return [Outcome(strategy.id, f"x{i}", outcome, 1, baseline=baseline) for i in range(first, first + n)]


def test_trust_follows_executions_on_distinct_problems(bank):
    """Imports rise from quarantine, harmful ones are retired and stay so, and trust falls with the bound."""
    good, bad, repeated = make("good", trust="quarantine"), make("bad"), make("repeated")
    bank.add([good, bad, repeated])
    bank.update(verified(good, 3, 1) + verified(bad, 3, 0) + 40 * verified(repeated, 3, 1))
    assert [bank.get(s.id).trust for s in (good, bad, repeated)] == ["quarantine", "candidate", "candidate"]
    bank.update(verified(good, 4, 1, first=3) + verified(bad, 9, 0, first=3))
    assert [bank.get(s.id).trust for s in (good, bad)] == ["trusted", "retired"]
    assert [hit.strategy.id for hit in bank.retrieve([good.text], exclude=[set()])[0]] == [good.id]

    bank.update(verified(good, 6, 0, baseline=0.9, first=7))
    assert bank.get(good.id).trust == "candidate" and bank.retrieve([good.text], exclude=[set()]) == [[]]
    bank.close()
    with StrategyBank(bank.path, hashed_words) as again:
        assert [again.get(s.id).trust for s in (good, bad)] == ["candidate", "retired"]
        assert again.add([make("bad", source="s7")]) == [] and again.get(bad.id).trust == "retired"


def test_trust_is_lost_with_the_executions_it_came_from(bank):
    """A strategy written again for three of the problems it was executed on keeps one of the four it needs."""
    strategy = make("isolate")
    bank.record([strategy], verified(strategy, 4, 1, baseline=0.1))
    assert (bank.get(strategy.id).problems, bank.get(strategy.id).trust) == (4, "trusted")
    bank.add([make("isolate", source=f"x{i}") for i in range(3)])
    assert (bank.get(strategy.id).problems, bank.get(strategy.id).trust) == (1, "candidate")


def test_trust_is_lost_in_a_merge_that_takes_its_executions(bank, tmp_path):
    strategy = make("isolate")
    bank.record([strategy], verified(strategy, 4, 1, baseline=0.1))
    with StrategyBank(tmp_path / "theirs", hashed_words) as theirs:
        theirs.add([make("isolate", source=f"x{i}") for i in range(3)])
        bank.merge(theirs.strategies(), [])
    assert bank.get(strategy.id).trust == "candidate"


@pytest.mark.parametrize("claimed", ["trusted", "candidate"])
def test_merged_strategies_have_the_state_that_their_executions_support(bank, claimed):
    proven = make("proven", **PROVEN | {"trust": claimed})
    weak = make("weak", **PROVEN | {"trust": claimed, "solved": 9})
    bank.merge([proven, weak], [])
    assert [bank.get(s.id).trust for s in (proven, weak)] == ["trusted", "candidate"]


def test_states_of_an_earlier_version_are_computed_again_at_the_first_commit_of_outcomes(bank):
    proven, weak, other = make("proven", **PROVEN), make("weak", **PROVEN), make("other")
    bank.add([proven, weak, other])
    bank.close()
    with closing(sqlite3.connect(bank.path / "ledger.sqlite")) as ledger, ledger:
        ledger.execute("UPDATE strategies SET solved = 9 WHERE id = ?", (weak.id,))
        ledger.execute("UPDATE strategies SET trust = 'candidate' WHERE id = ?", (proven.id,))
    with StrategyBank(bank.path, hashed_words) as again:
        again.add([make("imported", trust="quarantine")])
        assert [again.get(s.id).trust for s in (proven, weak)] == ["candidate", "trusted"]
        again.update(verified(other, 1, 1))
        assert [again.get(s.id).trust for s in (proven, weak)] == ["trusted", "candidate"]
    with StrategyBank(bank.path, hashed_words, min_problems=21) as strict:
        strict.update(verified(other, 1, 1))
        assert strict.get(proven.id).trust == "candidate"


def test_near_copies_are_skipped_within_a_class(bank):
    text = " ".join(f"word{i}" for i in range(20))
    first, copy, elsewhere = (Strategy(t, c, ()) for t, c in [(text, "a"), (text + " more", "a"), (text + " x", "b")])
    assert bank.add([first, copy, elsewhere]) == [first.id, elsewhere.id]
    assert bank.add([copy]) == []
    assert bank.get(copy.id) is None


def test_empty_text_is_refused_and_nothing_is_stored(bank):
    with pytest.raises(BankError, match="without text"):
        bank.add([make("isolate"), Strategy(" \n", "algebra", ())])
    assert len(bank) == 0


def test_capacity_is_per_class(tmp_path):
    with StrategyBank(tmp_path, hashed_words, capacity_per_class=2) as bank:
        bank.add([make("gone", "old", step=1), make("kept", "old", step=2)])
        weak, fine, new = make("weak"), make("fine", successes=3, trials=3), make("new", step=9)
        bank.add([weak, fine])
        assert bank.record([new], [Outcome(weak.id, "s0", 0, 4)]) == [new.id]
        assert {s.id for s in bank.strategies() if s.problem_class == "algebra"} == {fine.id, new.id}
        assert sum(s.problem_class == "old" for s in bank.strategies()) == 2
        retired = bank.get(weak.id)
        assert retired is not None and (retired.trust, retired.trials) == ("retired", 4)
        assert retired in bank.retired()
        assert weak.id not in {hit.strategy.id for hit in bank.retrieve([weak.text], k=9, trust=EVERYONE)[0]}
        # Worse than what the class holds: it is on record, but not new in the bank
        assert bank.add([make("bad", successes=0, trials=9)]) == []
        assert len(bank) == 4


def test_an_evicted_strategy_returns_with_its_counts(tmp_path):
    with StrategyBank(tmp_path, hashed_words, capacity_per_class=1) as bank:
        first, second = make("first", step=1), make("second", step=2)
        bank.add([first])
        assert bank.add([second]) == [second.id]
        bank.record([], [Outcome(second.id, "s0", 0, 2), Outcome(first.id, "s0", 1)])
        assert bank.add([make("first", source="s1")]) == [first.id]
        assert bank.strategies() == [replace(first, successes=1, trials=1, source_problems=("s0", "s1"))]
        assert [hit.strategy.id for hit in bank.retrieve([first.text], trust=EVERYONE)[0]] == [first.id]


def test_retrieval_ranks_by_similarity_and_utility(bank):
    known = {"trust": "trusted", "trials": 10, "problems": 9, "solved": 9}
    good = Strategy("sum the digits then check the first remainder", "a", (), successes=9, **known)
    bad = Strategy("sum the digits then check the second quotient", "a", (), successes=0, **known)
    bank.add([bad, good, make("far", "a")])
    hits = bank.retrieve(["sum the digits then check"], k=2)[0]
    assert [hit.strategy.id for hit in hits] == [good.id, bad.id]
    expected = float(bank.embed(["sum the digits then check"])[0] @ bank.embed([good.text])[0])
    assert hits[0].similarity == pytest.approx(expected, abs=1e-5)
    assert hits[0].score == pytest.approx(expected * 10 / 12, abs=1e-5)
    assert bank.retrieve(["sum the digits then check"], k=2)[0] == hits


def test_a_problem_never_sees_its_own_strategies(bank):
    problem = "isolate the unknown"
    own = [
        Strategy(f"isolate the unknown by way {i} of{i}", "a", (problem_id(problem),), trust="trusted")
        for i in range(40)
    ]
    other = Strategy("quite another thing", "a", (problem_id("another"),), trust="trusted")
    bank.add([*own, other])
    assert len(bank) > 30
    assert [hit.strategy for hit in bank.retrieve([problem], k=3, classes=["a"])[0]] == [other]
    assert other not in [hit.strategy for hit in bank.retrieve([problem], k=3, exclude=[{problem_id("another")}])[0]]


def test_classes(bank):
    near = [make(f"alike{i}", "near", trust="trusted") for i in range(30)]
    far = make("stranger", "far", trust="trusted")
    bank.add([*near, far])
    problems = [near[0].text, near[1].text]
    found = bank.retrieve(problems, k=2, classes=["far", "near"])
    assert [hit.strategy for hit in found[0]] == [far]
    assert found[1][0].strategy == near[1] and len(found[1]) == 2
    assert bank.retrieve(problems, k=1, classes=["far", "far"], cross_class=True)[0][0].strategy == near[0]
    assert bank.retrieve(problems, classes=["none", "none"]) == [[], []]
    with pytest.raises(ValueError):
        bank.retrieve(problems, classes=["far"])


@pytest.mark.parametrize("state", EVERYONE)
def test_who_is_shown_where(bank, state):
    """Trusted ones everywhere, candidates in training, quarantined ones nowhere; all are tried."""
    strategy = make("imported", trust=state)
    bank.add([strategy])
    shown = {
        "in use": bank.retrieve([strategy.text])[0],
        "in training": bank.retrieve([strategy.text], trust=("trusted", "candidate"), explore=0)[0],
    }
    assert {where for where, hits in shown.items() if hits} == {
        "trusted": {"in use", "in training"},
        "candidate": {"in training"},
        "quarantine": set(),
    }[state]
    assert bank.best(1) == ([] if state == "quarantine" else [strategy])
    assert bank.sample("algebra", 1, seed=0) == [strategy]


def test_training_explores_and_is_repeatable(bank):
    strategies = [make(f"alike way{i}", trust="trusted") for i in range(6)]
    bank.add(strategies)
    problems = [f"alike problem {i}" for i in range(40)]

    def first(seed):
        return [hits[0].strategy.id for hits in bank.retrieve(problems, k=1, explore=seed)]

    assert first(1) == first(1) != first(2)
    assert len(set(first(1))) > 3
    assert bank.retrieve(problems, k=2) == bank.retrieve(problems, k=2)


def test_no_strategy_is_shown_more_than_its_share(bank):
    """Beyond the first 16 times, and as long as there are others."""
    best = make("alike best", **PROVEN | {"successes": 500, "trials": 500})
    bank.add([best, *(make(f"alike way{i}", **PROVEN | {"successes": 0, "trials": 500}) for i in range(9))])
    problems = [f"alike problem {i}" for i in range(100)]
    hits = [hits[0].strategy.id for hits in bank.retrieve(problems, k=1, explore=0)]
    assert 20 <= hits.count(best.id) <= 26
    bank.record([], (), {best.id: 1000})
    assert best.id not in [hits[0].strategy.id for hits in bank.retrieve(problems, k=1, explore=0)]
    assert bank.retrieve(problems[:1], k=1)[0][0].strategy.id == best.id
    alone = make("alone", "other", trust="trusted", shown=1000)
    bank.add([alone])
    assert bank.retrieve(["x"], k=1, classes=["other"], explore=0)[0][0].strategy == alone


def test_merging_banks(tmp_path):
    """Strategies, counts and trust of both; merging again changes nothing."""
    shared, theirs = make("shared"), make("theirs")
    with StrategyBank(tmp_path / "a", hashed_words) as a, StrategyBank(tmp_path / "b", hashed_words) as b:
        a.record([shared], verified(shared, 3, 1))
        b.record([make("shared", source="s5"), theirs], verified(shared, 9, 1, first=1) + verified(theirs, 6, 1))
        executions = [execution for s in b.strategies() for execution in b.executions(s.id)]
        assert a.merge(b.strategies(), executions) == [theirs.id]
        merged = {s.id: s for s in a.strategies()}
        assert merged[theirs.id] == b.get(theirs.id) and merged[theirs.id].trust == "trusted"
        assert (merged[shared.id].problems, merged[shared.id].trials) == (10, 10)
        assert merged[shared.id].source_problems == ("s0", "s5") and merged[shared.id].trust == "trusted"
        assert a.merge(b.strategies(), executions) == []
        assert {s.id: s for s in a.strategies()} == merged
        assert a.damage() == []


def test_an_empty_bank_loads_no_embedder(tmp_path):
    def explode(texts):
        raise AssertionError

    with StrategyBank(tmp_path, explode) as bank:
        assert bank.retrieve(["a", "b"]) == [[], []]
        assert bank.sample("algebra", 2, seed=0) == [] and bank.best(3) == [] and len(bank) == 0
        bank.update([Outcome("unknown", "x", 1)])


def test_sampling(bank):
    strategies = [make(f"s{i}", source=f"p{i}", successes=10 * (i == 3), trials=10) for i in range(6)]
    bank.add([*strategies, make("other", "geometry")])
    assert bank.sample("algebra", 4, seed=1) == bank.sample("algebra", 4, seed=1)
    first = [bank.sample("algebra", 1, seed=seed)[0].id for seed in range(20)]
    assert first.count(strategies[3].id) > 15
    drawn = bank.sample("algebra", 9, seed=0, exclude={"p3"})
    assert {s.id for s in drawn} == {s.id for s in strategies} - {strategies[3].id}
    assert bank.best(1) == [strategies[3]]


def test_most_trials_go_to_strategies_that_are_not_trusted_yet(bank):
    proven = [make(f"proven{i}", **PROVEN) for i in range(3)]
    untried = [make(f"untried{i}", trust="quarantine") for i in range(3)]
    bank.add([*proven, *untried])
    tried = [strategy.trust for seed in range(200) for strategy in bank.sample("algebra", 1, seed=seed)]
    assert 130 <= tried.count("quarantine") <= 170
    assert {s.id for s in bank.sample("algebra", 6, seed=0)} == {s.id for s in (*proven, *untried)}


def test_retired_by_hand(bank):
    strategies = [make(f"s{i}", trust="trusted") for i in range(3)]
    bank.add(strategies)
    bank.retire([strategies[1].id])
    assert bank.get(strategies[1].id).trust == "retired" and len(bank) == 2
    assert strategies[1].id not in {h.strategy.id for h in bank.retrieve([strategies[1].text], trust=EVERYONE)[0]}
    assert bank.damage() == []
    with pytest.raises(BankError, match="has no strategy nothing"):
        bank.retire([strategies[0].id, "nothing"])
    assert len(bank) == 2


def test_problem_embeddings_are_computed_once(tmp_path):
    seen: list[str] = []

    def counting(texts):
        seen.extend(texts)
        return hashed_words(texts)

    with StrategyBank(tmp_path, counting) as bank:
        first = bank.embed(["one two", "three", "three"])
        np.testing.assert_array_equal(bank.embed(["three", "one two"]), first[[1, 0]])
        assert seen == [FINGERPRINT_TEXT, "one two", "three"]
        assert first.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-6)


def test_importing_the_bank_is_light():
    code = "import sys, trl_sgpo.bank; print(*{'chromadb', 'torch', 'sentence_transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
