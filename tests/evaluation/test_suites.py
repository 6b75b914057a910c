"""Suites: how they are named, and what is said about one that cannot be loaded."""

import json
import subprocess
import sys

import pytest

from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.evaluation.suites import NAMED, Suite, load_suites, parse_suite


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GSM8K = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(20)]
MATH = [
    {
        "problem": "2 + 2?",
        "solution": r"$\boxed{4}$",
        "answer": "4",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "a",
    }
]


def test_light_import():
    heavy = "{'torch', 'datasets', 'transformers', 'trl', 'matplotlib'}"
    code = f"import sys, trl_sgpo.evaluation.suites\nsys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_named_suites():
    assert parse_suite("gsm8k") == Suite(
        "gsm8k", "openai/gsm8k", "test", "main", "in_distribution", hub_id="openai/gsm8k", task_id="gsm8k"
    )
    assert {suite.kind for suite in NAMED.values()} == {"in_distribution", "out_of_distribution", "harder"}
    assert all(name == suite.name for name, suite in NAMED.items())


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ("mine=reasoning_gym/lcm?max_value=9", Suite("mine", "reasoning_gym/lcm?max_value=9")),
        ("ood=a/b@validation", Suite("ood", "a/b", "validation", kind="out_of_distribution")),
        ("harder_2=x.jsonl@train[:9]", Suite("harder_2", "x.jsonl", "train[:9]", kind="harder")),
        ("x=http://me:secret@host/a.jsonl", Suite("x", "http://me:secret@host/a.jsonl", kind="unknown")),
        ("x=http://me@host/a.jsonl@train", Suite("x", "http://me@host/a.jsonl", "train", kind="unknown")),
        ("id=a.jsonl", Suite("id", "a.jsonl", kind="in_distribution")),
        ("id_2=a.jsonl", Suite("id_2", "a.jsonl", kind="in_distribution")),
        ("ideas=a.jsonl", Suite("ideas", "a.jsonl", kind="unknown")),
        ('{"name": "mine", "path": "y"}', Suite("mine", "y", kind="unknown")),
        ('{"name": "ood", "path": "x@y.jsonl", "kind": "harder"}', Suite("ood", "x@y.jsonl", kind="harder")),
        ('{"name": "math500", "limit": 7}', Suite(**{**vars(NAMED["math500"]), "limit": 7})),
    ],
)
def test_given_suites(text, suite):
    assert parse_suite(text) == suite


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gsm8", "did you mean gsm8k"),
        ("nothing", r"use one of gsm8k, .* NAME=PATH"),
        ("a/b=x.jsonl", "no file name"),
        ('{"name": "x", "path": "y", "limt": 3}', "did you mean `limit`"),
        ('{"name": "x", "path": "y", "limit": "ten"}', "at least 1"),
        ('{"name": "x", "path": "y", "kind": "easy"}', "use one of in_distribution"),
        ('{"name"', "no JSON"),
    ],
)
def test_refused_suites(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_suite(text)


def test_local_copies_stand_in_for_the_hub(tmp_path):
    jsonl(tmp_path / "gsm8k" / "test.jsonl", GSM8K)
    jsonl(tmp_path / "math500" / "test.jsonl", MATH)
    gsm8k, math500 = load_suites([NAMED["gsm8k"], NAMED["math500"]], str(tmp_path))
    assert [row["solution"] for row in gsm8k.rows] == [str(i + 1) for i in range(20)]
    assert math500.rows[0]["problem_class"] == "Algebra" and math500.rows[0]["solution"] == "4"
    with pytest.raises(DataError, match=r"gsm_plus.*qintongli/GSM-Plus@test"):
        load_suites([NAMED["gsm_plus"]], str(tmp_path))


def test_limits_draw_the_same_problems(tmp_path):
    suite = Suite("few", jsonl(tmp_path / "few.jsonl", GSM8K), limit=5)
    (first,), (second,) = load_suites([suite]), load_suites([suite], limit=3)
    assert first == second and len(first.rows) == 5 and first.available == 20
    (third,) = load_suites([Suite("few", suite.path)], limit=3)
    assert len(third.rows) == 3 and third.available == 20


def test_generated_families_by_difficulty():
    (near, far) = load_suites(
        [
            parse_suite("near=reasoning_gym/chain_sum?size=40&max_digits=1"),
            parse_suite("harder=reasoning_gym/chain_sum?size=40&min_digits=6&max_digits=7"),
        ]
    )
    assert len(near.rows) == len(far.rows) == 32
    assert {row["problem_class"] for row in near.rows} == {"chain_sum"}
    assert max(len(row["solution"]) for row in near.rows) < min(len(row["prompt"][0]["content"]) for row in far.rows)


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        (Suite("gone", "no/such/file.jsonl"), "gone cannot be loaded.*no file"),
        (Suite("gone", "no-such-org/no-such-data"), "gone cannot be loaded"),
        (Suite("gone", "reasoning_gym/lcms"), "gone cannot be loaded.*did you mean lcm"),
        (Suite("gone", "reasoning_gym/lcm?size=8", class_column="topic"), "class_column.*problem_class"),
    ],
)
def test_one_error_for_what_cannot_be_loaded(suite, words):
    with pytest.raises(DataError, match=words):
        load_suites([suite])


def test_names_are_unique(tmp_path):
    suite = Suite("same", jsonl(tmp_path / "same.jsonl", GSM8K))
    with pytest.raises(ConfigError, match="same_2=PATH"):
        load_suites([suite, suite])
