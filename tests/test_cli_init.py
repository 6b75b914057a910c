"""`trl-sgpo init`: what it writes trains, with the reward function that it wrote."""

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import word_problems
import yaml
from datasets import Dataset
from models import hash_embedder, problems, save_tiny_model

from trl_sgpo.cli import init, init_recipe
from trl_sgpo.cli.main import main
from trl_sgpo.data.loading import load_data, load_rewards
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.transfer import BlockGeometry
from trl_sgpo.recipe import read_recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to start from, in which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)
    monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")
    importlib.invalidate_caches()
    return tmp_path


def write_sums(path: Path, size: int = 200, solutions: bool = True, classes: bool = True) -> str:
    dropped = [] if solutions else ["solution"]
    dropped += [] if classes else ["problem_class"]
    rows = problems(size).remove_columns(dropped).to_list()
    path.write_text("".join(json.dumps(row | {"prompt": row["prompt"][0]["content"]}) + "\n" for row in rows))
    return path.name


def test_recipe_trains_a_step_with_the_reward_file(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_sums(here / "sums.jsonl")
    arguments = ["--model", tiny, "--data", data, "--vram", "0", "--output", "mine.yaml"]
    assert main(["init", *arguments, "--reward_file", "sum_reward.py"]) == 0
    told = capsys.readouterr().out
    assert "trl-sgpo train --config mine.yaml" in told and "trl-sgpo solve --model runs/mine" in told

    written = Path("sum_reward.py").read_text()
    Path("sum_reward.py").write_text(
        written.replace("    return rewards\n", "    print('REWARDS', rewards)\n    return rewards\n")
    )
    short = ["--max_strategy_length", "4", "--max_completion_length", "4", "--report_problems", "4"]
    assert main(["train", "--config", "mine.yaml", "--max_steps", "1", *short]) == 0
    told = capsys.readouterr().out
    assert told.count("REWARDS") >= 3 and "strategy transfer score" in told  # before, the step, and after
    state = json.loads(Path("runs/mine/checkpoint-1/trainer_state.json").read_text())
    assert "rewards/reward/mean" in state["log_history"][0]
    assert Path("runs/mine/adapter_model.safetensors").is_file()
    settings = TwoPhaseSettings.load("runs/mine")
    assert settings.execution_prompt.endswith("End with #### and the answer.") and settings.max_strategy_length == 4
    # and the trained adapter solves
    assert main(["solve", "--model", "runs/mine", "What is 1 + 2?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["retrieved"] == []


def test_reward_function_tells_right_from_wrong(tiny: str, here: Path) -> None:
    data = write_sums(here / "sums.jsonl")
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0", "--reward_file", "first_reward.py"]) == 0
    (reward,) = load_rewards(read_recipe(["--config", "recipe.yaml"], "test").script)
    completions = ["#### 3", [{"role": "assistant", "content": r"So \boxed{4}"}], "3", "#### 3"]
    assert reward(completions, solution=["3", "3.0", "3", None], prompts=[""] * 4) == [1.0, 0.0, 0.0, None]

    data = write_sums(here / "open.jsonl", solutions=False)
    arguments = ["init", "--model", tiny, "--data", data, "--vram", "0", "--output", "open.yaml"]
    assert main([*arguments, "--reward_file", "second_reward.py"]) == 0
    (reward,) = load_rewards(read_recipe(["--config", "open.yaml"], "test").script)
    assert reward(["#### 3", "3"], prompts=["", ""]) == [1.0, 0.0]


@pytest.mark.parametrize("size", init_recipe.SIZES, ids=lambda size: f"{size.vram:g}GB")
def test_every_size_has_a_possible_geometry(tiny: str, here: Path, size: init_recipe.Size) -> None:
    arguments = ["--model", tiny, "--data", "lcm+gcd?size=40", "--vram", f"{size.vram:g}", "--output", "all.yaml"]
    assert main(["init", *arguments]) == 0
    recipe = read_recipe(["--config", "all.yaml", "--bf16", "false", "--use_cpu", "true"], "test")
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert rows == size.rows and rows % (training.num_generations * training.transfer_block_size) == 0
    assert BlockGeometry(2, 4).problems == training.transfer_block_size
    assert recipe.script.dataset_name == "reasoning_gym/lcm+gcd?size=40"
    assert recipe.script.reward_funcs == ["answer_reward"]
    assert recipe.model.use_peft and not recipe.model.load_in_4bit  # tiny weights fit as they are


@pytest.mark.parametrize(
    ("name", "vram", "quantized"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 8, False),
        ("Qwen/Qwen2.5-7B-Instruct", 24, True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 8, False),
        ("meta-llama/Llama-3.1-8B-Instruct", 80, False),
        ("someone/unknown", 16, True),
        ("someone/unknown", 24, False),
    ],
)
def test_weights_are_quantized_where_they_take_much_of_the_memory(name: str, vram: float, quantized: bool) -> None:
    assert init_recipe.precision(name, vram).get("load_in_4bit", False) == quantized


def test_asks_again_until_it_can_write(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(here / "sums.jsonl", size=30, classes=False)
    answers = iter(
        ["nowhere/at-all", tiny, "no_family", "sums.jsonl", "much", "0", "y", "json.py", "asked_reward.py", "n"]
    )
    asked = 0

    def answer() -> str:
        nonlocal asked
        asked += 1
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(init, "_asking", lambda: True)
    assert main(["init"]) == 0
    assert asked == 10 and next(answers, None) is None
    told = capsys.readouterr().out
    assert all(words in told for words in ("nowhere/at-all", "no_family", "`--vram much`", "installed module json"))
    content = yaml.safe_load(Path("recipe.yaml").read_text())
    assert content["reward_funcs"] == ["asked_reward.reward"] and content["num_clusters"] == 1
    assert content["report_problems"] == 0 and "dataset_train_split" not in content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "gcd"], "`--model`"),
        (["--model", "MODEL"], "`--data`"),
        (["--model", "no-such-org/no-such-model", "--data", "gcd"], "no-such-org/no-such-model"),
        (["--model", "MODEL", "--data", "gdc"], "gcd"),
        (["--model", "MODEL", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "MODEL", "--data", "gcd", "--vram", "2"], "too little"),
        (["--model", "MODEL", "--data", "gcd", "--output", "recipe.txt"], ".yaml"),
        (["--model", "MODEL", "--data", "gcd", "--reward_file", "../reward.py"], "my_rewards.py"),
        (
            ["--model", "MODEL", "--data", "open.jsonl", "--vram", "0"],
            "no answers: name their column by `--answer_column`, or",
        ),
        (["--model", "folder", "--data", "gcd"], "folder has no config.json"),
        (["--model", "MODEL", "--data", ""], "`--data` is empty"),
        (["--model", "MODEL", "--data", "folder"], "folder is a directory"),
        (["--model", "MODEL", "--data", "q"], "'q' is no reasoning-gym family, and files need"),
        (["--model", "MODEL", "--data", "nowhere.jsonl", "--vram", "much"], "`--vram much`"),
        (["--model", "MODEL", "--data", "gcd", "--output_dir", "open.jsonl"], "`--output_dir` is open.jsonl"),
        (["--model", "MODEL", "--data", "gcd", "--output_dir", ""], "`--output_dir` is empty"),
        (["--model", "MODEL", "--data", "gcd", "--output", "there.yaml"], "`--overwrite`"),
    ],
)
def test_one_line_that_names_the_fix(
    tiny: str, here: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(here / "open.jsonl", size=8, solutions=False)
    Path("there.yaml").write_text("")
    Path("folder").mkdir()
    assert main(["init", *(tiny if argument == "MODEL" else argument for argument in arguments)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("trl-sgpo init: error: ") and words in message
    assert sorted(path.name for path in here.iterdir()) == ["folder", "open.jsonl", "there.yaml"]


# Columns


def whole_problem(index: int) -> str:
    body, question, _, _ = word_problems.story(index)
    return f"{body} {question}"


@pytest.mark.parametrize(
    ("make", "template", "option", "answer"),
    [
        (word_problems.svamp, "{Body} {Question}", ["--answer_column", "answer"], "10"),
        (word_problems.asdiv, "{body} {question}", [], "10 (plums)"),
    ],
)
def test_a_file_with_body_and_question(
    tiny: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[int], list[dict[str, Any]]],
    template: str,
    option: list[str],
    answer: str,
) -> None:
    data = word_problems.write(here / "words.jsonl", make(96))
    arguments = ["init", "--model", tiny, "--data", data, "--vram", "0", *option]
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"`--prompt_template '{template}'`" in message and "looks like a part of the problem" in message
    assert not Path("recipe.yaml").exists()

    assert main([*arguments, "--prompt_template", template, "--try"]) == 0
    told = capsys.readouterr().out
    assert whole_problem(0) in told and "Its answer: 4" in told
    left_out = next(line for line in told.splitlines() if line.startswith("Text columns that are left out: "))
    assert "ody" not in left_out and ("Equation" in left_out or "formula" in left_out)
    assert "  right           0 of 16\n" in told and "at 64 tokens" in told and "executions at 128" in told
    assert "executions without a final answer" in told and "time a rollout" in told
    assert "No rollout is right" in told and "warm start" in told

    recipe = read_recipe(["--config", "recipe.yaml", "--report_problems", "8"], "test")
    problems = load_data(recipe)["train[:90%]"]
    assert problems[3]["prompt"] == [{"role": "user", "content": whole_problem(3)}]
    assert problems[3]["solution"] == word_problems_answer(make, 3)
    assert next(problem for problem in problems if problem["solution"] == answer) is not None


def word_problems_answer(make: Callable[[int], list[dict[str, Any]]], index: int) -> str:
    _, _, answer, thing = word_problems.story(index)
    return str(answer) if make is word_problems.svamp else f"{answer} ({thing})"


def test_training_reads_the_whole_problem(tiny: str, here: Path) -> None:
    data = word_problems.write(here / "svamp.jsonl", word_problems.svamp(96))
    template = ["--prompt_template", "{body} {question}"]
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0", *template]) == 0
    short = ["--max_steps", "1", "--max_strategy_length", "4", "--max_completion_length", "4"]
    assert main(["train", "--config", "recipe.yaml", *short, "--report_problems", "2"]) == 0
    prompts = Dataset.from_parquet(str(next(Path("runs/recipe").rglob("*.parquet"))))["prompt"]
    wholes = {whole_problem(index) for index in range(96)}
    assert {prompt[-1]["content"] for prompt in prompts} < wholes


def test_asks_for_columns_in_a_terminal(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = [word_problems.story(index) for index in range(20)]
    rows = [{"story": body, "question": question, "expected_answer": answer} for body, question, answer, _ in stories]
    data = word_problems.write(here / "words.jsonl", rows)
    answers = iter(["{story} {quest}", "{story} {question}", "gold", "", "n", "n"])
    monkeypatch.setattr("builtins.input", lambda: next(answers))
    monkeypatch.setattr(init, "_asking", lambda: True)
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0"]) == 0
    told = capsys.readouterr().out
    assert "`story` looks like a part of the problem: Ada keeps 3 pens" in told
    assert "names no column 'quest'" in told and "names no column 'gold'" in told and whole_problem(0) in told
    content = yaml.safe_load(Path("recipe.yaml").read_text())
    assert content["prompt_template"] == "{story} {question}" and content["answer_column"] == "expected_answer"

    answers = iter(["exercise", "n", "y"])
    data = word_problems.write(here / "named.jsonl", [{"exercise": body, "answer": "1"} for body, _, _, _ in stories])
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0", "--output", "named.yaml"]) == 0
    assert yaml.safe_load(Path("named.yaml").read_text())["prompt_column"] == "exercise"
    assert "16 rollouts of" in capsys.readouterr().out


def test_one_column_alone_is_taken_where_it_is_named(tiny: str, here: Path) -> None:
    data = word_problems.write(here / "asdiv.jsonl", word_problems.asdiv(20))
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0", "--prompt_column", "Question"]) == 0
    problems = load_data(read_recipe(["--config", "recipe.yaml"], "test"))["train"]
    assert problems[0]["prompt"][0]["content"] == word_problems.story(0)[1]


def test_a_long_problem_is_not_shown_whole(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "word " * 100_000, "answer": "1"}, {"question": "What is 1 + 2?", "answer": "3"}]
    (here / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    main(["init", "--model", tiny, "--data", "long.jsonl", "--vram", "0"])
    printed = capsys.readouterr().out
    assert re.search(r"… \(\d{3},\d{3} characters\)", printed) and len(printed) < 20_000


def test_choices_are_shown_with_letters(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = word_problems.write(here / "choices.jsonl", word_problems.choices(20))
    template = ["--prompt_template", "{question}{choices}"]
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0", *template]) == 0
    assert f"  {whole_problem(0)}\n  A. 5\n  B. 4\n\nIts answer: B\n" in capsys.readouterr().out


# The recipe as a newcomer reads it


@pytest.mark.parametrize(("size", "report"), [(30, 0), (200, 20)])
def test_recipe_keeps_what_its_titles_say(tiny: str, here: Path, size: int, report: int) -> None:
    data = write_sums(here / "sums.jsonl", size=size)
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0"]) == 0
    written = Path("recipe.yaml").read_text()
    content = yaml.safe_load(written)
    assert content["report_problems"] == report and ("too few problems" in written) == (report == 0)
    assert ("a tenth of the problems is kept" in written) == ("dataset_test_split" in content) == (report > 0)
    assert content["dtype"] == "float32" and content["bf16"] is False and "float16" not in written


def test_a_class_whose_problems_are_kept_is_merged(tiny: str, here: Path) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "solution": str(i + 1), "problem_class": "sums"} for i in range(88)]
    rows += [row | {"problem_class": "last"} for row in rows[:12]]
    data = word_problems.write(here / "sums.jsonl", rows)
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0"]) == 0
    assert yaml.safe_load(Path("recipe.yaml").read_text())["small_classes"] == "merge"  # two of twelve are trained on


def test_generated_problems_keep_none(tiny: str, here: Path) -> None:
    assert main(["init", "--model", tiny, "--data", "lcm+gcd?size=40", "--vram", "8"]) == 0
    written = Path("recipe.yaml").read_text()
    assert "unseen problems are generated for the report" in written and "report_problems: 64" in written
    assert "GPUs before Ampere" in written and yaml.safe_load(written)["dtype"] == "bfloat16"


# The trial


def test_a_recipe_that_is_there_is_tried(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_sums(here / "sums.jsonl", size=8)
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0"]) == 0
    before = Path("recipe.yaml").read_text()
    assert "init --try recipe.yaml" in capsys.readouterr().out
    assert main(["init", "--try", "recipe.yaml"]) == 0
    assert "  right           0 of 16\n" in capsys.readouterr().out and Path("recipe.yaml").read_text() == before
    assert sorted(path.name for path in here.iterdir()) == ["recipe.yaml", "sums.jsonl"]

    Path("even.py").write_text("from models import evenness as reward\n")
    Path("recipe.yaml").write_text(before.replace("- answer_reward", "- even.reward"))
    assert main(["init", "--try", "recipe.yaml"]) == 0
    right = re.search(r"right +(\d+) of 16", capsys.readouterr().out)
    assert right is not None and 0 < int(right[1]) < 16

    assert main(["init", "--try", "recipe.yaml", "--vram", "0"]) == 2
    assert "leave the other options out" in capsys.readouterr().err
    assert main(["init", "--try", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_names_of_columns_are_quoted_in_what_is_to_be_copied(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{n} + 1?", "target;touch ran #": str(n + 1)} for n in range(20)]
    data = word_problems.write(here / "words.jsonl", rows)
    assert main(["init", "--model", tiny, "--data", data, "--vram", "0"]) == 2
    assert "`--answer_column 'target;touch ran #'`" in capsys.readouterr().err
