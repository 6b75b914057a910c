"""Checks of arguments and model, before any long work."""

from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, PeftType, PromptLearningConfig
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging
from trl import GRPOTrainer

from ..checks.adapters import KINDS
from ..checks.secrets import redacted
from ..checks.sharding import check_sharding
from ..data.answers import answer_reward
from ..data.columns import check_column_names, check_entries, check_solutions
from ..errors import ConfigError, DataError, ModelError
from ..sgpo_config import SGPOConfig
from ..speed.learned_prompts import LEARNED_PROMPTS, is_prompt_learning
from ..speed.merging import base_of
from .context_length import check_context_length, shown_strategies
from .control_tokens import TextEncoder
from .conversation import check_system_role
from .prompts import check_prompts, system_prompt_of
from .reward_functions import check_columns_read, check_functions
from .sampling import check_generation_config


logger = logging.get_logger(__name__)

QUANTIZED_VLLM = (
    "Quantized weights with `use_vllm` are refused: vLLM would generate with other weights than are trained. Set "
    "`use_vllm` to false, or train without quantization."
)
UNSLOTH = (
    "Unsloth has replaced TRL's GRPOTrainer by one that ignores `rollout_func`: no strategy would be written, and "
    "nothing would be said. Train in a process that does not import unsloth."
)
_ENCODER_LOST = (
    "PEFT saves the prompt that P-tuning or a prefix projection has learnt, and not the encoder that it is trained "
    "through, so training cannot go on from a checkpoint"
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
        [`ConfigError`]: Tools, images, a rollout function, 4-bit weights with vLLM, no reward function, one that
            cannot be called, or names of reward functions that cannot be told apart.
        [`DataError`]: No training dataset, one that streams, without a column `prompt` or one that a reward function
            needs or can read, with images, or with a prompt that does not end in a user message.
    """
    if any("unsloth" in f"{base.__module__}.{base.__name__}".casefold() for base in GRPOTrainer.__mro__):
        raise ConfigError(UNSLOTH)
    for name in ("tools", "environment_factory", "rollout_func"):
        if trainer_kwargs.pop(name, None) is not None:
            raise ConfigError(f"SGPO generates in two phases of its own and cannot work with `{name}`: remove it.")
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("SGPO trains text models: pass a tokenizer as `processing_class`, not a processor.")
    if redacted(args.chat_template_kwargs) != args.chat_template_kwargs:
        raise ConfigError(
            "`chat_template_kwargs` holds a secret, and is saved and published with the model: remove it."
        )
    if quantization_config is not None and args.use_vllm:
        raise ConfigError(QUANTIZED_VLLM)
    if train_dataset is None:
        raise DataError("SGPO needs a `train_dataset`.")
    evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    datasets = [train_dataset, *(dataset for dataset in evals if dataset is not None)]
    for dataset in datasets:
        _check_dataset(dataset)
    if args.strategy_column is not None:
        _check_strategies(train_dataset, args.strategy_column)
    if reward_funcs is None:
        raise ConfigError("SGPO needs at least one reward function: pass `reward_funcs`. The first is the verifier.")
    check_functions(reward_funcs)
    for dataset in datasets:
        check_columns_read(reward_funcs, dataset.column_names)
        if answer_reward in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]):
            check_entries(dataset.features)
            check_solutions(dataset.features)


def check_saved(model: PreTrainedModel) -> None:
    """
    Checks that the settings of a model can be saved, and lets it return its outputs by name. transformers checks some
    values only when it saves them, which would end a training at its first checkpoint.

    Raises:
        [`ModelError`]: They cannot.
    """
    model.config.return_dict = True
    with TemporaryDirectory(prefix="trl-sgpo-config-") as directory:
        for config, file in ((model.config, "config.json"), (model.generation_config, "generation_config.json")):
            try:
                if config is not None:
                    config.save_pretrained(directory)
            except (ValueError, TypeError, StrictDataclassError) as error:
                raise ModelError(
                    f"The model cannot be saved with its `{file}` ({' '.join(str(error).split())}): mend the value "
                    "there."
                ) from error


def _check_strategies(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise DataError(
            f"`strategy_column` is {column!r}, and the columns are {', '.join(dataset.column_names)}: name the one "
            "with the strategies."
        )
    empty = [row for row, text in enumerate(dataset[column]) if not isinstance(text, str) or not text.strip()]
    if empty:
        raise DataError(f"Row {empty[0]} of the column {column!r} holds no strategy: write one for each problem.")


def check_model(trainer: GRPOTrainer) -> None:
    """
    Checks the model that a trainer has loaded, its chat template, and how it is sharded.

    Raises:
        [`ConfigError`]: An adapter that cannot be loaded again, quantized weights with vLLM, a generation
            configuration that does not sample, prefix tuning with gradient checkpointing, sharding other than asked
            for, rows longer than the model's table of positions or than vLLM reads, or a chat template without the
            system role that the prompts have.
        [`DataError`]: A message with control tokens of the model outside its content.
        [`ModelError`]: It has settings that cannot be saved.
    """
    check_saved(base_of(trainer.model))
    check_system_role(trainer.processing_class, trainer.train_dataset[0]["prompt"], trainer.args.chat_template_kwargs)
    if trainer.use_vllm and "quantization_config" in vars(trainer.model.config):
        raise ConfigError(QUANTIZED_VLLM)
    if not trainer.use_vllm:
        check_generation_config(trainer.generation_config, base_of(trainer.model).generation_config)
    if (
        isinstance(trainer.model, PeftModel)
        and (kind := trainer.model.active_peft_config.peft_type.value) not in KINDS
    ):
        raise ConfigError(f"Adapters of the type {kind} are not loaded after training: use one of {', '.join(KINDS)}.")
    if is_prompt_learning(trainer.model):
        _check_prompt_learning(trainer.model.active_peft_config, trainer.args)
    check_sharding(trainer)
    prompts = trainer.train_dataset["prompt"]
    evals = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    evaluated = [prompt for dataset in evals if dataset is not None for prompt in dataset["prompt"]]
    learns_prompt = is_prompt_learning(trainer.model)
    colocated = trainer.use_vllm and trainer.args.vllm_mode == "colocate"
    check_context_length(
        trainer.model.config,
        trainer.conversation,
        [*prompts, *evaluated],
        trainer.args,
        shown_strategies(trainer.args),
        trainer.model.active_peft_config.num_virtual_tokens if learns_prompt else 0,
        vllm_limit=trainer.vllm_generation.llm.model_config.max_model_len if colocated else None,
    )
    if trainer.accelerator.is_main_process:
        _warn_of_data(trainer, [dataset for dataset in evals if dataset is not None])
    with_control = TextEncoder(trainer.processing_class).count(prompts)
    if with_control and trainer.accelerator.is_main_process:
        logger.warning(
            f"{with_control} of {len(prompts)} problems hold control tokens of the model, which are encoded as plain "
            "text."
        )


def _warn_of_data(trainer: GRPOTrainer, evals: list[Dataset]) -> None:
    batch = trainer.args.eval_batch_size * trainer.accelerator.num_processes
    sizes = {len(dataset) * (trainer.args.num_generations_eval or trainer.num_generations) for dataset in evals}
    if uneven := sorted(size for size in sizes if size > batch and size % batch):
        logger.warning(
            f"Figures of evaluation are means over batches, and {uneven[0]} rows do not fill batches of {batch}: the "
            "rows of the last one count more. Choose `per_device_eval_batch_size` so that they do."
        )
    systems = {system_prompt_of(prompt) for prompt in trainer.train_dataset["prompt"]}
    if len(systems) > 1:
        logger.warning(
            f"The problems have {len(systems)} different system messages (or none). `eval` and `solve` put that of "
            "the first problem before problems without one."
        )


def _check_prompt_learning(config: PromptLearningConfig, args: SGPOConfig) -> None:
    if config.peft_type not in LEARNED_PROMPTS:
        raise ConfigError(f"{config.peft_type.value} is refused: use prompt tuning, prefix tuning, P-tuning or LoRA.")
    if args.use_vllm or args.use_transformers_continuous_batching:
        raise ConfigError(
            "A learned prompt works with plain generation only: set `use_vllm` and "
            "`use_transformers_continuous_batching` to false, or train with LoRA."
        )
    if config.peft_type == PeftType.PREFIX_TUNING and args.gradient_checkpointing:
        raise ConfigError(
            "Prefix tuning puts its prefix into the KV cache, which gradient checkpointing does not keep: set "
            "`gradient_checkpointing` to false."
        )
    if args.load_best_model_at_end and _has_encoder(config):
        raise ConfigError(f"{_ENCODER_LOST}: set `load_best_model_at_end` to false.")


def check_resumable(model: PreTrainedModel | PeftModel) -> None:
    """Raises [`ConfigError`] if checkpoints do not have all that is trained."""
    if is_prompt_learning(model) and _has_encoder(model.active_peft_config):
        raise ConfigError(f"{_ENCODER_LOST}: train without `resume_from_checkpoint`, or without an encoder.")


def _has_encoder(config: PromptLearningConfig) -> bool:
    return config.peft_type == PeftType.P_TUNING or (
        config.peft_type == PeftType.PREFIX_TUNING and config.prefix_projection
    )


def _check_dataset(dataset: Dataset) -> None:
    if isinstance(dataset, IterableDataset):
        raise DataError(
            "SGPO sorts problems into classes and cannot stream: load the dataset with `streaming=False`, or take "
            "a part of it with `Dataset.from_generator`."
        )
    if "prompt" not in dataset.column_names:
        raise DataError(f"The dataset has no column `prompt`, only {', '.join(dataset.column_names)}.")
    check_column_names(dataset.column_names)
    images = {"image", "images"} & set(dataset.column_names)
    if images:
        raise DataError(f"SGPO trains text models: remove the column `{images.pop()}`.")
    check_prompts(dataset["prompt"])
