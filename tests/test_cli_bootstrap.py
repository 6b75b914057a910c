"""`trl-sgpo bootstrap`: a server with faults, kill and resume on a tiny model, and what is done with the traces."""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from models import save_tiny_model

from trl_sgpo.bank import StrategyBank
from trl_sgpo.cli import bootstrap, warmstart
from trl_sgpo.data.trace_files import read_traces
from trl_sgpo.errors import ConfigError, DataError, ModelError
from trl_sgpo.inference import server as server_module
from trl_sgpo.inference.model import Decoding
from trl_sgpo.inference.server import TOKEN_VARIABLE, ServerModel
from trl_sgpo.method.problem import Problem


COMMAND = "trl_sgpo.cli.bootstrap"

GOOD = "To add, sum the ones, then the tens."
GUESS = "To add, guess a number and hope."


class ChatServer:
    """An OpenAI-compatible server that knows sums. `faults` are met by the next requests, in order."""

    def __init__(self) -> None:
        self.faults: list[int | str] = []
        self.requests: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.running = self.most = 0
        self.down = False
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(body)
                    server.tokens.add(self.headers["Authorization"])
                    server.running += 1
                    server.most = max(server.most, server.running)
                    fault = 503 if server.down else server.faults.pop(0) if server.faults else 200
                time.sleep(0.005)
                with lock:
                    server.running -= 1
                if fault == "drop":
                    self.close_connection = True
                    return
                reply: Any = {"error": "as asked for"}
                if self.path != "/v1/chat/completions":
                    fault = 404
                elif fault == "page":
                    fault, reply = 200, "<html>"
                elif fault == 200:
                    text, tokens = server.say(body), 7
                    finish = "length" if "cut" in text else "stop"
                    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
                    reply = {"choices": [choice], "usage": {"completion_tokens": tokens}}
                data = json.dumps(reply).encode()
                self.send_response(int(fault))
                self.send_header("Content-Length", str(len(data)))
                if fault == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def say(self, body: dict[str, Any]) -> str:
        messages = body["messages"]
        a, b = map(int, re.findall(r"\d+", messages[0]["content"])[:2])
        if len(messages) == 3:
            return f"{a} + {b} = {a + b}\n#### {a + b if messages[1]['content'] == GOOD else -1}"
        if "strategy for problems" in messages[0]["content"]:
            choices = (GOOD, GUESS, f"To add, answer is {a + b}", "To add, cut")
            return choices[body["seed"] % 4]
        return "#### -1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    running = ChatServer()
    yield running
    running.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tiny: str, tmp_path: Path) -> Path:
    """A recipe of sums in two classes, some with worked solutions, with a reward that gives random text a signal."""
    rows = []
    for index in range(16):
        a, b = 20 + index, 40 + index // 2
        worked = f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b} in all.\n#### {a + b}"
        rows.append({"question": f"What is {a} + {b}?", "answer": worked, "problem_class": f"kind-{index % 2}"})
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": tiny,
                "dataset_name": str(data),
                "reward_funcs": ["answer_reward"],
                "max_strategy_length": 160,
                "max_completion_length": 64,
                "bf16": False,
                "use_cpu": True,
                "report_to": "none",
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    return path


def start(recipe: Path, output_dir: Path, *arguments: str) -> int:
    return bootstrap.main(["--config", str(recipe), "--output_dir", str(output_dir), *arguments])


class TestServerModel:
    @pytest.mark.parametrize("fault", [429, 500, 503, "drop"])
    def test_repeats_what_may_pass(self, server: ChatServer, fault: int | str) -> None:
        server.faults = [fault, fault]
        model = ServerModel(server.url, "m", first_wait=0.01, concurrency=1, retries=2)
        assert model.answer(["What is 1 + 2?"]) == ["#### -1"]
        assert len(server.requests) == 3 and model.generated_tokens == 7

    def test_gives_up_with_how_to_continue(self, server: ChatServer) -> None:
        server.down = True
        model = ServerModel(server.url, "m", first_wait=0.01, concurrency=2, retries=1)
        with pytest.raises(ModelError, match=r"failed 2 times.*503.*run the same command again"):
            model.answer(["What is 1 + 2?"] * 40)
        assert len(server.requests) < 40  # the rest is called off

    @pytest.mark.parametrize(("fault", "words"), [(401, TOKEN_VARIABLE), (400, "400"), ("page", "chat completions")])
    def test_does_not_repeat_what_stays(self, server: ChatServer, fault: int | str, words: str) -> None:
        server.faults = [fault]
        with pytest.raises(ModelError, match=words):
            ServerModel(server.url, "m", first_wait=0.01).answer(["What is 1 + 2?"])
        assert len(server.requests) == 1

    def test_address_without_version_or_server(self, server: ChatServer) -> None:
        with pytest.raises(ModelError, match="with its /v1"):
            ServerModel(server.url.removesuffix("/v1"), "m").answer(["What is 1 + 2?"])
        with pytest.raises(ModelError, match="run the same command again"):
            ServerModel("http://127.0.0.1:9/v1", "m", first_wait=0.01, retries=1).answer(["What is 1 + 2?"])
        with pytest.raises(ModelError, match="`--server`"):
            ServerModel("127.0.0.1/v1", "m", first_wait=0.01, retries=0).answer(["What is 1 + 2?"])

    def test_order_limits_and_token(self, server: ChatServer) -> None:
        model = ServerModel(server.url, "m", token="secret", concurrency=3)
        problems = [Problem([{"role": "user", "content": f"What is {i} + {i}?"}]) for i in range(24)]
        decoding = Decoding(greedy=False, temperature=0.7, top_p=0.9, seed=4)
        assert model.execute(problems, [GOOD] * 24, decoding) == [
            f"{i} + {i} = {2 * i}\n#### {2 * i}" for i in range(24)
        ]
        assert server.most <= 3 and server.tokens == {"Bearer secret"}
        assert {(r["temperature"], r["top_p"], r["max_tokens"]) for r in server.requests} == {(0.7, 0.9, 256)}
        written = model.write_strategies(problems[:4], decoding)
        assert [strategy.flaw for strategy in written] == [None, None, None, "truncated"]


