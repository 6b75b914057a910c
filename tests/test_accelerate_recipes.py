"""Every configuration of `recipes/accelerate/` is one that accelerate and its launcher take."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from models import save_tiny_model

from trl_sgpo.recipe import read_recipe


DIRECTORY = Path(__file__).parents[1] / "recipes" / "accelerate"
TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "vllm_colocate": DistributedType.MULTI_GPU,
    "vllm_server": DistributedType.MULTI_GPU,
}


def test_none_is_forgotten() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_takes_it(name: str) -> None:
    path = str(DIRECTORY / f"{name}.yaml")
    config = load_config_from_file(path)  # refuses keys it does not know
    assert config.distributed_type == TYPES[name]
    assert config.num_processes == 2 and config.mixed_precision == "bf16"
    arguments = launch_command_parser().parse_args(["--config_file", path, "--num_processes", "4", "--module", "x"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert defaults is not None and arguments.num_processes == 4
    assert arguments.use_fsdp == (name == "fsdp2") and arguments.use_deepspeed == name.startswith("zero")
    if arguments.use_deepspeed:
        assert arguments.zero_stage == int(name[-1])
        assert str(arguments.zero3_init_flag).lower() == str(name == "zero3").lower()


def test_fsdp2_is_what_the_processes_get(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(DIRECTORY / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "--module", "x"])
    arguments, _, _ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", TYPES)
def test_a_recipe_hands_it_to_the_launcher(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    path = str(DIRECTORY / f"{name}.yaml")
    words = [
        "--model_name_or_path",
        model,
        "--dataset_name",
        "reasoning_gym/gcd",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    recipe = read_recipe([*words, "--accelerate_config", path, "--num_processes", "4"], "test")
    assert recipe.launch == ["--config_file", path, "--num_processes", "4"]
    assert recipe.own == words
