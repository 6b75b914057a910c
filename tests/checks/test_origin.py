"""Which errors are told in one line and which keep their traceback: by kind and place, not by message."""

import errno
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from trl_sgpo.checks.command import run_command
from trl_sgpo.checks.origin import what_to_mend
from trl_sgpo.errors import ConfigError, SettingsError


SITE_PACKAGES = pytest.__file__.rpartition("/pytest/")[0]


def function(module: str, name: str, body: str, **names: Any) -> FunctionType:
    """A function as if a module of another package defined it."""
    scope = {"__name__": module, **names}
    exec(compile(f"def {name}():\n    {body}\n", f"{SITE_PACKAGES}/{module.replace('.', '/')}.py", "exec"), scope)
    return scope[name]


def told(call: Any) -> str | None:
    try:
        call()
    except Exception as error:
        return what_to_mend(error)
    raise AssertionError("no error")


LIBRARY = function("transformers.planted", "construct", "raise ValueError('`x` must be\\n 3')")


class TestPlace:
    def test_what_a_library_raises_about_its_arguments(self) -> None:
        assert told(LIBRARY) == "`x` must be 3"
        through_torch = function("peft.planted", "construct", "inner()", inner=function("torch.x", "f", "int('a')"))
        assert told(through_torch) == "invalid literal for int() with base 10: 'a'"

    def test_a_bug_of_ours(self) -> None:
        assert told(function("trl_sgpo.planted", "f", "raise ValueError('bug')")) is None
        assert told(function("trl_sgpo.planted", "f", "{}['key']")) is None
        called_back = function("transformers.x", "f", "g()", g=function("trl_sgpo.x", "g", "int('a')"))
        assert told(called_back) is None

    @pytest.mark.parametrize(
        "place, mended",
        [
            ("transformers.tokenization_utils", True), ("trl_sgpo.method.control_tokens", True),
            ("trl_sgpo.bank.index", False), ("token_rewards", False),
        ],
    )  # fmt: skip
    def test_what_a_tokenizer_raises(self, place: str, mended: bool) -> None:
        panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
        expected = "the tokenizer cannot be used: a b. Save it again, or name another model." if mended else None
        for kind in (Exception, panic):
            try:
                function(place, "encode", "raise error", error=kind("a\nb"))()
            except BaseException as error:
                assert what_to_mend(error) == expected

    def test_the_users_own_code(self, tmp_path: Path) -> None:
        def reward() -> None:
            raise ValueError("in a reward function")

        assert told(reward) is None
        assert told(function("trl.planted", "f", "g()", g=reward)) is None

    @pytest.mark.parametrize("name", ["_run_epoch", "training_step", "evaluation_loop", "generate"])
    def test_while_work_is_under_way(self, name: str) -> None:
        assert told(function("transformers.trainer", name, "construct()", construct=LIBRARY)) is None


class TestKind:
    @pytest.mark.parametrize("error", ["AttributeError('a b')", "AssertionError('a b')", "IndexError('a b')"])
    def test_what_only_bugs_raise(self, error: str) -> None:
        assert told(function("transformers.x", "f", f"raise {error}")) is None

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            ("ImportError('install it first')", "install it first"),
            ("RuntimeError('needs a package')", "needs a package"),
            ("KeyError('no such metric')", "no such metric"),
            (
                "type('Its', (Exception,), {'__module__': 'package'})('invalid header')",
                "invalid header",
            ),
            ("KeyError('gelu2')", "transformers: KeyError gelu2"),
        ],
    )
    def test_what_users_mend(self, error: str, message: str) -> None:
        assert told(function("transformers.x", "f", f"raise {error}")) == message

    def test_files(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        making = function("trl_sgpo.x", "f", "(path / 'run').mkdir()", path=file)
        assert told(making) == f"{file}/run: Not a directory."
        full = OSError(errno.ENOSPC, "No space left on device", "bank.sqlite")
        assert what_to_mend(full) == "bank.sqlite: No space left on device."
        missing = function("trl_sgpo.x", "f", "open(path)", path=tmp_path / "none")
        assert told(missing) is None  # a program that looks for what it has not written


class TestRunCommand:
    def test_one_line_or_one_for_each(self, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(argv: list[str]) -> int:
            raise errors[argv[0]]

        errors = {"one": ConfigError("a\n b"), "two": SettingsError("r.yaml", ["a", "b\n c"])}
        assert run_command("trl-sgpo x", fail, ["one"]) == 2
        assert capsys.readouterr().err == "trl-sgpo x: error: a b\n"
        assert run_command("trl-sgpo x", fail, ["two"]) == 2
        assert capsys.readouterr().err == "trl-sgpo x: error: r.yaml has 2 problems:\n  - a\n  - b c\n"

    def test_on_one_of_several_processes(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert run_command("trl-sgpo x", lambda argv: LIBRARY(), []) == 2
        assert capsys.readouterr().err == ""

    def test_a_bug_is_raised(self) -> None:
        with pytest.raises(ValueError, match="bug"):
            run_command("trl-sgpo x", lambda argv: function("trl_sgpo.x", "f", "raise ValueError('bug')")(), [])


class TestTraceback:
    """`TRL_SGPO_TRACEBACK=1` prints it before the line, through the boundary to the terminal."""

    def failed(self, error: Exception, capsys: pytest.CaptureFixture[str]) -> list[str]:
        construct = function("transformers.planted", "construct", "raise error", error=error)
        assert run_command("trl-sgpo solve", lambda _: construct(), []) == 2
        return capsys.readouterr().err.splitlines()

    def test_is_named_after_the_error_of_a_library(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TRL_SGPO_TRACEBACK", raising=False)
        assert self.failed(ValueError("`x` must be 3."), capsys) == [
            "trl-sgpo solve: error: `x` must be 3. (TRL_SGPO_TRACEBACK=1 shows the traceback)"
        ]
        assert self.failed(ConfigError("`x` must be 3."), capsys) == ["trl-sgpo solve: error: `x` must be 3."]

    def test_is_printed(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRL_SGPO_TRACEBACK", "1")
        for kind in (ValueError, ConfigError):
            first, *middle, last = self.failed(kind("\x1b[2J\u202e http://user:pw@host"), capsys)
            assert first == "Traceback (most recent call last):"
            assert any("in construct" in line for line in middle)
            assert last == "trl-sgpo solve: error: \\x1b[2J\\u202e http://***@host"
            assert "\x1b" not in "".join(middle) and "pw" not in "".join(middle)
