"""A model that is named by its Hub id is checked like a folder, at the commit that is loaded, before it is loaded."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.hub
from hub_server import HubServer
from huggingface_hub import constants, hf_hub_download, snapshot_download
from models import problems, save_tiny_model, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from trl import GRPOConfig

from trl_sgpo import SGPOConfig
from trl_sgpo.cli.main import main
from trl_sgpo.data.warmstart import warmstart
from trl_sgpo.data.worked import Trace
from trl_sgpo.errors import ModelError
from trl_sgpo.inference.pretrained import load_config, load_model, load_sentence_transformer, load_tokenizer
from trl_sgpo.method import conversation_trainer
from trl_sgpo.method.conversation_trainer import ConversationGRPOTrainer
from trl_sgpo.speed.trainer import SharedPromptGRPOTrainer


REPO = "user/model"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def big(tiny: Path, tmp_path: Path) -> Path:
    """A model of a billion layers."""
    folder = shutil.copytree(tiny, tmp_path / "big")
    settings = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 10**9, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.connect(monkeypatch)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers the Hub it was made for
        yield hub


def upload(hub: HubServer, folder: Path, name: str = REPO, branch: str | None = None) -> None:
    hub.api().create_repo(name, exist_ok=True)
    if branch is not None:
        hub.api().create_branch(name, branch=branch)
    hub.api().upload_folder(repo_id=name, folder_path=folder, revision=branch)


def cached(folder: Path, name: str = REPO) -> Path:
    """Puts a model into the cache as a download does."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, place / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def weights_asked(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and path.endswith("model.safetensors")]


LOADERS: list[Callable[..., Any]] = [load_config, load_tokenizer, load_model]


@pytest.mark.parametrize("load", LOADERS)
def test_a_model_of_a_billion_layers_in_the_cache(load: Callable[..., Any], big: Path) -> None:
    cached(big)
    with pytest.raises(ModelError, match=f"{REPO} has `num_hidden_layers"):
        load(REPO)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("branch", [None, "v1"])
def test_a_model_of_a_billion_layers_on_the_hub(
    load: Callable[..., Any], branch: str | None, hub: HubServer, tiny: Path, big: Path
) -> None:
    upload(hub, tiny)
    upload(hub, big, branch=branch)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        load(REPO, revision=branch)
    assert not weights_asked(hub)


def test_a_command_with_a_hub_id(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(big)
    assert main(["solve", "--model", REPO, "--no_bank", "1 + 2"]) == 2
    assert "num_hidden_layers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [SharedPromptGRPOTrainer, ConversationGRPOTrainer])
@pytest.mark.parametrize("place", ["policy", "revision", "reward"])
def test_a_hub_id_in_a_trainer(
    place: str, kind: type[ConversationGRPOTrainer], tiny: Path, big: Path, hub: HubServer, tmp_path: Path
) -> None:
    upload(hub, tiny)
    upload(hub, big, branch="v1" if place == "revision" else None)
    args = SGPOConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none")
    args.model_init_kwargs = {"revision": "v1"} if place == "revision" else None
    model, reward = (str(tiny), REPO) if place == "reward" else (REPO, len)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        kind(model, reward, args)


def test_the_revision_of_a_warm_start(tiny: Path, big: Path, hub: HubServer, tmp_path: Path) -> None:
    upload(hub, tiny)
    upload(hub, big, branch="v1")
    args = SGPOConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none")
    traces = [Trace([{"role": "user", "content": "1 + 2"}], "Add.", "#### 3", "sums")]
    with pytest.raises(ModelError, match="num_hidden_layers"):
        warmstart(REPO, traces, args, tmp_path / "out", model_init_kwargs={"revision": "v1"})


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_that_a_library_would_put_on_its_base(
    with_config: bool, tiny: Path, hub: HubServer, tmp_path: Path
) -> None:
    """Its pattern would match for ever."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "user/base", "target_modules": r"((\w|\.)+)+!"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    if with_config:
        shutil.copy(tiny / "config.json", tmp_path / "adapter")
    upload(hub, tmp_path / "adapter")
    upload(hub, tiny, "user/base")
    with pytest.raises(ModelError, match=f"is an adapter, .*`trl-sgpo pull {REPO}`"):
        load_model(REPO)


def arguments_of(directory: Path) -> GRPOConfig:
    return GRPOConfig(
        str(directory), bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=2, num_generations=2
    )


def upload_reward_model(hub: HubServer, tiny: Path, tmp_path: Path) -> Path:
    reward = tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(reward)
    tokenizer().save_pretrained(reward)
    upload(hub, reward)
    return reward


def commit_after_the_check(monkeypatch: pytest.MonkeyPatch, commit: Callable[[], None]) -> None:
    checked = conversation_trainer._checked_arguments

    def then_commit(*arguments: Any) -> Any:
        found = checked(*arguments)
        commit()
        return found

    monkeypatch.setattr(conversation_trainer, "_checked_arguments", then_commit)


@pytest.mark.parametrize("kind", [ConversationGRPOTrainer, SharedPromptGRPOTrainer])
def test_tokenizers_of_a_commit_after_the_check(
    kind: Any, tiny: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would load them at the newest commit, with a file of the user as a vocabulary."""
    upload_reward_model(hub, tiny, tmp_path)
    upload(hub, tiny, "user/policy")
    other = tmp_path / "other"
    other.mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nSECRET\n")
    (other / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "vocab": str(secret)})
    )

    def another_commit() -> None:
        for name in (REPO, "user/policy"):
            hub.api().upload_folder(repo_id=name, folder_path=other, delete_patterns=["tokenizer.json"])

    args = arguments_of(tmp_path / "out")
    commit_after_the_check(monkeypatch, another_commit)
    with pytest.raises(ModelError, match="names a file as `vocab`"):
        kind("user/policy", REPO, args, train_dataset=problems())
    monkeypatch.undo()


