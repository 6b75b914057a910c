"""How the keys of a GRPO recipe are called here: those of `trl grpo`, of open-r1 and of Unsloth's notebooks."""

from typing import Any

from ..checks.old_names import NOTES, REMOVED, RENAMED
from .conversion import Conversion, in_short


UNSLOTH = {
    "fast_inference": "use_vllm",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "model_name": "model_name_or_path",
    "r": "lora_r",
    "random_state": "seed",
    "target_modules": "lora_target_modules",
    "use_gradient_checkpointing": "gradient_checkpointing",
}
"""Arguments of Unsloth's `from_pretrained` and `get_peft_model`, and the keys of recipes."""

DROPPED = {
    "bias": "biases are not trained",
    "disable_log_stats": "an option of Unsloth's vLLM",
    "float8_kv_cache": "an option of Unsloth's vLLM",
    "load_in_16bit": "`dtype` sets the precision",
    "loftq_config": "there is no LoftQ",
    "max_lora_rank": "`lora_r` is the rank",
    "max_seq_length": "`max_problem_tokens` and the two lengths limit a row",
    "token": "log in by `hf auth login`",
    "unsloth_num_chunks": "an option of Unsloth's kernels",
}
"""Arguments that have no counterpart, and why."""

ENVIRONMENT = {
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_project": "WANDB_PROJECT",
    "wandb_run_group": "WANDB_RUN_GROUP",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def rename_keys(of: Conversion) -> None:
    """Gives keys of older versions, of open-r1 and of Unsloth their names here, and takes out what has none."""
    _unsloth(of)
    if "dataset_mixture" in of.values:
        _mixture(of)
    if not isinstance(of.values.get("env") or {}, dict):
        of.problems.append(f"`env` must be a mapping of names to values, got {in_short('env', of.values.pop('env'))}.")
    for key, value in list(of.values.items()):
        if key in ENVIRONMENT and value is not None:
            variable = ENVIRONMENT[key]
            of.values.pop(key)
            of.values["env"] = {**(of.values.get("env") or {}), variable: value}
            of.said(key, value, f"env.{variable}", "an environment variable of the tracker")
        elif key == "adafactor" and value:
            of.rename(key, "optim", "adafactor", "the name of the optimizer")
        elif key == "gradient_checkpointing_use_reentrant":
            of.rename(key, "gradient_checkpointing_kwargs", {"use_reentrant": value}, "an argument of checkpointing")
        elif key == "token_entropy_percentile_threshold":
            _quantile(of, key, value)
        elif key == "dataset_configs":
            _single(of, key, "dataset_config")
        elif key == "include_inputs_for_metrics":
            of.rename(key, "include_for_metrics", ["inputs"] if value else [], "a list")
        elif key in RENAMED:
            of.rename(key, RENAMED[key], value, NOTES.get(key, "its name in the current versions"))
        elif key in REMOVED:
            of.drop(key, _reason(REMOVED[key]))


def _reason(advice: str) -> str:
    """Why a key is left out, by the advice that an error would give."""
    reason = advice.replace("; remove it", "").replace("remove it, or ", "")
    return "it has no effect any more" if reason == "remove it" else reason


def _single(of: Conversion, key: str, new: str) -> None:
    value = of.values[key]
    names = value if isinstance(value, list) else [value]
    if len(names) != 1:
        of.problems.append(f"`{key}` has {len(names)} names: keep one, or write `datasets` with an entry for each.")
        of.values.pop(key)
        return
    of.rename(key, new, names[0], "one name, not a list")


def _mixture(of: Conversion) -> None:
    """Open-r1's `dataset_mixture`, a mapping with its data sets and their columns."""
    mixture = of.values["dataset_mixture"]
    entries = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        of.problems.append("`dataset_mixture` needs `datasets`, a list of mappings, each with an `id`.")
        of.values.pop("dataset_mixture")
        return
    parts, lost = [], set()
    for entry in entries:
        names = {"id": "path", "config": "name", "split": "split"}
        part = {new: entry[old] for old, new in names.items() if entry.get(old) is not None}
        columns = entry.get("columns")
        if isinstance(columns, list) and len(columns) == 1:
            part["prompt_column"] = columns[0]
        elif columns is not None:
            lost.add("columns")
        lost |= {"weight"} if entry.get("weight") not in (None, 1) else set()
        lost |= entry.keys() - names.keys() - {"columns", "weight"}
        parts.append(part)
    of.rename("dataset_mixture", "datasets", parts, "a list of data sets")
    if mixture.get("test_split_size") is not None:
        of.set("test_split_size", mixture["test_split_size"], "of the mixture")
    for name in sorted(map(str, lost)):
        of.said(f"dataset_mixture: {name}", "set", None, "all rows and columns of each data set are read")


def _quantile(of: Conversion, key: str, value: Any) -> None:
    try:
        of.rename(key, "top_entropy_quantile", 1 - float(value), "1 minus its value")
    except (TypeError, ValueError):
        of.problems.append(f"`{key}` must be a number, got {in_short(key, value)}.")


def _unsloth(of: Conversion) -> None:
    adapter = "r" in of.values and not of.values.get("full_finetuning")
    if of.values.pop("full_finetuning", None) is not None:
        of.said("full_finetuning", not adapter, f"use_peft={str(adapter).lower()}", "its name here")
    if of.values.get("bias") not in (None, "none"):
        of.problems.append(f"`bias` is {of.values['bias']}, and biases are not trained here: set it to none.")
    if isinstance(parameters := of.values.pop("vllm_sampling_params", None), dict):
        for key in [key for key in _SAMPLING if key in parameters]:
            # vLLM writes "no limit" as -1, transformers as 0
            value = 0 if key == "top_k" and parameters[key] == -1 else parameters[key]
            of.set(key, value, "of `vllm_sampling_params`")
        if left := sorted(map(str, parameters.keys() - {*_SAMPLING})):
            of.said("vllm_sampling_params", ", ".join(left), None, "`generation_kwargs` is the key for others")
    for key in [key for key in of.values if key in UNSLOTH or key in DROPPED]:
        value = of.values[key]
        if key in DROPPED:
            of.drop(key, DROPPED[key])
            continue
        value = bool(value) if key == "use_gradient_checkpointing" else value
        of.rename(key, UNSLOTH[key], value, "its name here")
    if adapter and "use_peft" not in of.values:
        of.set("use_peft", True, "an adapter is trained, as by `get_peft_model`")
