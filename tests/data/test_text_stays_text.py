"""What is written as text comes back as that text, whatever the format of the file, also to reward functions."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import save_tiny_model

from trl_sgpo.cli.main import main
from trl_sgpo.data.loading import load_data
from trl_sgpo.data.mixture import ProblemMixtureConfig
from trl_sgpo.data.tasks import answer_reward, load_mixture, load_problems
from trl_sgpo.errors import DataError
from trl_sgpo.evaluation.suites import load_suites, parse_suite
from trl_sgpo.recipe import read_recipe


# fmt: off
NASTY = [
    "2024-01-05", "2024-01-05T10:00:00Z", "2024-01-05 10:00:00", "10:30", "1/2/2024",
    "12", "12.0", "0.50", "-0", "+5", "007", "00501", "1e5", "1E400", "1_000", "1,000", "0x1F", ".5", "5.",
    "12345678901234567890", "0.12345678901234567890123", "9" * 5000,
    "NA", "N/A", "None", "null", "NULL", "NaN", "nan", "inf", "-", "#N/A", "undefined",
    "true", "True", "FALSE", "yes", '["4", "four"]', "['4', 'four']", "[]", "{}", '{"a": 1}', '"5"', "'5'",
    "４２", "٣", "½", "Ⅳ", "²", "e\u0301", "\u00e9", "💡", "a\u2028b", "a\u0085b", "\ufeff5", "a\x00b", "a\x1fb",
    " 7 ", "a,b", 'say "x"', "two\nlines", "two\r\nlines", "a\rb", "tab\there", "\\n", "=1+1",
]
# fmt: on
Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows, **encoding: Any) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="", **encoding)


def write_json(path: Path, rows: Rows, **encoding: Any) -> None:
    path.write_text(json.dumps(rows, indent=1), newline="", **encoding)


def write_csv(path: Path, rows: Rows, **encoding: Any) -> None:
    with path.open("w", newline="", **encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows, kind: pa.DataType | None = None) -> None:
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]}
    pq.write_table(pa.table({name: column.cast(kind or pa.string()) for name, column in columns.items()}), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": lambda path, rows: write_jsonl(path, rows, encoding="utf-8"),
    ".json": lambda path, rows: write_json(path, rows, encoding="utf-8"),
    ".csv": lambda path, rows: write_csv(path, rows, encoding="utf-8"),
    ".parquet": write_parquet,
}


def in_repository(ending: str, rows: Rows) -> str:
    """A folder laid out like a dataset repository on the Hub."""
    folder = Path("repository", "data")
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[ending](folder / f"train{ending}", rows)
    return "repository"


def in_file(ending: str, rows: Rows) -> str:
    WRITERS[ending](Path(f"rows{ending}"), rows)
    return f"rows{ending}"


def problems(path: str) -> list[tuple[str, str | None]]:
    rows = load_problems(path)
    return [(row["prompt"][0]["content"], row["solution"]) for row in rows.to_list()]


# Round trips


@pytest.mark.parametrize("place", [in_file, in_repository])
@pytest.mark.parametrize("ending", WRITERS)
def test_nasty_texts(ending: str, place: Callable[[str, Rows], str]) -> None:
    path = place(ending, [{"question": text, "answer": text} for text in NASTY])
    assert problems(path) == [(text, text) for text in NASTY]


@pytest.mark.parametrize("ending", [ending for ending in WRITERS if ending != ".parquet"])  # which declares its types
@pytest.mark.parametrize("text", NASTY)
def test_a_column_of_one_nasty_text(text: str, ending: str) -> None:
    """Nothing else in the column says that it holds text."""
    path = in_file(ending, [{"question": f"{number}?", "answer": text} for number in range(2)])
    assert problems(path) == [("0?", text), ("1?", text)]


def is_answer(text: str) -> bool:
    return bool(text.strip()) and "####" not in text and "\\boxed" not in text


TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.integers().map(str),
    st.floats().map(repr),
    st.decimals(allow_nan=False).map(str),
    st.datetimes().map(str),
    st.dates().map(str),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4).map(repr),
).filter(is_answer)


@pytest.mark.parametrize("ending", WRITERS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_come_back(ending: str, texts: list[str]) -> None:
    path = in_file(ending, [{"question": f"{number}?", "answer": text} for number, text in enumerate(texts)])
    assert problems(path) == [(f"{number}?", text) for number, text in enumerate(texts)]


NUMBERS = {
    "big": (["12345678901234567890", "3"], ["12345678901234567890", "3"]),
    "huge": (["9" * 5000, "3"], ["9" * 5000, "3"]),
    "exponent": (["1e999", "3"], ["1e999", "3"]),
    "long": (["0.12345678901234567890123", "3.10"], ["0.12345678901234567890123", "3.10"]),
    "mixed": (["12", "0.5"], ["12", "0.5"]),
    "whole": (["8.0", "2.5"], ["8", "2.5"]),
    "empty": (["12", "null"], ["12", None]),
    "NaN": (["NaN", "12"], [None, "12"]),
    "booleans": (["true", "false"], ["true", "false"]),
    "words": (["12", '"twelve"', "true"], ["12", "twelve", "true"]),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_numbers_in_json(ending: str, name: str) -> None:
    written, answers = NUMBERS[name]
    rows = [f'{{"question": "{number}?", "answer": {text}}}' for number, text in enumerate(written)]
    Path(f"rows{ending}").write_text("\n".join(rows) if ending == ".jsonl" else f"[{', '.join(rows)}]")
    assert [answer for _, answer in problems(f"rows{ending}")] == answers


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_texts_of_pandas_and_polars(column: str, kind: pa.DataType) -> None:
    write_parquet(Path("rows.parquet"), [{column: text, "answer": text} for text in NASTY[:5]], kind)
    write_csv(Path("rows.csv"), [{column: text, "answer": text} for text in NASTY[:5]])
    both = ProblemMixtureConfig(datasets=[{"path": "rows.parquet"}, {"path": "rows.csv"}])
    for path in ("rows.parquet", "rows.csv"):
        assert problems(path) == [(text, text) for text in NASTY[:5]]
    assert load_mixture(both)["train"]["solution"] == NASTY[:5] * 2


def test_numbers_of_32_bits_are_the_decimals_that_they_were_made_of() -> None:
    """0.1 of 32 bits is 0.10000000149011612 in 64, so that the answer 0.1 would be wrong."""
    answers = pa.array([0.1, 12.0, None, 1e-7], pa.float32())
    pq.write_table(pa.table({"question": list("abcd"), "answer": answers, "level": answers}), "rows.parquet")
    rows = load_problems("rows.parquet")
    assert rows["solution"][:] == ["0.1", "12", None, "1e-07"]
    assert rows["level"][:] == [0.1, 12.0, None, 1e-7]


@pytest.mark.parametrize(("kind", "whole"), [(pa.float32(), 2**27), (pa.float16(), 2**14)])
def test_short_numbers_and_whole_ones(kind: pa.DataType, whole: int) -> None:
    """The shortest decimal that gives 2^27 is 134217730."""
    answers = pa.array(np.array([0.1, 3.3, whole], kind.to_pandas_dtype()))
    pq.write_table(pa.table({"question": list("abc"), "answer": answers}), "rows.parquet")
    assert load_problems("rows.parquet")["solution"][:] == ["0.1", "3.3", str(whole)]


SHORT_LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2), pa.list_view, pa.large_list_view]


@pytest.mark.parametrize("number", [pa.float32(), pa.float16()])
@pytest.mark.parametrize("kind", SHORT_LISTS)
def test_short_numbers_in_lists_of_all_kinds(kind: Any, number: pa.DataType) -> None:
    first, second, third = np.array([0.1, 2, 3.3], number.to_pandas_dtype())
    lists = pa.array([[first, None], None, [second, third]], kind(number))
    within = pa.StructArray.from_arrays([lists], ["a"])
    columns = {"question": list("abc"), "answer": list("123"), "marks": lists, "level": within}
    pq.write_table(pa.table(columns), "rows.parquet")
    rows = load_problems("rows.parquet")
    assert rows["marks"][:] == [[0.1, None], None, [2.0, 3.3]]
    assert rows["level"][:] == [{"a": [0.1, None]}, {"a": None}, {"a": [2.0, 3.3]}]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_numbers_of_32_bits_in_lists_and_mappings(kind: Any) -> None:
    values = [{"a": [0.1], "b": "x"}, {"a": None, "b": None}]
    mappings = pa.array(values, pa.struct({"a": kind(pa.float32()), "b": "string"}))
    lists = pa.array([[0.1, None], None], kind(pa.float32()))
    pq.write_table(
        pa.table({"question": ["a", "b"], "answer": ["1", "2"], "level": mappings, "marks": lists}), "rows.parquet"
    )
    rows = load_problems("rows.parquet")
    assert rows["level"][:] == values and rows["marks"][:] == [[0.1, None], None]


@pytest.mark.parametrize("name", ["rows.tsv", "rows.jsonl.gz", "rows.ndjson", "rows.txt"])
def test_files_with_other_endings_are_named(name: str) -> None:
    Path(name).write_text("question\tanswer\n1?\t2\n")
    with pytest.raises(DataError, match=rf"The file {name} has none of the endings .jsonl, .json, .parquet, .csv:"):
        load_problems(name)


def test_mappings_of_parquet_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    mapping = pa.map_(pa.string(), pa.int64())
    table = pa.table(
        {
            "prompt": ["1 + 1?", "1 + 2?"],
            "solution": ["2", "3"],
            "counts": pa.array([[("a", 1)], []], mapping),
            "nested": pa.array([[[("a", 1)]], []], pa.list_(mapping)),
        }
    )
    pq.write_table(table, "rows.parquet")
    problems = load_problems("rows.parquet")
    assert problems["solution"][:] == ["2", "3"] and "counts" not in problems.column_names
    assert "`counts`, `nested` hold mappings" in caplog.text


def test_rows_within_an_object_are_named() -> None:
    Path("squad.json").write_text(json.dumps({"version": 1, "data": [{"prompt": "1 + 1?", "solution": "2"}]}))
    with pytest.raises(DataError, match="save that list as the file"):
        load_problems("squad.json")


def test_an_empty_cell_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    Path("rows.csv").write_text('question,answer,level\n1?,12,1\n2?,,\n3?,"",3\n4?\n')
    rows = load_problems("rows.csv")
    assert rows["solution"][:] == ["12", None, None, None]
    assert rows["level"][:] == [1, None, 3, None]
    assert "3 of 4 problems have no answer" in caplog.text


def test_answers_that_may_stand_for_missing_ones_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"{number}?", "answer": text} for number, text in enumerate(["None", "3", "nan", "null"])]
    write_csv(Path("rows.csv"), rows)
    assert [answer for _, answer in problems("rows.csv")] == ["None", "3", "nan", "null"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "3 of 4 answers are texts such as `None`" in line and "rows 1, 3, 4, counted from 1" in line


# Other columns


def test_columns_keep_their_types() -> None:
    """Reward functions get the other columns as numbers, lists and mappings."""
    rows = [
        {"question": "1?", "answer": "12.50", "n": 3, "x": 12, "ok": True, "many": [1, 2], "of": {"a": "1"}, "any": 1},
        {"question": "2?", "answer": "007", "n": None, "x": 0.5, "ok": False, "many": [], "of": {"b": []}, "any": "a"},
    ]
    write_jsonl(Path("rows.jsonl"), rows)
    for row, wanted in zip(load_problems("rows.jsonl").to_list(), rows, strict=True):
        assert row == wanted | {
            "prompt": [{"role": "user", "content": wanted["question"]}],
            "solution": wanted["answer"],
            "any": str(wanted["any"]),
        }
    Path("rows.csv").write_text("question,answer,n,x,ok,zip\n1?,12.50,3,12,True,00501\n2?,1.0,,0.5,False,2\n")
    assert [list(row.values())[1:] for row in load_problems("rows.csv").to_list()] == [
        [12.5, 3, 12.0, True, "00501", [{"role": "user", "content": "1?"}], "12.50"],
        [1.0, None, 0.5, False, "2", [{"role": "user", "content": "2?"}], "1.0"],
    ]


@pytest.mark.parametrize("depth", [20, 100])
def test_nested_columns(depth: int) -> None:
    deep: Any = "2024-01-05"
    for _ in range(depth):
        deep = [deep]
    write_jsonl(Path("rows.jsonl"), [{"question": "1?", "other": deep}])
    assert load_problems("rows.jsonl")["other"][:] == [deep]


def test_a_column_that_only_later_rows_have() -> None:
    rows = [{"question": f"{number}?"} | ({"level": number} if number > 2000 else {}) for number in range(2100)]
    write_jsonl(Path("rows.jsonl"), rows)
    assert load_problems("rows.jsonl")["level"][1999:2003] == [None, None, 2001, 2002]


def test_headers_and_cells_of_csv_files(caplog: pytest.LogCaptureFixture) -> None:
    """Empty lines, an index without a name, a name twice, empty cells at the end of a row, and a very long one."""
    limit, long = csv.field_size_limit(), "x" * 200_000
    Path("rows.csv").write_text(f"\n\n,question,answer,answer\n0,1?,{long},a,,\n1,2?,12.50\n\n")
    rows = load_problems("rows.csv").to_list()
    names = ["Unnamed: 0", "question", "answer", "answer.1", "solution"]
    assert [[row[name] for name in names] for row in rows] == [
        [0, "1?", long, "a", long],
        [1, "2?", "12.50", None, "12.50"],
    ]
    assert csv.field_size_limit() == limit
    assert caplog.text.count("rows.csv: columns with the name of another one are called ['answer.1']") == 1
    assert caplog.text.count("rows.csv: the cells that rows lack are empty. Rows with too few of them: 1.") == 1


def test_a_file_that_changes_is_read_again() -> None:
    for answer in ("12", "13"):
        write_jsonl(Path("rows.jsonl"), [{"question": "1?", "answer": answer}])
        assert problems("rows.jsonl") == [("1?", answer)]


def test_reading_leaves_no_cache_beside_the_rows() -> None:
    """Its name would have to tell functions apart: processes that were forked alike would read each other's rows."""
    write_jsonl(Path("rows.jsonl"), [{"question": "1?", "answer": "12"}])
    files = [Path(file["filename"]).name for file in load_problems("rows.jsonl").cache_files]
    assert files and not [name for name in files if name.startswith("cache-")]


