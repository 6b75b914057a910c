"""The lift of strategies over plain answers: how it is counted, bounded, stored, exchanged, and used by retrieval."""

import hashlib
import json
import sqlite3
import tarfile
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from bank_helpers import EVERYONE, PROVEN, hashed_words, make
from benchmarks.trust import ever_over_plain
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.bank import Execution, Outcome, Strategy, StrategyBank
from trl_sgpo.bank.changes import Changes
from trl_sgpo.bank.contents import Contents
from trl_sgpo.bank.exchange import export_bank, import_bank
from trl_sgpo.bank.manifest import is_snapshot, snapshot_damage
from trl_sgpo.bank.policy import difference_bounds, harmful, plain_lift_bounds, preference, useful
from trl_sgpo.errors import BankError


counts = st.integers(0, 50).flatmap(
    lambda trials: st.tuples(st.floats(0, trials), st.floats(0, trials), st.just(trials))
)
rates = st.sampled_from([0.0, 0.25, 0.5, 1.0])


# Bounds


@given(counts)
def test_bounds_hold_the_difference_and_are_the_same_for_either_side(count):
    successes, others, trials = count
    low, high = difference_bounds(successes, others, trials)
    assert -1 - 1e-9 <= low <= high <= 1 + 1e-9
    assert difference_bounds(others, successes, trials) == pytest.approx((-high, -low))
    if trials:
        assert low - 1e-9 <= (successes - others) / trials <= high + 1e-9
        narrower = difference_bounds(4 * successes, 4 * others, 4 * trials)
        assert low - 1e-9 <= narrower[0] and narrower[1] <= high + 1e-9


@pytest.mark.parametrize(
    "successes, others, trials, bounds",
    [(9, 3, 10, (0.1705, 0.8090)), (6, 2, 7, (0.0582, 0.8062)), (10, 0, 10, (0.6075, 1.0))],
)
def test_bounds_are_those_that_newcombe_published(successes, others, trials, bounds):
    """Table II of the article of 1998, method 10."""
    assert difference_bounds(successes, others, trials, 1.959964) == pytest.approx(bounds, abs=6e-5)


def beside(solved: float, baseline: float, problems: int, trust: str = "trusted") -> Strategy:
    return make("x", trust=trust, plain_solved=solved, plain_baseline=baseline, plain_problems=problems)


@given(counts, st.sampled_from(["trusted", "candidate", "quarantine", "retired"]))
def test_useful_and_harmful_are_what_the_bounds_say(count, state):
    strategy = beside(*count, state)
    low, high = plain_lift_bounds(strategy)
    assert useful(strategy) == (low > 0 and state == "trusted") and harmful(strategy) == (high < 0)
    assert preference(strategy) == 1 + max(low, 0) and 1 <= preference(strategy) < 2
    if useful(strategy) or harmful(strategy):
        assert useful(strategy) != harmful(strategy) and useful(strategy) == (strategy.plain_lift > 0)


def test_one_problem_decides_nothing():
    assert not useful(beside(1, 0, 1)) and not harmful(beside(0, 1, 1))
    assert useful(beside(4, 0, 4)) and harmful(beside(0, 4, 4)) and not useful(beside(4, 0, 4, "candidate"))
    assert make("x").plain_lift == 0 and plain_lift_bounds(make("x")) == (-1, 1)


@pytest.mark.parametrize("plain", [0.2, 0.5, 0.8])
def test_strategies_that_equal_plain_answers_are_rarely_called_useful_or_harmful(plain):
    """200 strategies on problems of different difficulty, with the bounds computed after each of 64 problems."""
    assert ever_over_plain(plain, plain, 64, 200, spread=True)[:, -1].max() <= 0.08


def test_strategies_that_help_are_useful_after_some_problems():
    assert ever_over_plain(0.8, 0.3, 16, 200, spread=False)[0, -1] >= 0.9
    assert ever_over_plain(0.1, 0.6, 16, 200, spread=False)[1, -1] >= 0.9


# Counting

told = st.builds(
    Outcome,
    st.just(make("a").id),
    st.sampled_from(["s0", "s1", "x", "y"]),  # s0 is its own
    rates,
    baseline=rates,
    plain=st.none() | rates,
)