@pytest.mark.parametrize("kind", [ConversationGRPOTrainer, SharedPromptGRPOTrainer])
def test_a_reward_model_is_of_the_commit_that_was_checked(
    kind: Any, tiny: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next commit is an adapter, on any base, with a pattern that never ends."""
    reward = upload_reward_model(hub, tiny, tmp_path)
    wanted = load_file(reward / "model.safetensors")["score.weight"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(reward)
    settings = json.loads((reward / "adapter_config.json").read_text())
    settings |= {"target_modules": r"((\w|\.)+)+!", "base_model_name_or_path": str(tiny)}
    (reward / "adapter_config.json").write_text(json.dumps(settings))
    commit_after_the_check(monkeypatch, lambda: upload(hub, reward))
    trainer = kind(str(tiny), REPO, arguments_of(tmp_path / "out"), train_dataset=problems())
    assert torch.equal(trainer.reward_funcs[0].model.score.weight, wanted)
    assert trainer.reward_func_names == [REPO.split("/")[-1]] == [trainer.reward_funcs[0].__name__]
    monkeypatch.undo()


def test_tokenizers_are_of_the_revision_of_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TRL loads a reward model with the same arguments as the policy."""
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        conversation_trainer, "load_tokenizer", lambda name, **how: asked.append((name, how.get("revision")))
    )
    args = arguments_of(tmp_path / "out")
    args.model_init_kwargs = {"revision": "v1"}
    found = conversation_trainer._tokenizers(
        {"model": "user/policy", "reward_funcs": ["user/reward", len], "args": args}
    )
    assert asked == [("user/policy", "v1"), ("user/reward", "v1")] and len(found["reward_processing_classes"]) == 2


def test_a_processor_is_not_loaded(tiny: Path, tmp_path: Path) -> None:
    """TRL would take any class for one."""
    settings = json.loads((tiny / "tokenizer_config.json").read_text()) | {"processor_class": "CLIPProcessor"}
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings))
    args = arguments_of(tmp_path / "out")
    trainer = ConversationGRPOTrainer(str(tiny), len, args, problems())
    assert (
        isinstance(trainer.processing_class, PreTrainedTokenizerBase)
        and trainer.processing_class.padding_side == "left"
    )


