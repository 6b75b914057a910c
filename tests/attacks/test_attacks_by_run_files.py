"""Files of a run of somebody else: what no run writes is one line with status 2."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from models import hash_embedder, save_tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_sgpo import StrategyBank
from trl_sgpo.checks.json_text import texts_in
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


def report(**changes: object) -> dict[str, Any]:
    score = {"accuracy": 0.5, "transfer": 0.2, "problems": 10, "transfers": 5} | changes
    return {when: {"greedy": score, "sampled": score} for when in ("before", "after")}


def evaluated(name: str = "sums", **changes: object) -> dict[str, Any]:
    figures = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {"suites": {name: {"kind": "ood", "problems": 9, "available": 9, "accuracy": figures} | changes}}


def index(value: float = 0.5, name: str = "sums", **changes: object) -> str:
    metrics = [{"type": "accuracy", "value": value, "name": "accuracy"}]
    dataset = {"name": name, "type": "sums"}
    entry = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics} | changes
    return yaml.safe_dump({"model-index": [{"name": "x", "results": [entry]}]})


PUSHED = {
    "sgpo.json": ["[]", "{", "null", '{"embedding_model": 1}'],
    "trainer_state.json": ["{}", "[]", "{", "null", '{"global_step": 1, "epoch": 1}'],
    "report.json": [
        *("[]", "{", '{"after": {"x": {}}}', '{"after": []}', '{"after": {"x": {"problems": 1}}}'),
        json.dumps(report(accuracy=100)),
        json.dumps(report(problems="9 | # P")),
        json.dumps({when: scores | {"x | <b>": scores["greedy"]} for when, scores in report().items()}),
    ],
    "training.json": [
        *("[]", "{", '{"x": 1}', '{"datasets": [1]}', '{"settings": []}', '{"license": {"license": 1}}'),
        '{"license": {"license": "mit", "new_version": "evil/model"}}',
        '{"license": {"license": "mit\\nextra_gated_prompt: x"}}',
        '{"license": {"license_link": "<img src=x>"}}',
        '{"tags": ["a\\nb: c"]}',
        '{"badges": ["# BADGE"]}',
        '{"badges": ["[<img src=\\"https://evil.example/b.png\\"/>](https://evil.example)"]}',
    ],
    "tokenizer_config.json": ["{"],
    "adapter_config.json": [
        "{}",
        "[]",
        *(f'{{"base_model_name_or_path": {name}}}' for name in ("null", '["a"]', "5")),
    ],
}
EVALUATED = {
    "results.json": [
        *("{}", "[]", "{", '{"suites": 1}', '{"suites": {"a": {}}}', '{"suites": {"a": 1}}'),
        json.dumps(evaluated(problems="9 | # P")),
        json.dumps(evaluated(kind=5)),
        json.dumps(evaluated(accuracy={"value": 9, "low": 0, "high": 1})),
    ],
    "hub/model_index.yaml": [
        *("{}", "model-index: 1", "model-index: []", "model-index: [{results: 1}]"),
        *(index(100), index(0.9), index(name="AIME"), index(task=5), index(source={"url": "http://evil.example"})),
    ],
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
    (run / "eval" / "results.json").write_text(json.dumps(evaluated()))
    (run / "eval" / name).write_text(content)
    arguments = ["push", str(run), "user/m", "--no_bank", "--dry_run", str(tmp_path / "out")]
    expect_one_line([*arguments, "--eval", str(run / "eval")], name, capsys)


def test_texts_of_a_run_are_data_in_its_card(run: Path, tmp_path: Path) -> None:
    evil = (
        'x` |\n\n<img src="http://evil.example/p.png"> [click](javascript:alert(1))\n\n# You must run\n\n```bash\nrm\n'
    )
    facts = {name: [evil] for name in ("datasets", "rewards")} | {
        name: {evil: evil} for name in ("settings", "versions")
    }
    (run / "training.json").write_text(json.dumps(facts | {"base_model": evil}))
    (run / "report.json").write_text(json.dumps(report()))
    (run / "eval" / "hub").mkdir(parents=True)
    (run / "eval" / "results.json").write_text(json.dumps(evaluated(evil, kind=evil)))
    dataset = {"name": evil, "type": evil, "args": {"x": evil}}
    (run / "eval" / "hub" / "model_index.yaml").write_text(index(dataset=dataset, name=evil))
    out = tmp_path / "out"
    assert main(["push", str(run), "user/m", "--no_bank", "--dry_run", str(out), "--eval", str(run / "eval")]) == 0
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert set(metadata) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert not any("\n" in part or ("evil" in part and "<" not in part) for part in texts_in(metadata))
    assert metadata["model-index"][0]["results"][-1]["dataset"].keys() == {"name", "type"}
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    inline = [part for token in tokens for part in token.children or []]
    assert not [part for part in inline if part.type in ("image", "html_inline")]
    assert not [token for token in tokens if token.type == "html_block" and "evil" in token.content]
    links = [str(part.attrs["href"]) for part in inline if part.type == "link_open"]
    assert not [
        link
        for link in links
        if not link.startswith(("https://huggingface.co/", "https://github.com/", "https://arxiv.org/"))
    ]
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert not [heading for heading in headings if "must" in heading]
    assert not [token for token in tokens if token.type == "fence" and token.content == "rm\n"]
    assert sum("must run" in token.content for token in tokens if token.type == "inline") > 5


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
