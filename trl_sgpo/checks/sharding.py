"""Whether accelerate shards a run as its launcher was asked to."""

import os

from transformers import Trainer

from ..errors import ConfigError


SHARDED_CHECKPOINTS = (
    "With FSDP's sharded state dicts, checkpoints would hold neither a model that others can load nor the bank: set "
    "`fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration."
)
FSDP_ON_CPUS = (
    "FSDP needs GPUs, and there are none: on CPUs, `--accelerate_config recipes/accelerate/ddp.yaml` or "
    "`--num_processes 2` trains with the whole model in every process."
)
DEEPSPEED_UNUSED = (
    "The launcher was asked for DeepSpeed, and accelerate does not use it here, which it does on CPUs where "
    "`ACCELERATE_USE_CPU` is set: unset it, or launch with `recipes/accelerate/ddp.yaml`."
)


def launched_with(name: str) -> bool:
    """
    Whether a launcher asked this process to use a backend.

    Args:
        name (`str`):
            `FSDP` or `DEEPSPEED`.
    """
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")


def check_sharding(trainer: Trainer) -> None:
    """
    Checks that a trainer is sharded as its launcher was asked to, and writes whole checkpoints. On CPUs accelerate
    takes DDP in place of FSDP without saying so.

    Raises:
        [`ConfigError`]: It is not.
    """
    if launched_with("FSDP") and not trainer.is_fsdp_enabled:
        raise ConfigError(FSDP_ON_CPUS)
    if launched_with("DEEPSPEED") and not trainer.is_deepspeed_enabled:
        raise ConfigError(DEEPSPEED_UNUSED)
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise ConfigError(SHARDED_CHECKPOINTS)
