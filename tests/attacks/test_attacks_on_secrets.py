"""Tokens, passwords and user parts of addresses do not reach files, reports, cards, trackers and messages."""

import json
import logging
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile_server import serving
from models import evenness, hash_embedder, problems, save_tiny_model
from report_runs import write_run
from test_pipeline import PROBLEM
from transformers import TrainerControl, TrainerState

from trl_sgpo import SGPOConfig, SGPOTrainer, SharedPromptGRPOTrainer, StrategyBank
from trl_sgpo.bank.shared import SharedBank
from trl_sgpo.callbacks import RunRecordCallback
from trl_sgpo.checks.command import run_command
from trl_sgpo.checks.secrets import arguments_without_secrets, is_secret, redacted, without_credentials, without_sent
from trl_sgpo.cli.compare import _run
from trl_sgpo.cli.main import main
from trl_sgpo.data.classes import CLASS_COLUMN
from trl_sgpo.errors import BankError, ConfigError, ModelError
from trl_sgpo.hub.model_card import FACTS_FILE, TrainingFacts, make_card
from trl_sgpo.inference.server import TOKEN_VARIABLE, ServerModel
from trl_sgpo.method.conversation_trainer import ConversationGRPOTrainer
from trl_sgpo.report.page import write_report
from trl_sgpo.report.records import read_run


TESTS = str(Path(__file__).parents[1])
SECRET = "s3cr3t-of-a-user"
HIDDEN_IN = {
    "model_init_kwargs": {"token": SECRET, "deep": [{"X-Api-Key": SECRET}, {"proxies": {"Authorization": SECRET}}]},
    "generation_kwargs": {"no_repeat_ngram_size": 5},
    "vllm_server_base_url": f"http://user:{SECRET}@host:8000/v1?api_key={SECRET}",
    "hub_token": SECRET,
}


@pytest.fixture
def config(tmp_path: Path) -> SGPOConfig:
    return SGPOConfig(output_dir=str(tmp_path / "run"), report_to="none", **HIDDEN_IN)


@pytest.mark.parametrize(
    "key",
    ["token", "hub_token", "api_key", "apiKey", "X-Api-Key", "Authorization", "password", "client_secret", "hf_token",
     "aws_secret_access_key", "passwords", "tokenizer_token", "identitytoken", "authtoken", "HFTOKEN", "hf_pat", "jwt",
     "GITHUB_PAT", "sas", "sig", "X-Amz-Signature", "dsn", "connection_string", "webhook_url", "session_id",
     "passcode", "AWS_ACCESS_KEY_ID", "access_tokens", "hf_tokens"],
)  # fmt: skip
def test_names_of_secrets(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "max_tokens",
        "pad_token",
        "eos_token",
        "tokens",
        "tokenizer",
        "author",
        "num_key_value_heads",
        "keys",
        "path",
        "design",
        "config",
        "num_tokens",
        "max_new_tokens",
    ],
)
def test_names_of_others(key):
    assert not is_secret(key)


def test_settings_of_a_run(config):
    trainer = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(name_or_path="org/model")),
        reward_func_names=["r"],
        train_dataset={CLASS_COLUMN: ["password", "sums"]},
    )
    record = RunRecordCallback(trainer)
    record.recipe = {"datasets": [{"path": f"https://user:{SECRET}@host/data.jsonl"}]}
    record.on_train_begin(config, TrainerState(is_world_process_zero=True), TrainerControl())
    path = Path(config.output_dir, "settings.json")
    assert SECRET not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    settings = json.loads(path.read_text())
    assert settings["vllm_server_base_url"] == "http://***@host:8000/v1?api_key=***"
    assert settings["generation_kwargs"] == {"no_repeat_ngram_size": 5}
    assert settings["problems"] == {"password": 1, "sums": 1}


@pytest.fixture
def private(monkeypatch):
    """Files are private when libraries write to them, not only later."""
    modes = []
    save = torch.save

    def noting(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        modes.append(stat.S_IMODE(Path(path).stat().st_mode))

    monkeypatch.setattr("torch.save", noting)
    return modes


@pytest.mark.parametrize("kind", [SGPOTrainer, SharedPromptGRPOTrainer, ConversationGRPOTrainer])
def test_pickled_arguments_are_readable_by_their_owner_only(kind, tmp_path, private):
    args = SGPOConfig(str(tmp_path / "run"), report_to="none", use_bank=False, hub_token=SECRET)
    args = args if kind is SGPOTrainer else args.to_grpo()
    trainer = kind(
        model=save_tiny_model(tmp_path / "model"), reward_funcs=evenness, args=args, train_dataset=problems()
    )
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "training_args.bin").symlink_to(victim)
    trainer.save_model(str(tmp_path / "saved"))
    assert private == [0o600] and victim.read_text() == "precious"
    assert torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False).hub_token == SECRET


