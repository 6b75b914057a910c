"""Text of strangers reaches the terminal without anything that a terminal acts on, or does not show."""

import contextlib
import json
import logging
import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from bank_helpers import hashed_words
from models import save_tiny_model
from test_pipeline import PROBLEM

from trl_sgpo.bank import Strategy, StrategyBank
from trl_sgpo.bank.audit import audit_text
from trl_sgpo.checks.command import MAX_LINE, MAX_LINES, run_command
from trl_sgpo.checks.terminal import EscapedStream, printable
from trl_sgpo.cli.main import main
from trl_sgpo.errors import SettingsError


# Erase the line above; fill the clipboard (OSC 52); BEL; C1's CSI; carriage return; marks of direction; zero-width and
# tag characters
CONTROL = "\x1b[A\x1b[2K\x1b]52;c;cm0gLXJm\x07\x9b2J\rFAKE\u202e\u200f\u061c\u2066\u200b\ufeff\U000e0041\U000e007f"
SHOWN = "\\x1b[A\\x1b[2K"


def acts(text: str) -> list[str]:
    """What a terminal acts on or does not show. Progress bars return to the start of their line."""
    text = text.replace("\rFAKE", "\0")
    return sorted({character for character in text if not character.isprintable() and character not in "\n\r"})


def in_yaml(text: str) -> str:
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'


def check_printed(capsys: pytest.CaptureFixture[str], shown: str = SHOWN) -> None:
    printed = "".join(capsys.readouterr())
    assert shown in printed
    assert acts(printed) == []


class Server:
    """A server that answers each path with a status, a type and a body."""

    def __init__(self, replies: dict[str, tuple[int, str, str]]):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, kind, text = replies.get(self.path, (404, "text/plain", "none"))
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


MODELS = (200, "application/json", json.dumps({"data": [{"id": "m"}]}))
HOSTILE_MODELS = (200, "application/json", json.dumps({"data": [{"id": f"m{CONTROL}"}, {"id": "n"}]}))
EVENTS = f'data: {{"error": "{CONTROL}"}}\n\n'.replace("\r", "").replace("\x1b", "\\u001b").replace("\x07", "\\u0007")


class TestServers:
    @pytest.mark.parametrize(
        ("models", "status", "kind", "body", "shown"),
        [
            (MODELS, 400, "text/plain", CONTROL, SHOWN),
            (HOSTILE_MODELS, 200, "application/json", "{}", SHOWN),
            (MODELS, 200, "text/event-stream", EVENTS, "2JFAKE"),
            (MODELS, 200, "text/event-stream", f"data: {CONTROL}", "does not answer"),
            (MODELS, 200, "text/plain", CONTROL, "does not answer"),
        ],
        ids=["refusal", "models", "error in a stream", "no event", "no answer"],
    )
    def test_messages(self, models, status, kind, body, shown, capsys):
        with Server({"/v1/models": models, "/v1/chat/completions": (status, kind, body)}) as url:
            assert main(["solve", "--server", url, PROBLEM]) == 2
        check_printed(capsys, shown)


class TestModels:
    def solve(self, model: Path) -> int:
        return main(["solve", "--model", str(model), "--no_bank", PROBLEM])

    def test_model_type(self, tmp_path, capsys):
        save_tiny_model(tmp_path / "model")
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": f"llama{CONTROL}"}))
        assert self.solve(tmp_path / "model") == 2
        check_printed(capsys, shown="prints control characters of a terminal")

    def test_unknown_key_of_the_settings(self, tmp_path, capsys):
        save_tiny_model(tmp_path / "model")
        (tmp_path / "model" / "sgpo.json").write_text(json.dumps({f"key{CONTROL}": 1}))
        assert self.solve(tmp_path / "model") == 2
        check_printed(capsys)

    def test_error_of_a_chat_template(self, tmp_path, capsys):
        save_tiny_model(tmp_path / "model")
        text = CONTROL.encode("unicode_escape").decode()
        (tmp_path / "model" / "chat_template.jinja").write_text(f"{{{{ raise_exception('{text}') }}}}")
        assert self.solve(tmp_path / "model") == 2
        check_printed(capsys)

    def test_name_of_a_file(self, tmp_path, capsys):
        assert self.solve(tmp_path / f"model{CONTROL.replace('/', '')}") == 2
        check_printed(capsys)


