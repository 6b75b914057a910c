"""Checks of arguments and model, before any long work."""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from trl import GRPOTrainer

from ..errors import ConfigError, DataError
from ..sgpo_config import SGPOConfig
from .conversation import check_system_role


QUANTIZED_VLLM = (
    "Quantized weights with `use_vllm` are refused: vLLM would generate with other weights than are trained. Set "
    "`use_vllm` to false, or train without quantization."
)
SHARDED_CHECKPOINTS = (
    "With FSDP's sharded state dicts, checkpoints would hold neither a model that others can load nor the bank: set "
    "`fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration."
)


def check_arguments(
    args: SGPOConfig,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    quantization_config: Any,
    trainer_kwargs: dict[str, Any],
) -> None:
    """
    Checks the arguments of [`SGPOTrainer`].

    Raises:
        [`ConfigError`]: Tools, images, a rollout function, 4-bit weights with vLLM, or no reward function.
        [`DataError`]: No training dataset, one that streams, without a column `prompt`, or with images.
    """
    for name in ("tools", "environment_factory", "rollout_func"):
        if trainer_kwargs.pop(name, None) is not None:
            raise ConfigError(f"SGPO generates in two phases of its own and cannot work with `{name}`: remove it.")
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("SGPO trains text models: pass a tokenizer as `processing_class`, not a processor.")
    if quantization_config is not None and args.use_vllm:
        raise ConfigError(QUANTIZED_VLLM)
    if train_dataset is None:
        raise DataError("SGPO needs a `train_dataset`.")
    evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *(dataset for dataset in evals if dataset is not None)):
        _check_dataset(dataset)
    if reward_funcs is None:
        raise ConfigError("SGPO needs at least one reward function: pass `reward_funcs`. The first is the verifier.")


def check_model(trainer: GRPOTrainer) -> None:
    """
    Checks the model that a trainer has loaded, its chat template, and how it is sharded.

    Raises:
        [`ConfigError`]: Quantized weights with vLLM, FSDP with sharded state dicts, or a chat template without the
            system role that the prompts have.
    """
    check_system_role(trainer.processing_class, trainer.train_dataset[0]["prompt"], trainer.args.chat_template_kwargs)
    if trainer.use_vllm and "quantization_config" in vars(trainer.model.config):
        raise ConfigError(QUANTIZED_VLLM)
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise ConfigError(SHARDED_CHECKPOINTS)


def _check_dataset(dataset: Dataset) -> None:
    if isinstance(dataset, IterableDataset):
        raise DataError(
            "SGPO sorts problems into classes and cannot stream: load the dataset with `streaming=False`, or take "
            "a part of it with `Dataset.from_generator`."
        )
    if "prompt" not in dataset.column_names:
        raise DataError(f"The dataset has no column `prompt`, only {', '.join(dataset.column_names)}.")
    images = {"image", "images"} & set(dataset.column_names)
    if images:
        raise DataError(f"SGPO trains text models: remove the column `{images.pop()}`.")
