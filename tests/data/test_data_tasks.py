import json
import subprocess
import sys

import pytest

from trl_sgpo.data.families import generated_again, read_reference
from trl_sgpo.data.generated import materialise
from trl_sgpo.data.loading import load_data
from trl_sgpo.data.mixture import ProblemMixtureConfig, ProblemsConfig
from trl_sgpo.data.tasks import answer_reward, final_answer, load_mixture, load_problems, to_problems
from trl_sgpo.errors import DataError
from trl_sgpo.recipe import read_recipe


GYM = "reasoning_gym/lcm+chain_sum?size=60&seed=3&max_value=40&max_digits=2"
GSM8K = {"question": "How many apples?", "answer": "3 + 4 = <<3+4=7>>7 apples\n#### 7"}
MATH = {
    "problem": "What is $1/2+1/4$?",
    "solution": r"It is $\boxed{\frac{3}{4}}$.",
    "answer": r"\frac{3}{4}",
    "subject": "Prealgebra",
    "level": 1,
}


def questions(dataset):
    return [prompt[0]["content"] for prompt in dataset["prompt"]]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_light_import():
    heavy = "{'torch', 'datasets', 'transformers', 'reasoning_gym', 'sklearn', 'sentence_transformers'}"
    code = f"""
import sys, trl_sgpo.inference.weights, trl_sgpo.data.tasks, trl_sgpo.data.classes, trl_sgpo.data.worked
sys.exit(bool({heavy} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gym_splits_are_disjoint_and_distinct():
    train, test = load_problems(GYM), load_problems(GYM, "test")
    assert not set(questions(train)) & set(questions(test))
    for dataset, size in ((train, 120), (test, 64)):
        assert len(dataset) == size == len(set(questions(dataset)))
    assert train.column_names == ["prompt", "solution", "problem_class", "entry"]
    assert set(train["problem_class"]) == {"lcm", "chain_sum"}
    for row in train.select(range(5)).to_list():
        assert generated_again(read_reference(row["entry"]))["answer"] == row["solution"]


def test_gym_is_deterministic():
    from trl_sgpo.data.generated import _generate

    assert _generate(GYM, "train") == _generate(GYM, "train")
    assert _generate(GYM, "train") != _generate(GYM.replace("seed=3", "seed=4"), "train")
    assert materialise(GYM, "train") == materialise(GYM, "train") != materialise(GYM, "test")


@pytest.mark.parametrize("family", ["knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"])
def test_gym_families_that_depend_on_the_hash_seed_give_the_same_problems_again(family):
    for row in load_problems(f"reasoning_gym/{family}?size=8").to_list():
        again = generated_again(read_reference(row["entry"]))
        assert (again["question"], again["answer"]) == (row["prompt"][0]["content"], row["solution"])


def test_a_gym_family_whose_problems_take_too_long(monkeypatch):
    monkeypatch.setattr("trl_sgpo.checks.process.CHECKS.ask", lambda *_: None)
    with pytest.raises(DataError, match="use easier settings"):
        load_problems("reasoning_gym/gcd?size=8&seed=987654")


def test_gym_family_with_few_questions(caplog):
    dataset = load_problems("reasoning_gym/products?size=500&max_digits=1")
    assert 60 < len(dataset) < 100
    assert "distinct train problems instead of 500" in caplog.text


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("reasoning_gym/chain_sums", "train", "did you mean chain_sum"),
        ("reasoning_gym/lcm?max_valu=3", "train", "min_numbers, max_numbers, min_value, max_value"),
        ("reasoning_gym/lcm?max_value=0", "train", "max_value must be > min_value"),
        ("reasoning_gym/lcm?size=many", "train", "whole numbers"),
        ("reasoning_gym/lcm", "validation", "use `train` or `test`"),
        ("no/such/file.jsonl", "train", "There is no file"),
        ("no-such-org/no-such-dataset", "train", "check the name and the network"),
    ],
)
def test_load_problems_errors(path, split, message):
    with pytest.raises(DataError, match=message) as error:
        load_problems(path, split)
    assert "\n" not in str(error.value)


def test_gsm8k_columns(tmp_path):
    dataset = load_problems(jsonl(tmp_path / "gsm8k.jsonl", [GSM8K]))
    row = dataset[0]
    assert row["prompt"] == [{"role": "user", "content": "How many apples?"}]
    assert (row["solution"], row["worked_solution"]) == ("7", GSM8K["answer"])
    assert to_problems(dataset)[0] == row


def test_math_columns(tmp_path):
    dataset = load_problems(jsonl(tmp_path / "math.jsonl", [MATH]), "train[:1]")
    row = dataset[0]
    assert (row["solution"], row["worked_solution"]) == (MATH["answer"], MATH["solution"])
    assert (row["problem_class"], row["level"]) == ("Prealgebra", 1)
    assert to_problems(dataset)[0] == row


def test_boxed_solution_without_answer(tmp_path):
    dataset = load_problems(jsonl(tmp_path / "boxed.json", [{"problem": "?", "solution": MATH["solution"]}]))
    assert (dataset[0]["solution"], dataset[0]["worked_solution"]) == (MATH["answer"], MATH["solution"])


def test_rows_without_solution(tmp_path):
    dataset = load_problems(jsonl(tmp_path / "plain.jsonl", [{"prompt": "Hi"}]))
    assert dataset.column_names == ["prompt"]


def test_missing_prompt(tmp_path):
    with pytest.raises(DataError, match=r"columns text, answer: name .* `prompt_column`"):
        load_problems(jsonl(tmp_path / "text.jsonl", [{"text": "a", "answer": "b"}]))


def test_mixture(tmp_path):
    file = jsonl(tmp_path / "gsm8k.jsonl", [GSM8K] * 4)
    mixture = ProblemMixtureConfig(
        datasets=[
            ProblemsConfig(path=GYM, split="train[:10]"),
            ProblemsConfig(path="reasoning_gym/gcd?size=8"),
            ProblemsConfig(path=file),
        ]
    )
    train = load_mixture(mixture)["train"]
    assert len(train) == 22
    assert all(prompt[0]["role"] == "user" for prompt in train["prompt"])
    assert None not in train["solution"] and train[21]["solution"] == "7"
    assert train[21]["problem_class"] is None
    assert mixture.datasets[0].path == GYM


def test_mixture_test_split():
    mixture = ProblemMixtureConfig(datasets=[ProblemsConfig(path=GYM)], test_split_size=0.25)
    assert {split: len(dataset) for split, dataset in load_mixture(mixture).items()} == {"train": 90, "test": 30}


def test_mixture_errors(tmp_path):
    parts = [
        ProblemsConfig(path=jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "Hi", "level": level}]))
        for name, level in (("number", 3), ("text", "3"))
    ]
    with pytest.raises(DataError, match="`columns:`"):
        load_mixture(ProblemMixtureConfig(datasets=parts))
    with pytest.raises(DataError, match="streaming: false"):
        load_mixture(ProblemMixtureConfig(datasets=parts, streaming=True))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1\nno\n#### 42 \nmore", "42"),
        ("####\n1 2\n3 4", "1 2\n3 4"),
        (r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1", None),
        ("The answer is 3. No, the answer is **4**.\nBye", "4"),
        ("Answer: 3.5.", "3.5"),
        ("the final answer is: x = 2", "x = 2"),
        ("I do not know", None),
        ("", None),
        ("####", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "solution", "reward"),
    [
        ("42", "42", 1.0),
        ("$1,042.00", "1042", 1.0),
        ("42.", "42", 1.0),
        ("4 2", "42", 0.0),
        ("43", "42", 0.0),
        ("(1,2)", "(12)", 0.0),
        (r"\frac{6}{8}", r"\frac{3}{4}", 1.0),
        ("0.75", r"\frac{3}{4}", 1.0),
        (r"\frac{3}{5}", r"\frac{3}{4}", 0.0),
        ("x + 1", "1+x", 1.0),
        ("east", r"\text{west}", 0.0),
    ],
)
def test_answer_reward(answer, solution, reward):
    assert answer_reward([f"#### {answer}"], [solution]) == [reward]
    assert answer_reward([[{"role": "assistant", "content": f"So\n#### {answer}"}]], [solution], entry=[None]) == [
        reward
    ]


def test_answer_reward_without_answer_or_solution():
    assert answer_reward(["no idea", "#### 1"], ["1", None], extra=[0, 0]) == [0.0, None]


def test_answer_reward_by_family():
    dataset = load_problems("reasoning_gym/lcm+gcd+chain_sum+products+spell_backward+game_of_life?size=5")
    columns = {"solution": dataset["solution"], "entry": dataset["entry"], "problem_class": dataset["problem_class"]}
    assert answer_reward([f"#### {solution}" for solution in dataset["solution"]], **columns) == [1.0] * 30
    assert answer_reward(["#### {}"] * 30, **columns) == [0.0] * 30
    assert answer_reward(["#### 987654321"] * 30, **columns) == [0.0] * 30


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_recipe_data_that_ends_in_another_role_is_refused_before_anything_is_loaded(tmp_path, system_prompt):
    rows = [
        {"prompt": [{"role": "user", "content": "1 + 1?"}], "solution": "2"},
        {
            "prompt": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "It is"}],
            "solution": "3",
        },
    ]
    path = tmp_path / "problems.jsonl"
    jsonl(path, rows)
    options = ["--model_name_or_path", "nowhere", "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    options += ["--system_prompt", system_prompt] if system_prompt else []
    recipe = read_recipe([*options, "--report_to", "none", "--bf16", "false"], "test")
    with pytest.raises(DataError, match="prompt of row 1 ends in a message of the role `assistant`"):
        load_data(recipe)
