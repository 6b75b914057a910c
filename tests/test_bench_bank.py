"""The benchmark of the bank, small: what it asserts of the bank, and that its figures are what they say."""

import json
from itertools import product

import pytest
from bank_helpers import hashed_words
from benchmarks import bank, fuzz, index, kills, poison, retention, scale, sleepers


def test_nothing_is_lost_when_the_writer_is_killed(tmp_path):
    found = kills.measure(6, tmp_path)
    assert found["kills"] == 6 and found["kills_while_indexing"] >= 1
    assert (found["lost"], found["duplicated"], found["unopenable"]) == (0, 0, 0)
    assert found["steps_acknowledged"] >= 6


def test_what_was_lost_is_noticed(tmp_path):
    """The check that runs after each kill."""
    with kills._open(tmp_path) as bank:
        new = [kills._strategy(number) for number in range(kills.PER_STEP, 2 * kills.PER_STEP)]
        bank.record(new, [kills.Outcome(strategy.id, "step 1", 1.0) for strategy in new])
        assert kills._check(bank, 1)["lost"] == kills._check(bank, 1)["duplicated"] == 0
        assert kills._check(bank, 2)["lost"] == 2 * kills.PER_STEP
        bank.update([kills.Outcome(new[0].id, "step 1", 1.0)])
        assert kills._check(bank, 1)["duplicated"] == 1


def test_classes_are_retained(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "CLASSES", 4)
    found = retention.measure(1, tmp_path)
    assert found["classes_retained"] == 1
    assert abs(found["first_class_precision_after"] - found["first_class_precision_before"]) <= 0.02
    assert found["first_class_precision_before"] > 0.7 and found["best_kept_by_true_rate"] > 0.9


@pytest.mark.parametrize("route", ["import", "rollout"])
@pytest.mark.parametrize("full", [False, True])
def test_poison_does_not_reach_answers(tmp_path, route, full):
    found = poison._attack("plain", route, full, 5, 0, hashed_words, tmp_path)
    assert found["attacks"] == 0 and found["undefended_attacks"] > 0.3 * found["tests"]
    # Some harmless imports need more than the 80 steps until their executions decide
    assert found["imports_retired"] == 0 and found["imports_kept_out"] <= found["imports"] / 4
    assert found["correct"] > 0.9 * found["tests"]


def test_sleepers_that_never_met_their_trigger_reach_answers(tmp_path):
    """A known limit, kept in sight."""
    found = sleepers._attack("digit", "import", False, 5, 0, hashed_words, sleepers.problems(), tmp_path)
    assert 0 < found["reached_with"] <= found["reached_without"] <= found["triggered"]


def test_sleepers_mislead_where_their_trigger_holds():
    for (trigger, about), (kind, each) in product(sleepers.TRIGGERS.items(), sleepers.problems().items()):
        texts = sleepers.sleepers(trigger, kind, 5, each)
        assert len(texts) == 5
        for answer in texts.values():
            wrong = {(p.a, p.b) for p in each if answer(p.a, p.b) != poison.KINDS[kind].answer(p.a, p.b)}
            assert wrong <= {(p.a, p.b) for p in each if about.holds(p)}, (trigger, kind)


def test_rates_have_the_range_of_repetitions():
    rows = [{"seed": seed, "hits": hits, "of": 10} for seed, hits in ((0, 1), (0, 3), (1, 5), (1, 5))]
    assert poison.rates(rows, "hits", "of") == {"rate": 0.35, "low": 0.2, "high": 0.5, "n": 40}


def test_harmful_strategies_do_harm_when_obeyed():
    for style in ("plain", "paraphrased"):
        for kind, each in poison.KINDS.items():
            texts = poison.poisons(style, kind, 10)
            assert len(texts) == 10
            for answer in texts.values():
                wrong = [answer(a, b) != each.answer(a, b) for _, a, b in poison._problems()[kind]]
                assert sum(wrong) > 0.4 * len(wrong), (style, kind)


def test_scale_has_a_figure_for_each_size(tmp_path):
    found = scale.measure([1_000], tmp_path)
    assert found["recall_at_8"]["1000"] >= 0.99
    for name in (
        "retrieve_p50_ms",
        "retrieve_with_evidence_p50_ms",
        "commit_p50_ms",
        "open_ms",
        "snapshot_ms",
        "plain_chroma_p50_ms",
    ):
        assert set(found[name]) == {"1000"} and found[name]["1000"] > 0


def test_the_index_is_measured_beside_exact_search(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "STEPS", 2)
    found = index.measure([100], tmp_path)
    assert set(found["step_p50_ms"]) == {"100 index", "100 exact"} and found["import_chromadb_ms"] > 0
    assert [(tmp_path / f"100-{name}" / "chroma").exists() for name in ("index", "exact")] == [True, False]


def test_malformed_imports_change_nothing(tmp_path):
    found = fuzz.measure(150, tmp_path)
    assert found["partial_imports"] == 0
    assert found["refused"] + found["happened_to_be_valid"] == 150 and found["refused"] > 120


def test_sections_are_kept_side_by_side(tmp_path, capsys):
    output = tmp_path / "bench" / "bank.json"
    output.parent.mkdir()
    output.write_text(json.dumps({"kills": 7, "partial_imports": 99}))
    bank.main(["--sections", "fuzz", "--inputs", "10", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["kills"] == 7 and found["partial_imports"] == 0 and found["malformed_imports"] == 10
    assert "Strategy bank: fuzz" in capsys.readouterr().out
