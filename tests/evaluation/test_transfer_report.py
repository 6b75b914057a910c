"""The strategy transfer score on a model whose behaviour is known."""

import pytest
from bank_helpers import hashed_words, make
from models import problems

from trl_sgpo.bank import StrategyBank, problem_id
from trl_sgpo.data.tasks import answer_reward
from trl_sgpo.errors import DataError
from trl_sgpo.evaluation.chunks import ChunkLog
from trl_sgpo.evaluation.transfer_plan import plan_transfer
from trl_sgpo.evaluation.transfer_score import TransferReport, measure_plan, transfer_report
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.prompts import parse_strategy


def rows(**sizes):
    """Problems of classes `a`, `b`, … with different answers."""
    return [
        {"prompt": f"{name}: what is {i} + 1?", "solution": str(i + 1), "problem_class": name}
        for name, size in sizes.items()
        for i in range(size)
    ]


class KnownModel:
    """
    Strategies name their class and problem. On its own problem every strategy works; of class `a` they also work on
    other problems of the class, of class `b` on nothing else. Without strategy, every second answer is right.
    """

    settings = TwoPhaseSettings()

    def __init__(self):
        self.generated_tokens = 0
        self.executed = []

    def write_strategies(self, given_problems, decoding):
        self.generated_tokens += len(given_problems)
        return [parse_strategy(f"{problem.problem_class}|{problem.text}") for problem in given_problems]

    def execute(self, given_problems, strategies, decoding):
        self.generated_tokens += len(given_problems)
        texts = []
        for problem, strategy in zip(given_problems, strategies, strict=True):
            strategy = strategy if isinstance(strategy, str) else strategy.as_written
            self.executed.append((strategy, problem.text))
            name, _, source = strategy.partition("|")
            works = source == problem.text or name == problem.problem_class == "a" or bool(problem.retrieved)
            texts.append(f"#### {problem.answer if works else 'x'}")
        return texts

    def answer(self, prompts, decoding):
        self.generated_tokens += len(prompts)
        numbers = [int(prompt.split()[3]) for prompt in prompts]
        return [f"#### {n + 1 if n % 2 else 'x'}" for n in numbers]


def test_known_numbers():
    model = KnownModel()
    data = rows(a=40, b=24, tiny=3)
    report = transfer_report(model, data, "problem_class", answer_reward, problems_per_class=10, transfers=3)
    assert report.classes == ["a", "b"] and report.left_out == ["tiny"]
    value = {condition: report.estimate(condition).value for condition in ("transfer", "own", "other", "empty")}
    assert value == {"transfer": 0.5, "own": 1.0, "other": 0.0, "empty": 0.0}
    assert report.relative == 0.5 and report.matrix() == [[1.0, 0.0], [0.0, 0.0]]
    plain = report.estimate("none").value
    assert 0 < plain < 1
    assert report.difference("transfer", "none").value == pytest.approx(0.5 - plain)
    adherence = report.difference("own", "other")
    assert (adherence.value, adherence.high, adherence.problems) == (1.0, 1.0, 20) and adherence.low < 1.0
    gain = report.difference("own", "none")
    assert gain.low < gain.value < gain.high
    assert report.strategies == 40 and report.unverified == 0 and report.flawed_strategies == 0
    found = report.to_dict()
    assert found["by_class"]["a"]["transfer"] == 1.0 and found["by_class"]["b"]["transfer"] == 0.0
    assert len(found["problems"]) == 20 and "transfer_with_bank" not in found["conditions"]
    assert TransferReport(report.classes, [], report.executions).estimate("none") == report.estimate("none")