# Reward functions and suites


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


SEEN: dict[str, str] = {}


def seen(completions: list[Any], prompts: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """A reward function that notes the answers it gets."""
    for prompt, text in zip(prompts, solution, strict=True):
        SEEN[prompt[-1]["content"]] = text
    return [float(index % 2) for index in range(len(completions))]


def recipe(tiny: str, path: str, **keys: Any) -> list[str]:
    fixed = {
        "model_name_or_path": tiny,
        "dataset_name": path,
        "reward_funcs": ["test_text_stays_text.seen"],
        "max_strategy_length": 2,
        "max_completion_length": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 16,
        "use_bank": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "num_train_epochs": 1,
        "output_dir": "run",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(fixed | keys))
    return ["--config", "recipe.yaml"]


@pytest.mark.parametrize("ending", WRITERS)
def test_reward_functions_get_the_texts(ending: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_text_stays_text as module

    texts = NASTY[:64]
    rows = [{"prompt": f"What is {n}?", "answer": text, "problem_class": "one"} for n, text in enumerate(texts)]
    module.SEEN.clear()
    assert main(["train", *recipe(tiny, in_file(ending, rows))]) == 0
    assert {f"What is {n}?": text for n, text in enumerate(texts)} == module.SEEN


@pytest.mark.parametrize("ending", WRITERS)
def test_right_answers_are_right(ending: str, tiny: str) -> None:
    texts = [text for text in NASTY if text.strip() == text and "\n" not in text and "\r" not in text]
    path = in_file(ending, [{"question": f"{number}?", "answer": text} for number, text in enumerate(texts)])
    data = load_data(read_recipe(recipe(tiny, path, reward_funcs=["answer_reward"]), "test"))["train"]
    assert answer_reward([f"#### {text}" for text in texts], **data.to_dict()) == [1.0] * len(texts)


@pytest.mark.parametrize("ending", WRITERS)
def test_suites_get_the_texts(ending: str) -> None:
    path = in_file(ending, [{"question": text, "answer": text} for text in NASTY])
    (loaded,) = load_suites([parse_suite(f"mine={path}")])
    assert [row["solution"] for row in loaded.rows] == NASTY
