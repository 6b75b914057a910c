"""`trl-sgpo solve`: one problem, files that resume, a terminal, real and faulty servers, and messages."""

import json
import os
import platform
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import word_problems
from models import hash_embedder
from test_cli_bootstrap import GOOD, ChatServer
from test_pipeline import ASKED, PROBLEM, SETTINGS, fill_bank, save_model

from trl_sgpo import SGPOPipeline, StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.cli.main import main
from trl_sgpo.inference import server as server_module
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.inference.server import TOKEN_VARIABLE


ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


@pytest.fixture(autouse=True)
def embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("run")
    save_model(directory)
    SETTINGS.save(directory)
    fill_bank(directory / "strategy_bank")
    generation = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}))
    return str(directory)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"What is {i} + {i + 1}?", "problem_class": "sums"} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def solve(*arguments: str) -> int:
    return main(["solve", *arguments])


def solved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert solve(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


class TestOneProblem:
    def test_prints_strategies_of_the_bank_and_both_phases(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = solved(capsys, "--model", run, PROBLEM)
        assert len(found["retrieved"]) == 2 and {entry["trust"] for entry in found["retrieved"]} == {"trusted"}
        assert solve("--model", run, PROBLEM) == 0
        told = capsys.readouterr()
        for entry in found["retrieved"]:
            known = (
                f"{entry['problem_class']}, trusted, right 0/0, similarity to the problem {entry['similarity']:.2f}"
            )
            assert f"{entry['id']}  {known}\n  {entry['text']}" in told.out
        headings = ["From the bank", "Strategy", "Execution", "Answer"]
        assert [line for line in told.out.splitlines() if line in headings] == headings
        assert "4 strategies for differences, sums, 3 of them trusted, which may be shown." in told.err
        assert ("cut off at 12 tokens" in told.err) == (found["flaw"] == "truncated")
        assert "\033" not in told.out

    def test_a_bank_without_a_trusted_strategy_says_that_none_is_shown(
        self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(run, tmp_path / "run")
        with StrategyBank.restore(tmp_path / "run" / "strategy_bank") as bank:
            bank.retire(each.id for each in bank.strategies() if each.trust == "trusted")
            bank.add([Strategy("Add.", f"class {index}\n", ()) for index in range(9)])
        assert solve("--model", str(tmp_path / "run"), PROBLEM) == 0
        told = capsys.readouterr()
        assert "From the bank" not in told.out and "0 of them trusted, so none is shown: the model writes" in told.err
        assert re.search(r"strategies for class 0\\n, .* and \d other classes, 0 of", told.err)

    def test_bank_and_strategy_options(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        alone = solved(capsys, "--model", run, PROBLEM, "--no-bank")
        assert alone["retrieved"] == []
        one = solved(capsys, "--model", run, PROBLEM, "--bank", run, "--num_retrieved", "1", "--class", "sums")
        assert [entry["problem_class"] for entry in one["retrieved"]] == ["sums"]
        given = solved(capsys, "--model", run, PROBLEM, "--strategy", "Add them.")
        assert given["strategy"] == "Add them." and given["retrieved"] == []
        assert given["execution"] != alone["execution"]

    def test_votes(self, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        texts = iter(["#### 5", "none", "the answer is 5.0", "#### 6"])
        execute = "trl_sgpo.inference.model.TwoPhaseModel.execute"
        monkeypatch.setattr(execute, lambda self, problems, *_, **__: [next(texts) for _ in problems])
        assert solve("--model", run, PROBLEM, "--no_bank", "--n", "4", "--seed", "7") == 0
        assert capsys.readouterr().out.endswith("Answer\n5  (2 of 4 attempts)\nOthers: 6 (1), no answer (1)\n")

    def test_plain_answers_the_bare_problem(self, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = solved(capsys, "--model", run, "--plain", PROBLEM)
        model = TwoPhaseModel.from_pretrained(run)
        assert found["execution"] == model.answer([ASKED], limit=28)[0] != model.answer([ASKED])[0]
        assert found["strategy"] == "" and found["retrieved"] == [] and found["flaw"] is None
        assert solve("--model", run, "--plain", PROBLEM) == 0
        told = capsys.readouterr()
        headings = ["Strategy", "Execution", "Plain answer", "From the bank", "Answer"]
        assert [line for line in told.out.splitlines() if line in headings] == ["Plain answer", "Answer"]
        assert "Bank" not in told.err and "plain answer was cut off, at 28 tokens" in told.err

    def test_problem_on_standard_input(
        self, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = solved(capsys, "--model", run, PROBLEM)
        monkeypatch.setattr("sys.stdin", StringIO(f"{PROBLEM}\n"))
        assert solved(capsys, "--model", run) == expected

    def test_help_loads_no_heavy_module(self) -> None:
        code = (
            "import sys\nfrom trl_sgpo.cli import init, solve\n"
            "for command in (init, solve):\n"
            "    try:\n        command.main(['--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
            "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'datasets', 'httpx'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, capture_output=True, cwd=ROOT)


class TestFile:
    def test_interrupted_file_goes_on_to_the_same_answers(
        self, run: str, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, stopped = tmp_path / "whole.jsonl", tmp_path / "new" / "stopped.jsonl"
        arguments = ["--model", run, "--input", str(sums), "--batch_size", "2", "--n", "2"]
        assert solve(*arguments, "--output", str(whole)) == 0
        entries = [json.loads(line) for line in whole.read_text().splitlines()]
        assert [entry["problem"] for entry in entries] == [f"What is {i} + {i + 1}?" for i in range(7)]
        assert {shown["problem_class"] for entry in entries for shown in entry["retrieved"]} == {"sums"}
        assert len({attempt["strategy"] for entry in entries for attempt in entry["attempts"]}) > 7

        original, calls = SGPOPipeline.solve, iter(range(9))

        def stop(*given: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return original(*given)

        with monkeypatch.context() as patch:
            patch.setattr(SGPOPipeline, "solve", stop)
            assert solve(*arguments, "--output", str(stopped)) == 130
        assert "the same command goes on" in capsys.readouterr().err
        assert whole.read_bytes().startswith(stopped.read_bytes()) and stopped.read_text().count("\n") == 4
        with stopped.open("ab") as file:
            file.write(whole.read_bytes().splitlines(keepends=True)[4] + b'{"index": 5, "pro')  # killed while writing
        assert solve(*arguments, "--output", str(stopped)) == 0
        assert stopped.read_bytes() == whole.read_bytes()
        assert "3 solved now" in capsys.readouterr().out
        monkeypatch.setattr(SGPOPipeline, "solve", None)  # nothing is left to be solved
        assert solve(*arguments, "--output", str(stopped)) == 0

        for other in (["--seed", "1"], ["--no_bank"]):
            assert solve(*arguments, "--output", str(stopped), *other) == 2
            assert "--overwrite" in capsys.readouterr().err
        assert stopped.read_bytes() == whole.read_bytes()

    def test_plain_answers_go_on_and_are_no_others(
        self, run: str, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--model", run, "--input", str(sums), "--output", str(tmp_path / "out.jsonl")]
        arguments += ["--batch_size", "4"]
        assert solve(*arguments, "--plain") == 0
        whole = (tmp_path / "out.jsonl").read_bytes()
        entries = [json.loads(line) for line in whole.splitlines()]
        assert len(entries) == 7 and {(entry["strategy"], len(entry["retrieved"])) for entry in entries} == {("", 0)}
        one = solved(capsys, "--model", run, "--plain", "What is 0 + 1?")
        assert one["execution"] == entries[0]["execution"]
        (tmp_path / "out.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
        assert solve(*arguments, "--plain") == 0 and (tmp_path / "out.jsonl").read_bytes() == whole
        assert solve(*arguments, "--no_bank") == 2
        assert "made otherwise (plain)" in capsys.readouterr().err


class TestTerminal:
    def test_chat(self, run: str) -> None:
        """In a real pseudo-terminal: problems, commands and the end."""
        controller, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_sgpo.cli.main", "solve", "--model", run, "--no_bank", "--device", "cpu"],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd=ROOT,
        )
        os.close(terminal)
        told = ""

        def until(text: str) -> str:
            nonlocal told
            while text not in told:
                piece = os.read(controller, 4096)
                told += piece.decode(errors="replace")
            before, told = told.split(text, 1)
            return before

        assert "/strategy TEXT" in until("problem> ")
        for line, expected in (
            (PROBLEM, ("Strategy", "Execution", "Answer")),
            ("/n 2", ("2 sampled attempts",)),
            ("/strategy Add them.", ("executed from now on",)),
            ("What is 1 + 1?", ("Add them.", "Others: no answer (2)")),
            ("/nonsense", ("/quit",)),
        ):
            os.write(controller, f"{line}\n".encode())
            answer = until("problem> ")
            assert all(words in answer for words in expected), answer
        os.write(controller, b"/quit\n")
        assert process.wait(120) == 0
        os.close(controller)


class TestServer:
    @pytest.fixture
    def server(self) -> Iterator[ChatServer]:
        running = ChatServer()
        yield running
        running.close()

    def test_bank_for_a_deployed_model(
        self, server: ChatServer, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        server.faults = [503]
        server.say = lambda body: "Add what is given."  # type: ignore[method-assign]
        monkeypatch.setattr(server_module, "_LONGEST_WAIT", 0.0)
        found = solved(capsys, "--server", server.url, "--model", "m", "--run", run, PROBLEM)
        assert len(found["retrieved"]) == 2 and server.tokens == {"Bearer secret"}
        first, second = server.requests[-2:]
        assert [message["role"] for message in first["messages"]] == ["system", "user"]
        assert all(f"] {entry['text']}" in first["messages"][1]["content"] for entry in found["retrieved"])
        assert second["messages"][:2] == first["messages"]
        assert second["messages"][2:] == [
            {"role": "assistant", "content": found["strategy"]},
            {"role": "user", "content": SETTINGS.execution_prompt},
        ]
        assert (first["max_tokens"], second["max_tokens"]) == (12, 16) and first["temperature"] == 0

    def test_prints_texts_of_a_server_that_does_not_stream(
        self, server: ChatServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert solve("--server", server.url, "--model", "m", "--strategy", GOOD, "What is 20 + 3?") == 0
        assert capsys.readouterr().out.endswith("20 + 3 = 23\n#### 23\nAnswer\n23\n")
        assert server.requests[-1]["stream"] is True

    def test_plain_answers(self, server: ChatServer, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        server.say = lambda body: "It is #### 5"  # type: ignore[method-assign]
        found = solved(capsys, "--server", server.url, "--model", "m", "--run", run, "--plain", PROBLEM)
        assert found["answer"] == "5" and found["strategy"] == "" and len(server.requests) == 1
        (request,) = server.requests
        assert request["messages"] == ASKED and request["max_tokens"] == 28
        assert solve("--server", server.url, "--model", "m", "--plain", PROBLEM) == 0
        told = capsys.readouterr()
        assert told.out.endswith("Plain answer\nIt is #### 5\nAnswer\n5\n") and "bank" not in told.err
        assert server.requests[-1]["stream"] is True

    def test_one_line_that_names_the_fix(
        self, server: ChatServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server_module, "_LONGEST_WAIT", 0.0)
        assert solve("--server", "http://127.0.0.1:9/v1", "--model", "m", PROBLEM) == 2
        assert "No server answers at http://127.0.0.1:9/v1" in capsys.readouterr().err
        assert solve("--server", server.url, PROBLEM) == 2
        assert "`--model`" in capsys.readouterr().err
        server.faults = [400] * 2
        assert solve("--server", server.url, "--model", "m", PROBLEM) == 2
        assert re.search(r"error: .*status 400.*`m`", capsys.readouterr().err)


@pytest.fixture(scope="module")
def served(run: str) -> Iterator[str]:
    """`transformers serve` with the model of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", run, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)  # polls for an event, measures nothing
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait()


class TestTransformersServe:
    def test_writes_what_the_model_writes_here(
        self, served: str, run: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A strategy of random bytes is not the same tokens after it was sent as text, so one is given to execute."""
        written = solved(capsys, "--model", run, PROBLEM)
        there = solved(capsys, "--server", served, "--model", run, PROBLEM)
        for name in written.keys() - {"execution", "answer"}:
            assert there[name] == written[name]
        assert len(there["retrieved"]) == 2
        given = ["--strategy", "Add the two numbers.", PROBLEM]
        here = solved(capsys, "--model", run, *given)
        assert solved(capsys, "--server", served, "--model", run, *given) == here
        assert solved(capsys, "--server", served, "--run", run, *given) == here  # the only model that it lists

    def test_streams(self, served: str, run: str) -> None:
        heard: list[tuple[str, str]] = []
        with SGPOPipeline.from_server(served, run) as pipeline:
            streamed = pipeline(PROBLEM, watch=lambda *said: heard.append(said))
            whole = pipeline(PROBLEM)
            # `transformers serve` streams no character that was cut off in its middle
            assert streamed.execution == whole.execution.rstrip("�") and streamed.strategy == whole.strategy
            assert len({attempt.strategy for attempt in pipeline(PROBLEM, samples=3).attempts}) > 1
        assert "".join(text for phase, text in heard if phase == "execution") == streamed.execution

    def test_missing_model(self, served: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert solve("--server", served, "--model", "other", PROBLEM) == 2
        assert re.search(rf"error: .*`other` \(the server lists {run}\)", capsys.readouterr().err)


class TestMessages:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([PROBLEM], "`--model`"),
            (["--model", "MODEL", "  "], "problem is empty"),
            (["--model", "MODEL", PROBLEM, "--strategy", " "], "`--strategy` is empty"),
            (["--model", "MODEL", PROBLEM, "--n", "0"], "`--n`"),
            (["--model", "MODEL", PROBLEM, "--n", "2", "--temperature", "0"], "all the same"),
            (["--model", "MODEL", PROBLEM, "--top_p", "0"], "`--top_p`"),
            (["--model", "MODEL", PROBLEM, "--bank", "x", "--no_bank"], "`--bank`"),
            (["--model", "MODEL", PROBLEM, "--plain", "--strategy", "Add."], "which `--strategy` would use"),
            (
                ["--model", "MODEL", PROBLEM, "--plain", "--bank", "x", "--class", "a", "--num_retrieved", "1"],
                "`--plain` answers without strategies, which `--bank`, `--num_retrieved`, `--class` would use: leave",
            ),
            (["--model", "MODEL", PROBLEM, "--bank", "nowhere"], "holds no strategy bank (there is no such folder)"),
            (["--model", "MODEL", PROBLEM, "--bank", "runs/none"], "There is no folder runs/none, and an export"),
            (["--model", "MODEL", PROBLEM, "--run", "nowhere"], "`--run`"),
            (["--model", "no-such-org/no-such-model", PROBLEM], "no-such-org/no-such-model"),
            (["--model", "MODEL", "--input", "x.jsonl"], "`--output`"),
            (["--model", "MODEL", "--input", "x.jsonl", "--output", "y.jsonl"], "no file"),
            (["--model", "MODEL", "--input", "x.jsonl", "--output", "y.csv"], ".jsonl"),
            (["--model", "MODEL", PROBLEM, "--input", "x.jsonl", "--output", "y.jsonl"], "leave out"),
            (["--model", "MODEL", PROBLEM, "--prompt_column", "question"], "`--input`"),
        ],
    )
    def test_one_line_that_names_the_fix(
        self, run: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert solve(*[run if argument == "MODEL" else argument for argument in arguments]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("trl-sgpo solve: error: ") and words in message

    def test_bank_that_is_open_elsewhere(self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The message names who has it, and a copy, which `--bank` takes."""
        shutil.copytree(run, tmp_path / "run")
        model = str(tmp_path / "run")
        with StrategyBank.restore(Path(model, "strategy_bank")) as bank:
            who = f"in use by process {os.getpid()} on {platform.node()} since 20.*--bank.*copy.*--no_bank"
            assert solve("--model", model, PROBLEM) == 2
            assert re.search(who, capsys.readouterr().err)
            bank.snapshot(tmp_path / "run" / "checkpoint-3" / "strategy_bank")
            for named in ([], ["--bank", model], ["--bank", str(tmp_path / "run" / "strategy_bank")]):
                assert solve("--model", model, PROBLEM, *named) == 2
                message = capsys.readouterr().err
                assert re.search(who.replace("copy", f"copy.*--bank {model}/checkpoint-3`"), message)
                assert "bank_path" not in message
            assert solve("--model", model, PROBLEM, "--bank", f"{model}/checkpoint-3") == 0
            assert solve("--model", model, PROBLEM, "--no_bank") == 0

    def test_columns_of_a_file(self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = word_problems.svamp(3)
        word_problems.write(tmp_path / "svamp.jsonl", rows)
        files = ["--input", str(tmp_path / "svamp.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--overwrite"]
        for option, problem in (
            (["--prompt_template", "{body} {question}"], f"{rows[1]['Body']} {rows[1]['Question']}"),
            (["--prompt_column", "question"], rows[1]["Question"]),
        ):
            assert solve("--model", run, *files, *option) == 0
            lines = (tmp_path / "out.jsonl").read_text().splitlines()
            assert json.loads(lines[1])["problem"] == problem
        assert solve("--model", run, *files, "--prompt_template", "{story}") == 2
        assert "names no column 'story'" in capsys.readouterr().err

    def test_empty_problem_in_a_file(self, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "problems.jsonl"
        path.write_text('{"prompt": "What is 1 + 1?"}\n{"prompt": " "}\n')
        assert solve("--model", run, "--input", str(path), "--output", str(tmp_path / "out.jsonl")) == 2
        told = capsys.readouterr().err
        assert "problems.jsonl" in told and "1 of 2 problems is empty (row 2, counted from 1)" in told
        assert not (tmp_path / "out.jsonl").exists()

    def test_nothing_a_terminal_acts_on_is_printed(
        self, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        execute = "trl_sgpo.inference.model.TwoPhaseModel.execute"
        monkeypatch.setattr(execute, lambda self, problems, *_, **__: ["\033[2J\a#### 5\033]0;x"] * len(problems))
        arguments = ["--model", run, PROBLEM, "--strategy", "Add.", "--n", "2"]
        assert solve(*arguments) == 0
        out, err = capsys.readouterr()
        assert "All attempts are the same" in err
        assert "\033" not in out and "\a" not in out and r"\x1b[2J\x07#### 5" in out
