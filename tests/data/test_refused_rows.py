"""Rows and files that cannot be trained on are refused when they are loaded, in one line that names them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from models import evenness, save_tiny_model

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.cli.main import main
from trl_sgpo.data.columns import Columns
from trl_sgpo.data.leftover import leftover
from trl_sgpo.data.tasks import load_problems, to_problems
from trl_sgpo.errors import DataError
from trl_sgpo.method.prompts import check_prompts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


# Files


FILES = {
    "empty.jsonl": (b"", "has no rows"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "list.json": (b"[]", "has no rows"),
    "header.csv": (b"question,answer\n", "has no rows"),
    "bad.jsonl": (b'{"question": "1 + 1?"}\n{bad\n', "cannot be read: JSON parse error"),
    "scalar.jsonl": (b'"a"\n', "cannot be read: JSON parse error"),
    "number.json": (b"5", "cannot be read: JSON parse error"),
    "latin.csv": ("question,answer\nWas f\u00e4llt?,1\n".encode("latin-1"), "cannot be read: .*utf-8.*byte 0xe4"),
    "text.parquet": (b"no parquet", "cannot be read: .*Parquet"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named_with_what_is_wrong_with_it(name: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} {words}") as error:
        load_problems(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["empty.jsonl", "bad.jsonl", "latin.csv"])
def test_commands_name_the_file(
    name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")
    content, words = FILES[name]
    Path(name).write_bytes(content)
    keys = {"reward_funcs": ["answer_reward"], "output_dir": "out", "bf16": False}
    Path("r.yaml").write_text(json.dumps({"model_name_or_path": tiny, "dataset_name": name} | keys))
    for command in (
        ["init", "--model", tiny, "--data", name, "--vram", "0"],
        ["train", "--config", "r.yaml"],
        ["solve", "--model", tiny, "--no_bank", "--input", name, "--output", "solved.jsonl"],
    ):
        assert main(command) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert name in line and words.split(":")[0] in line


# Problems


@pytest.mark.parametrize("empty", ["", " \n", None])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_empty_problems_are_counted_and_named(empty: str | None, form: str) -> None:
    texts = ["1 + 1?", empty, "2 + 2?", empty]
    values: list[Any] = texts
    if form == "messages":
        values = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in texts]
    rows = Dataset.from_dict({"prompt": values, "answer": ["2", "3", "4", "5"]})
    with pytest.raises(DataError, match=r"2 of 4 problems are empty \(rows 2, 4, counted from 1\): remove them"):
        to_problems(rows)
    if form == "messages" or empty is not None:
        with pytest.raises(DataError, match=r"2 of 4 problems are empty \(rows 2, 4, counted from 1\): remove them"):
            check_prompts(rows["prompt"])


def test_a_template_of_empty_columns_is_an_empty_problem() -> None:
    rows = Dataset.from_list([{"body": "", "ask": ""}, {"body": "Ada has 2.", "ask": "How many?"}])
    with pytest.raises(DataError, match=r"1 of 2 problems is empty \(row 1, counted from 1\): remove it"):
        to_problems(rows, Columns(prompt_template="{body} {ask}"))


@pytest.mark.parametrize("value", [["a", "b"], [1, 2], {"text": "a"}, b"1 + 1?", [{"text": "a"}]])
def test_a_column_without_text_or_messages_is_no_problem(value: Any) -> None:
    rows = Dataset.from_list([{"question": value, "answer": "1", "context": "some words that are long enough"}] * 3)
    with pytest.raises(DataError, match="column `question` holds neither text nor messages"):
        problems = to_problems(rows)
        leftover(rows, problems, Columns())


@pytest.mark.parametrize("value", [5, ["a"], {"role": "user", "content": "a"}])
def test_prompts_of_a_dataset_in_python(value: Any, tiny: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": value, "solution": "1"}] * 8)
    args = SGPOConfig(str(tmp_path), bf16=False, use_bank=False)
    with pytest.raises(DataError, match="The prompt of row 0 is neither text nor messages"):
        SGPOTrainer(tiny, evenness, args, rows)


# Answers


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"prompt_template": "{question} {answer}"}, "`prompt_template` shows the column `answer`"),
        ({"prompt_template": "{question} {Solution}"}, "`prompt_template` shows the column `solution`"),
        ({"prompt_column": "answer"}, "`prompt_column` shows the column `answer`"),
        (
            {"prompt_template": "{question} {gold}", "answer_column": "GOLD"},
            "`prompt_template` shows the column `gold`",
        ),
        ({"answer_column": "question"}, "the problem shows the column `question`"),
    ],
)
def test_a_problem_that_shows_its_answer_is_refused(columns: dict[str, str], named: str) -> None:
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": "2", "solution": "It is 2.", "gold": "2"}])
    with pytest.raises(DataError, match=f"{named}, which the answer is read from"):
        to_problems(rows, Columns(**columns))


def test_a_solution_that_is_no_answer_may_be_shown() -> None:
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": "2", "solution": "It is 3."}])
    (problem,) = to_problems(rows, Columns(prompt_template="{question} {solution}", answer_column="answer")).to_list()
    assert problem["prompt"][0]["content"] == "1 + 1? It is 3." and problem["solution"] == "2"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"value": "2", "unit": "cm"}, "holds mappings with the keys value, unit: "),
        (b"2", "holds bytes: "),
        (["2", "two"], "holds lists of several texts, .*'2', 'two'"),
        ([[1, 2], [3, 4]], "holds lists of several"),
        ([{"value": "2"}], "holds mappings with the keys value: "),
    ],
)
def test_answers_that_are_no_text_are_refused(value: Any, words: str) -> None:
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": value}] * 2)
    with pytest.raises(DataError, match=f"column `answer` {words}"):
        to_problems(rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(["2"], "2"), ([2.0], "2"), ([2, 5, 9], "2, 5, 9"), ([0.5, 1.0], "0.5, 1"), ([], None), (True, "true"), (7, "7")],
)
def test_lists_of_one_and_of_numbers_are_read(value: Any, text: str | None) -> None:
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": value}, {"question": "2 + 2?", "answer": value}])
    assert to_problems(rows)["solution"][:] == [text, text]
