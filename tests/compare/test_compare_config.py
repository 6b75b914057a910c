"""A comparison's YAML: what it means and what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_sgpo.compare.config import METHODS, read_comparison
from trl_sgpo.errors import ConfigError


CONTENT: dict[str, Any] = {
    "recipe": "recipes/lab/sgpo.yaml",
    "output_dir": "runs/x",
    "seeds": [1, 2],
    "budget": 100,
    "suites": [{"name": "seen", "path": "list_functions/seen"}],
    "transfer": {"suite": "seen"},
    "arms": {
        "base": None,
        "sgpo": {},
        "rlhf": {"label_share": 0.5, "learning_rate": 1e-3},
        "k1": {"method": "sgpo", "transfer_block_size": 1},
    },
}


def _written(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "compare.yaml"
    path.write_text(
        yaml.safe_dump(
            {key: value for key, value in (CONTENT | changes).items() if value is not None}, sort_keys=False
        )
    )
    return str(path)


def test_arms_take_settings_of_their_method_and_keys_of_the_recipe(tmp_path: Path) -> None:
    base, sgpo, rlhf, k1 = read_comparison(_written(tmp_path)).arms
    assert [arm.method for arm in (base, sgpo, rlhf, k1)] == ["base", "sgpo", "rlhf", "sgpo"]
    assert rlhf.settings["label_share"] == 0.5 and rlhf.overrides == {"learning_rate": 1e-3}
    assert k1.overrides == {"transfer_block_size": 1}
    assert [arm.form for arm in (base, k1)] == ["plain", "two_phase"]


def test_changes_win_and_arms_can_be_chosen(tmp_path: Path) -> None:
    path = _written(tmp_path, overrides={"lora_r": 8, "lora_alpha": 16})
    comparison = read_comparison(path, {"arms": ["k1"], "budget": 7, "overrides": {"lora_r": 4}})
    assert [arm.name for arm in comparison.arms] == ["k1"]
    assert comparison.budget == 7 and comparison.overrides == {"lora_r": 4, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": 3}, "Unknown key `budgets`.*`budget`"),
        ({"recipe": None}, "lacks `recipe`"),
        ({"arms": {"sgbo": {}}}, f"'sgbo'.*{METHODS[0]}"),
        ({"transfer": {"suite": "other"}}, "name of a suite: one of seen"),
        ({"seeds": []}, "a seed and an arm"),
        ({"samples": 0}, "`samples` and `pass_samples` must be at least 1"),
        ({"pass_samples": 0}, "`samples` and `pass_samples` must be at least 1"),
        ({"pass_samples": 2.5}, "`pass_samples` must be a whole number"),
        ({"transfer": {"suite": "seen", "problem": 4}}, "`problem` in `transfer`.*`problems`"),
        ({"suites": [{"name": "seen", "pth": "list_functions/seen"}]}, "`pth`.*`path`"),
        ({"arms": {"../../home": {"method": "base"}}}, "cannot be the name of its directory"),
        ({"arms": {"warmstart": {"method": "base"}}}, "not warmstart or logs"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_comparison(_written(tmp_path, **changes))


def test_known_suites_go_by_their_name(tmp_path: Path) -> None:
    suites = ["gsm8k", {"name": "seen", "path": "list_functions/seen"}]
    known, own = read_comparison(_written(tmp_path, suites=suites)).parsed_suites
    assert known.hub_id == "openai/gsm8k" and own.path == "list_functions/seen"


def test_an_unknown_arm_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no arm 'ppo', only base"):
        read_comparison(_written(tmp_path), {"arms": ["ppo"]})


def test_a_file_that_is_missing_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no file"):
        read_comparison(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        read_comparison(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(("name", "shown"), [(None, "null"), (1, "1"), (True, "true"), (1.5, "1.5")])
def test_names_that_yaml_reads_as_something_else_are_to_be_quoted(tmp_path: Path, name: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=rf"^The arm {shown} .*in quotes: \"{shown}\"\.$") as error:
        read_comparison(_written(tmp_path, arms={name: {"method": "sgpo"}}))
    assert "\n" not in str(error.value)
    assert read_comparison(_written(tmp_path, arms={"null": {"method": "sgpo"}})).arms[0].name == "null"


@pytest.mark.parametrize("arms", [["sgpo"], "sgpo", 3, {"sgpo": "yes"}, {"sgpo": ["a"]}])
def test_arms_that_are_no_mapping(tmp_path: Path, arms: Any) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        read_comparison(_written(tmp_path, arms=arms))


def test_the_home_directory_in_the_output_folder(tmp_path: Path) -> None:
    read = read_comparison(_written(tmp_path, output_dir="~/runs"))
    assert read.output_dir == os.path.expanduser("~/runs") != "~/runs"


@pytest.mark.parametrize("recipe", ["sgpo.yaml", "recipes/lab/sgpo.yaml", "../lab/sgpo.yaml"])
def test_recipes_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """Beside the file, or named from a directory above it, as in a checkout. Others are those of the command line."""
    lab = tmp_path / "checkout" / "recipes" / "lab"
    lab.mkdir(parents=True)
    (lab / "sgpo.yaml").write_text("seed: 1")
    path, elsewhere = _written(lab, recipe=recipe), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for directory in (elsewhere, lab, lab.parents[1]):
        monkeypatch.chdir(directory)
        for name in (path, os.path.relpath(path)):
            found = read_comparison(name).recipe  # it is a part of the results, where no absolute path belongs
            assert Path(found).samefile(lab / "sgpo.yaml") and not Path(found).is_absolute()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "own.yaml").write_text("seed: 1")
    assert read_comparison(_written(lab, recipe="own.yaml")).recipe == "own.yaml"
