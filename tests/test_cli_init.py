"""`trl-sgpo init`: what it writes trains, with the reward function that it wrote."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from models import hash_embedder, problems, save_tiny_model

from trl_sgpo.cli import init
from trl_sgpo.cli.main import main
from trl_sgpo.data.loading import load_rewards
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


@pytest.mark.parametrize("size", init.SIZES, ids=lambda size: f"{size.vram:g}GB")
def test_every_size_has_a_possible_geometry(tiny: str, here: Path, size: init.Size) -> None:
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
    assert init._precision(name, vram).get("load_in_4bit", False) == quantized


def test_asks_again_until_it_can_write(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(here / "sums.jsonl", size=30, classes=False)
    answers = iter(["nowhere/at-all", tiny, "no_family", "sums.jsonl", "much", "0", "y", "json.py", "asked_reward.py"])
    asked = []

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(init, "_asking", lambda: True)
    assert main(["init"]) == 0
    assert len(asked) == 9 and next(answers, None) is None
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
        (["--model", "MODEL", "--data", "open.jsonl", "--vram", "0"], "`--reward_file`"),
        (["--model", "MODEL", "--data", "gcd", "--output", "there.yaml"], "`--overwrite`"),
    ],
)
def test_one_line_that_names_the_fix(
    tiny: str, here: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(here / "open.jsonl", size=8, solutions=False)
    Path("there.yaml").write_text("")
    assert main(["init", *(tiny if argument == "MODEL" else argument for argument in arguments)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("trl-sgpo init: error: ") and words in message
    assert sorted(path.name for path in here.iterdir()) == ["open.jsonl", "there.yaml"]