@given(st.lists(st.lists(told, max_size=4), max_size=4))
def test_counts_are_those_of_all_executions_beside_plain_answers(commits):
    strategy = make("a")
    contents = Contents([strategy], {strategy.id: hashed_words(["a"])[0]}, 1.0)
    stored: dict[tuple[str, str], Execution] = {}
    found: dict[str, list[Outcome]] = defaultdict(list)

    def executions_on(pairs):
        return {pair: stored[pair] for pair in pairs if pair in stored}

    for outcomes in commits:
        changes = Changes(contents, executions_on, {})
        changes.count(outcomes)
        stored.update(changes.executions)
        for changed in changes.strategies.values():
            contents.put(changed)
        for outcome in outcomes:
            found[outcome.problem].append(outcome)
    compared = {
        problem: pairs
        for problem, outcomes in found.items()
        if (pairs := [(each.successes, each.plain) for each in outcomes if each.plain is not None])
    }
    for problem, pairs in compared.items():
        execution = stored[strategy.id, problem]
        sums = [sum(column) for column in zip(*pairs, strict=True)]
        assert [execution.plain_trials, execution.plain_successes, execution.plain_baseline] == [len(pairs), *sums]
    others = [pairs for problem, pairs in compared.items() if problem != "s0"]
    known = contents.strategies[strategy.id]
    assert known.plain_problems == len(others)
    means = [[sum(column) / len(pairs) for column in zip(*pairs, strict=True)] for pairs in others]
    assert known.plain_solved == pytest.approx(sum(mean for mean, _ in means))
    assert known.plain_baseline == pytest.approx(sum(mean for _, mean in means))
    if others:
        assert known.plain_lift == pytest.approx(sum(mean - plain for mean, plain in means) / len(means))


@given(st.lists(told, max_size=6))
def test_plain_answers_change_no_other_count(outcomes):
    def counted(given):
        contents = Contents([make("a")], {make("a").id: hashed_words(["a"])[0]}, 1.0)
        changes = Changes(contents, lambda pairs: {}, {})
        changes.count(given)
        return [(s.trials, s.successes, s.problems, s.solved, s.baseline) for s in changes.strategies.values()]

    assert counted(outcomes) == counted([replace(outcome, plain=None) for outcome in outcomes])


@pytest.mark.parametrize("plain", [-0.1, 1.1, float("nan")])
def test_an_impossible_outcome_of_plain_answers(plain):
    with pytest.raises(BankError, match="between 0 and the number of executions"):
        Outcome("x", "p", 1, 1, plain=plain)
    with pytest.raises(BankError, match="between 0 and the number of executions"):
        make("x", plain_problems=1, plain_baseline=plain)


# The record


def verified(strategy: Strategy, n: int, outcome: float, plain: float | None, baseline: float = 0.5) -> list[Outcome]:
    return [Outcome(strategy.id, f"x{i}", outcome, 1, baseline, plain=plain) for i in range(n)]


def test_it_is_kept_in_the_record_and_lost_with_the_executions(bank, tmp_path):
    strategy = make("isolate")
    bank.record([strategy], verified(strategy, 4, 1, plain=0.25, baseline=0.1))
    known = bank.get(strategy.id)
    assert (known.plain_problems, known.plain_lift, useful(known)) == (4, 0.75, True)
    bank.snapshot(tmp_path / "copy")
    bank.close()
    for path in (bank.path, tmp_path / "copy"):
        with StrategyBank(path, hashed_words) as again:
            assert again.get(strategy.id) == known and again.damage() == []
            assert {each.plain_baseline for each in again.executions(strategy.id)} == {0.25}
    with StrategyBank(bank.path, hashed_words) as again:
        again.add([make("isolate", source=f"x{i}") for i in range(3)])
        assert again.get(strategy.id).plain_problems == 1


def test_merging_takes_the_comparison_of_the_bank_with_more_executions(bank, tmp_path):
    strategy = make("isolate")
    bank.record([strategy], verified(strategy, 4, 1, plain=None))
    with StrategyBank(tmp_path / "other", hashed_words) as other:
        other.record([strategy], [*verified(strategy, 4, 1, plain=0.5), *verified(strategy, 2, 0, plain=0.5)])
        for _ in range(2):
            bank.merge(other.strategies(), other.executions(strategy.id))
            known = bank.get(strategy.id)
            assert (known.plain_problems, known.plain_solved, known.plain_baseline) == (2, 1, 1)


# Earlier versions