class TestServerRun:
    def test_interrupted_run_continues_and_keeps_what_lifts(
        self,
        server: ChatServer,
        recipe: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        monkeypatch.setattr(server_module, "_LONGEST_WAIT", 0.0)
        arguments = ("--source", "server", "--server", server.url, "--server_model", "m")
        output = tmp_path / "out"
        say = server.say

        def say_until_down(body: dict[str, Any]) -> str:
            server.down = (output / bootstrap.RECORD).read_text().count("\n") > 2
            return say(body)

        server.say = say_until_down  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="run the same command again"):
            start(recipe, output, *arguments)
        assert not (output / bootstrap.TRACES).exists()
        before = (output / bootstrap.RECORD).read_bytes()
        assert before.count(b"\n") == 3  # settings and two blocks

        server.down, server.say = False, say  # type: ignore[method-assign]
        capsys.readouterr()
        assert start(recipe, output, *arguments) == 0
        assert (output / bootstrap.RECORD).read_bytes().startswith(before)
        told = " ".join(capsys.readouterr().out.split())
        for figure in (
            "problems │ 16",
            "written │ 64, 19 distinct",
            "no lift │ 16",
            "leak │ 16",
            "malformed (truncated) │ 16",
            "+1.00",
        ):
            assert figure in told, told
        traces = read_traces(output / bootstrap.TRACES)
        assert {trace.strategy for trace in traces} == {GOOD} and len(traces) == 16
        with StrategyBank(output / bootstrap.BANK_DIRECTORY) as bank:
            found = bank.strategies()
            assert {(s.text, s.problem_class, s.trust) for s in found} == {
                (GOOD, "kind-0", "candidate"),
                (GOOD, "kind-1", "candidate"),
            }
            assert {(s.model, s.origin, s.run, len(s.source_problems)) for s in found} == {
                ("m", "bootstrap:server", "out", 8)
            }
            bank.retire([found[0].id])
        with pytest.raises(ConfigError, match=r"other settings \(num_strategies was 4, is 2\)"):
            start(recipe, output, *arguments, "--num_strategies", "2")
        assert start(recipe, output, *arguments, "--min_lift", "1") == 0  # measured already, only judged anew
        assert (output / bootstrap.TRACES).read_text() == ""
        assert start(recipe, output, *arguments) == 0
        with StrategyBank(output / bootstrap.BANK_DIRECTORY) as bank:
            assert len(bank) == 1  # what was retired stays so