def test_logs_of_a_comparison(tmp_path):
    """What libraries print may hold a token."""
    victim, log = tmp_path / "victim", tmp_path / "logs" / "grpo-seed-1.txt"
    victim.write_text("precious")
    log.parent.mkdir()
    log.symlink_to(victim)
    for text in ("first", "second"):
        assert _run([sys.executable, "-c", f"print({text!r})"], dict(os.environ), log, set()) == 0
        assert log.read_text() == f"{text}\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600 and victim.read_text() == "precious"


def test_trackers_and_texts_of_a_configuration(config):
    for shown in (config.to_sanitized_dict(), config.to_json_string(), str(config), repr(config), f"{config}"):
        assert SECRET not in str(shown)
    assert config.hub_token == SECRET and config.model_init_kwargs["token"] == SECRET
    plain = config.to_grpo()
    assert plain.model_init_kwargs["token"] == SECRET
    for shown in (plain.to_sanitized_dict(), plain.to_json_string(), repr(plain)):
        assert SECRET not in str(shown)


def test_report_of_settings_that_an_earlier_version_wrote(tmp_path):
    write_run(tmp_path / "run", **HIDDEN_IN)
    write_report(read_run(tmp_path / "run"), tmp_path / "report.html")
    assert SECRET not in (tmp_path / "report.html").read_text()


def test_card_and_facts(tmp_path):
    data = f"https://user:{SECRET}@host/problems.jsonl?token={SECRET}"
    facts = replace(TrainingFacts(base_model="org/model"), datasets=(data,))
    facts.save(tmp_path)
    card = make_card(tmp_path, "user/model", facts, {}, adapter=False)
    for text in ((tmp_path / FACTS_FILE).read_text(), card):
        assert SECRET not in text and "host/problems.jsonl" in text


class TestMessages:
    def test_token_with_a_line_feed(self, capsys, monkeypatch):
        monkeypatch.setenv(TOKEN_VARIABLE, f"{SECRET}\nmore")
        with serving(lambda handler: handler.send(b"{}")) as url:  # without an answer nothing complains of the header
            assert main(["solve", "--server", f"{url}/v1", "--model", "m", PROBLEM]) == 2
        printed = "".join(capsys.readouterr())
        assert SECRET not in printed and "more" not in printed and TOKEN_VARIABLE in printed

    @pytest.mark.parametrize("url", [f"http://user:{SECRET}@127.0.0.1:9/v1", f"http://{SECRET}@127.0.0.1:9/v1"])
    def test_user_in_an_address(self, url, capsys):
        assert main(["solve", "--server", url, "--model", "m", PROBLEM]) == 2
        printed = "".join(capsys.readouterr())
        assert SECRET not in printed and TOKEN_VARIABLE in printed

    @pytest.mark.parametrize(
        "url", ["file:///etc/passwd", "ftp://host/v1", "127.0.0.1:9/v1", "http://h/\nX: y", "http:"]
    )
    def test_addresses_of_no_server(self, url, capsys):
        assert main(["solve", "--server", url, "--model", "m", PROBLEM]) == 2
        assert "like http://127.0.0.1:8000" in capsys.readouterr().err

    def test_the_bank_server_has_the_same_check(self, tmp_path, monkeypatch):
        with StrategyBank(tmp_path / "bank", hash_embedder) as bank:
            with pytest.raises(BankError, match="TRL_SGPO_BANK_TOKEN") as error:
                SharedBank(bank, f"http://user:{SECRET}@host")
            assert SECRET not in str(error.value)
            monkeypatch.setenv("TRL_SGPO_BANK_TOKEN", f"{SECRET}\nmore")
            with pytest.raises(BankError, match="TRL_SGPO_BANK_TOKEN") as error:
                SharedBank(bank, "http://host")
            assert SECRET not in str(error.value)

    def test_values_of_a_recipe(self, tmp_path, capsys):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"learning_rate: {{token: {SECRET}}}\n")
        assert main(["train", "--config", str(recipe)]) == 2
        printed = capsys.readouterr().err
        assert "learning_rate" in printed and SECRET not in printed

    def test_errors_and_logs_of_libraries(self, capsys):
        def command(argv: list[str]) -> int:
            handler = logging.StreamHandler()
            logger = logging.getLogger("a.library")
            logger.addHandler(handler)
            logger.warning("connecting to http://user:%s@host, Authorization: Bearer %s", SECRET, SECRET)
            logger.removeHandler(handler)
            raise ConfigError(f"no server at https://user:{SECRET}@host/v1, got {{'token': '{SECRET}'}}")

        assert run_command("trl-sgpo test", command, []) == 2
        printed = capsys.readouterr().err
        assert SECRET not in printed and printed.count("://***@host") == 2


