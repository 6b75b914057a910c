"""Values in YAML are read as the command line reads them, and keys may be there once."""

from typing import Any

import pytest
import yaml

from trl_sgpo.checks.values import check_mixture, read_value
from trl_sgpo.errors import ConfigError, SettingsError
from trl_sgpo.yaml_files import read_mapping


def read(hint: Any, written: str, choices: list[str] | None = None) -> Any:
    """Reads `key: written`."""
    value, text = (yaml.load(f"key: {written}", loader)["key"] for loader in (yaml.SafeLoader, yaml.BaseLoader))
    return read_value("key", hint, choices, value, text)


@pytest.mark.parametrize(
    ("hint", "written", "value"),
    [
        (str, "no", "no"),
        (str, "1e-4", "1e-4"),
        (str | None, "2024-01-01", "2024-01-01"),
        (str | None, "007", "007"),
        (str | None, "None", None),
        (str | None, "", None),
        (None | str | list[str], "none", "none"),
        (None | str | list[str], "[wandb]", ["wandb"]),
        (bool, "no", False),
        (bool, "on", True),
        (bool, '"yes"', True),
        (bool | None, "None", None),
        (str | bool, "all", "all"),
        (float, "1e-4", 1e-4),
        (float, '"0.5"', 0.5),
        (float, ".inf", float("inf")),
        (float, "3", 3),
        (int, "100.0", 100),
        (int, '"4"', 4),
        (int | None, "~", None),
        (int | str | None, "auto", "auto"),
        (list[str] | None, "answer_reward", ["answer_reward"]),
        (list[str] | None, "[no, 1e-4]", ["no", "1e-4"]),
        (list[float] | None, "[1, 1e-1]", [1, 0.1]),
        (dict[str, Any] | str | None, "{a: no}", {"a": False}),
    ],
)
def test_read(hint: Any, written: str, value: Any) -> None:
    found = read(hint, written)
    assert found == value and type(found) is type(value)


def test_choices_are_words() -> None:
    assert read(str, "no", ["no", "steps"]) == "no"
    with pytest.raises(ConfigError, match="`key` must be one of no, steps, got on"):
        read(str, "on", ["no", "steps"])


@pytest.mark.parametrize(
    ("hint", "written", "words"),
    [
        (float, "fast", "must be a number, got 'fast'"),
        (int, "true", "must be a whole number, got 'true'"),
        (int, "1.5", "must be a whole number, got '1.5'"),
        (bool, "maybe", "must be true or false, got 'maybe'"),
        (float, "", "is empty"),
        (int, "[4]", "takes one value, got a list of 1"),
        (str, "{a: 1}", "takes no mapping"),
        (dict[str, Any] | None, "text", "must be a mapping"),
    ],
)
def test_refused(hint: Any, written: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"`key` {words}"):
        read(hint, written)


def test_mixtures() -> None:
    check_mixture([{"path": "a.jsonl", "split": "train"}])
    for datasets in ("a.jsonl", ["a.jsonl"], [{"split": "train"}]):
        with pytest.raises(ConfigError, match="list of mappings, each with a `path`"):
            check_mixture(datasets)
    with pytest.raises(SettingsError, match=r"(?s)`splt`.*did you mean `split`.*`nme`.*did you mean `name`"):
        check_mixture([{"path": "a", "splt": "x", "nme": "y"}])


@pytest.mark.parametrize("text", ["seed: 1\nlr: 2\nseed: 3\n", "a:\n  seed: 1\n  seed: 2\n"])
def test_a_key_that_is_there_twice(text: str, tmp_path: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="the key `seed` is there twice, again in line 3"):
        read_mapping(str(path))
    path.write_text("base: &base\n  a: 1\nother:\n  <<: *base\n  a: 2\n")
    assert read_mapping(str(path))["other"] == {"a": 2}
