"""Figures of an evaluation, and chunks that survive."""

import itertools
import json
import math
import statistics

import pytest
from bank_helpers import hashed_words, make
from hypothesis import given, settings
from hypothesis import strategies as st
from models import problems

from trl_sgpo.bank import StrategyBank, problem_id
from trl_sgpo.data.tasks import answer_reward, same_answer
from trl_sgpo.errors import ConfigError
from trl_sgpo.evaluation.chunks import ChunkLog
from trl_sgpo.evaluation.runner import (
    Protocol,
    evaluate_suite,
    evaluate_ways,
    suite_texts,
    summarise_kinds,
    ways_texts,
)
from trl_sgpo.evaluation.statistics import (
    class_mean_estimate,
    derived_seed,
    majority_vote,
    pass_at_k,
    rate_estimate,
    wilson_interval,
)
from trl_sgpo.evaluation.suites import LoadedSuite, Suite
from trl_sgpo.evaluation.tables import tables, ways_table
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings


counts = st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(counts)
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(drawn):
    n, solved, k = drawn
    subsets = list(itertools.combinations([1] * solved + [0] * (n - solved), k))
    assert pass_at_k(n, solved, k) == pytest.approx(statistics.fmean(max(subset) for subset in subsets))


@given(counts)
def test_pass_at_k_grows(drawn):
    n, solved, k = drawn
    assert pass_at_k(n, solved, 1) == pytest.approx(solved / n)
    assert pass_at_k(n, solved, k) <= pass_at_k(n, solved, n) == float(solved > 0)
    assert pass_at_k(n, solved, k) <= pass_at_k(n, min(solved + 1, n), k)


answers = st.lists(st.none() | st.sampled_from(["1", "1.0", "$1$", "2", r"\frac{1}{2}", "0.5", "x"]), max_size=9)


@settings(deadline=None)
@given(answers)
def test_majority_is_the_largest_group_of_equal_answers(given_answers):
    chosen = majority_vote(given_answers, same_answer)
    cast = [answer for answer in given_answers if answer is not None]
    if not cast:
        assert chosen is None
        return
    votes = [sum(same_answer(other, answer) for other in cast) for answer in cast]
    winner = given_answers[chosen]
    assert sum(same_answer(other, winner) for other in cast) == max(votes)
    assert chosen == min(i for i, a in enumerate(given_answers) if a is not None and same_answer(a, winner))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_intervals_hold_their_estimate(values):
    rate = rate_estimate(values)
    assert rate.low <= rate.value + 1e-12 and rate.value <= rate.high + 1e-12 and rate.problems == len(values)
    low, high = wilson_interval(rate.value, len(values))
    assert (rate.low, rate.high) == (low, high)


def test_class_means_weigh_classes_equally_and_skip_nothing_else():
    values = [1.0] * 30 + [0.0, 0.0] + [math.nan]
    found = class_mean_estimate(values, ["a"] * 30 + ["b"] * 3)
    assert (found.value, found.problems) == (0.5, 32) and found.low < 0.1 and found.high > 0.9
    assert class_mean_estimate([math.nan], ["a"]) is None


def test_seeds_depend_on_every_part():
    seeds = {
        derived_seed(seed, f"suite/{name}/{chunk}", k)
        for seed in (1, 2)
        for name in "ab"
        for chunk in (0, 4)
        for k in (0, 1)
    }
    assert len(seeds) == 16


class Solver:
    """Stands in for a model: greedy attempts are right, sampled ones right where the seed and the problem say so."""

    settings = TwoPhaseSettings()

    def __init__(self):
        self.generated_tokens = 0
        self.seeds = []
        self.shown = []
        self.limits = []

    def write_strategies(self, given_problems, decoding):
        from trl_sgpo.method.prompts import parse_strategy

        self.seeds.append(decoding.seed)
        self.shown += [[s.text for s in problem.retrieved] for problem in given_problems]
        return [parse_strategy("" if "is 3 +" in problem.text else "Add both.") for problem in given_problems]

    def execute(self, given_problems, strategies, decoding):
        self.generated_tokens += 10 * len(given_problems)
        return [
            f"#### {problem.answer if decoding.greedy or (decoding.seed + i) % 2 else 'x'}"
            for i, problem in enumerate(given_problems)
        ]

    def answer(self, prompts, decoding, limit):
        self.limits.append(limit)
        self.generated_tokens += 5 * len(prompts)
        return ["no idea" for _ in prompts]


