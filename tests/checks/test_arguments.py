"""Options that name files and folders."""

import json
from pathlib import Path

import pytest
import yaml
from report_runs import write_run

from trl_sgpo.cli.eval import read_options
from trl_sgpo.cli.main import main


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_directory_where_no_shell_replaced_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(home / "run")
    assert main(["report", "~/run", "--output=~/page.html", "--eval", "~/run/eval"]) == 0
    assert (home / "page.html").is_file()
    assert main(["bank", "export", "~/run", "~/export"]) == 0
    assert json.loads((home / "export" / "manifest.json").read_text())
    assert main(["export", "--model", "~/nowhere", "--output_dir", "~/out", "--merge"]) == 2
    assert f"{home}/nowhere" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_the_home_directory_in_a_file_of_options(home: Path) -> None:
    (home / "eval.yaml").write_text(yaml.safe_dump({"output_dir": "~/out", "suites": ["gsm8k"]}))
    options = read_options(["--config", "~/eval.yaml", "--model=~/model", "--system_prompt", "~/ is text"])
    assert (options.output_dir, options.model) == (f"{home}/out", f"{home}/model")
    assert options.system_prompt == "~/ is text"


def test_the_home_directory_in_the_name_of_a_recipe(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "~/nowhere.yaml"]) == 2
    assert f"There is no file {home}/nowhere.yaml" in capsys.readouterr().err