class TestData:
    def test_class_names_in_an_evaluation(self, tmp_path, capsys):
        rows = [
            {"prompt": f"What is {i} + 1?", "solution": f"{i + 1}", "problem_class": f"c{i % 2}{CONTROL}[link=x]"}
            for i in range(4)
        ]
        data = tmp_path / "problems.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--model", save_tiny_model(tmp_path / "model"), "--suites", f"id_sums={data}", "--form", "plain"]
        given += ["--max_completion_length", "4", "--output_dir", str(tmp_path / "eval"), "--no_plots"]
        assert main(["eval", *given]) == 0
        check_printed(capsys)

    def test_names_of_columns(self, tmp_path, capsys):
        data = tmp_path / "problems.jsonl"
        data.write_text(json.dumps({f"column{CONTROL}": "text", "other": "text"}) + "\n")
        given = ["--suites", f"id_sums={data}", "--output_dir", str(tmp_path / "eval")]
        assert main(["eval", "--model", save_tiny_model(tmp_path / "model"), *given]) == 2
        check_printed(capsys)

    def test_environment_key_of_a_recipe(self, tmp_path, capsys, monkeypatch):
        recipe = tmp_path / "recipe.yaml"
        key = f"KEY\n{CONTROL}"
        recipe.write_text(f"env:\n  {in_yaml(key)}: value\n")
        monkeypatch.setattr("os.environ", dict(os.environ))
        assert main(["train", "--config", str(recipe)]) == 2
        printed = capsys.readouterr()
        assert acts(printed.out + printed.err) == []
        assert len(printed.out.splitlines()) == 1 and "KEY\\n" in printed.out

    def test_key_of_a_recipe(self, tmp_path, capsys):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{in_yaml(f'key{CONTROL}')}: value\n")
        assert main(["train", "--config", str(recipe)]) == 2
        check_printed(capsys)


class TestBank:
    @pytest.fixture
    def bank(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hashed_words)
        text = "List, then compare \u202e\u200f\u200b\U000e0041 the multiples"  # what a bank's check lets pass
        with StrategyBank(tmp_path / "bank", hashed_words) as bank:
            bank.add([Strategy(text, "c\u202e\u200b", ("p",), model="m\u202e", run="r\u2066")])
        return tmp_path / "bank"

    @pytest.mark.parametrize("command", ["list", "show", "search", "stats", "audit"])
    def test_commands(self, command, bank, capsys):
        with StrategyBank(bank, hashed_words) as opened:
            (strategy,) = opened.strategies()
        more = {"show": [strategy.id], "search": ["List multiples", "--trust", "candidate"]}.get(command, [])
        assert main(["bank", command, str(bank), *more]) in (0, 1)
        check_printed(capsys, "\\u202e")


class TestLibraries:
    def test_logs(self, capsys):
        def command(argv: list[str]) -> int:
            handler = logging.StreamHandler()
            logger = logging.getLogger("some.library")
            logger.addHandler(handler)
            logger.warning("log %s", CONTROL)
            logger.removeHandler(handler)
            return 0

        assert run_command("trl-sgpo test", command, []) == 0
        printed = capsys.readouterr().err
        assert printed.count(SHOWN) == 1 and acts(printed) == []

    def test_handlers_that_were_there_before(self, capsys):
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("another.library")
        logger.addHandler(handler)
        try:
            run_command("trl-sgpo test", lambda argv: logger.warning("log %s", CONTROL) or 0, [])
        finally:
            logger.removeHandler(handler)
        check_printed(capsys)

    def test_tables_of_libraries(self, capsys):
        def command(argv: list[str]) -> int:
            from rich.console import Console
            from rich.table import Table

            table = Table(title="sample")
            table.add_row(CONTROL, "text")
            Console(width=200).print(table)
            return 0

        run_command("trl-sgpo test", command, [])
        check_printed(capsys)