def loaded(size=7, name="sums"):
    return LoadedSuite(Suite(name, "here"), problems(size).to_list(), size)


def test_results_of_a_suite():
    protocol = Protocol(samples=4, chunk_size=3)
    result = evaluate_suite(Solver(), loaded(), answer_reward, protocol)
    assert result["accuracy"]["value"] == 1.0 and result["problems"] == 7 and result["unverified"] == 0
    assert set(result["classes"]) == {"kind-0", "kind-1"} and result["classes"]["kind-1"]["problems"] == 3
    assert result["generated_tokens"] == 7 * 5 * 10
    assert list(result["sampled"]["pass_at_k"]) == ["1", "2", "4"]
    assert result["sampled"]["pass_at_k"]["1"]["value"] == pytest.approx(result["sampled"]["accuracy"]["value"])
    assert 0 < result["sampled"]["accuracy"]["value"] < 1
    assert result["flawed_strategies"] == {"empty": 5}  # of one problem: one greedy and four sampled ones
    assert suite_texts(7, protocol) == 70


def test_a_plain_evaluation_writes_no_strategy():
    solver = Solver()
    result = evaluate_suite(solver, loaded(), answer_reward, Protocol(form="plain"))
    assert result["accuracy"]["value"] == 0.0 and not solver.seeds and result["generated_tokens"] == 35
    assert solver.limits == [None]


def test_a_two_phase_model_is_measured_in_three_ways(tmp_path):
    protocol, solver = Protocol(samples=2, chunk_size=4), Solver()
    keys = []

    def run(key, texts, compute, check):
        keys.append((key, texts))
        return compute()

    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add([make("others", "kind-1", trust="trusted")])
        found = evaluate_ways(solver, loaded(), answer_reward, protocol, bank, run)
        shown = [texts for texts in solver.shown if texts]
        without = evaluate_ways(Solver(), loaded(), answer_reward, protocol, plain=False)
        assert len(shown) == 3 * 3  # of one class and one pass
        with_bank = evaluate_suite(Solver(), loaded(), answer_reward, protocol, bank)
    assert {key: found[key] for key in with_bank} == with_bank
    assert found["bank"]["accuracy"] == found["own"]["accuracy"] == without["accuracy"] == without["own"]["accuracy"]
    assert found["own"]["sampled"] == without["sampled"]  # the same draws
    assert found["plain"]["accuracy"]["value"] == 0.0 and found["plain"]["sampled"]["accuracy"]["value"] == 0.0
    assert (found["plain"]["generated_tokens"], found["own"]["generated_tokens"]) == (7 * 3 * 5, 7 * 3 * 10)
    assert set(solver.limits) == {128 + 256} and not {"plain", "bank"} & without.keys()
    assert [key for key, _ in keys] == [f"{part}/sums/{i}" for part in ("suite", "own", "plain") for i in (0, 4)]
    assert sum(texts for _, texts in keys) == ways_texts(7, protocol, bank=True, plain=True) == 7 * 3 * 5
    assert ways_texts(7, protocol, bank=False, plain=False) == suite_texts(7, protocol)
    (table,) = [
        table for table in tables({"suites": {"sums": found}, "kinds": {}, "transfer": {}}) if "own" in table.title
    ]
    assert table.columns == ["accuracy", "plain", "own strategy", "bank"]
    assert [row[0] for row in table.rows] == ["sums, greedy", "sums, sampled"]
    assert table.rows[0][1:] == ["0.000 [0.000, 0.354]", *["1.000 [0.646, 1.000]"] * 2]
    assert ways_table({"sums": without}).rows[0][1:] == ["–", "1.000 [0.646, 1.000]", "–"]
    assert ways_table({"sums": with_bank}) is None  # an evaluation of an earlier version


def test_what_the_verifier_cannot_tell_is_counted_apart():
    def verifier(prompts, completions, **kwargs):
        return [None if "1" in prompt[0]["content"][7:] else 0.5 for prompt in prompts]

    result = evaluate_suite(Solver(), loaded(), verifier, Protocol())
    assert 0 < result["unverified"] < 7
    assert result["accuracy"]["problems"] == 7 - result["unverified"] and result["accuracy"]["value"] == 0.5


