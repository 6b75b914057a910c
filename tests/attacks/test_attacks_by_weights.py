"""Damaged weights and configurations of models, adapters and embedding models: one line that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import problems, save_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from trl_sgpo import SharedPromptGRPOTrainer
from trl_sgpo.bank.embedding import load_embedder
from trl_sgpo.cli.main import main
from trl_sgpo.errors import ModelError
from trl_sgpo.inference.pretrained import load_adapter, load_config, load_model


WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8] + b"x" * 20 + path.read_bytes()[28:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_sizes(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "q_proj" in name)
    save_file(tensors | {name: torch.zeros(3, 5)}, path, metadata={"format": "pt"})


DAMAGES = [header, no_json, cut, empty, other_sizes]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(save_tiny_model(tmp_path / "tiny"))


def adapter_of(base: Path, directory: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, directory / name)
    return directory


def sharded(base: Path) -> Path:
    """Saves a model in several files, and returns the second."""
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    return sorted(base.glob("model-*.safetensors"))[1]


def message(raised: Any) -> str:
    text = str(raised.value)
    assert "\n" not in text and len(text) < 900 and "copy or download" in text
    return text


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights(damage: Callable[[Path], None], tiny: Path) -> None:
    damage(tiny / WEIGHTS)
    with pytest.raises(ModelError) as raised:
        load_model(tiny)
    assert str(tiny if damage is other_sizes else tiny / WEIGHTS) in message(raised)


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_of_an_adapter(damage: Callable[[Path], None], tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    damage(adapter / ADAPTER)
    with pytest.raises(ModelError) as raised:
        load_adapter(load_model(tiny), adapter)
    assert str(adapter if damage is other_sizes else adapter / ADAPTER) in message(raised)


@pytest.mark.parametrize("damage", [header, cut])
def test_weights_of_an_embedding_model(damage: Callable[[Path], None], tiny: Path) -> None:
    damage(tiny / WEIGHTS)
    with pytest.raises(ModelError) as raised:
        load_embedder(str(tiny))
    assert str(tiny / WEIGHTS) in message(raised)


@pytest.mark.parametrize("damage", [header, Path.unlink])
def test_a_shard(damage: Callable[[Path], None], tiny: Path) -> None:
    shard = sharded(tiny)
    damage(shard)
    with pytest.raises(ModelError) as raised:
        load_model(tiny)
    assert str(shard) in message(raised)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "[" * 10**5])
def test_an_index_of_shards(text: str, tiny: Path) -> None:
    sharded(tiny)
    (tiny / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(ModelError) as raised:
        load_model(tiny)
    assert str(tiny / f"{WEIGHTS}.index.json") in message(raised)


@pytest.mark.parametrize("values", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": 10**13}], ids=str)
def test_a_configuration(values: dict[str, Any], tiny: Path) -> None:
    path = tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ModelError) as raised:
        load_model(tiny)
    assert str(tiny) in message(raised)


@pytest.mark.parametrize(
    "values", [{"r": "x"}, {"r": 4}, {"peft_type": "EVIL"}, {"target_modules": "(a"}, {"lora_alpha": []}], ids=str
)
def test_a_configuration_of_an_adapter(values: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ModelError) as raised:
        load_adapter(load_model(tiny), adapter)
    assert str(adapter) in message(raised)


def test_other_files_are_not_read(tiny: Path) -> None:
    """A configuration is read before its weights are there, and what is beside weights is not theirs."""
    (tiny / "rollouts.safetensors").write_bytes(b"")
    assert load_model(tiny).num_parameters() > 0
    header(tiny / WEIGHTS)
    assert load_config(tiny).model_type == "llama"


@pytest.mark.parametrize("damage", [header, other_sizes])
def test_training(damage: Callable[[Path], None], tiny: Path, tmp_path: Path) -> None:
    damage(tiny / WEIGHTS)
    args = GRPOConfig(
        str(tmp_path / "run"), num_generations=2, per_device_train_batch_size=2, bf16=False, use_cpu=True
    )
    with pytest.raises(ModelError) as raised:
        SharedPromptGRPOTrainer(str(tiny), lambda **kwargs: [0.0], args=args, train_dataset=problems())
    assert str(tiny) in message(raised)


@pytest.mark.parametrize("command", ["solve", "train", "warmstart", "export"])
@pytest.mark.parametrize("damage", [header, other_sizes])
def test_one_line_and_status_2(
    command: str, damage: Callable[[Path], None], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model_name_or_path": str(tiny), "dataset_name": "reasoning_gym/gcd?size=8", "reward_funcs": ["answer_reward"],
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1,
        "max_strategy_length": 4, "max_completion_length": 4, "report_problems": 0, "report_to": "none",
        "bf16": False, "use_cpu": True, "use_bank": False, "warmstart_traces": 0 if command == "train" else 4,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(content))
    damage(tiny / WEIGHTS)
    arguments = {
        "solve": ["--model", str(tiny), "--no_bank", "1 + 2"],
        "export": ["--model", str(tiny), "--merge", "--output_dir", str(tmp_path / "export")],
    }.get(command, ["--config", str(recipe)])
    assert main([command, *arguments]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"trl-sgpo {command}: error: ") and str(tiny) in line and "copy or download" in line


@pytest.mark.parametrize("whole", [True, False], ids=["beside whole weights", "alone"])
def test_a_distributed_checkpoint_that_lacks_most_weights(tiny: Path, whole: bool) -> None:
    """The library reads it in place of other weights, and what it lacks is whatever was in memory."""
    weights = load_file(tiny / WEIGHTS)
    offsets = {name: {"saved_offsets": [len(each) - 1, *[0] * (each.dim() - 1)]} for name, each in weights.items()}
    save_file(
        {name: each[-1:].clone() for name, each in weights.items()},
        tiny / "shard-00001-model-00001-of-00001.safetensors",
        {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)},
    )
    if not whole:
        (tiny / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="is a part of a distributed checkpoint"):
        load_model(tiny)
