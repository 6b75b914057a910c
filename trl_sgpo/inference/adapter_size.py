"""How large an adapter becomes on its base: a config of 1 KB can ask for any number of weights."""

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks.opening import FEW
from ..errors import ModelError
from .model_files import ADAPTER_WEIGHTS


if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel


def check_adapter_size(directory: str | Path, config: "PeftConfig", model: "PreTrainedModel", size: int) -> None:
    """
    Checks that most weights that peft makes for an adapter are in its file. It is made without memory for that.

    Args:
        directory (`str` or `Path`):
            Directory of the adapter, for the message.
        config ([`~peft.PeftConfig`]):
            Its settings.
        model ([`~transformers.PreTrainedModel`]):
            Its base.
        size (`int`):
            Bytes of its file of weights.

    Raises:
        [`ModelError`]: They are not.
    """
    weights = _weights(config, model)
    if weights > size + FEW:
        raise ModelError(
            f"The adapter in {directory} is not loaded: its settings ask for {weights:,} weights, of which most are "
            f"not in its {ADAPTER_WEIGHTS}. Copy or download it again, or use another."
        )


def _weights(config: "PeftConfig", model: "PreTrainedModel") -> int:
    import torch
    from peft import get_peft_model

    alone = deepcopy(config)
    # As loaded to generate: without the networks that only training has, and without factors of the base's weights
    changes = {"inference_mode": True, "prefix_projection": False, "init_lora_weights": False, "loftq_config": {}}
    vars(alone).update({name: value for name, value in changes.items() if name in vars(alone)})
    made = 0
    with suppress(Exception), torch.device("meta"):  # peft raises it again, where it is told
        base = type(model)(deepcopy(model.config))
        before = _numbers(base)
        made = _numbers(get_peft_model(base, alone)) - before
    return made


def _numbers(model: "torch.nn.Module") -> int:
    return sum(each.numel() for each in (*model.parameters(), *model.buffers()))