SCRIPT = """
import sys, warnings
from trl_sgpo.checks.command import run_command
CONTROL = {control!r}
def command(argv):
    from tqdm.auto import tqdm
    from rich.console import Console
    from trl_sgpo.checks.console import console
    for _ in tqdm(range(2), desc="outer" + CONTROL, mininterval=0):
        for _ in tqdm(range(2), desc="inner", leave=False, mininterval=0):
            pass
    Console().print("library", style="bold red")
    console(highlight=False).print("own" + CONTROL, style="bold red")
    print(input("ask> "))
    warnings.warn("warning" + CONTROL)
    raise RuntimeError(CONTROL)
run_command("test", command, [])
"""


def on_a_terminal(script: str, typed: str) -> str:
    """What a script shows on a terminal."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 200))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    os.write(controller, typed.encode())
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of file
        while data := os.read(controller, 4096):
            shown += data
    process.wait(60)
    os.close(controller)
    return shown.decode()


def test_a_terminal_gets_colours_and_bars_of_ours_only():
    shown = on_a_terminal(SCRIPT.format(control=CONTROL), "typed\n")
    assert "\r\nTraceback" in shown and "RuntimeError: \\x1b[A" in shown
    assert "UserWarning: warning\\x1b[A" in shown
    assert "\x1b]" not in shown and "\x07" not in shown and "\x9b" not in shown and "\x1b[2K" not in shown
    assert "\router\\x1b[A\\x1b[2K" in shown and "\n\rinner: " in shown.replace("\r\n", "\n") and "\x1b[A" in shown
    assert "\x1b[1;31mown\\x1b[A" in shown
    assert "\x1b[1;31mlibrary" not in shown and "library" in shown
    assert "ask> " in shown and "\u202e" not in shown and "\U000e0041" not in shown


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    before: dict[str, Any] = {name: list(logging.getLogger(name).handlers) for name in ("transformers", "datasets")}
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers


HIDDEN = ["\u034f", "\u115f", "\u1160", "\u3164", "\uffa0", "\u17b4", "\u2800", "\ufe00", "\U000e0100", "\U0001d159"]


@pytest.mark.parametrize("character", HIDDEN, ids=lambda c: f"U+{ord(c):04X}")
def test_characters_that_no_terminal_shows(character):
    text = f"sums{character}"
    assert printable(text) != text and character not in printable(text)
    assert audit_text(text) and not audit_text("sums")


def test_marks_that_come_one_by_one():
    """As a server streams them."""
    written = StringIO()
    stream = EscapedStream(written, messages=False)
    for piece in ("a", *"\u0338" * 6, "", "\u0338b", "\u0338"):
        stream.write(piece)
    assert written.getvalue() == "a" + "\u0338" * 4 + "\\u0338" * 3 + "b\u0338"


def test_marks_that_cover_other_lines():
    assert printable("e\u0301") == "e\u0301" and printable("\u2764\ufe0f") == "\u2764\ufe0f"
    assert printable("e" + "\u0301" * 5000).count("\u0301") == 4


def test_a_long_text_in_an_error(tmp_path, capsys):
    save_tiny_model(tmp_path)
    (tmp_path / "sgpo.json").write_text(json.dumps({"strategy_prompt": "long " * 10_000}))
    capsys.readouterr()
    assert main(["solve", "--model", str(tmp_path), "--no_bank", "1 + 2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < MAX_LINE + 100 and " … " in line and line.endswith("delete it to use the default prompts.")


def test_an_error_of_many_lines(capsys):
    def main(_):
        raise SettingsError("The recipe", [f"`{number}` is unknown" for number in range(5_000)])

    assert run_command("trl-sgpo train", main, []) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MAX_LINES + 1 and lines[-1] == "  … and 4,801 more lines"