class TestMessages:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--source", "teacher"], "--teacher NAME"),
            (["--teacher", "x"], "--teacher NAME"),
            (["--source", "server", "--server", "http://x/v1"], "--server_model"),
            (["--writer", "model"], "--writer"),
            (["--block_size", "1"], "--block_size"),
            (["--no_such_key", "1"], "no_such_key"),
            (["--block_size", "9"], "`--block_size`"),
            (["--source", "teacher", "--teacher", "no-such-org/no-such-model"], "no-such-org/no-such-model"),
        ],
    )
    def test_one_line_that_names_the_fix(self, recipe: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
        with pytest.raises((ConfigError, DataError, ModelError), match=re.escape(words)):
            start(recipe, tmp_path / "out", *arguments)

    def test_output_dir_of_the_training_run(self, recipe: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="another `--output_dir`"):
            start(recipe, tmp_path / "run")

    def test_help_is_fast(self) -> None:
        code = (
            "import sys\nfrom trl_sgpo.cli.bootstrap import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'trl', 'transformers', 'chromadb', 'datasets', 'httpx'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestTinyModel:
    def test_killed_run_resumes_to_the_same_files(self, recipe: Path, tmp_path: Path) -> None:
        content = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump(content | {"reward_funcs": ["models.evenness"], "max_completion_length": 8}))
        tail = ["--num_strategies", "3", "--num_answers", "2", "--min_lift", "0"]
        commands = {
            name: ["--config", str(recipe), "--output_dir", str(tmp_path / name / "out"), *tail]
            for name in ("whole", "killed")
        }
        whole = processes.run(COMMAND, *commands["whole"])
        assert whole.returncode == 0, whole.stderr[-2000:]
        record = tmp_path / "killed" / "out" / bootstrap.RECORD
        process = processes.start(COMMAND, *commands["killed"])
        while not record.exists() or record.read_bytes().count(b"\n") < 2:
            assert process.is_alive()
            time.sleep(0.01)  # polls for an event, measures nothing
        process.kill()
        process.join()
        blocks = (tmp_path / "whole" / "out" / bootstrap.RECORD).read_bytes().count(b"\n") - 1
        assert record.read_bytes().count(b"\n") < blocks + 1 and not record.with_name(bootstrap.TRACES).exists()
        with record.open("ab") as file:
            file.write(b'{"problems": ["torn')  # as if it had been killed while writing
        resumed = processes.run(COMMAND, *commands["killed"])
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        for name in (bootstrap.RECORD, bootstrap.TRACES):
            assert record.with_name(name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()
        traces = read_traces(record.with_name(bootstrap.TRACES))
        assert traces and "malformed" in resumed.stdout
        with StrategyBank(record.with_name(bootstrap.BANK_DIRECTORY)) as bank:
            assert len(bank) > 0 and {s.trust for s in bank.strategies()} == {"candidate"}
            assert {s.text for s in bank.strategies()} <= {trace.strategy for trace in traces}

    def test_worked_traces_can_be_warm_started_on(
        self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "out"
        overrides = ["--max_strategy_length", "400"]
        assert start(recipe, output, "--source", "worked", "--max_problems", "12", *overrides) == 0
        traces = read_traces(output / bootstrap.TRACES)
        assert len(traces) == 12
        assert {trace.strategy for trace in traces} == {"To solve a word problem in one step, add two given numbers."}
        assert all(re.fullmatch(r"\d+\+\d+ = \d+ in all\.\n#### \d+", trace.execution) for trace in traces)

        arguments = ["--config", str(recipe), "--traces", str(output / bootstrap.TRACES)]
        assert warmstart.main(arguments) == 0
        assert (tmp_path / "run" / "warmstart" / "model.safetensors").is_file()
        assert "on 12 two-phase traces" in capsys.readouterr().out
        assert warmstart.main([*arguments, "--warmstart_traces", "4"]) == 0
        assert "on 4 two-phase traces" in capsys.readouterr().out

        lines = (output / bootstrap.TRACES).read_text().splitlines()
        broken = tmp_path / "broken.jsonl"
        broken.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | {"execution": ""})]))
        with pytest.raises(DataError, match="line 2: the field `execution`"):
            warmstart.main(["--config", str(recipe), f"--traces={broken}"])

    def test_worked_by_the_model_and_without_solutions(self, recipe: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        assert start(recipe, output, "--source", "worked", "--writer", "model", "--max_problems", "4") == 0
        record = [json.loads(line) for line in (output / bootstrap.RECORD).read_text().splitlines()]
        assert record[1]["tokens"] > 0 and all(one["executions"] for one in record[1]["tried"])
        content = yaml.safe_load(recipe.read_text())
        bare = tmp_path / "bare.jsonl"
        bare.write_text(
            "\n".join(json.dumps({"prompt": f"{i}?", "solution": "1", "problem_class": "a"}) for i in "abc")
        )
        recipe.write_text(yaml.safe_dump(content | {"dataset_name": str(bare)}))
        with pytest.raises(DataError, match="No problem has a worked solution"):
            start(recipe, tmp_path / "none", "--source", "worked")

    def test_covered_families_need_no_worked_solution(self, recipe: Path, tmp_path: Path) -> None:
        content = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump(content | {"dataset_name": "reasoning_gym/gcd+products?size=8"}))
        overrides = ["--max_strategy_length", "400", "--max_completion_length", "200"]
        assert start(recipe, tmp_path / "out", "--source", "worked", *overrides) == 0
        traces = read_traces(tmp_path / "out" / bootstrap.TRACES)
        assert {trace.problem_class for trace in traces} == {"gcd", "products"}


def test_options_have_help() -> None:
    parser = bootstrap._parser()
    assert all(action.help for action in parser._actions if action.dest != argparse.SUPPRESS)
