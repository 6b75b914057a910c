"""Columns of problems and answers: names, templates, missing answers, and what is left out."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import word_problems
import yaml
from datasets import Dataset

from trl_sgpo.data.columns import Columns, fill_template, find_column
from trl_sgpo.data.leftover import leftover, suggest_template
from trl_sgpo.data.loading import load_data
from trl_sgpo.data.mixture import ProblemMixtureConfig
from trl_sgpo.data.tasks import load_mixture, load_problems, to_problems
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.evaluation.suites import load_suites, parse_suite
from trl_sgpo.method.rewards import leak
from trl_sgpo.recipe import read_recipe


def texts(problems: Any) -> list[str]:
    return [prompt[0]["content"] for prompt in problems["prompt"]]


def file(path: Path, rows: list[dict[str, Any]]) -> str:
    word_problems.write(path, rows)
    return str(path)


def recipe_of(tmp_path: Path, **keys: Any) -> Any:
    path = tmp_path / "recipe.yaml"
    fixed = {"model_name_or_path": "none", "output_dir": "out", "bf16": False, "reward_funcs": ["answer_reward"]}
    path.write_text(yaml.safe_dump(fixed | keys))
    return read_recipe(["--config", str(path)], "test")


@pytest.mark.parametrize("written", ["Question", "QUESTION", "Problem", "Prompt"])
def test_usual_names_are_matched_whatever_their_case(written: str) -> None:
    row = {written: "What is 1 + 2?", "ANSWER": "3", "Subject": "sums"}
    (problem,) = to_problems(Dataset.from_list([row])).to_list()
    assert problem["prompt"] == [{"role": "user", "content": "What is 1 + 2?"}]
    assert (problem["solution"], problem["problem_class"]) == ("3", "sums")


def test_a_name_that_fits_several_columns_is_refused_by_name() -> None:
    assert find_column("Text", ["text", "Text"]) == "Text"
    with pytest.raises(DataError, match="`question` may be each of the columns Question, QUESTION"):
        to_problems(Dataset.from_list([{"Question": "1", "QUESTION": "2"}]))
    with pytest.raises(DataError, match="`answer_column` names no column 'gold': the columns are question, answer"):
        to_problems(Dataset.from_list([{"question": "1", "answer": "2"}]), Columns(answer_column="gold"))


def test_problem_from_several_columns(tmp_path: Path) -> None:
    path = file(tmp_path / "svamp.jsonl", word_problems.svamp(4))
    problems = load_problems(path, columns=Columns(prompt_template="{body} {QUESTION}"))
    body, question, answer, _ = word_problems.story(1)
    assert texts(problems)[1] == f"{body} {question}"
    assert problems["solution"][1] == str(answer)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_floats_are_whole_numbers_where_they_can_be(tmp_path: Path, ending: str) -> None:
    rows = Dataset.from_list([{"question": "half of 16?", "answer": 8.0}, {"question": "half of 5?", "answer": 2.5}])
    write = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[ending]
    write(str(tmp_path / f"halves.{ending}"))
    problems = load_problems(str(tmp_path / f"halves.{ending}"))
    assert problems["solution"][:] == ["8.0" if ending == "csv" else "8", "2.5"]  # a CSV file holds texts
    assert leak("When halving, the result is 8.", texts(problems)[0], problems[0]["solution"]) == 1.0


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}", "one"),
        ("{{{a}}}: {b}", "{one}: 2"),
        ("{a}\n\n{Missing}", "one"),
        ("Choose.{items}", "Choose.\nA. x\nB. y"),
        ("Choose.{labelled}", "Choose.\n1. x\n2. y"),
        ("Choose.{by name}", "Choose.\nA. x"),
        ("{a.b} {c[0]}", "dotted indexed"),  # names of columns, never read as attributes
    ],
)
def test_template(template: str, text: str) -> None:
    row = {
        "a": " one\n",
        "b": 2.0,
        "Missing": None,
        "items": ["x", "y"],
        "labelled": {"label": ["1", "2"], "text": ["x", "y"]},
        "by name": {"A": "x", "B": None},
        "a.b": "dotted",
        "c[0]": "indexed",
    }
    names = [name for name in row if f"{{{name}}}" in template]
    assert fill_template(template, row, names) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{Body", "cannot be read"),
        ("Body Question", "names no column"),
        ("{}", "column name in braces"),
        ("{Body!r}", "column name in braces"),
        ("{Body:>9}", "column name in braces"),
    ],
)
def test_template_that_cannot_be_read(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Columns(prompt_template=template)


@pytest.mark.parametrize("template", ["{Bodie}", "{Body.__class__}", "{Body[0]}"])
def test_template_with_an_unknown_column(template: str) -> None:
    with pytest.raises(DataError, match=r"`prompt_template` names no column .*: the columns are ID, Body, Question"):
        to_problems(Dataset.from_list(word_problems.svamp(2)), Columns(prompt_template=template))


def test_template_and_column_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="set one of them"):
        Columns(prompt_column="Body", prompt_template="{Body}")


def test_named_answer_beside_a_worked_solution() -> None:
    row = {"problem": "1 + 2?", "solution": "Add: 3.", "answer": "three", "Final": 3}
    (problem,) = to_problems(Dataset.from_list([row]), Columns(answer_column="final")).to_list()
    assert (problem["solution"], problem["worked_solution"]) == ("3", "Add: 3.")
    (problem,) = to_problems(Dataset.from_list([row]), Columns(answer_column="solution")).to_list()
    assert problem["solution"] == "Add: 3." and "worked_solution" not in problem


def test_problems_of_problems_are_the_same() -> None:
    for rows in (word_problems.svamp(3), word_problems.asdiv(3)):
        problems = to_problems(Dataset.from_list(rows), Columns(prompt_template="{body} {question}"))
        assert to_problems(problems).to_list() == problems.to_list()


# Missing answers


def test_missing_answers_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    answers = ["None", "3", "", None, " nan ", "null", "5", "NULL"]
    with caplog.at_level(logging.WARNING, "trl_sgpo"):
        problems = to_problems(Dataset.from_list([{"question": "?", "answer": answer} for answer in answers]))
    assert problems["solution"][:] == ["None", "3", None, None, " nan ", "null", "5", "NULL"]
    missing, doubtful = [record.getMessage() for record in caplog.records]
    assert "2 of 8 problems have no answer" in missing and "rows 3, 4, counted from 1" in missing
    assert "4 of 8 answers are texts such as `None` (rows 1, 5, 6, 8, counted from 1)" in doubtful


def test_missing_numbers_and_solutions_without_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    problems = to_problems(Dataset.from_list([{"question": "?", "answer": 2.0}, {"question": "?", "answer": None}]))
    assert problems["solution"][:] == ["2", None]
    problems = to_problems(
        Dataset.from_list([{"question": "?", "answer": "So\n####"}, {"question": "?", "answer": "1"}])
    )
    assert problems["solution"][:] == [None, "1"]
    assert [record.getMessage().count("row") for record in caplog.records] == [1, 1]


def test_no_answer_at_all_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path / "empty.jsonl", [{"question": "?", "answer": "None", "rest": "x"}] * 4)
    with pytest.raises(DataError, match=r"No problem of the split `train` has an answer.*`answer_column`"):
        load_data(recipe_of(tmp_path, dataset_name=path))
    empty = file(tmp_path / "none.jsonl", [{"question": "?", "answer": ""}] * 4)
    with pytest.raises(DataError, match="has no answer in the column `answer`"):
        load_problems(empty, columns=Columns(answer_column="Answer"))
    assert len(load_data(recipe_of(tmp_path, dataset_name=path, reward_funcs=["think_format_reward"]))["train"]) == 4


# Recipes


def test_recipe_names_columns_for_both_splits(tmp_path: Path) -> None:
    path = file(tmp_path / "svamp.jsonl", word_problems.svamp(10))
    recipe = recipe_of(
        tmp_path,
        dataset_name=path,
        prompt_template="{Body} {Question}",
        answer_column="answer",
        dataset_train_split="train[:6]",
        dataset_test_split="train[6:]",
        report_problems=4,
        system_prompt="Be brief.",
    )
    assert recipe.training.answer_column == "solution"  # where answers are loaded to, for leaks and blocks
    data = load_data(recipe)
    body, question, answer, _ = word_problems.story(6)
    assert data["train[6:]"][0]["prompt"][1]["content"] == f"{body} {question}"
    assert data["train[6:]"][0]["solution"] == str(answer) and len(data["train[:6]"]) == 6


def test_each_dataset_of_a_mixture_names_its_own_columns(tmp_path: Path) -> None:
    parts = [
        {"path": file(tmp_path / "a.jsonl", word_problems.svamp(4)), "prompt_template": "{Body} {Question}"},
        {"path": file(tmp_path / "b.jsonl", word_problems.asdiv(4)), "prompt_template": "{body} {question}"},
        {"path": file(tmp_path / "c.jsonl", word_problems.open_math(4)), "answer_column": "expected_answer"},
        {"path": "reasoning_gym/lcm?size=4"},
    ]
    problems = load_data(recipe_of(tmp_path, datasets=parts))["train"]
    body, question, answer, thing = word_problems.story(2)
    whole = [f"{body} {question}"] * 3
    assert [texts(problems)[index] for index in (2, 6, 10)] == whole
    assert [problems["solution"][index] for index in (2, 6, 10)] == [str(answer), f"{answer} ({thing})", str(answer)]
    assert problems["solution"][12] is not None and len(problems) == 16


def test_columns_beside_a_mixture_are_refused(tmp_path: Path) -> None:
    parts = [{"path": "reasoning_gym/lcm?size=4"}]
    for keys in ({"prompt_template": "{Body}"}, {"prompt_column": "Body"}, {"answer_column": "Answer"}):
        with pytest.raises(ConfigError, match="in each entry of `datasets`"):
            recipe_of(tmp_path, datasets=parts, **keys)


def test_shares_of_a_mixture(tmp_path: Path) -> None:
    path = file(tmp_path / "a.jsonl", word_problems.asdiv(10))
    part = {"path": path, "prompt_template": "{body} {question}"}
    mixture = ProblemMixtureConfig(datasets=[{**part, "fraction": 0.75}, {**part, "fraction": 0.25}])
    assert len(load_mixture(mixture)["train"]) == 13  # 10 rows are three quarters
    mixture.datasets[0].fraction = None
    with pytest.raises(DataError, match="`fraction`"):
        load_mixture(mixture)


# What is left out


def test_half_a_problem_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file(tmp_path / "asdiv.jsonl", word_problems.asdiv(6))
    for load in (
        lambda: load_problems(path),
        lambda: load_mixture(ProblemMixtureConfig(datasets=[{"path": path}])),
        lambda: load_suites([parse_suite(f"mine={path}")]),
    ):
        with pytest.raises(
            DataError, match=r"`body` would not be read .* '\{body\} \{question\}'; if `question` alone"
        ):
            load()
    load_problems(path, columns=Columns(prompt_column="question"))
    load_problems(path, columns=Columns(prompt_template="{body} {question}"))
    load_problems("reasoning_gym/lcm?size=4")
    assert not caplog.records


def left_of(rows: list[dict[str, Any]], columns: Columns | None = None) -> Any:
    dataset, chosen = Dataset.from_list(rows), columns or Columns()
    return leftover(dataset, to_problems(dataset, chosen), chosen)


@pytest.mark.parametrize(
    ("make", "source", "parts", "template"),
    [
        (word_problems.svamp, "Question", ("Body",), "{Body} {Question}"),
        (word_problems.asdiv, "question", ("body",), "{body} {question}"),
        (word_problems.choices, "question", ("choices",), "{question}{choices}"),
        (word_problems.open_math, "problem", (), None),
    ],
)
def test_columns_that_look_like_parts_of_the_problem(
    make: Any, source: str, parts: tuple[str, ...], template: str | None
) -> None:
    rows = make(20)
    left = left_of(rows)
    assert left.parts == parts
    if template is not None:
        assert suggest_template(list(rows[0]), source, left, rows[0]) == template
        problems = to_problems(Dataset.from_list(rows), Columns(prompt_template=template))
        assert word_problems.story(3)[0] in texts(problems)[3] and word_problems.story(3)[1] in texts(problems)[3]
        assert left_of(rows, Columns(prompt_template=template)).parts == ()


@pytest.mark.parametrize(
    ("name", "value", "is_part"),
    [
        ("candidates", ["{0} plums", "no plums"], True),
        ("domain", ["Mathematics, chapter {0}"], False),
        ("generations", ["We add to {0}.", "We count from {0}."], False),
    ],
)
def test_rules_for_lists(name: str, value: list[str], is_part: bool) -> None:
    rows = [
        {"question": f"What is {i} + 2?", name: [item.format(i) for item in value], "answer": str(i + 2)}
        for i in range(20)
    ]
    assert (left_of(rows).parts == (name,)) == is_part


@pytest.mark.parametrize(
    ("name", "value", "is_part"),
    [
        ("Equation", "( {0}.0 + 2.0 )", False),
        ("Type", "Common-Division", False),
        ("level", "Level {0}", False),
        ("unique_id", "test/algebra/{0}.json", False),
        ("rationale", "First we add {0} to both of the sides.", False),
        ("notes", "We add {0} to both sides.\n#### 3", False),
        ("title", "the same words in each of the rows", False),
        ("A", "{0} plums", True),
        ("context", "Row {0}.", True),
        ("story", "A farmer sells {0} eggs at the market on Monday.", True),
        ("sentence1", "Only {0} of the pens are blue, the others red.", True),
    ],
)
def test_rules_for_parts(name: str, value: str, is_part: bool) -> None:
    rows = [{"question": f"What is {i} + 2?", name: value.format(i), "answer": str(i + 2)} for i in range(20)]
    assert (left_of(rows).parts == (name,)) == is_part


def test_a_column_with_the_whole_problem_is_suggested_alone() -> None:
    rows = [row | {"question_concat": f"{row['Body']} {row['Question']}"} for row in word_problems.svamp(12)]
    left = left_of(rows)
    assert suggest_template(list(rows[0]), "Question", left, rows[0]) == "{question_concat}"
    trained = [row | {"text": f"{row['question']}\nAnswer: {row['answer']}"} for row in word_problems.choices(12)]
    assert left_of(trained).parts == ("choices",)  # a text that ends in the answer is no problem


def test_suites_name_columns(tmp_path: Path) -> None:
    from trl_sgpo.evaluation.suites import load_suites, parse_suite

    path = file(tmp_path / "svamp.jsonl", word_problems.svamp(4))
    keys = {"name": "words", "path": path, "prompt_template": "{body} {question}", "answer_column": "ANSWER"}
    (loaded,) = load_suites([parse_suite(json.dumps(keys))])
    body, question, answer, _ = word_problems.story(0)
    assert loaded.rows[0]["prompt"][0]["content"] == f"{body} {question}"
    assert loaded.rows[0]["solution"] == str(answer)