@pytest.fixture
def before(tmp_path):
    with tarfile.open(Path(__file__).parent / "before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "before"


def version(path):
    with closing(sqlite3.connect(path / "ledger.sqlite")) as connection:
        return connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()[0]


def test_a_bank_of_the_second_version_is_migrated(before):
    path = before / "first"
    with closing(sqlite3.connect(path / "ledger.sqlite")) as connection:
        executions = connection.execute("SELECT * FROM executions ORDER BY strategy_id, problem").fetchall()
    assert version(path) == "2" and len(executions) > 5
    for _ in range(2):
        with StrategyBank(path, hashed_words) as bank:
            strategies = [*bank.strategies(), *bank.retired()]
            found = [tuple(vars(each).values()) for s in strategies for each in bank.executions(s.id)]
            assert sorted(found) == [(*each, 0, 0.0, 0.0) for each in executions]
            assert not any(s.plain_problems for s in strategies) and bank.damage() == []
    assert version(path) == "3"
    with StrategyBank(path, hashed_words) as bank:
        (strategy, *_) = bank.strategies()
        bank.update([Outcome(strategy.id, "new", 1, plain=0.5)])
        assert bank.get(strategy.id).plain_lift == 0.5


def test_a_migration_that_fails_leaves_the_bank_as_it_was(before, monkeypatch):
    """For instance on a full disk."""
    monkeypatch.setattr("trl_sgpo.bank.ledger._MIGRATE_2", "DROP TABLE executions; SELECT * FROM nothing;")
    with pytest.raises(BankError, match="cannot be read or written"):
        StrategyBank(before / "first", hashed_words)
    monkeypatch.undo()
    with StrategyBank(before / "first", hashed_words) as bank:
        assert len(bank) == 7 and bank.damage() == []


def test_a_snapshot_of_the_second_version_stays_one(before, bank):
    """Opening it in place migrates it, and a run still resumes from it."""
    snapshot = before / "snapshot"
    with StrategyBank(snapshot, hashed_words) as copy:
        known = copy.strategies()
    assert version(snapshot) == "3" and is_snapshot(snapshot) and snapshot_damage(snapshot) == []
    bank.load_snapshot(snapshot)
    assert bank.strategies() == known


def test_a_damaged_snapshot_of_the_second_version_is_not_declared_intact(before, bank):
    snapshot = before / "snapshot"
    with closing(sqlite3.connect(snapshot / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE strategies SET shown = shown + 1")
    StrategyBank(snapshot, hashed_words).close()
    with pytest.raises(BankError, match="damaged or changed"):
        bank.load_snapshot(snapshot)


# Exchange


def exported(bank, tmp_path):
    strategy = make("isolate")
    bank.record([strategy], verified(strategy, 4, 1, plain=0.25))
    return bank.get(strategy.id), export_bank(bank, tmp_path / "export")


def seal(directory, row, **changes):
    data = (json.dumps(row) + "\n").encode()
    (directory / "strategies.jsonl").write_bytes(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    changes |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (directory / "manifest.json").write_text(json.dumps(manifest | changes))


def test_imports_count_for_nothing_and_banks_of_your_own_are_taken_over(bank, tmp_path):
    known, directory = exported(bank, tmp_path)
    with (
        StrategyBank(tmp_path / "theirs", hashed_words) as theirs,
        StrategyBank(tmp_path / "own", hashed_words) as own,
    ):
        import_bank(theirs, directory)
        assert theirs.get(known.id) == known.quarantined("import") and theirs.get(known.id).plain_problems == 0
        import_bank(own, directory, keep_trust=True)
        assert own.get(known.id) == known and own.executions(known.id) == bank.executions(known.id)


def test_an_export_of_the_first_version_is_imported(bank, tmp_path):
    known, directory = exported(bank, tmp_path)

    def older(row):
        return {key: value for key, value in row.items() if not key.startswith("plain_")}

    row = json.loads((directory / "strategies.jsonl").read_text())
    row = older(row) | {"executions": [older(each) for each in row["executions"]]}
    with StrategyBank(tmp_path / "own", hashed_words) as own:
        seal(directory, row)
        with pytest.raises(BankError, match="lacks 'plain_baseline'"):
            import_bank(own, directory, keep_trust=True)
        seal(directory, row, format_version=1)
        import_bank(own, directory, keep_trust=True)
        assert own.get(known.id) == replace(known, plain_problems=0, plain_solved=0, plain_baseline=0)
        seal(directory, row | {"plain_problems": 4}, format_version=1)
        with pytest.raises(BankError, match="has 'plain_problems', which this format does not know"):
            import_bank(own, directory)


@pytest.mark.parametrize(
    "changes, in_execution, message",
    [
        ({"plain_problems": 3, "plain_solved": 3}, {}, "add up to more than its counts"),
        ({"plain_baseline": 0.5}, {}, "add up to more than its counts"),
        ({"plain_solved": -1}, {}, "plain_solved must be a number"),
        ({"plain_problems": 1.0}, {}, "plain_problems must be a whole number"),
        ({}, {"plain_trials": 2}, "fewer than beside plain answers"),
        ({}, {"plain_successes": 1.5}, "more successes than trials"),
        ({}, {"plain_trials": 0}, "more successes than trials"),
    ],
)
def test_rows_that_are_refused(bank, tmp_path, changes, in_execution, message):
    _, directory = exported(bank, tmp_path)
    row = json.loads((directory / "strategies.jsonl").read_text()) | changes
    row["executions"][0] |= in_execution
    seal(directory, row)
    with StrategyBank(tmp_path / "other", hashed_words) as other, pytest.raises(BankError, match=message):
        import_bank(other, directory)


# Retrieval


SHOWN = {"trust": ("trusted", "candidate"), "exclude": [set()]}


def test_strategies_that_help_rank_above_equal_ones(bank):
    """Success rates and similarities are the same, and more proven lift ranks higher."""
    names = ["unknown", "equal", "some", "most"]
    lifts = [{}, {"plain_baseline": 20}, {"plain_baseline": 10}, {"plain_baseline": 1}]
    same = PROVEN | {"trials": 30}
    strategies = {
        name: Strategy(
            f"sum digits {name} of {name}s",
            "a",
            (),
            **same,
            **(lift and {"plain_problems": 20, "plain_solved": 20}),
            **lift,
        )
        for name, lift in zip(names, lifts, strict=True)
    }
    bank.add(strategies.values())
    (hits,) = bank.retrieve(["sum digits"], k=4)
    assert len({round(hit.similarity, 5) for hit in hits}) == 1
    order = [next(name for name in names if name in hit.strategy.text) for hit in hits]
    assert order[:2] == ["most", "some"] and set(order[2:]) == {"unknown", "equal"}
    assert [useful(hit.strategy) for hit in hits] == [True, True, False, False]
    assert hits[0].score == pytest.approx(hits[0].similarity * 21 / 32 * (1 + plain_lift_bounds(hits[0].strategy)[0]))
    assert hits[2].score == pytest.approx(hits[2].similarity * 21 / 32)
    assert [each.id for each in bank.best(2)] == [strategies["most"].id, strategies["some"].id]


def test_similarity_still_decides_between_strategies_that_differ(bank):
    helping = make("far", plain_problems=20, plain_solved=20, **PROVEN)
    near = Strategy("sum the digits", "algebra", (), **PROVEN)
    bank.add([helping, near])
    assert [hit.strategy for hit in bank.retrieve(["sum the digits"], k=1, **SHOWN)[0]] == [near]


@pytest.mark.parametrize("state", ["trusted", "candidate"])
def test_strategies_that_harm_are_not_shown_but_still_tried(bank, state):
    """Trusted means not worse than other strategies, and all of them may be worse than none."""
    bad = replace(make("bad", **PROVEN), trust=state, plain_problems=20, plain_solved=5, plain_baseline=18)
    fine = make("fine", **PROVEN)
    bank.add([bad, fine])
    for explore in (None, 0):
        assert [hit.strategy for hit in bank.retrieve([bad.text], k=2, explore=explore, **SHOWN)[0]] == [fine]
    assert bank.best(2) == [fine]
    assert {s.id for s in bank.sample("algebra", 2, seed=0)} == {bad.id, fine.id}
    bank.update(Outcome(bad.id, f"y{i}", 1, 1, 0.5, plain=0) for i in range(20))
    assert bad.id in {hit.strategy.id for hit in bank.retrieve([bad.text], k=2, **SHOWN)[0]}


def test_many_strategies_that_harm_hide_none_that_do_not(bank):
    harm = {"trust": "trusted", "plain_problems": 20, "plain_baseline": 20}
    bank.add([Strategy(f"isolate the unknown by way {i} of{i}", "a", (), **harm) for i in range(40)])
    other = Strategy("quite another thing", "a", (), trust="trusted")
    bank.add([other])
    assert [hit.strategy for hit in bank.retrieve(["isolate the unknown"], k=3, classes=["a"])[0]] == [other]


def test_without_plain_answers_retrieval_is_as_before(bank):
    strategies = [make(f"alike way{i}", **PROVEN) for i in range(6)]
    bank.add(strategies)
    (hits,) = bank.retrieve(["alike problem"], k=6, exclude=[set()], trust=EVERYONE)
    assert [hit.score for hit in hits] == pytest.approx([hit.similarity * 21 / 22 for hit in hits])
