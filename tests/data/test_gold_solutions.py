"""The answer checker on solutions that are known to be right, and on those of other problems."""

import os
from pathlib import Path

import pytest

from trl_sgpo.data.answers import answer_reward, same_answer, same_answer_text
from trl_sgpo.data.final_answers import final_answer
from trl_sgpo.data.tasks import load_problems
from trl_sgpo.errors import DataError
from trl_sgpo.evaluation.suites import load_suites, parse_suite
from trl_sgpo.evaluation.verifier_check import check_verifier


DATA_DIR = os.environ.get("TRL_SGPO_DATA_DIR")


@pytest.fixture(scope="module")
def gold():
    return load_problems(str(Path(__file__).with_name("gold_solutions.jsonl"))).to_list()


def test_shipped_solutions(gold):
    found = check_verifier(gold, answer_reward, rounds=30)
    assert found.gold >= 60 and found.wrong > 1500
    assert found.rejected == [] and found.mistaken == [] and found.sound


def test_near_misses_of_shipped_solutions(gold):
    numbers = [row for row in gold if row["solution"].lstrip("-").isdecimal() and row["entry"] is None]
    assert len(numbers) >= 10
    for change in (1, -1, 10):
        texts = [f"#### {int(row['solution']) + change}" for row in numbers]
        assert answer_reward(texts, [row["solution"] for row in numbers]) == [0.0] * len(numbers)


@pytest.mark.parametrize(
    "form",
    ["#### {}", r"\boxed{{{}}}", "The answer is {}.", "The final answer is ${}$.", r"Answer: \({}\)", "#### **{}**"],
)
def test_forms_of_an_answer(form, gold):
    rows = [row for row in gold if row["entry"] is None]
    texts = [form.format(row["solution"]) for row in rows]
    assert answer_reward(texts, [row["solution"] for row in rows]) == [1.0] * len(rows)


def test_same_answers():
    assert same_answer("0.5", r"\frac{1}{2}") and same_answer("1,000", "1000") and not same_answer("1", "-1")
    assert same_answer_text("1,000", "1000.0") and not same_answer_text(r"\sqrt{12}", r"2\sqrt{3}")
    assert final_answer("#### **3**") == "**3**"


def test_a_solution_is_needed():
    with pytest.raises(DataError, match="solution"):
        check_verifier([{"prompt": "?", "solution": None}], answer_reward)


@pytest.mark.skipif(DATA_DIR is None, reason="TRL_SGPO_DATA_DIR names no directory with gsm8k/ and math500/")
@pytest.mark.parametrize(("name", "problems"), [("gsm8k", 1319), ("math500", 500)])
def test_all_solutions_of_a_benchmark(name, problems):
    (suite,) = load_suites([parse_suite(name)], DATA_DIR)
    found = check_verifier(suite.rows, answer_reward)
    assert found.gold == problems
    assert found.gold_accepted >= 0.99 * found.gold, found.rejected
    assert found.wrong_accepted <= 0.01 * found.wrong, found.mistaken
