"""YAML files that fill memory, nest too deeply, or hold what cannot be read."""

from pathlib import Path

import pytest

from trl_sgpo.cli import main as cli
from trl_sgpo.errors import ConfigError
from trl_sgpo.yaml_files import read_mapping, read_texts


def laughs(levels: int, one: str, many: str) -> str:
    """Aliases of aliases: each level repeats the one before nine times."""
    lines = [f"a0: &a0 {one}"]
    lines += [f"a{level}: &a{level} {many % ', '.join([f'*a{level - 1}'] * 9)}" for level in range(1, levels + 1)]
    return "\n".join(lines) + f"\noutput_dir: *a{levels}\n"


FILES = {
    "lists of aliases": laughs(8, "[x]", "[%s]"),
    "merged aliases": laughs(8, "{k: 1}", "{<<: [%s]}"),
    "an alias of itself": "output_dir: &a [*a]\n",
    "a mapping in itself": "output_dir: &a {b: *a}\n",
    "brackets": "output_dir: " + "[" * 100_000,
    "braces": "output_dir: " + "{a: " * 100_000,
    "dashes": "output_dir:\n" + "".join(f"{' ' * level}-\n" for level in range(1_200)),
    "digits": "seed: " + "9" * 5_000 + "\n",
    "signed": "seed: -" + "9" * 5_000 + "\n",
    "hexadecimal": "seed: 0x" + "f" * 5_000 + "\n",
    "octal": "seed: 0" + "7" * 5_000 + "\n",
    "base 60": "seed: 1" + ":59" * 5_000 + "\n",
    "a list of digits": "reward_weights: [" + "9" * 5_000 + "]\n",
    "digits as a key": "9" * 5_000 + ": 1\n",
    "a date": "run_name: 2025-13-45\n",
    "no UTF-8": "run_name: \udcff\n",
    "NUL": "run_name: \0\n",
    "a tag": "run_name: !!python/object/apply:os.system [touch owned]\n",
    "large": "run_name: " + "x" * 2**21 + "\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "a key twice within": "model_init_kwargs:\n  a: {b: 1, b: 2}\n",
    "a key twice in a list": "datasets:\n- {path: a, path: b}\n",
    "a key twice, quoted": "seed: 1\n'seed': 2\n",
    "a key twice as numbers": "a: {1: x, 0x1: y}\n",
    "a list as a key": "? [a]\n: 1\n",
}


@pytest.fixture(params=FILES)
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(FILES[request.param].encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("command", ["train", "compare", "eval"])
def test_one_line_and_status_2(command: str, hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--config", str(hostile)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "hostile.yaml" in line and len(line) < 1_000
    assert not Path("owned").exists()


def test_a_file_that_does_not_end() -> None:
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_mapping("/dev/zero")


@pytest.mark.parametrize("name", ["lists of aliases", "merged aliases", "an alias of itself", "brackets", "large"])
def test_texts_are_read_with_the_same_limits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(FILES[name])
    with pytest.raises(ConfigError):
        read_texts(str(path))


def test_aliases_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: &base {a: 1, b: [1, 2]}\none: {<<: *base, a: 2}\ntwo: *base\nthree: [*base, *base]\n")
    base = {"a": 1, "b": [1, 2]}
    assert read_mapping(str(path)) == {"base": base, "one": base | {"a": 2}, "two": base, "three": [base, base]}


def test_numbers_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 123456789012345678901234567890\nhex: 0xff\nsmall: 1e-5\n")
    assert read_mapping(str(path)) == {"seed": 123456789012345678901234567890, "hex": 255, "small": "1e-5"}
