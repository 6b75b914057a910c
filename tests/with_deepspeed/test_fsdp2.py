"""`trl-sgpo train` with `recipes/accelerate/fsdp2.yaml` on two processes: checkpoints, resuming, and what is saved."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from models import save_tiny_model
from ranks import run
from sharded_runs import check_run, recipe


ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def launched() -> dict[str, str]:
    """What the launcher sets in the environment of each process."""
    words = ["--config_file", FILE, "--mixed_precision", "no", "--main_process_port", "0", "--module", "x"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    names = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith(names)}


def test_fsdp2(model: str, tmp_path: Path, launched: dict[str, str]) -> None:
    """With LoRA. Full training is resumed in `test_distributed.py`."""
    command = ["train", "--config", str(recipe(model, tmp_path, adapter=True))]

    def train(output_dir: Path, *options: str) -> None:
        words = [*command, "--output_dir", str(output_dir), *options]
        statuses, told = run(tmp_path, 2, *words, module="fsdp_on_cpus", **launched)
        assert statuses == [0, 0], told[-6000:]

    check_run(train, tmp_path, adapter=True)
