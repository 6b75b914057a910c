"""Files of a run of somebody else: what no run writes is one line with status 2."""

import json
import os
import shutil
from pathlib import Path

import pytest
from models import hash_embedder, save_tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_sgpo import StrategyBank
from trl_sgpo.cli.main import main
from trl_sgpo.errors import SGPOError
from trl_sgpo.evaluation.chunks import ChunkLog
from trl_sgpo.inference.pretrained import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory)
    return directory


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "run")


PUSHED = {
    "sgpo.json": ["[]", "{", "null", '{"embedding_model": 1}'],
    "trainer_state.json": ["{}", "[]", "{", "null", '{"global_step": 1, "epoch": 1}'],
    "report.json": ["[]", "{", '{"after": {"x": {}}}', '{"after": []}', '{"after": {"x": {"problems": 1}}}'],
    "training.json": ["[]", "{", '{"x": 1}', '{"datasets": [1]}', '{"settings": []}', '{"license": {"license": 1}}'],
    "tokenizer_config.json": ["{"],
    "adapter_config.json": [
        "{}",
        "[]",
        *(f'{{"base_model_name_or_path": {name}}}' for name in ("null", '["a"]', "5")),
    ],
}
EVALUATED = {
    "results.json": ["{}", "[]", "{", '{"suites": 1}', '{"suites": {"a": {}}}', '{"suites": {"a": 1}}'],
    "hub/model_index.yaml": ["{}", "model-index: 1", "model-index: []", "model-index: [{results: 1}]"],
}


def expect_one_line(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert name in line


@pytest.mark.parametrize("name, content", [(name, content) for name, each in PUSHED.items() for content in each])
def test_files_of_a_run_that_is_pushed(
    name: str, content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_text(content)
    expect_one_line(["push", str(run), "user/m", "--no_bank", "--dry_run", str(tmp_path / "out")], name, capsys)


@pytest.mark.parametrize("name, content", [(name, content) for name, each in EVALUATED.items() for content in each])
def test_files_of_an_evaluation_that_is_pushed(
    name: str, content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "eval" / "hub").mkdir(parents=True)
    (run / "eval" / "results.json").write_text('{"suites": {}}')
    (run / "eval" / name).write_text(content)
    arguments = ["push", str(run), "user/m", "--no_bank", "--dry_run", str(tmp_path / "out")]
    expect_one_line([*arguments, "--eval", str(run / "eval")], name, capsys)


@pytest.mark.parametrize("base", [None, ["a"], 5])
def test_an_adapter_that_names_no_base(base: object, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    expect_one_line(["solve", "--model", str(run), "--no_bank", "1 + 1"], "adapter_config.json", capsys)


@pytest.mark.parametrize("command", ["export", "push"])
def test_the_base_that_an_adapter_is_merged_into_is_named(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of somebody else may name any model on this machine, whose weights are then in what is published."""
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    load_tokenizer(model).save_pretrained(tmp_path / "adapter")
    arguments = {
        "export": ["export", "--model", str(tmp_path / "adapter"), "--merge", "--output_dir", str(tmp_path / "out")],
        "push": ["push", str(tmp_path / "adapter"), "user/m", "--no_bank", "--dry_run", str(tmp_path / "out")],
    }
    assert main(arguments[command]) == 0
    assert f"is merged into {model}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"log_history": [1]}', '{"log_history": [{"sgpo/malformed": "x"}]}']
)
def test_the_log_beside_an_empty_bank(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StrategyBank(tmp_path / "run" / "strategy_bank", hash_embedder).close()
    (tmp_path / "run" / "trainer_state.json").write_text(content)
    expect_one_line(["bank", "list", str(tmp_path / "run")], "trainer_state.json", capsys)


@pytest.mark.parametrize(
    "settings, rows", [("[]", ""), ("{", ""), ('{"suites": 1}', ""), ("{}", '{"key": "a"}\n'), ("{}", '{"key": []}\n')]
)
def test_files_of_an_evaluation_that_is_continued(settings: str, rows: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(settings)
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(SGPOError, match="damaged"):
        ChunkLog(tmp_path, {}, 1)


@pytest.mark.parametrize("name", ["trainer_state.json", "training.json", "report.json"])
def test_a_file_of_20_gigabytes_in_a_run_that_is_pushed(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / name).open("wb") as file:
        file.truncate(20 << 30)
    expect_one_line(["push", str(run), "user/m", "--no_bank", "--dry_run", str(tmp_path / "out")], name, capsys)


def test_chunks_of_an_evaluation_that_are_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(SGPOError, match="no file"):
        ChunkLog(tmp_path, {}, 1)
