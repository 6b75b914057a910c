"""`trl-sgpo report --watch`: the report of a run that is training, on 127.0.0.1."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from bank_helpers import hashed_words
from browser import CHROMIUM, Browser
from models import evenness, problems, save_tiny_model
from report_runs import log_step, write_bank, write_run
from transformers import TrainerCallback

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.bank import StrategyBank
from trl_sgpo.cli.main import main
from trl_sgpo.report.records import read_run, read_watched
from trl_sgpo.report.watch import WatchedReport, serve


def get(address, path="/", **headers):
    """Status, headers and text of an answer."""
    request = urllib.request.Request(address + path, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def text(page):
    return " ".join(re.sub("<[^>]*>", " ", page[page.index("<main") :]).split())


@contextmanager
def served(run, *more):
    """Address of a report that this process serves."""
    with serve(WatchedReport(str(run), *more), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_page_follows_a_run_from_before_its_first_step(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "trl_sgpo.cli.main", "report", str(run), "--watch", "--port", "0"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+", said)
        assert str(run) in said and "Ctrl-C" in said
        status, headers, page = get(address)
        assert status == 200 and "Waiting for the first step" in text(page) and "No metrics yet" not in page
        unchanged = {"If-None-Match": headers["ETag"]}
        assert get(address, **unchanged)[0] == 304

        for step in range(1, 5):
            log_step(run, step)
        page = get(address, **unchanged)[2]
        assert "Unfinished: step 4 of 12" in text(page) and "Waiting" not in page
        assert "went from 0.06 to 0.25 from the first to the last quarter of 4 steps" in text(page)
        log_step(run, 5)
        assert "Unfinished: step 5 of 12" in text(get(address)[2])

        assert get(address, "/progress.jsonl")[0] == get(address, "/?run=/etc")[0] == 404
        assert get(address, Host="example.org")[0] == 403
    finally:
        process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)
    assert process.returncode == 0 and rest == ("\nEnded.\n", "")


class TestServer:
    @pytest.fixture(scope="class")
    def address(self, tmp_path_factory):
        with served(write_run(tmp_path_factory.mktemp("runs") / "run")) as address:
            yield address

    @pytest.mark.parametrize(
        "path", ["/index.html", "/settings.json", "/..", "/../settings.json", "/%2e%2e/", "/?", "/.", "/earlier/", "*"]
    )
    def test_there_is_no_other_page(self, address, path):
        assert get(address, "" if path == "*" else path)[0] == (200 if path == "*" else 404)
        host, port = address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", path, headers={"Host": "localhost"})  # as it is written, without a client's changes
        answer = connection.getresponse()
        assert answer.status == 404 and b"org/model" not in answer.read()

    @pytest.mark.parametrize(
        "host",
        ["example.org", "127.0.0.1.example.org", "localhost.example.org:80", "127.0.0.1:80@example.org", "127.0.0.2",
         "", "[::1]", "127.0.0.1:", "localhost:999999"],
    )  # fmt: skip
    def test_the_name_of_someone_else_is_refused(self, address, host):
        for path in ("/", "/x"):
            status, _, body = get(address, path, Host=host)
            assert status == 403 and "org/model" not in body

    @pytest.mark.parametrize("hosts", [[], ["localhost", "example.org"], ["localhost", "localhost"]])
    def test_there_is_one_host(self, address, hosts):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = ["GET / HTTP/1.0", *(f"Host: {name}" for name in hosts), "", ""]
            connection.sendall("\r\n".join(lines).encode())
            assert connection.makefile().readline().startswith("HTTP/1.0 403 ")

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.1:80", "localhost:8600"])
    def test_names_of_this_machine_are_answered(self, address, host):
        """With any port: a tunnel may begin at another one."""
        assert get(address, Host=host)[0] == 200

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
    def test_nothing_but_reading(self, address, method):
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(urllib.request.Request(address, method=method))

    def test_headers(self, address):
        _, headers, page = get(address)
        (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', page)
        assert headers["Content-Security-Policy"] == f"{policy}; frame-ancestors 'none'"
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert (
            headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"
        )
        assert headers["Access-Control-Allow-Origin"] is None and "Python" not in headers["Server"]
        tag = re.findall('data-tag="([^"]*)"', page)
        assert [each.replace("&#34;", '"') for each in tag] == [headers["ETag"]]

    def test_only_this_machine_is_bound(self, tmp_path):
        with serve(WatchedReport(str(tmp_path / "run")), 0) as server:
            assert server.server_address[0] == "127.0.0.1"


class TestRun:
    def test_bank_of_a_run_that_trains_is_left_alone(self, tmp_path):
        """A bank that is open here could not be opened by training."""
        run = write_run(tmp_path / "run", steps=4)
        found = read_watched(run)
        assert found.bank is None and "from the first checkpoint on" in found.missing["bank"]
        assert not (run / "strategy_bank" / "holder.json").exists()
        with StrategyBank(run / "strategy_bank", hashed_words) as bank:
            bank.snapshot(run / "checkpoint-4" / "strategy_bank")
            found = read_watched(run)
        assert len(found.bank.strategies) == 12 and "checkpoint-4" in found.missing["bank"]

    def test_bank_of_a_finished_run_is_shown_once_it_is_free(self, tmp_path):
        run = write_run(tmp_path / "run")
        with served(run) as address:
            with StrategyBank(run / "strategy_bank", hashed_words):
                assert "is in use" in text(get(address)[2])
            _, headers, page = get(address)
            assert "11 strategies in the bank" in text(page)
            assert get(address, **{"If-None-Match": headers["ETag"]})[0] == 304  # reading it changed nothing

    def test_evaluations_and_a_second_run(self, tmp_path):
        run, other = write_run(tmp_path / "run", evaluation=False), tmp_path / "other"
        evaluation = write_run(tmp_path / "third") / "eval"
        with served(run, str(other), [str(evaluation)]) as address:
            assert "Transfer between classes: sums (eval)" in text(get(address)[2])
            write_run(other, steps=5, learning_rate=1e-4)
            assert "learning_rate 1e-05 0.0001" in text(get(address)[2])
            (evaluation / "results.json").unlink()
            status, _, body = get(address)
            assert status == 503 and "holds no evaluation" in body

    def test_half_a_line_is_the_next_step(self, tmp_path):
        log_step(tmp_path / "run", 1)
        with (tmp_path / "run" / "progress.jsonl").open("a") as file:
            file.write('{"step": 2, "los')
        assert read_watched(tmp_path / "run").steps == 1

    def test_messages(self, tmp_path, capsys):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("mine")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            for arguments, words in (
                ([tmp_path / "notes"], "notes holds no run"),
                ([tmp_path, "--eval", tmp_path / "notes"], "holds no evaluation"),
                ([tmp_path / "run", "--port", port], f"Port {port} of 127.0.0.1 cannot be used"),
                ([tmp_path / "run", "--port", "70000"], "--port"),
                ([tmp_path / "run", "--output", tmp_path / "a.html"], "--output"),
            ):
                assert main(["report", "--watch", *map(str, arguments)]) == 2
                assert words in capsys.readouterr().err
        assert main(["report", str(tmp_path), "--port", "1"]) == 2
        assert "add `--watch`" in capsys.readouterr().err


class Watch(TrainerCallback):
    """What a report has when each step begins."""

    def __init__(self, run):
        self.run, self.steps = run, []

    def on_step_begin(self, args, state, control, **kwargs):
        found = read_watched(self.run)
        self.steps.append((found.steps, found.max_steps, len(found.history), found.is_finished))


def test_training_writes_each_step(tmp_path):
    def train(max_steps, **more):
        watch = Watch(tmp_path / "run")
        args = SGPOConfig(
            str(tmp_path / "run"), per_device_train_batch_size=8, num_generations=4, transfer_block_size=2,
            max_strategy_length=4, max_completion_length=4, max_steps=max_steps, logging_steps=1, save_steps=1,
            use_bank=False, report_to="none", bf16=False, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = save_tiny_model(tmp_path / "model")
        trainer = SGPOTrainer(
            model=model, reward_funcs=evenness, args=args, train_dataset=problems(), callbacks=[watch]
        )
        trainer.train(**more)
        trainer.log({"loss": 0.0})  # no step of training
        return watch.steps

    assert train(2) == [(0, 2, 0, False), (1, 2, 1, False)]
    assert not (tmp_path / "run" / "progress.jsonl").exists()
    finished = read_run(tmp_path / "run")
    assert finished.is_finished and finished.steps == 2
    log_step(tmp_path / "run", 9)  # as if killed later, and resumed from a checkpoint
    assert train(3, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")) == [(2, 3, 2, False)]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")
def test_the_page_refreshes_itself_and_keeps_what_is_open(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    write_bank(run / "checkpoint-4" / "strategy_bank")
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    for step in range(1, 5):
        log_step(run, step)
    facts = "document.querySelector('.facts').textContent"
    with served(run) as address, Browser(tmp_path / "profile") as browser:
        browser.open(address)
        assert "step 4 of 12" in browser.run(facts) and "Live" in browser.run(
            "document.getElementById('watch').textContent"
        )
        browser.run("document.getElementById('theme').click()")
        browser.run("document.querySelector('form[data-filters=problems] input').focus()")
        for letter in "riddle-3":
            browser.press(letter)
        opened = "#problems > .item:nth-child(6)"
        browser.run(f"document.querySelector('{opened}').open = true")
        shown = "[...document.querySelectorAll('#problems > .item')].filter((item) => item.checkVisibility()).length"
        assert browser.run(shown) == 2
        dark = browser.run("document.documentElement.style.colorScheme")

        log_step(run, 5)
        changed = (
            f"(async () => {{ while (!{facts}.includes('step 5 of 12')) await new Promise(requestAnimationFrame) }})()"
        )
        browser.run(changed)
        assert browser.run(shown) == 2 and browser.run(f"document.querySelector('{opened}').open")
        assert browser.run("document.activeElement.value") == "riddle-3"
        assert browser.run("document.documentElement.style.colorScheme") == dark
        assert browser.errors == [] and {url.rstrip("/") for url in browser.requests} == {address}
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_damaged_record_of_progress_is_named(steps, tmp_path):
    """Also where a checkpoint has older metrics, which are shown."""
    run = tmp_path / "run"
    log_step(run, 1)
    (run / "run.json").write_text('{"id": "one"}')
    with (run / "progress.jsonl").open("a") as file:
        file.write("garbage\n")
    if steps:
        logs = [{"step": step, "reward": 0.5} for step in range(1, steps + 1)]
        state = {"log_history": logs, "global_step": steps, "max_steps": 12}
        (run / f"checkpoint-{steps}").mkdir()
        (run / f"checkpoint-{steps}" / "trainer_state.json").write_text(json.dumps(state))
    found = read_watched(run)
    assert len(found.history) == steps and any("progress.jsonl is damaged" in text for text in found.missing.values())
    assert not found.has_no_step