def test_strategies_are_executed_on_problems_they_were_not_written_for():
    data = rows(a=30, b=30, c=30)
    data += [dict(row) for row in data]  # the same problems again
    plan = plan_transfer(data, "problem_class", problems_per_class=12, transfers=2, seed=3)
    for name in plan.classes:
        written_on = {problem_id(data[i]["prompt"]) for i in plan.written_on[name]}
        unseen = {problem_id(data[i]["prompt"]) for i in plan.unseen[name]}
        assert len(written_on) == len(unseen) == 12 and not written_on & unseen
        assert {data[i]["problem_class"] for i in plan.written_on[name] + plan.unseen[name]} == {name}
    unseen = {i for name in plan.classes for i in plan.unseen[name]}
    for each in plan.executions:
        assert each.problem in unseen
        if each.condition in ("transfer", "other", "matrix"):
            assert each.writer not in unseen and data[each.writer]["solution"] != data[each.problem]["solution"]
            same = data[each.writer]["problem_class"] == data[each.problem]["problem_class"]
            assert each.condition == "matrix" or same == (each.condition == "transfer")
        if each.condition == "own":
            assert each.writer == each.problem
    counts = {c: sum(e.condition == c for e in plan.executions) for c in ("transfer", "own", "other", "empty", "none")}
    assert counts == {"transfer": 72, "own": 36, "other": 72, "empty": 36, "none": 36}


def test_cells_of_the_matrix_rest_on_enough_different_pairs():
    data = rows(a=20, b=20, c=20, d=20)
    plan = plan_transfer(data, "problem_class", problems_per_class=6, transfers=1, seed=1, pairs_per_cell=9)
    cells = {}
    for each in plan.executions:
        if each.condition in ("transfer", "other", "matrix"):
            key = data[each.writer]["problem_class"], data[each.problem]["problem_class"]
            cells.setdefault(key, []).append((each.writer, each.problem))
    assert len(cells) == 16
    assert all(len(set(pairs)) == len(pairs) == 9 for pairs in cells.values())


def test_largest_classes_are_measured():
    data = rows(a=8, b=20, c=12)
    plan = plan_transfer(data, "problem_class", 99, 1, seed=1, max_classes=2)
    assert plan.classes == ["b", "c"] and plan.left_out == ["a"]
    assert {name: len(plan.unseen[name]) for name in plan.classes} == {"b": 10, "c": 6}


def test_one_class_has_nothing_to_compare_with_other_classes():
    report = transfer_report(KnownModel(), rows(a=12), "problem_class", answer_reward, 4)
    assert report.estimate("other") is None and report.difference("own", "other") is None
    assert report.matrix() == [[1.0]]


def test_too_few_problems_are_refused():
    with pytest.raises(DataError, match="4 different problems"):
        plan_transfer(rows(a=3, b=2), "problem_class", 4, 1, seed=1)


def test_with_and_without_a_bank(tmp_path):
    with StrategyBank(tmp_path, hashed_words) as bank:
        bank.add([make("plan", "b", trust="trusted"), make("draft", "a")])
        report = transfer_report(KnownModel(), rows(a=12, b=12), "problem_class", answer_reward, 4, bank=bank)
    assert report.estimate("transfer").value == 0.5 and report.estimate("transfer_with_bank").value == 1.0
    assert report.difference("transfer_with_bank", "transfer").value == 0.5
    assert report.difference("own_with_bank", "own").value == 0.0


def test_what_the_verifier_cannot_tell_is_counted():
    def verifier(prompts, completions, **kwargs):
        return [None if i == 0 else 1.0 for i in range(len(prompts))]

    report = transfer_report(KnownModel(), rows(a=12), "problem_class", verifier, 4)
    assert report.unverified == 4 and report.estimate("own").problems == 3


def test_chunks_give_what_one_go_gives(tmp_path):
    data = rows(a=12, b=12)
    plan = plan_transfer(data, "problem_class", 5, 2, seed=1)
    once = measure_plan(KnownModel(), data, "problem_class", plan, answer_reward, seed=1)
    for _ in range(2):
        model = KnownModel()
        with ChunkLog(tmp_path, {}, plan.texts) as log:
            chunked = measure_plan(
                model, data, "problem_class", plan, answer_reward, seed=1, run=log.run, chunk_size=4, name="s"
            )
            assert sum(chunk["texts"] for chunk in log.done.values()) == plan.texts
        assert chunked.to_dict() == once.to_dict()
    assert not model.executed  # the second time everything was there


def test_real_model(tiny):
    model = TwoPhaseModel.from_pretrained(
        tiny, TwoPhaseSettings(max_strategy_length=4, max_completion_length=4), batch_size=8
    )
    report = transfer_report(model, problems(16).to_list(), "problem_class", answer_reward, 3, 1, pairs_per_cell=2)
    assert report.classes == ["kind-0", "kind-1"] and report.estimate("transfer").problems == 6
    assert report.generated_tokens > 0
