"""U+0000 and halves of surrogate pairs, which no path, variable, file or tokenizer takes: one line that names them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from models import save_tiny_model

from trl_sgpo import SGPOPipeline
from trl_sgpo.checks.json_text import parse_json
from trl_sgpo.cli.main import main
from trl_sgpo.data.trace_files import read_traces
from trl_sgpo.errors import ConfigError, DataError
from trl_sgpo.inference.settings import SETTINGS_FILE, TwoPhaseSettings
from trl_sgpo.method.prompts import check_prompts


NUL, HALF = "a\\u0000b", "a\\ud800b"  # as YAML and JSON write them


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Writes a recipe with more lines, which are the last that count."""

    def write(*lines: str) -> str:
        content = {
            "model_name_or_path": save_tiny_model(tmp_path / "model"), "dataset_name": "reasoning_gym/gcd?size=8",
            "reward_funcs": ["answer_reward"], "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8,
            "num_generations": 4, "max_steps": 1, "max_strategy_length": 4, "max_completion_length": 4,
            "report_problems": 0, "report_to": "none", "bf16": False, "use_cpu": True, "use_bank": False,
        }  # fmt: skip
        for line in lines:
            content.pop(line.partition(":")[0], None)
        path = tmp_path / "recipe.yaml"
        path.write_text("\n".join([*(f"{key}: {json.dumps(value)}" for key, value in content.items()), *lines]))
        return str(path)

    return write


def line_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command, which ends with status 2 before anything else."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1, printed
    return printed[0]


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (f'{{"{NUL}": x}}', "`env.a\\x00b` holds U+0000"),
        (f'{{A_TOKEN: "{NUL}"}}', "`env.A_TOKEN` holds U+0000"),
        (f'{{A_TOKEN: "{HALF}"}}', "`env.A_TOKEN` holds U+D800, half of a character"),
        ('{"A=B": x}', "`env` names a variable 'A=B'"),
        ('{"": x}', "`env` names a variable ''"),
    ],
)
def test_environment_of_a_recipe(
    environment: str, named: str, recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A_TOKEN", raising=False)
    for name in ("TRL_EXPERIMENTAL_SILENCE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # by the command itself
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    before = dict(os.environ)
    assert named in line_of(["train", "--config", recipe(f"env: {environment}")], capsys)
    assert dict(os.environ) == before


@pytest.mark.parametrize("character", [NUL, HALF])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", '"%s"'),
        ("bank_path", '"%s"'),
        ("strategy_prompt", '"%s {problem}"'),
        ("system_prompt", '"%s"'),
        ("reward_funcs", '["%s"]'),
        ("model_init_kwargs", '{"%s": 1}'),
        ("datasets", '[{path: "%s"}]'),
    ],
)
def test_values_of_a_recipe(
    key: str, value: str, character: str, recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_of(["train", "--config", recipe(f"{key}: {value % character}")], capsys)
    assert f"recipe.yaml: `{key}" in line and "holds U+" in line


@pytest.mark.parametrize("argument", ["caf\udce9", "a\0b", "\ud83d"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["solve", "--model", "m", "--no_bank"],
        ["export", "--model", "m", "--merge", "--output_dir"],
        ["train", "--config", "r.yaml", "--strategy_prompt"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_line(arguments: list[str], argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of([*arguments, argument], capsys)
    assert line.startswith(f"trl-sgpo {arguments[0]}: error: The argument") and "holds U+" in line


@pytest.mark.parametrize(
    "prompt", ["a\ud800b", [{"role": "user", "content": "a\udfffb"}], [{"role": "a\ud800", "content": "b"}]]
)
def test_problems(prompt: Any) -> None:
    """Those of a file or a server are replaced, or no JSON, so that these come from Python or a terminal."""
    with pytest.raises(DataError, match=r"row 0 holds U\+D[8F]"):
        check_prompts([prompt])
    check_prompts(["a\0b"])


def test_a_problem_and_a_strategy_in_python(tmp_path: Path) -> None:
    with SGPOPipeline.from_pretrained(save_tiny_model(tmp_path), bank=None) as pipeline:
        with pytest.raises(DataError, match=r"The prompt holds U\+D800"):
            pipeline("a\ud800b")
        with pytest.raises(ConfigError, match=r"The strategy holds U\+D800"):
            pipeline("1 + 2", strategy="a\ud800b")


def test_settings_beside_a_model(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text(f'{{"strategy_prompt": "{HALF} {{problem}}"}}')
    with pytest.raises(ConfigError, match=r"holds U\+D800"):
        TwoPhaseSettings.load(tmp_path)


def test_traces(tmp_path: Path) -> None:
    row = {"prompt": "1 + 2", "strategy": "a\ud800b", "execution": "3", "problem_class": "sums"}
    (tmp_path / "traces.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"line 1: no JSON \(a text in it holds U\+D800"):
        read_traces(tmp_path / "traces.jsonl")


@pytest.mark.parametrize("text", ['["\\ud83d\\ude00"]', '["\\\\ud800"]', '["\\u0000"]'])
def test_whole_characters_are_read(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
