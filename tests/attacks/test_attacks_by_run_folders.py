"""A received run's folder: the id in it names a folder, links in it lead elsewhere, and files in it are no files."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from models import save_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trl_sgpo.cli.main import main
from trl_sgpo.compare import rlhf
from trl_sgpo.data import warmstart
from trl_sgpo.errors import ConfigError
from trl_sgpo.internalize.snapshot import WeightSnapshot
from trl_sgpo.method.buffer import _check_batch
from trl_sgpo.run.directory import begin_run, run_id
from trl_sgpo.run.resuming import check_same_model
from trl_sgpo.run.trainer import RunTrainer


ID = "20261130-101500-0a1b"
CODE = "print('code of the run')"


@pytest.fixture
def received(tmp_path: Path) -> Path:
    """A run with two checkpoints, of which the first is resumed, and an evaluation of the second that holds code."""
    run = tmp_path / "received"
    for step in (1, 2):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (run / "sitecustomize").mkdir()
    (run / "sitecustomize" / "__init__.py").write_text(CODE)
    (run / "sitecustomize" / "results.json").write_text(json.dumps({"settings": {"model": str(run / "checkpoint-2")}}))
    (run / "earlier").mkdir()
    return run


def name(run: Path, identity: object) -> None:
    for folder in (run, run / "checkpoint-1", run / "checkpoint-2"):
        (folder / "run.json").write_text(json.dumps({"id": identity}))


def moved(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.py")]


@pytest.mark.parametrize("absolute", [True, False])
def test_what_is_set_aside_stays_in_the_run(received: Path, tmp_path: Path, absolute: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    name(received, str(home) if absolute else "../../home")
    with pytest.raises(ConfigError, match=r"The `id` in .*run\.json is none of a run: delete the file\."):
        begin_run(received, str(received / "checkpoint-1"))
    assert moved(home) == []


@pytest.mark.parametrize("identity", ["..", "", "a/b", 5, None, ["x"], ID + "\n", "20261130-101500-0A1B", "٢" * 8])
def test_an_id_is_one_that_a_run_writes(tmp_path: Path, identity: object) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"id": identity}))
    with pytest.raises(ConfigError, match="is none of a run"):
        run_id(tmp_path)


@pytest.mark.parametrize("link", ["earlier", f"earlier/{ID}"])
def test_nothing_is_moved_through_a_link(received: Path, tmp_path: Path, link: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    name(received, ID)
    if link == "earlier":
        (received / link).rmdir()
    (received / link).symlink_to(home)
    with pytest.raises(ConfigError, match="is a link to another folder: delete it"):
        begin_run(received, str(received / "checkpoint-1"))
    assert moved(home) == []


def test_a_run_that_is_resumed_sets_aside_what_came_later(received: Path) -> None:
    name(received, ID)
    assert begin_run(received, str(received / "checkpoint-1")).id == ID
    assert moved(received / "earlier" / ID) == ["__init__.py"]
    assert (received / "earlier" / ID / "checkpoint-2").is_dir()


def test_links_that_lead_round_in_circles(received: Path) -> None:
    """The base of adapters is kept with them, and these links have each folder in each other one."""
    name(received, ID)
    (received / "checkpoint-2" / "adapter_config.json").write_text("{}")
    (received / "warmstart").mkdir()
    (received / "warmstart" / "config.json").write_text("{}")
    for number in range(2):
        (received / "warmstart" / f"link-{number}").symlink_to("..")
    begin_run(received, str(received / "checkpoint-1"))
    kept = received / "earlier" / ID / "warmstart"
    assert [path.name for path in kept.iterdir()] == ["config.json"]


@pytest.mark.parametrize("link", ["warmstart", "warmstart/model.safetensors"])
def test_weights_behind_a_link_are_not_published(
    tmp_path: Path, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter is merged into the model that it was trained on, which is found beside it."""
    private, run = Path(save_tiny_model(tmp_path / "private")), tmp_path / "run"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(private), config)
    adapted.peft_config["default"].base_model_name_or_path = "runs/theirs/warmstart"
    adapted.save_pretrained(run)
    if link == "warmstart":
        (run / link).symlink_to(private)
    else:
        shutil.copytree(private, run / "warmstart")
        (run / link).unlink()
        (run / link).symlink_to(private / "model.safetensors")
    assert main(["push", str(run), "user/m", "--no_bank", "--dry_run", str(tmp_path / "pushed")]) == 2
    assert f"{run / link} is a link out of its folder and is not published" in capsys.readouterr().err
    assert not list((tmp_path / "pushed").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rollouts_0.safetensors", "strategy_bank/x.sqlite"])
def test_a_pipe_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    file = tmp_path / "checkpoint-1" / name
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=f"{name} is no file, such as a pipe or a broken link: remove it"):
        check_same_model(model, str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", "text"),
        ("adapter_model.safetensors", None),
        ("optimizer.pt", "text"),
        ("scheduler.pt", ""),
        ("rng_state.pth", "text"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "checkpoint-1")
    check_same_model(model, str(tmp_path / "checkpoint-1"))
    file = tmp_path / "checkpoint-1" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged.*: resume from another checkpoint"):
        check_same_model(model, str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{}", b"x", b"[" * 100_000, b"0" * 10**6, None], ids=repr)
def test_the_record_of_what_a_model_was_made_of(tmp_path: Path, content: bytes | None) -> None:
    for name, made in (
        ("warmstart.sha256", lambda: warmstart._is_made_of(tmp_path, "digest", "model")),
        ("held_out.json", lambda: rlhf.is_made_of(tmp_path, "digest")),
    ):
        if content is None:
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        assert made() is False


STATE = {"global_step": 1, "max_steps": 3, "epoch": 0.5, "log_history": [], "total_flos": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": -5},
        {"global_step": 10**12},
        {"global_step": "1"},
        {"total_flos": "x"},
        {"epoch": "x"},
        {"log_history": [1]},
        {"best_model_checkpoint": 3},
        {"stateful_callbacks": {"ExportableState": [1]}},
        {"stateful_callbacks": 5},
    ],
    ids=str,
)
def test_the_state_of_a_trainer(tmp_path: Path, changes: dict[str, object]) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    file = tmp_path / "checkpoint-1" / "trainer_state.json"
    file.parent.mkdir()
    file.write_text(json.dumps(STATE))
    check_same_model(model, str(file.parent))
    file.write_text(json.dumps(STATE | changes))
    with pytest.raises(ConfigError, match=r"trainer_state\.json is damaged .*: resume from another checkpoint"):
        check_same_model(model, str(file.parent))


def test_the_step_of_a_checkpoint_or_an_evaluation(received: Path) -> None:
    for path in (received / "checkpoint-1" / "trainer_state.json", received / "checkpoint-2" / "trainer_state.json"):
        before = path.read_text()
        for step in ('"x"', "1e999"):
            path.write_text(f'{{"global_step": {step}}}')
            with pytest.raises(
                ConfigError, match=r"trainer_state\.json is damaged .*: resume from another checkpoint"
            ):
                begin_run(received, str(received / "checkpoint-1"))
        path.write_text(before)


def test_a_model_of_an_evaluation_that_is_no_folder(received: Path) -> None:
    (received / "circle").symlink_to("circle")
    for model in ("a\0b", str(received / "circle"), "x" * 100_000):
        (received / "sitecustomize" / "results.json").write_text(json.dumps({"settings": {"model": model}}))
        begin_run(received, str(received / "checkpoint-1"))
        assert (received / "sitecustomize").is_dir()


def test_an_archive_that_is_compressed(tmp_path: Path) -> None:
    """One of 8 MB could fill 8 GB when it is read."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    torch.save({"state": torch.zeros(100_000)}, checkpoint / "stored.pt")
    check_same_model(model, str(checkpoint))
    with (
        ZipFile(checkpoint / "stored.pt") as stored,
        ZipFile(checkpoint / "optimizer.pt", "w", ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    with pytest.raises(ConfigError, match=r"optimizer\.pt is damaged: resume from another checkpoint"):
        check_same_model(model, str(checkpoint))


def test_weights_that_are_a_pickle(tmp_path: Path) -> None:
    """transformers reads them where there are no others, and goes on with the present weights for those it lacks."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    (tmp_path / "checkpoint-1").mkdir()
    torch.save(dict(list(model.state_dict().items())[:1]), tmp_path / "checkpoint-1" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"The weights in .* are no safetensors: resume from another checkpoint"):
        check_same_model(model, str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", tie_word_embeddings=True))
    checkpoint = tmp_path / "checkpoint-1"
    model.save_pretrained(checkpoint)
    check_same_model(model, str(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    first = min(weights)
    save_file({name: weight for name, weight in weights.items() if name != first}, checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=f"lacks 1 of the model's weights, such as {first}: resume from another"):
        check_same_model(model, str(checkpoint))
    (checkpoint / "model.safetensors").write_text("text")
    with pytest.raises(ConfigError, match="is damaged"):
        check_same_model(model, str(checkpoint))


@pytest.mark.parametrize("change", ["nan", "inf", "shape", "missing"])
def test_a_teacher_of_a_checkpoint(tmp_path: Path, change: str) -> None:
    snapshot = WeightSnapshot(torch.nn.Linear(2, 2))
    snapshot.save(tmp_path / "teacher.safetensors")
    snapshot.load(tmp_path / "teacher.safetensors")
    weights = load_file(tmp_path / "teacher.safetensors")
    if change == "missing":
        del weights["bias"]
    else:
        weights["bias"] = torch.ones(1) if change == "shape" else torch.full((2,), float(change))
    save_file(weights, tmp_path / "teacher.safetensors", {"step": "1"})
    with pytest.raises(ConfigError, match="is damaged"):
        snapshot.load(tmp_path / "teacher.safetensors")


@pytest.mark.parametrize("change", ["nan", "shape", "missing"])
def test_a_reference_of_a_checkpoint(tmp_path: Path, change: str) -> None:
    reference = torch.nn.Linear(2, 2)
    accelerator = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(ref_model=reference, accelerator=accelerator)
    file = tmp_path / "reference.safetensors"
    weights = {name: weight.detach().clone() for name, weight in reference.named_parameters()}
    save_file(weights, file)
    RunTrainer._load_reference(trainer, file)
    if change == "missing":
        del weights["bias"]
    else:
        weights["bias"] = torch.ones(1) if change == "shape" else torch.full((2,), float(change))
    save_file(weights, file)
    with pytest.raises(ConfigError, match=r"reference\.safetensors is damaged .*: resume from another checkpoint"):
        RunTrainer._load_reference(trainer, file)


def rollouts() -> dict[str, torch.Tensor]:
    ids, mask = torch.ones(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long)
    names = ("prompt", "completion", "target")
    return {f"{name}_ids": ids for name in names} | {f"{name}_mask": mask for name in names} | {
        "advantages": torch.ones(4), "num_items_in_batch": torch.tensor(12)
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_mask": None},
        {"completion_ids": None},
        {"prompt_ids": torch.ones(4, 3)},
        {"prompt_ids": torch.ones(12, dtype=torch.long)},
        {"completion_mask": torch.full((4, 3), -5)},
        {"target_mask": torch.ones(4, 2, dtype=torch.long)},
        {"advantages": torch.ones(3)},
        {"advantages": None},
        {"advantages": torch.ones(4, 7)},
        {"old_per_token_logps": torch.zeros(4, 2)},
    ],
    ids=str,
)
def test_rollouts_of_a_checkpoint(change: dict[str, torch.Tensor | None]) -> None:
    _check_batch(rollouts())
    batch = {name: value for name, value in (rollouts() | change).items() if value is not None}
    with pytest.raises((ValueError, KeyError)):
        _check_batch(batch)


def test_results_beside_a_run_that_are_none(received: Path) -> None:
    name(received, ID)
    (received / "sitecustomize" / "results.json").write_text(json.dumps({"settings": []}))
    assert begin_run(received, str(received / "checkpoint-1")).id == ID
    assert moved(received / "earlier") == []
