"""Rows and files that cannot be trained on are refused when they are loaded, in one line that names them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from models import evenness, save_tiny_model
from pyarrow import parquet

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.checks.setup import setup_problems
from trl_sgpo.cli.main import main
from trl_sgpo.data.columns import Columns
from trl_sgpo.data.leftover import leftover
from trl_sgpo.data.loading import load_data
from trl_sgpo.data.mixture import ProblemMixtureConfig
from trl_sgpo.data.tasks import answer_reward, load_mixture, load_problems, to_problems
from trl_sgpo.errors import DataError
from trl_sgpo.evaluation.suites import load_suites, parse_suite
from trl_sgpo.method.prompts import check_prompts
from trl_sgpo.recipe import read_recipe


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
    "unfinished.jsonl": (
        b'{"question": "1 + 1?"\n',
        r"cannot be read: JSON parse error in line 1, column 22: Expecting ','",
    ),
    "unfinished_first.jsonl": (
        b'{"q": 1, "a": 2\n{"q": 3}\n',
        "cannot be read: JSON parse error in line 1, column 16",
    ),
    "unfinished_later.jsonl": (b'{"q": 1}\n{"q": 3,\n', "cannot be read: JSON parse error in line 2, column 9"),
    "unfinished_key.jsonl": (b'{"q":\n\n', "cannot be read: JSON parse error in line 1, column 6: Expecting value"),
    "unfinished.json": (b'[\n{"q": 1\n}\n, {\n"q":\n]\n', "cannot be read: JSON parse error in line 6, column 1"),
    "scalar.jsonl": (b'"a"\n', "cannot be read: JSON parse error"),
    "number.json": (b"5", "cannot be read: JSON parse error"),
    "latin.jsonl": ('{"question": "Was f\u00e4llt?"}\n'.encode("latin-1"), "cannot be read: .*utf-8.*byte 0xe4"),
    "empty.csv": (b"", "has no rows"),
    "empty.json": (b"", "has no rows"),
    "empty.parquet": (b"", "cannot be read: Parquet file size is 0"),
    "cells.csv": (b"question,answer\nIs 1, 2 more?,3\n", "cannot be read: line 2 has 3 cells and the header 2"),
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "ROWS.JSONL", "rows.Csv"])
def test_encodings_and_endings(name: str, encoding: str) -> None:
    rows = {"question": "Was f\u00e4llt?", "answer": "\u00c4pfel"}
    text = json.dumps(rows, ensure_ascii=False)
    if name.casefold().endswith(".csv"):
        text = f"{','.join(rows)}\n{','.join(rows.values())}\n"
    Path(name).write_bytes(text.encode(encoding))
    (problem,) = load_problems(name).to_list()
    assert problem["prompt"][0]["content"] == rows["question"] and problem["solution"] == rows["answer"]


def test_a_file_in_the_home_directory(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert load_problems("~/p.jsonl", "train[:1]")["solution"][:] == ["2"]
    assert load_suites([parse_suite("mine=~/p.jsonl")])[0].available == 1
    keys = {"model_name_or_path": tiny, "reward_funcs": ["answer_reward"], "output_dir": "out", "bf16": False}
    Path("r.yaml").write_text(json.dumps(keys | {"dataset_name": "~/p.jsonl"}))
    recipe = read_recipe(["--config", "r.yaml"], "test", setup_problems)
    assert len(load_data(recipe)["train"]) == 1


def test_splits_of_a_repository() -> None:
    Path("repository").mkdir()
    for split, rows in (("train", ["12.50", "3"]), ("test", ["4", "5"])):
        Path(f"repository/{split}.csv").write_text("question,answer\n" + "".join(f"{row}?,{row}\n" for row in rows))
    assert load_problems("repository", "train[1:]+test")["solution"][:] == ["3", "4", "5"]
    assert load_problems("repository", "test[50%:]+train[:1]")["solution"][:] == ["5", "12.50"]
    for split, words in (
        ("dev", "no split `dev`: use one of train, test"),
        ("test[5:]", "no rows"),
        ("test[", "read"),
    ):
        with pytest.raises(DataError, match=words):
            load_problems("repository", split)


def test_rows_of_the_hub_are_kept_for_work_without_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path("repository").mkdir()
    Path("repository/train.jsonl").write_text('{"question": "When?", "answer": "2024-01-05"}\n')
    builder = datasets.load_dataset_builder("repository")
    builder.repo_id = "someone/problems"
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: builder)
    assert load_problems("someone/problems")["solution"][:] == ["2024-01-05"]

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert load_problems("someone/problems")["solution"][:] == ["2024-01-05"]
    assert "someone/problems cannot be reached: the rows are those that were read before" in caplog.text
    with pytest.raises(DataError, match=r"Cannot load someone/others .Couldn't reach the Hub"):
        load_problems("someone/others")


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


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (6.5, "6.5"), (7.0, "7"), (10**20, str(10**20))])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_numbers_are_problems(value: float, text: str, ending: str) -> None:
    if ending == "parquet":
        parquet.write_table(pa.table({"prompt": [value if value < 2**63 else str(value)]}), "rows.parquet")
    else:
        Path(f"rows.{ending}").write_text(f'{{"prompt": {value}}}\n' if ending == "jsonl" else f"prompt\n{text}\n")
    assert load_problems(f"rows.{ending}")["prompt"][:] == [[{"role": "user", "content": text}]]


@pytest.mark.parametrize("value", ["[]", "NaN", "null", '""', '[{"role": "user", "content": ""}]'])
def test_a_prompt_of_nothing_is_empty(value: str) -> None:
    Path("rows.jsonl").write_text(f'{{"prompt": {value}, "answer": "1"}}\n')
    with pytest.raises(DataError, match=r"1 of 1 problems is empty \(row 1, counted from 1\): remove it"):
        load_problems("rows.jsonl")


def test_messages_with_different_keys_are_problems() -> None:
    messages = [{"role": "system", "content": "Be brief.", "name": "a"}, {"role": "user", "content": "1 + 1?"}]
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": messages[i:], "answer": 2}) + "\n" for i in (0, 1)))
    problems = load_problems("rows.jsonl")
    assert problems["prompt"][:] == [messages, messages[1:]] and problems["solution"][:] == ["2", "2"]


def test_copies_of_a_problem_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    answers = [("1 + 1?", "2"), ("2 + 2?", "4"), ("1 + 1?", "2"), ("1 + 1?", "3"), ("2 + 2?", None)]
    Path("rows.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in answers))
    assert len(load_problems("rows.jsonl")) == 5
    words = (
        "3 of 5 problems are copies of an earlier one, 1 of them with another answer (rows 3, 4, 5, counted from 1)"
    )
    assert f"rows.jsonl: {words}." in caplog.messages
    mixture = ProblemMixtureConfig(
        datasets=[{"path": "rows.jsonl", "split": split} for split in ("train", "train[:1]")]
    )
    load_mixture(mixture)
    assert any("The mixture: 4 of 6 problems are copies" in line for line in caplog.messages)


# Columns that mean something


@pytest.mark.parametrize("name", ["entry", "prompts", "completions", "completion_ids"])
def test_a_column_whose_name_is_taken_is_refused_at_loading(
    name: str, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")
    rows = [{"question": f"1 + {number}?", "answer": str(number + 1), name: number} for number in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"reward_funcs": ["answer_reward"], "output_dir": "out", "bf16": False}
    Path("r.yaml").write_text(json.dumps({"model_name_or_path": tiny, "dataset_name": "rows.jsonl"} | keys))
    assert main(["train", "--config", "r.yaml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"column `{name}`" in line and "rename it" in line


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"solution": "2", "entry": 3}, "column `entry`"),
        ({"solution": ["2", "two"]}, "column `solution` holds neither texts nor numbers"),
        ({"solution": True}, "column `solution` holds neither texts nor numbers"),
    ],
)
def test_columns_that_answer_reward_cannot_read(columns: dict[str, Any], words: str, tiny: str) -> None:
    rows = Dataset.from_list([{"prompt": "1 + 1?"} | columns] * 8)
    args = SGPOConfig("out", bf16=False, use_bank=False)
    with pytest.raises(DataError, match=words):
        SGPOTrainer(tiny, [answer_reward], args, rows)
    SGPOTrainer(tiny, [evenness], args, rows)


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