def test_a_header_of_weights_on_the_hub(tiny: Path, hub: HubServer) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{number:050}": empty for number in range(2**18 + 2**17)}).encode()
    (tiny / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    upload(hub, tiny)
    with pytest.raises(ModelError, match="has a header of more than"):
        load_model(REPO)


def test_an_embedding_model_on_the_hub(big: Path, hub: HubServer) -> None:
    upload(hub, big)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        load_sentence_transformer(REPO)


# What is no attack


def test_a_model_on_the_hub_is_loaded_at_one_commit_and_once(hub: HubServer, tiny: Path, big: Path) -> None:
    upload(hub, big)
    upload(hub, tiny, branch="v1")
    commit = hub.head(REPO, revision="v1")
    for load in (*LOADERS, *LOADERS):
        assert load(REPO, revision="v1")
    assert load_model(REPO, revision="v1").name_or_path == REPO
    assert len(weights_asked(hub)) == 1
    assert all(commit in path for _, path in hub.requests if "/resolve/" in path)


def test_what_was_loaded_from_the_hub_is_loaded_without_it(
    hub: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, tiny)
    for load in LOADERS:
        load(REPO)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert all(load(REPO) for load in LOADERS) and not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    assert all(load(REPO) for load in LOADERS)


def test_a_part_of_a_repository_in_the_cache(hub: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(hub, tiny)
    snapshot_download(REPO, allow_patterns=["config.json", "tokenizer*"])  # lists the files that are missing
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_config(REPO) and load_tokenizer(REPO)


def test_a_repository_without_a_tokenizer(hub: HubServer, tiny: Path) -> None:
    for path in tiny.glob("tokenizer*"):
        path.unlink()
    upload(hub, tiny)
    assert load_config(REPO) and load_model(REPO)


def test_a_repository_with_other_files(hub: HubServer, tiny: Path) -> None:
    """Checkpoints and other weights are not downloaded."""
    (tiny / "checkpoint-1").mkdir()
    for name in ("checkpoint-1/config.json", "consolidated.safetensors", "README.md"):
        shutil.copy(tiny / "config.json", tiny / name)
    upload(hub, tiny)
    assert load_model(REPO)
    asked = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert not [path for path in asked if "checkpoint-1" in path or "consolidated" in path or "README" in path]


@pytest.mark.parametrize("load", LOADERS)
def test_a_gated_repository_is_one_line(load: Callable[..., Any], hub: HubServer, tiny: Path) -> None:
    upload(hub, tiny)
    hub.fail(50, 403, path_contains="/resolve/")
    with pytest.raises(ModelError, match=f"^Reading {REPO} failed .status 403.: .*token[^\n]*$"):
        load(REPO)


def test_a_file_in_the_cache_alone(hub: HubServer, tiny: Path) -> None:
    upload(hub, tiny)
    hf_hub_download(REPO, "tokenizer.json")
    hub.fail(1_000, "drop")
    with pytest.raises((ModelError, ValueError)):
        load_config(REPO)


@pytest.mark.parametrize("blobs", ["there", "on another disk"])
@pytest.mark.parametrize("form", ["id", "snapshot", "folder of links"])
def test_a_model_in_the_users_own_cache(blobs: str, form: str, tiny: Path, tmp_path: Path) -> None:
    snapshot = cached(tiny)
    place = snapshot.parent.parent / "blobs"
    if blobs != "there":
        shutil.move(place, tmp_path / "disk")
        place.symlink_to(tmp_path / "disk")
    (tmp_path / "links").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    source = {"id": REPO, "snapshot": str(snapshot), "folder of links": str(tmp_path / "links")}[form]
    assert all(load(source) for load in LOADERS)


@pytest.mark.parametrize("place", ["datasets--user--private", "."])
def test_links_into_other_parts_of_the_cache(place: str, tiny: Path) -> None:
    other = Path(constants.HF_HUB_CACHE) / place / "blobs"
    other.mkdir(parents=True)
    (tiny / "tokenizer.json").rename(other / "secret")
    (tiny / "tokenizer.json").symlink_to(other / "secret")
    with pytest.raises(ModelError, match="is a link out"):
        load_tokenizer(tiny)


@pytest.mark.parametrize("pushed", [False, True], ids=["model", "pushed run"])
def test_an_export_downloads_the_files_of_a_model_only(
    pushed: bool, tiny: Path, tmp_path: Path, hub: HubServer
) -> None:
    for name in ("evil.py", "pytorch_model.bin", "huge.dat", "folder/huge.dat"):
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_text("x")
    if pushed:
        (tiny / "sgpo.json").write_text("{}")
    upload(hub, tiny)
    assert main(["export", "--model", REPO, "--merge", "--output_dir", str(tmp_path / "export")]) == 0
    assert weights_asked(hub)
    asked = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert asked and not [path for path in asked if path.endswith((".py", ".bin", ".dat"))]


def test_an_export_of_a_model_of_a_billion_layers(big: Path, tmp_path: Path, hub: HubServer) -> None:
    upload(hub, big)
    assert main(["export", "--model", REPO, "--merge", "--output_dir", str(tmp_path / "export")]) == 2
    assert not weights_asked(hub)
