"""Keys of older recipes: those that TRL, transformers and open-r1 renamed or removed."""

from collections.abc import Collection
from difflib import get_close_matches


RENAMED = {
    # TRL
    "max_prompt_length": "max_problem_tokens",
    "torch_dtype": "dtype",
    "use_liger_loss": "use_liger_kernel",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "vllm_max_model_len": "vllm_max_model_length",
    "wandb_log_unique_prompts": "log_unique_prompts",
    # transformers
    "evaluation_strategy": "eval_strategy",
    "include_inputs_for_metrics": "include_for_metrics",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps",
    "xpu_backend": "ddp_backend",
    # open-r1 and others
    "dataset_configs": "dataset_config",
    "dataset_mixture": "datasets",
    "dataset_prompt_column": "prompt_column",
    "hub_model_revision": "hub_revision",
}
"""Old keys and the keys that replace them."""

NOTES = {
    "dataset_configs": "it takes one name, not a list",
    "dataset_mixture": "a list of data sets",
    "include_inputs_for_metrics": "a list: [inputs]",
    "max_prompt_length": "longer problems are left out, not cut",
    "use_liger_loss": "it needs liger-kernel",
    "warmup_ratio": "a number below 1 is a share of all steps",
}
"""What differs in the value of the key that replaces an old one."""

REMOVED = {
    # TRL
    "gradient_checkpointing_use_reentrant": "set `use_reentrant` in `gradient_checkpointing_kwargs`",
    "token_entropy_percentile_threshold": "set `top_entropy_quantile` to 1 minus its value",
    "vllm_device": "vLLM shares the GPUs of training, or is a server with `vllm_mode: server`; remove it",
    "vllm_dtype": "vLLM takes the model's data type; remove it",
    "vllm_enable_prefix_caching": "it is always on; remove it",
    # transformers
    "adafactor": "set `optim: adafactor`",
    "dispatch_batches": "set it in `accelerator_config`",
    "fp16_backend": "remove it",
    "fp16_opt_level": "remove it",
    "group_by_length": "SGPO puts rows of a transfer block together; remove it",
    "half_precision_backend": "remove it",
    "jit_mode_eval": "remove it",
    "logging_dir": "for TensorBoard, set the environment variable TENSORBOARD_LOGGING_DIR",
    "mp_parameters": "remove it",
    "overwrite_output_dir": "remove it, or set `resume_from_checkpoint` to continue a run",
    "past_index": "remove it",
    "push_to_hub_organization": "write the organization in `hub_model_id`, as in organization/name",
    "ray_scope": "remove it",
    "save_safetensors": "weights are always saved as safetensors; remove it",
    "split_batches": "set it in `accelerator_config`",
    "torchdynamo": "set `torch_compile: true`",
    "tpu_metrics_debug": "set `debug`",
    "tpu_num_cores": "remove it",
    "use_ipex": "remove it",
    "use_legacy_prediction_loop": "remove it",
    "use_mps_device": "an Apple GPU is used where there is one; remove it",
    # arguments of trainers, and open-r1
    "benchmarks": "evaluate with `trl-sgpo eval`; remove it",
    "callbacks": "pass them to `SGPOTrainer` in Python; remove it",
    "chat_template": "save the template with the model's tokenizer",
    "overwrite_hub_revision": "remove it",
    "processing_class": "the model's tokenizer is used; remove it",
    "push_to_hub_revision": "set `push_to_hub`, and `hub_revision` for the branch",
    "tokenizer": "the model's tokenizer is used; remove it",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "wandb_run_group": "set the environment variable WANDB_RUN_GROUP",
}
"""Keys that nothing replaces one to one, and what to do."""


def unknown_key(name: str, known: Collection[str]) -> str:
    """
    Says what to write in place of a key that does not exist.

    Args:
        name (`str`):
            The key.
        known (`Collection[str]`):
            The keys that exist.
    """
    if name in RENAMED and RENAMED[name] in known:
        note = f" ({NOTES[name]})" if name in NOTES else ""
        return f"`{name}` is now `{RENAMED[name]}`{note}."
    if name in REMOVED:
        return f"`{name}` does not exist any more: {REMOVED[name]}."
    close = get_close_matches(name, list(dict.fromkeys(known)), n=3)
    hint = f" Did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else ""
    return f"Unknown key `{name}`.{hint}"
