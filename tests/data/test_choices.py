"""Multiple choice: the answer that is loaded is the letter that the model sees."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import word_problems
from datasets import ClassLabel, Dataset
from models import save_tiny_model

from trl_sgpo.cli.main import main
from trl_sgpo.data.answers import answer_reward
from trl_sgpo.data.columns import Columns
from trl_sgpo.data.tasks import load_problems, to_problems
from trl_sgpo.errors import DataError


CITIES = 20
RIGHT = [(index * 7 + 2) % 4 for index in range(CITIES)]
LETTERS = ["ABCD"[right] for right in RIGHT]


def texts(index: int) -> list[str]:
    return [f"city {10 * index + place}" for place in range(4)]


def rows_of(make: Any, **changes: Any) -> Dataset:
    rows = [
        {"question": f"Which city is number {index} of the list?"} | make(index, RIGHT[index])
        for index in range(CITIES)
    ]
    return Dataset.from_list([row | changes for row in rows])


SHAPES = {
    "MMLU": (lambda i, right: {"choices": texts(i), "answer": right}, "{question}{choices}", None),
    "from 1": (lambda i, right: {"choices": texts(i), "answer": right + 1}, "{question}{choices}", None),
    "as text": (lambda i, right: {"choices": texts(i), "answer": str(right)}, "{question}{choices}", None),
    "HellaSwag": (lambda i, right: {"endings": texts(i), "label": str(right)}, "{question}{endings}", "label"),
    "ARC": (
        lambda i, right: {"choices": {"text": texts(i), "label": list("ABCD")}, "answerKey": "ABCD"[right]},
        "{question}{choices}",
        "answerKey",
    ),
    "the text": (lambda i, right: {"options": texts(i), "answer": texts(i)[right]}, "{question}{options}", None),
    "in case": (
        lambda i, right: {"options": texts(i), "answer": f" {texts(i)[right]} ".upper()},
        "{question}{options}",
        None,
    ),
    "bracketed": (lambda i, right: {"options": texts(i), "answer": f"({'abcd'[right]})"}, "{question}{options}", None),
    "columns": (
        lambda i, right: dict(zip("ABCD", texts(i), strict=True)) | {"answer": "ABCD"[right]},
        "{question} A. {A} B. {B} C. {C} D. {D}",
        None,
    ),
    "MedMCQA": (
        lambda i, right: dict(zip(("opa", "opb", "opc", "opd"), texts(i), strict=True)) | {"cop": right},
        "{question} A. {opa} B. {opb} C. {opc} D. {opd}",
        "cop",
    ),
    "numbered": (
        lambda i, right: {f"option{n + 1}": text for n, text in enumerate(texts(i))} | {"answer": texts(i)[right]},
        "{question} A. {option1} B. {option2} C. {option3} D. {option4}",
        None,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_become_the_letters_that_are_shown(shape: str) -> None:
    make, template, answer_column = SHAPES[shape]
    problems = to_problems(rows_of(make), Columns(prompt_template=template, answer_column=answer_column))
    assert problems["solution"][:] == LETTERS
    for problem, letter, right, index in zip(problems, LETTERS, RIGHT, range(CITIES), strict=True):
        assert f"{letter}. {texts(index)[right]}" in problem["prompt"][0]["content"]
        assert answer_reward([f"So the answer is {letter}"], [problem["solution"]]) == [1.0]


def test_variables_are_no_choices() -> None:
    rows = [{"a": i % 5, "b": 7 - i, "answer": max(i % 5, 7 - i)} for i in range(8)]
    problems = to_problems(
        Dataset.from_list(rows), Columns(prompt_template="If a = {a} and b = {b}, which is larger?")
    )
    assert problems["solution"][:] == [str(row["answer"]) for row in rows]


def test_what_is_read_as_letters_is_told(caplog: pytest.LogCaptureFixture) -> None:
    to_problems(rows_of(SHAPES["MMLU"][0]), Columns(prompt_template="{question}{choices}"), "cities")
    assert caplog.messages == ["cities: answers are read as letters of the choices, as C for 2."]


def test_class_labels_are_indices() -> None:
    rows = rows_of(SHAPES["MMLU"][0]).cast_column("answer", ClassLabel(names=list("ABCD")))
    assert to_problems(rows, Columns(prompt_template="{question}{choices}"))["solution"][:] == LETTERS


@pytest.mark.parametrize("shape", SHAPES)
def test_what_init_advises_can_be_won(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, template, answer_column = SHAPES[shape]
    data = word_problems.write(tmp_path / "choices.jsonl", rows_of(make).to_list())
    named = ["--answer_column", answer_column] if answer_column else []
    command = ["init", "--model", save_tiny_model(tmp_path / "model"), "--data", data, "--vram", "0", *named]
    assert main(command) == 2
    assert f"add `--prompt_template {shlex.quote(template)}`" in capsys.readouterr().err
    assert main([*command, "--prompt_template", template]) == 0
    told = capsys.readouterr().out
    assert f"\nIts answer: {LETTERS[0]}\n" in told
    stays = shape in ("ARC", "columns")
    assert ("Answers are the letters of the choices: this one is" in told) != stays


def test_columns_without_letters_are_refused_where_answers_are_letters() -> None:
    rows = rows_of(SHAPES["columns"][0])
    with pytest.raises(
        DataError, match=r"choices A, B, C, D without .*'\{question\} A\. \{A\} B\. \{B\} C\. \{C\} D\. \{D\}'"
    ):
        to_problems(rows, Columns(prompt_template="{question} {A} {B} {C} {D}"))
    by_text = rows_of(SHAPES["numbered"][0])
    template = "{question} {option1}, {option2}, {option3} or {option4}?"
    assert to_problems(by_text, Columns(prompt_template=template))["solution"][0] == texts(0)[RIGHT[0]]


def test_an_index_that_may_count_from_0_or_1_is_refused(tmp_path: Path) -> None:
    shown = Columns(prompt_template="{question}{choices}")
    rows = [{"question": f"Number {i}?", "choices": texts(i), "answer": right} for i, right in enumerate((1, 2, 1, 3))]
    with pytest.raises(DataError, match="no row tells whether they count from 0 or 1: write answers as letters"):
        to_problems(Dataset.from_list(rows), shown)
    for first, letters in ((0, "BCBD"), (4, "ABAC")):
        told = [*rows, rows[0] | {"answer": first}]
        data = tmp_path / f"from{first}.jsonl"
        word_problems.write(data, told)
        assert "".join(load_problems(str(data), "train[:4]", columns=shown)["solution"]) == letters  # by all rows


def test_answers_that_differ_as_text_and_as_index_are_refused() -> None:
    rows = [{"question": f"Number {i}?", "choices": ["1", "0", "3", "2"], "answer": i % 4} for i in range(8)]
    with pytest.raises(DataError, match="labels, texts or indices of the choices, which differ"):
        to_problems(Dataset.from_list(rows), Columns(prompt_template="{question}{choices}"))


def test_answers_that_are_no_choices() -> None:
    shown = Columns(prompt_template="{question}{choices}")
    rows = rows_of(SHAPES["the text"][0]).rename_column("options", "choices").to_list()
    rows[3]["answer"] = "a village"
    with pytest.raises(DataError, match=r"1 of 20 answers are none of the choices .*\(row 4, counted from 1\)"):
        to_problems(Dataset.from_list(rows), shown)
    facts = [row | {"answer": f"{index + 30} km"} for index, row in enumerate(rows)]  # a list of something else
    assert to_problems(Dataset.from_list(facts), shown)["solution"][0] == "30 km"
    missing = [row | {"answer": None if index else texts(0)[2]} for index, row in enumerate(rows)]
    assert to_problems(Dataset.from_list(missing), shown)["solution"][:2] == ["C", None]
