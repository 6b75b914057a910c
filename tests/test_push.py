"""Publishing runs on a local Hub and pulling them: what is in a commit, what others get, and the Hub's faults."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from models import evenness, hash_embedder, problems
from peft import LoraConfig, PeftModel, get_peft_model
from test_pipeline import PROBLEM, SETTINGS, fill_bank, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sgpo import SGPOConfig, SGPOPipeline, SGPOTrainer, StrategyBank
from trl_sgpo.bank.exchange import push_bank
from trl_sgpo.cli.main import main
from trl_sgpo.errors import BankError, ModelError
from trl_sgpo.evaluation.digest import model_record
from trl_sgpo.hub.model_card import TrainingFacts
from trl_sgpo.hub.snippet import transformers_snippet


REPO = "tester/model"
REPORT = {
    when: {
        how: {"accuracy": rate, "transfer": rate / 2, "problems": 40, "transfers": 80} for how in ("sampled", "greedy")
    }
    for when, rate in (("before", 0.25), ("after", 0.5))
}
PUBLISHED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "metrics.json",
    "model.safetensors",
    "report.json",
    "sgpo.json",
    "strategy_bank/manifest.json",
    "strategy_bank/strategies.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


@pytest.fixture(autouse=True)
def embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_sgpo.bank.embedding.load_embedder", lambda name: hash_embedder)
    monkeypatch.setattr("trl_sgpo.hub.push.PAUSES", (0.0,))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.connect(monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers the Hub it was made for
        yield hub


def save_run(directory: Path) -> None:
    """What a run leaves behind, with what must not be published."""
    SETTINGS.save(directory)
    TrainingFacts("org/base", ("openai/gsm8k", str(directory / "mine.jsonl")), ("answer_reward",)).save(directory)
    (directory / "metrics.json").write_text('{"step": 3, "epoch": 1.0, "log": []}')
    (directory / "report.json").write_text(json.dumps(REPORT))
    (directory / "training_args.bin").write_bytes(b"\x80\x04.")
    for name in ("completions", "checkpoint-3"):
        (directory / name).mkdir()
        (directory / name / "completions_00001.parquet").write_bytes(b"private")
    fill_bank(directory / "strategy_bank")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    save_model(directory)
    save_run(directory)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def save_adapter(run: Path, base: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(run)


@pytest.fixture
def adapter_run(saved: Path, tmp_path: Path) -> Path:
    """A run that trained an adapter of a model that it had warm-started."""
    run = tmp_path / "adapter-run"
    shutil.copytree(saved, run / "warmstart", ignore=shutil.ignore_patterns("strategy_bank", "*.bin", "completions"))
    save_adapter(run, str(run / "warmstart"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(saved / name, run / name)
    save_run(run)
    return run


def push(*arguments: Any) -> int:
    return main(["push", *map(str, arguments)])


def answer(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main(["solve", *arguments, PROBLEM, "--json"]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), told.err


def content(directory: Path) -> dict[str, bytes]:
    # SQLite's own files come and go as a bank is read
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and "strategy_bank" not in path.parts)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def card(hub: HubServer) -> ModelCard:
    return ModelCard(hub.files(REPO)["README.md"].decode())


class TestRoundTrip:
    def test_others_solve_with_model_and_bank_of_one_commit(
        self, hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected, _ = answer("--model", str(run), capsys=capsys)
        before = content(run)
        assert push(run, REPO) == 0
        assert content(run) == before and not list(run.glob(".hub-*"))
        told = capsys.readouterr().out
        sha = hub.head(REPO)
        assert f"Pushed to {REPO} as {sha}" in told and f"--revision {sha}" in told
        files = hub.files(REPO)
        assert files.keys() - {".gitattributes"} == PUBLISHED
        assert [commit.title for commit in hub.api().list_repo_commits(REPO)] == ["Push run", "initial commit"]
        for name, data in files.items():
            assert str(run.parent).encode() not in data, name
        shutil.rmtree(run)

        hub.requests.clear()
        found, said = answer("--model", REPO, capsys=capsys)
        assert found == expected and len(found["retrieved"]) == 2
        assert f"Pulled {REPO}@{sha}." in said and "trusted there" in said
        asked = {
            path for method, path in hub.requests if "/resolve/" in path and "/resolve/main/sgpo.json" not in path
        }
        assert asked and all(f"/resolve/{sha}/" in path for path in asked)

        hub.api().upload_file(path_or_fileobj=b"{", path_in_repo="sgpo.json", repo_id=REPO)
        assert answer("--model", REPO, "--revision", sha, capsys=capsys)[0] == expected
        assert main(["solve", "--model", REPO, PROBLEM]) == 2 and "sgpo.json" in capsys.readouterr().err

    def test_what_was_pulled_works_without_network(
        self, hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert push(run, REPO) == 0
        expected, _ = answer("--model", REPO, capsys=capsys)
        hub.close()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert answer("--model", REPO, capsys=capsys)[0] == expected

    def test_adapter_of_a_local_model_is_merged(
        self, hub: HubServer, adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected, _ = answer("--model", str(adapter_run), capsys=capsys)
        tokenizer = AutoTokenizer.from_pretrained(adapter_run)
        ids = torch.tensor([tokenizer("What is 1 + 2?")["input_ids"]])
        base = AutoModelForCausalLM.from_pretrained(adapter_run / "warmstart")
        with torch.no_grad():
            plain = base(ids).logits
            wanted = PeftModel.from_pretrained(base, adapter_run).eval()(ids).logits
        assert push(adapter_run, REPO) == 0
        assert hub.files(REPO).keys() - {".gitattributes"} == PUBLISHED
        assert (card(hub).data.library_name, card(hub).data.base_model_relation) == ("transformers", "finetune")
        shutil.rmtree(adapter_run)
        assert answer("--model", REPO, capsys=capsys)[0] == expected
        pulled = AutoModelForCausalLM.from_pretrained(huggingface_hub.snapshot_download(REPO))
        with torch.no_grad():
            got = pulled(ids).logits
        assert torch.allclose(got, wanted, atol=1e-4) and not torch.allclose(got, plain, atol=1e-1)

    def test_adapter_of_a_model_on_the_hub_stays_one(
        self, hub: HubServer, adapter_run: Path, saved: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected, _ = answer("--model", str(adapter_run), capsys=capsys)
        hub.api().create_repo("org/base")
        base_card = b"---\nlicense: mit\n---\n"
        (adapter_run / "warmstart" / "README.md").write_bytes(base_card)
        hub.api().upload_folder(repo_id="org/base", folder_path=adapter_run / "warmstart")
        config = json.loads((adapter_run / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "org/base"
        (adapter_run / "adapter_config.json").write_text(json.dumps(config))
        shutil.rmtree(adapter_run / "warmstart")
        assert push(adapter_run, REPO, "--license", "mit") == 0
        files = hub.files(REPO)
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        data = card(hub).data
        assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")
        assert answer("--model", REPO, capsys=capsys)[0] == expected

    def test_adapter_whose_model_is_gone_is_refused(
        self, hub: HubServer, adapter_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = json.loads((adapter_run / "adapter_config.json").read_text())
        (adapter_run / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": "/nowhere/base-model"})
        )
        assert push(adapter_run, REPO) == 2
        assert "belongs to /nowhere/base-model, which is no directory here" in capsys.readouterr().err
        assert hub.files(REPO).keys() == {".gitattributes"}


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "where", "message"),
        [
            (500, "/commit/", "status 500.*try again in a few minutes"),
            (503, "/preupload/", "status 503"),
            (503, "/upload/", "Pushing to tester/model failed"),
            ("drop", "/commit/", "no connection.*check the network"),
            ("break", "/upload/", "no connection.*check the network"),
            ("break", "/commit/", "no connection"),
            (429, "/commit/", "status 429.*too many requests"),
            (403, "/commit/", "status 403.*permission"),
            (412, "/commit/", "status 412.*try again"),
        ],
    )
    def test_a_push_that_fails_changes_nothing_and_can_be_repeated(
        self, hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], status: Any, where: str, message: str
    ) -> None:
        assert push(run, REPO) == 0
        head, files, before = hub.head(REPO), hub.files(REPO), content(run)
        weights = AutoModelForCausalLM.from_pretrained(run)
        weights.lm_head.weight.data += 1
        weights.save_pretrained(run)
        before = content(run)
        hub.fail(99, status, path_contains=where)
        capsys.readouterr()
        assert push(run, REPO) == 2
        told = capsys.readouterr().err
        assert re.search(message, told) and "run the same command again" in told
        assert "hf_" not in told and "trl-sgpo push: error: Pushing to tester/model" in told.splitlines()[-1]
        assert hub.head(REPO) == head and hub.files(REPO) == files
        assert content(run) == before and not list(run.glob(".hub-*"))
        hub._faults.clear()
        assert push(run, REPO) == 0
        after = hub.files(REPO)
        assert after["model.safetensors"] == before["model.safetensors"] != files["model.safetensors"]
        assert hub.repos["model", REPO].at("main").parent == head

    @pytest.mark.parametrize("status", [500, "drop", "lose", "cut"])
    def test_a_passing_fault_is_got_over(self, hub: HubServer, run: Path, status: Any) -> None:
        hub.fail(1, status, path_contains="/commit/")
        assert push(run, REPO) == 0
        assert hub.files(REPO).keys() - {".gitattributes"} == PUBLISHED
        assert len(hub.api().list_repo_commits(REPO)) == 2

    def test_tokens_without_rights(
        self, hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for token, message in (("hf_read", "may only read.*make one that may write"), ("hf_none", "status 401")):
            monkeypatch.setenv("HF_TOKEN", token)
            assert push(run, REPO) == 2
            told = capsys.readouterr().err
            assert re.search(message, told) and token not in told
        assert not hub.repos

    def test_another_commit_meanwhile_is_not_overwritten_unseen(
        self, hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert push(run, REPO) == 0
        original = huggingface_hub.HfApi.create_commit
        changed = []

        def meanwhile(api: Any, *arguments: Any, **named: Any) -> Any:
            if not changed:
                changed.append(
                    original(
                        api, REPO, [huggingface_hub.CommitOperationAdd("NOTES.md", b"hello")], commit_message="Notes"
                    )
                )
            return original(api, *arguments, **named)

        monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", meanwhile)
        (run / "report.json").write_text(json.dumps(REPORT | {"before": REPORT["after"]}))
        assert push(run, REPO) == 2
        assert hub.head(REPO) == changed[0].oid
        assert push(run, REPO) == 0 and hub.files(REPO)["NOTES.md"] == b"hello"

    @pytest.mark.parametrize(
        "entry",
        [
            {"dataset": {"id": "cais/hle", "task_id": "x"}, "value": 99.9},
            {"dataset": {"id": "a/b", "task_id": "x"}, "value": 50.0, "verifyToken": "x"},
            {"dataset": {"id": "no name", "task_id": "x"}, "value": 50.0},
        ],
        ids=["value", "key", "name"],
    )
    def test_results_that_no_evaluation_writes(
        self, entry: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        evaluation = tmp_path / "eval"
        (evaluation / "hub" / ".eval_results").mkdir(parents=True)
        (evaluation / "hub" / ".eval_results" / "gsm8k.yaml").write_text(yaml.safe_dump([entry]))
        figures = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 9}
        suite = {"kind": "in_distribution", "problems": 9, "available": 10, "accuracy": figures}
        (evaluation / "results.json").write_text(json.dumps({"suites": {"gsm8k": suite}}))
        assert push(run, REPO, "--eval", evaluation, "--dry_run", tmp_path / "dry") == 2
        assert "hub/.eval_results is damaged" in capsys.readouterr().err

    def test_leftovers_go_in_the_same_commit_and_the_users_files_stay(self, hub: HubServer, run: Path) -> None:
        hub.api().create_repo(REPO)
        old = [
            "adapter_config.json",
            "adapter_model.safetensors",
            "training_args.bin",
            "model-00001-of-00002.safetensors",
        ]
        old += ["strategy_bank/chroma/chroma.sqlite3", "strategy_bank/ledger.sqlite", "strategy_bank/lock"]
        old += [".eval_results/gsm8k.yaml"]
        own = ["LICENSE", "images/plot.png", "gguf/model.gguf", "completions/a.parquet"]
        operations = [huggingface_hub.CommitOperationAdd(name, b"old") for name in (*old, *own)]
        hub.api().create_commit(REPO, operations, commit_message="Before")
        assert push(run, REPO) == 0
        assert hub.files(REPO).keys() - {".gitattributes"} == PUBLISHED | set(own)

    def test_branch_private_and_dry_run(
        self, hub: HubServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(run, REPO, "--dry_run", tmp_path / "look") == 0
        looked = {
            str(path.relative_to(tmp_path / "look")) for path in (tmp_path / "look").rglob("*") if path.is_file()
        }
        assert looked == PUBLISHED and not hub.repos
        assert push(run, REPO, "--dry_run", tmp_path / "look") == 2 and "not empty" in capsys.readouterr().err
        assert push(run, REPO, "--private", "--revision", "v2", "--no_bank") == 0
        assert hub.api().model_info(REPO).private
        assert hub.files(REPO).keys() == {".gitattributes"}
        there = hub.files(REPO, revision="v2").keys() - {".gitattributes"}
        assert there == {name for name in PUBLISHED if not name.startswith("strategy_bank/")}
        hub.api().create_repo("tester/open")
        assert push(run, "tester/open", "--private") == 2 and "is public" in capsys.readouterr().err
        for arguments, words in (
            ((tmp_path / "none", REPO), "There is no run"),
            ((run, "model"), "name it as user/name"),
            ((tmp_path, REPO), "holds no model in safetensors"),
            ((run, REPO, "--eval", tmp_path), "holds no results.json"),
        ):
            assert push(*arguments) == 2 and words in capsys.readouterr().err


class TestTrust:
    def test_a_bank_that_comes_from_elsewhere_has_to_be_trusted(
        self, hub: HubServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(run, "tester/other") == 0 and push(run, REPO, "--no_bank") == 0
        assert answer("--model", REPO, capsys=capsys)[0]["retrieved"] == []
        export = huggingface_hub.snapshot_download("tester/other") + "/strategy_bank"
        for bank in ("tester/other", export):
            assert main(["solve", "--model", REPO, "--bank", bank, PROBLEM]) == 2
            assert "--trust_bank" in capsys.readouterr().err
            found, said = answer("--model", REPO, "--bank", bank, "--trust_bank", capsys=capsys)
            assert len(found["retrieved"]) == 2 and f"Bank of {bank}: 4 strategies, 3 of them trusted there" in said
        assert main(["solve", "--model", REPO, "--trust_bank", PROBLEM]) == 2

    def test_from_pretrained_imports_into_quarantine(self, hub: HubServer, run: Path, tmp_path: Path) -> None:
        assert push(run, REPO) == 0
        sha = hub.head(REPO)
        with StrategyBank.from_pretrained(REPO, tmp_path / "a", embedding_model=hash_embedder) as bank:
            assert len(bank) == 4 and {s.trust for s in bank.strategies()} == {"quarantine"}
            assert {s.origin for s in bank.strategies()} == {f"{REPO}@{sha}"}
            assert bank.retrieve([PROBLEM]) == [[]]
            push_bank(bank, "tester/bank")
        assert push(run, REPO, "--no_bank") == 0
        with pytest.raises(BankError, match="missing or too large: name a model and a revision"):
            StrategyBank.from_pretrained(REPO, tmp_path / "b", embedding_model=hash_embedder)
        assert not (tmp_path / "b").exists()
        with StrategyBank.from_pretrained(
            REPO, tmp_path / "c", revision=sha, keep_trust=True, embedding_model=hash_embedder
        ) as bank:
            assert [s.trust for s in bank.strategies()].count("trusted") == 3
        with pytest.raises(BankError, match="status 404"):
            StrategyBank.from_pretrained("tester/none", tmp_path / "d", repo_type="dataset")

    def test_no_code_and_no_pickles_are_pulled(
        self, hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(run, REPO) == 0
        expected, _ = answer("--model", REPO, capsys=capsys)
        config = json.loads((run / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
        files = {
            "modeling_evil.py": b"raise SystemExit(9)",
            "pytorch_model.bin": b"\x80\x04.",
            "last-checkpoint/rng_state.pth": b"\x80",
        }
        files["config.json"] = json.dumps(config).encode()
        operations = [huggingface_hub.CommitOperationAdd(name, data) for name, data in files.items()]
        hub.api().create_commit(REPO, operations, commit_message="Evil")
        hub.requests.clear()
        assert answer("--model", REPO, capsys=capsys)[0] == expected
        asked = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
        assert asked.isdisjoint({"modeling_evil.py", "pytorch_model.bin", "rng_state.pth"})

    def test_a_bank_that_was_tampered_with_is_refused(
        self, hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(run, REPO) == 0
        data = hub.files(REPO)["strategy_bank/strategies.jsonl"].replace(b"add the numbers", b"say the numbers")
        hub.api().upload_file(path_or_fileobj=data, path_in_repo="strategy_bank/strategies.jsonl", repo_id=REPO)
        assert main(["solve", "--model", REPO, PROBLEM]) == 2
        told = capsys.readouterr().err
        assert "cut off or changed" in told and "--no_bank" in told
        assert main(["solve", "--model", REPO, PROBLEM, "--no_bank"]) == 0


class TestCard:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("[mit]", "mit"),
            ("[mit, apache-2.0]", "other"),
            ("My own licence", "other"),
            ("[]", None),
            ("llama3.2", "llama3.2"),
        ],
    )
    def test_licence_of_the_base(self, given: str, expected: str | None, hub: HubServer, run: Path) -> None:
        hub.api().create_repo("org/base")
        hub.api().upload_file(
            path_or_fileobj=f"---\nlicense: {given}\n---\n".encode(), path_in_repo="README.md", repo_id="org/base"
        )
        assert push(run, REPO) == 0
        assert yaml.safe_load(card(hub).content.split("---\n")[1]).get("license") == expected
        assert json.loads(hub.files(REPO)["strategy_bank/manifest.json"])["license"] == (expected or "other")

    @pytest.mark.parametrize("bank", [[], ["--no_bank"]])
    def test_a_licence_of_no_form(self, bank: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert push(run, REPO, "--license", "my: licence", *bank) == 2
        assert "license must have the form of one on the Hub" in capsys.readouterr().err

    def test_metadata_and_text(self, hub: HubServer, run: Path, tmp_path: Path) -> None:
        hub.api().create_repo("org/base")
        base_card = b"---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
        hub.api().upload_file(path_or_fileobj=base_card, path_in_repo="README.md", repo_id="org/base")
        evaluation = tmp_path / "eval"
        (evaluation / "hub" / ".eval_results").mkdir(parents=True)
        (evaluation / "hub" / ".eval_results" / "gsm8k.yaml").write_text(
            "- {dataset: {id: openai/gsm8k, task_id: gsm8k}, value: 50.0, notes: 'two phases'}\n"
        )
        entry = {"task": {"type": "text-generation"}, "dataset": {"type": "openai/gsm8k", "name": "gsm8k"}}
        entry["metrics"] = [{"type": "accuracy", "value": 0.5}]  # type: ignore[assignment]
        written = entry | {"dataset": {"type": "/home/me/data/gsm8k.jsonl", "name": "gsm8k"}}
        entry["dataset"]["type"] = "gsm8k.jsonl"
        (evaluation / "hub" / "model_index.yaml").write_text(
            yaml.safe_dump({"model-index": [{"name": "x", "results": [written]}]})
        )
        figures = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 9}
        suite = {"kind": "in_distribution", "problems": 9, "available": 10, "accuracy": figures}
        (evaluation / "results.json").write_text(json.dumps({"suites": {"gsm8k": suite}}))
        assert push(run, REPO, "--eval", evaluation) == 0
        found = card(hub)
        metadata = yaml.safe_load(found.content.split("---\n")[1])
        index = metadata.pop("model-index")
        assert metadata == {
            "license": "other",
            "license_name": "mine",
            "license_link": "LICENSE",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "base_model": "org/base",
            "base_model_relation": "finetune",
            "datasets": ["openai/gsm8k"],
            "tags": ["sgpo", "strategy-bank", "trl", "trl-sgpo"],
        }
        assert index[0]["name"] == "model" and index[0]["results"][-1] == entry
        metrics = {m["name"]: m["value"] for each in index[0]["results"][:-1] for m in each["metrics"]}
        assert metrics["accuracy with the own strategy, greedy, 40 executions"] == 0.5
        assert metrics["strategy transfer score, sampled, 80 executions"] == 0.25
        assert found.data.eval_results is not None
        (published,) = yaml.safe_load(hub.files(REPO)[".eval_results/gsm8k.yaml"])
        assert published["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and published["value"] == 50
        manifest = json.loads(hub.files(REPO)["strategy_bank/manifest.json"])
        assert manifest["license"] == "other"
        text = found.text
        for words in (
            "| accuracy with own strategy, greedy | 0.25 [0.14, 0.40] | 0.50 [0.35, 0.65] |",
            "| strategy transfer score, greedy | 0.12 [0.05, 0.26] | 0.25 [0.14, 0.40] |",
            "| gsm8k | in distribution | 9 of 10 | 0.50 [0.40, 0.60] |",
            f'trl-sgpo solve --model {REPO} "',
            f'SGPOPipeline.from_pretrained("{REPO}")',
            "4 strategies (1 candidate, 3 trusted)",
            "arXiv 2606.24064",
            "It was **not**",
            "**Strategies are text that a model wrote.**",
            "@software{trl_sgpo",
            "`mine.jsonl`",
            transformers_snippet(REPO, SETTINGS).strip(),
        ):
            assert words in text, words
        assert "None" not in text and "licence:" not in found.content
        assert "lain answer" not in text

    def test_an_evaluation_of_other_weights_is_refused(
        self, hub: HubServer, run: Path, tmp_path: Path, capsys: Any
    ) -> None:
        evaluation = tmp_path / "eval"
        evaluation.mkdir()
        figures = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 9}
        suite = {"kind": "in_distribution", "problems": 9, "available": 10, "accuracy": figures}
        results = {"suites": {"gsm8k": suite}, "settings": model_record(str(run))}
        (evaluation / "results.json").write_text(json.dumps(results))
        assert push(run, REPO, "--eval", evaluation, "--dry_run", tmp_path / "first") == 0
        weights = AutoModelForCausalLM.from_pretrained(run)
        weights.lm_head.weight.data += 1
        weights.save_pretrained(run)
        capsys.readouterr()
        assert push(run, REPO, "--eval", evaluation, "--dry_run", tmp_path / "second") == 2
        assert f"`--eval {evaluation}` is of other weights than those in {run}" in capsys.readouterr().err
        assert not (tmp_path / "second").exists()

    def test_the_weights_of_an_adapter_are_its_own(self, hub: HubServer, adapter_run: Path, tmp_path: Path) -> None:
        (tmp_path / "eval").mkdir()
        results = {"suites": {}, "settings": model_record(str(adapter_run))}
        (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
        assert push(adapter_run, REPO, "--eval", tmp_path / "eval", "--dry_run", tmp_path / "out") == 0

    def test_figures_after_training_only_and_problems_left_out(
        self, hub: HubServer, run: Path, tmp_path: Path
    ) -> None:
        after = {how: score | {"unverified": 3} for how, score in REPORT["after"].items()}
        (run / "report.json").write_text(json.dumps({"after": after}))
        assert push(run, REPO, "--dry_run", tmp_path / "out") == 0
        text = (tmp_path / "out" / "README.md").read_text()
        assert (
            "On 40 problems that were not trained on (3 more are left out: the verifier does not judge them)" in text
        )
        assert "| after |\n|---|---|\n" in text and "“Before”" not in text

    def test_three_figures_where_they_were_measured(self, hub: HubServer, run: Path, tmp_path: Path) -> None:
        report = {
            when: {how: score | {"plain": 0.4, "own": own} for how, score in scores.items()}
            for (when, scores), own in zip(REPORT.items(), (None, 0.45), strict=True)
        }
        (run / "report.json").write_text(json.dumps(report))
        figures = [{"value": rate, "low": rate - 0.1, "high": rate + 0.1, "problems": 9} for rate in (0.3, 0.5, 0.6)]
        suite = {"kind": "harder", "problems": 9, "available": 9, "accuracy": figures[2]}
        ways = {name: {"accuracy": each} for name, each in zip(("plain", "own", "bank"), figures, strict=True)}
        suites = {"all": suite | ways, "two": suite | {"own": {"accuracy": None}, "plain": ways["plain"]}}
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval" / "results.json").write_text(json.dumps({"suites": suites}))
        assert push(run, REPO, "--eval", tmp_path / "eval") == 0
        for words in (
            "| accuracy of plain answers, sampled | 0.40 [0.26, 0.55] | 0.40 [0.26, 0.55] |",
            "| accuracy with own strategy, sampled | 0.25 [0.14, 0.40] | 0.45 [0.31, 0.60] |",
            "| accuracy with the bank in view, sampled | – | 0.50 [0.35, 0.65] |",
            "| suite | kind | problems | plain | own strategy | bank |\n|---|---|---|---|---|---|\n",
            "| all | harder | 9 of 9 | 0.30 [0.20, 0.40] | 0.50 [0.40, 0.60] | 0.60 [0.50, 0.70] |",
            "| two | harder | 9 of 9 | 0.30 [0.20, 0.40] | – | – |",
        ):
            assert words in card(hub).text, words
        (entry,) = card(hub).data.to_dict()["model-index"][0]["results"]
        assert {"accuracy of plain answers, greedy, 40 executions"} < {each["name"] for each in entry["metrics"]}

    @pytest.mark.parametrize("internalize", [None, "none", "distill"])
    def test_examples_without_this_package_run(
        self, hub: HubServer, run: Path, capsys: Any, internalize: str | None
    ) -> None:
        """That of plain answers comes first, where they were trained."""
        if internalize is not None:
            (run / "training.json").write_text(json.dumps({"settings": {"internalize": internalize}}))
        assert push(run, REPO) == 0
        blocks = re.findall(r"```(?:python|bash)\n(.*?)```", card(hub).text, re.DOTALL)
        codes = [block for block in blocks if "AutoModelForCausalLM" in block]
        said = []
        for code in codes:
            capsys.readouterr()
            exec(code.replace('device_map="auto"', 'device_map="cpu"'), {})
            said.append(capsys.readouterr().out)
        with SGPOPipeline.from_pretrained(REPO, bank=None) as pipeline:
            problem = "Find the Least Common Multiple (LCM) of these numbers: 4, 6"
            assert pipeline(problem).execution in said[-1]
            if internalize == "distill":
                assert said[0] == pipeline(problem, plain=True).execution + "\n" and blocks[0] == codes[0]
        assert len(codes) == (2 if internalize == "distill" else 1)
        assert ("Plain answers, without a strategy, were trained too" in card(hub).text) == (internalize == "distill")

    @pytest.mark.parametrize("internalize", ["kl", "contrast"])
    def test_which_method_was_used(self, hub: HubServer, run: Path, internalize: str) -> None:
        (run / "training.json").write_text(json.dumps({"settings": {"internalize": internalize}}))
        assert push(run, REPO) == 0
        assert ("Its KL term was used here" in card(hub).text) == (internalize == "kl")
        assert ("It was **not** used here" in card(hub).text) == (internalize != "kl")


@pytest.fixture
def make(saved: Path, tmp_path: Path) -> Iterator[Any]:
    """Makes trainers of an adapter for a model in a local directory, as after a warm start."""
    banks = []
    shutil.copytree(
        saved, tmp_path / "out" / "warmstart", ignore=shutil.ignore_patterns("strategy_bank", "checkpoint*")
    )

    def make(**kwargs: Any) -> SGPOTrainer:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_strategy_length": 8,
            "max_completion_length": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "save_steps": 1,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": "none",
            "bf16": False,
            "push_to_hub": True,
            "hub_model_id": REPO,
            "hub_always_push": True,
        }
        for bank in banks:
            bank.close()
        banks.append(StrategyBank(tmp_path / "out" / "strategy_bank", embedding_model=hash_embedder))
        return SGPOTrainer(
            model=str(tmp_path / "out" / "warmstart"),
            reward_funcs=evenness,
            args=SGPOConfig(**(defaults | kwargs)),
            train_dataset=problems(),
            strategy_bank=banks[-1],
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )

    yield make
    for bank in banks:
        bank.close()


def check_commits(hub: HubServer) -> list[set[str]]:
    """Files of each commit, the first one first, after checking that each is complete and says what it is."""
    found = []
    for commit in list(hub.repos["model", REPO].log("main"))[-2::-1]:
        files = {path: blob.content for path, blob in commit.files.items() if path != ".gitattributes"}
        step = json.loads(files["metrics.json"])["step"]
        assert f"step {step}" in commit.title or commit.title == "End of training"
        manifest = json.loads(files["strategy_bank/manifest.json"])
        assert manifest["size"] == len(files["strategy_bank/strategies.jsonl"])
        assert f"{manifest['count']} strategies" in files["README.md"].decode()
        top = {name for name in files if "/" not in name or name.startswith("strategy_bank/")}
        assert top == PUBLISHED - {"report.json"}
        for name in files:
            assert not re.search(r"chroma|\.lock|-wal|-shm|training_args|completions", name), name
        found.append(files.keys() - top)
    return found


class TestTrainer:
    @pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
    def test_every_commit_is_whole(self, hub: HubServer, make: Any, tmp_path: Path, strategy: str) -> None:
        trainer = make(hub_strategy=strategy)
        trainer.train()
        assert trainer.push_to_hub(license="apache-2.0") == hub.head(REPO)
        extra = check_commits(hub)
        assert card(hub).data.license == "apache-2.0"
        assert not list((tmp_path / "out").glob(".hub-*"))
        folders = [{name.split("/")[0] for name in names} for names in extra]
        assert (
            folders
            == {
                "end": [set()],
                "every_save": [set()] * 3,
                "checkpoint": [{"last-checkpoint", "warmstart"}] * 3,
                "all_checkpoints": [
                    {"checkpoint-1", "warmstart"},
                    {"checkpoint-1", "checkpoint-2", "warmstart"},
                    {"checkpoint-1", "checkpoint-2", "warmstart"},
                ],
            }[strategy]
        )
        shutil.rmtree(tmp_path / "out" / "warmstart")
        with SGPOPipeline.from_pretrained(REPO) as pipeline:
            assert pipeline(PROBLEM).execution is not None and pipeline.bank is not None

    def test_resumes_from_a_checkpoint_of_the_hub(self, hub: HubServer, make: Any, tmp_path: Path) -> None:
        settings = {"lr_scheduler_type": "constant", "learning_rate": 1e-2}
        trainer = make(hub_strategy="all_checkpoints", **settings)
        trainer.train()
        found = Path(huggingface_hub.snapshot_download(REPO, local_dir=tmp_path / "pulled"))
        assert (found / "warmstart" / "model.safetensors").read_bytes() == (
            tmp_path / "out" / "warmstart" / "model.safetensors"
        ).read_bytes()
        assert str(tmp_path) not in (found / "checkpoint-1" / "adapter_config.json").read_text()
        trained = []
        for directory in (tmp_path / "out", found):
            again = make(push_to_hub=False, save_strategy="no", **settings)
            again.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
            assert again.state.global_step == 2
            trained.append({name: p for name, p in again.model.named_parameters() if p.requires_grad})
        # To what the run that pushed came to, so pushing did not change its course either
        for name, parameter in trained[0].items():
            assert torch.equal(parameter, trained[1][name])
            assert torch.equal(parameter, trainer.model.get_parameter(name))

    def test_faults_during_training_do_not_stop_it(
        self, hub: HubServer, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make(hub_strategy="every_save")
        hub.fail(2, 500, path_contains="/commit/")  # the first push and its repetition
        trainer.train()
        trainer._finish_current_push()
        assert len(check_commits(hub)) == 1
        assert json.loads(hub.files(REPO)["metrics.json"])["step"] == 2
        hub.fail(99, "drop", path_contains="/commit/")
        head = hub.head(REPO)
        with pytest.raises(ModelError, match=f"no connection.*{REPO} is as it was.*saved in .*trl-sgpo push .*out"):
            trainer.push_to_hub()
        assert hub.head(REPO) == head
        trainer.strategy_bank.close()
        hub._faults.clear()
        assert push(tmp_path / "out", REPO) == 0
        assert hub.files(REPO).keys() - {".gitattributes"} == PUBLISHED - {"report.json"}

    def test_a_token_without_rights_is_found_before_training(
        self, hub: HubServer, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_read")
        with pytest.raises(ModelError, match="may only read"):
            make()
        hub.close()
        with pytest.raises(ModelError, match="Preparing tester/model on the Hub failed"):
            make()

    def test_a_recipe_whose_push_fails_loses_nothing(
        self,
        hub: HubServer,
        saved: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TRL_SGPO_LAUNCHED", "1")
        output = tmp_path / "trained"
        recipe = {
            "model_name_or_path": str(saved),
            "datasets": [{"path": "reasoning_gym/chain_sum?size=24&max_terms=2&max_digits=1"}],
            "reward_funcs": ["models.evenness", "answer_reward"],
            "use_peft": True,
            "lora_r": 2,
            "lora_target_modules": ["q_proj", "v_proj"],
            "warmstart_traces": 4,
            "max_strategy_length": 8,
            "max_completion_length": 8,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "save_strategy": "no",
            "report_problems": 4,
            "gradient_checkpointing": False,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "push_to_hub": True,
            "hub_model_id": REPO,
            "hub_private_repo": True,
            "output_dir": str(output),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with monkeypatch.context() as patch:
            patch.setenv("HF_TOKEN", "hf_read")
            assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
        told = capsys.readouterr().err
        assert "may only read" in told and not output.exists() and not hub.repos
        hub.fail(99, 503, path_contains="/commit/")
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
        told = capsys.readouterr().err
        assert f"To push it again: trl-sgpo push {output} {REPO}" in told
        assert hub.files(REPO).keys() == {".gitattributes"} and hub.api().model_info(REPO).private
        hub._faults.clear()
        assert push(output, REPO) == 0
        assert hub.files(REPO).keys() - {".gitattributes"} == PUBLISHED
        metadata = card(hub).data
        assert metadata.base_model is None and metadata.library_name == "transformers"  # its base is a directory
        text = (output / "README.md").read_text()
        assert "reasoning_gym/chain_sum" in text and "before | after" in text and str(tmp_path) not in text
        for name, data in hub.files(REPO).items():
            assert str(tmp_path).encode() not in data, name