def test_kinds_pool_their_problems():
    right, wrong = (
        {"kind": "harder", "accuracy": {"value": value, "problems": n}} for value, n in ((1.0, 30), (0.0, 10))
    )
    nothing = {"kind": "in_distribution", "accuracy": None}
    kinds = summarise_kinds({"a": right, "b": wrong, "c": nothing})
    assert kinds["harder"]["value"] == 0.75 and kinds["harder"]["problems"] == 40 and kinds["in_distribution"] is None


def test_the_bank_shows_trusted_strategies_of_others(tmp_path):
    suite = loaded(4)
    own = problem_id(suite.rows[0]["prompt"])
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add(
            [
                make("mine", "kind-0", source=own, trust="trusted"),
                make("candidate", "kind-0"),
                make("others", "kind-1", trust="trusted"),
            ]
        )
        solver = Solver()
        evaluate_suite(solver, suite, answer_reward, Protocol(), bank)
    mine, others = "mine mineone minetwo minethree", "others othersone otherstwo othersthree"
    assert solver.shown == [[], [others], [mine], [others]]


def test_real_model_gives_the_same_twice(tiny):
    model = TwoPhaseModel.from_pretrained(
        tiny, TwoPhaseSettings(max_strategy_length=6, max_completion_length=6), batch_size=4
    )
    protocol = Protocol(samples=2, chunk_size=4)
    first, second, other = (
        evaluate_suite(model, loaded(6), answer_reward, chosen)
        for chosen in (protocol, protocol, Protocol(samples=2, chunk_size=4, seed=1))
    )
    assert json.dumps(first) == json.dumps(second)
    assert first["generated_tokens"] > 0 and other["accuracy"] == first["accuracy"]


def unchecked(value, place):
    pass


class TestChunkLog:
    def test_finished_chunks_are_not_computed_again(self, tmp_path):
        with ChunkLog(tmp_path, {"a": 1}, texts=4) as log:
            assert log.run("x", 2, lambda: {"rows": [1, 2.5, None]}, unchecked)["rows"] == [1, 2.5, None]
        with ChunkLog(tmp_path, {"a": 1}, texts=4) as log:
            assert log.run("x", 2, lambda: pytest.fail("computed again"), unchecked)["rows"] == [1, 2.5, None]

    def test_a_torn_last_line_is_dropped(self, tmp_path):
        with ChunkLog(tmp_path, {}, texts=4) as log:
            for key in "xyz":
                log.run(key, 1, lambda key=key: {"rows": [key * 30]}, unchecked)
        path = tmp_path / "rows.jsonl"
        whole = path.read_bytes()
        for cut in (1, 20, whole.count(b"") // 3):
            path.write_bytes(whole[:-cut])
            with ChunkLog(tmp_path, {}, texts=4) as log:
                assert set(log.done) < {"x", "y", "z"}
                for key in "xyz":
                    log.run(key, 1, lambda key=key: {"rows": [key * 30]}, unchecked)
            assert path.read_bytes() == whole

    @pytest.mark.parametrize("line", [b"\x00\n", b"[]\n", b"{}\n", b"\xff\n"])
    def test_a_damaged_line_is_told(self, tmp_path, line):
        with ChunkLog(tmp_path, {}, texts=1) as log:
            log.run("x", 1, lambda: {"rows": []}, unchecked)
        path = tmp_path / "rows.jsonl"
        path.write_bytes(line + path.read_bytes())
        with pytest.raises(ConfigError, match=r"is damaged .*`--overwrite`"):
            ChunkLog(tmp_path, {}, texts=1)
        assert path.read_bytes().startswith(line)

    def test_other_settings_are_refused(self, tmp_path):
        with ChunkLog(tmp_path, {"seed": 1, "form": "plain"}, texts=1) as log:
            log.run("x", 1, lambda: {"rows": []}, unchecked)
        with pytest.raises(ConfigError, match=r"other settings \(seed was 1, is 2\).*--output_dir.*--overwrite"):
            ChunkLog(tmp_path, {"seed": 2, "form": "plain"}, texts=1)
        with ChunkLog(tmp_path, {"seed": 2, "form": "plain"}, texts=1, overwrite=True) as log:
            assert not log.done
        (tmp_path / "settings.json").unlink()
        with pytest.raises(ConfigError, match=r"no settings\.json"):
            ChunkLog(tmp_path, {"seed": 2}, texts=1)