def test_a_line_of_a_recipe_that_is_no_yaml(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"hub_token: {SECRET}: x\n")
    assert main(["train", "--config", str(path)]) == 2
    assert SECRET not in (printed := capsys.readouterr().err) and "line 1" in printed


def test_addresses_that_are_keys_and_signed_ones():
    settings = {f"https://user:{SECRET}@proxy": "x", "url": f"https://h/?sig={SECRET}&X-Amz-Signature={SECRET}"}
    assert SECRET not in json.dumps(redacted(settings))


def test_a_secret_in_what_is_published(tmp_path):
    args = SGPOConfig(str(tmp_path), report_to="none", chat_template_kwargs={"api_key": SECRET})
    with pytest.raises(ConfigError, match="`chat_template_kwargs` holds a secret"):
        SGPOTrainer(model="none", reward_funcs=evenness, args=args, train_dataset=problems(4))


def test_a_link_out_of_a_run_is_not_shown(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "docker.json").write_text(json.dumps({"model_name_or_path": SECRET}))
    (run / "settings.json").unlink()
    (run / "settings.json").symlink_to(tmp_path / "docker.json")
    assert SECRET not in str(read_run(str(run)).settings)


def test_other_texts_stay():
    for text in ("user@host.org", "https://host/a@b", "eos_token='<s>'", "a token: 5", "git@github.com:a/b", "x='y'"):
        assert without_credentials(text) == text
    settings = {"token": None, "use_token": True, "a": [1, "b"], "max_tokens": 5}
    assert redacted(settings) == settings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:it's{SECRET}@host/v1?api_key=a'{SECRET}&n=1", "http://***@host/v1?api_key=***&n=1"),
        (f"no file 'http://host?api_key={SECRET}': name one", "no file 'http://host?api_key=***': name one"),
        (json.dumps({"password": f'a"{SECRET}', "n": "1"}), '{"password": "***", "n": "1"}'),
        (f"token='{SECRET}\\'", "token='***'"),
        (f"see https://host/#access_token={SECRET}", "see https://host/#access_token=***"),
        (f"Authorization: Basic {SECRET}, Basic arithmetic", "Authorization: Basic ***, Basic arithmetic"),
    ],
)
def test_quotes_in_a_secret(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_arguments_of_a_command() -> None:
    argv = ["--hub_token", SECRET, "--config", "a.yaml", f"--api_key={SECRET}", "--hub_token", "--max_tokens", "5"]
    shown = ["--hub_token", "***", "--config", "a.yaml", "--api_key=***", "--hub_token", "--max_tokens", "5"]
    assert arguments_without_secrets([*argv, f"http://me:{SECRET}@host"]) == [*shown, "http://***@host"]


def test_what_wandb_records_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes `sys.argv`, and texts before they are escaped."""
    token = "hf_" + SECRET.replace("-", "") * 2
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_CONSOLE", raising=False)
    command = [sys.executable, "-m", "command_with_wandb", "--hub_token", token]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": TESTS}, check=False)
    assert done.returncode == 0 and "to ***" in done.stderr and "with ***" in done.stderr, done.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"--hub_token" in each for each in written)
    assert not any(token.encode() in each for each in written)


def _repeating(handler: Any) -> None:
    body = f"Incorrect key: {handler.headers['Authorization']}, {SECRET}".encode()
    handler.send_response(400)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_a_server_that_repeats_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with serving(_repeating) as url:
        model = ServerModel(f"{url}/v1", "m", token=SECRET, retries=0)
        with pytest.raises(ModelError, match=r"status 400: Incorrect key: .*\*\*\*") as refused:
            model.answer([[{"role": "user", "content": "1 + 1?"}]])
        monkeypatch.setenv("TRL_SGPO_BANK_TOKEN", SECRET)
        with StrategyBank(tmp_path, hash_embedder) as bank:
            SharedBank(bank, url).sync()
    assert "it answered 400" in caplog.text and "Incorrect key: " in caplog.text
    assert SECRET not in caplog.text + str(refused.value)
    assert without_sent("an answer", {"Authorization": "Bearer "}) == "an answer"


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--pool", "a.json", "--results", "x", "--hub_token", SECRET],
        ["push", "run", "user/model", f"--api_token={SECRET}"],
    ],
)
def test_a_token_among_arguments_that_a_command_has_not(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "***" in told and SECRET not in told
