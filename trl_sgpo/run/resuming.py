"""Whether a checkpoint is of the model that would go on from it: a whole one, or an adapter with the same settings."""

import json
import logging
import math
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.shapes import MOST, count, either, listing, mapping, nothing, number, record, text
from ..errors import ConfigError
from ..evaluation.digest import model_record
from ..inference.loading import adapter_base, how_trained, is_adapter
from ..inference.model_files import ADAPTER_FILE, ADAPTER_WEIGHTS
from ..inference.settings import TwoPhaseSettings
from ..report.run_files import STATE_FILE


logger = logging.getLogger(__name__)

# Those that say how large the weights of an adapter are, and how much they count
_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_ARCHIVES = (".pt", ".pth")  # the state of optimizer, schedule and random numbers, as torch saves them
_OF_A_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of torch, as large as the weight
ANOTHER = "resume from another checkpoint."
_MAYBE = either(nothing, number(-math.inf, math.inf))
_CALLBACK = record({"args": record({}), "attributes": record({})})
_STATE = record(
    {"global_step": count, "epoch": either(nothing, number()), "log_history": listing(record({}))},
    optional={
        "max_steps": count,
        "num_input_tokens_seen": count,
        **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), either(nothing, number())),
        "train_batch_size": either(nothing, count),
        "num_train_epochs": count,
        "total_flos": number(most=math.inf),
        "best_metric": _MAYBE,
        "best_global_step": either(nothing, count),
        "best_model_checkpoint": either(nothing, text),
        "stateful_callbacks": mapping(either(_CALLBACK, listing(_CALLBACK))),
    },
)
_OR_ANEW = "or train without `resume_from_checkpoint`."


def check_same_model(model: PreTrainedModel | PeftModel, checkpoint: str | None) -> None:
    """
    Checks that a checkpoint has the weights that are trained. Libraries would fail late, or load weights that mean
    something else.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is trained.
        checkpoint (`str`, *optional*):
            The checkpoint.

    Raises:
        [`ConfigError`]: It holds a whole model and an adapter is trained, or the reverse, or an adapter with other
            settings, or an adapter of another base, or of one in another precision.
    """
    if checkpoint is None or not Path(checkpoint).is_dir():
        return
    _check_files(Path(checkpoint))
    _check_state(Path(checkpoint))
    if not isinstance(model, PeftModel):
        if is_adapter(checkpoint):
            raise ConfigError(
                f"{checkpoint} holds an adapter, and the whole model is trained: set `use_peft: true`, {_OR_ANEW}"
            )
        _check_whole(model, Path(checkpoint))
        return
    if not is_adapter(checkpoint):
        raise ConfigError(
            f"{checkpoint} holds a whole model, and an adapter is trained: set `use_peft: false`, {_OR_ANEW}"
        )
    saved = read_json(Path(checkpoint, ADAPTER_FILE))
    now = model.active_peft_config.to_dict()
    changed = [
        f"`{name}` was {saved[name]}, is {now[name]}"
        for name in _SETTINGS
        if name in saved and name in now and saved[name] != now[name]
    ]
    if changed:
        raise ConfigError(
            f"The adapter in {checkpoint} has other settings ({'; '.join(changed)}): set those of before, {_OR_ANEW}"
        )
    try:
        with safe_open(Path(checkpoint, ADAPTER_WEIGHTS), framework="pt") as file:
            there = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{checkpoint}/{ADAPTER_WEIGHTS} is damaged ({error}): {ANOTHER}") from error
    trained = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if others := sorted((trained - there) | {name for name in there - trained if "lora_" in name}):
        raise ConfigError(
            f"The adapter in {checkpoint} is of other layers ({len(others)} weights differ, such as {others[0]}): set "
            f"`lora_target_modules` and `lora_modules_to_save` as before, {_OR_ANEW}"
        )
    _check_same_base(model, checkpoint, str(now["base_model_name_or_path"]))


def _check_whole(model: PreTrainedModel, checkpoint: Path) -> None:
    """transformers goes on with the present weights for those that a checkpoint lacks."""
    there: set[str] = set()
    files = sorted(checkpoint.glob("model*.safetensors"))
    if not files and any(checkpoint.glob("pytorch_model*.bin")):
        raise ConfigError(f"The weights in {checkpoint} are no safetensors: {ANOTHER}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                there |= set(stored.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is damaged ({error}): {ANOTHER}") from error
    shared: dict[tuple[int, torch.Size], list[str]] = {}  # of tied weights, a file has one
    for name, weight in model.state_dict().items():
        shared.setdefault((weight.data_ptr(), weight.shape), []).append(name)
    missing = [names[0] for names in shared.values() if there.isdisjoint(names)]
    if files and missing:
        raise ConfigError(f"{checkpoint} lacks {len(missing)} of the model's weights, such as {missing[0]}: {ANOTHER}")


def _check_files(checkpoint: Path) -> None:
    """Reading a pipe never ends, and libraries do not name a file of theirs that is damaged."""
    for path in checkpoint.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path} is no file, such as a pipe or a broken link: remove it, or {ANOTHER}")
        if path.name.endswith(_ARCHIVES) and not _is_stored(path):
            raise ConfigError(f"{path} is damaged: {ANOTHER}")


def _is_stored(path: Path) -> bool:
    """Whether a file is an archive as torch writes it. In one that is compressed, 8 MB could become as many GB."""
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
    except (BadZipFile, OSError):
        return False
    stored = all(entry.compress_type == ZIP_STORED for entry in entries)
    return stored and sum(entry.file_size for entry in entries) <= path.stat().st_size


@expect_readable(STATE_FILE, ANOTHER)
def _check_state(checkpoint: Path) -> None:
    if (checkpoint / STATE_FILE).is_file():
        state = read_json(checkpoint / STATE_FILE)
        _STATE(state, "it")
        if state["global_step"] > state.get("max_steps", MOST):
            raise ValueError(f"`global_step` is {state['global_step']} of {state['max_steps']} steps")


def _check_same_base(model: PeftModel, checkpoint: str, base: str) -> None:
    """An adapter fits the weights that it was trained on, as they were rounded or quantized."""
    trained_on, now = TwoPhaseSettings.load(checkpoint).trained_on, how_trained(model)
    if trained_on is not None and trained_on != json.loads(json.dumps(now, default=str)):
        raise ConfigError(
            f"The adapter in {checkpoint} was trained on a base in another precision ({_short(trained_on)}, now "
            f"{_short(now)}): set `dtype` and `load_in_4bit` or `load_in_8bit` as before, {_OR_ANEW}"
        )
    before = adapter_base(checkpoint) or ""
    if not (Path(before).is_dir() and Path(base).is_dir()):
        if Path(before).name != Path(base).name:
            logger.warning(f"The adapter in {checkpoint} was trained on {before}, and goes on with {base}.")
    elif not Path(before).samefile(base) and model_record(before)["weights"] != model_record(base)["weights"]:
        raise ConfigError(
            f"The adapter in {checkpoint} was trained on {before}, whose weights are not those of {base}: name that "
            f"base or use the warm start of that run, {_OR_ANEW}"
        )


def _short(trained_on: dict[str, Any]) -> str:
    bits = trained_on.get("quantization_config") or {}
    kinds = [name for name in ("load_in_4bit", "load_in_8bit") if bits.get(name)]
    return ", ".join([str(trained_on.get("dtype")), *kinds])


class OptimizerBefore:
    """
    What an optimizer and its schedule are before the state of a checkpoint is loaded, to which that is compared.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            The optimizer.
        schedule ([`~torch.optim.lr_scheduler.LRScheduler`]):
            Its schedule.
    """

    def __init__(self, optimizer: Any, schedule: Any):
        self._optimizer, self._schedule = optimizer, schedule
        self._settings = dict(optimizer.param_groups[0])
        self._attributes = dict(vars(schedule))

    def check(self, checkpoint: str, sharded: bool = False) -> None:
        """
        Checks that the loaded state is that of the optimizer in use. Kernels of an optimizer write where a tensor of
        another shape has no memory.

        Args:
            checkpoint (`str`):
                The checkpoint.
            sharded (`bool`, *optional*, defaults to `False`):
                Whether FSDP or DeepSpeed keeps the state, whose tensors have other shapes than the weights.

        Raises:
            [`ConfigError`]: It is of another optimizer, or has tensors of other shapes or settings of other types.
        """
        for group in self._optimizer.param_groups:
            if missing := set(self._settings) - set(group):
                raise ConfigError(
                    f"{checkpoint} holds the state of another optimizer, without {', '.join(sorted(missing))}: set "
                    f"`optim` as it was, {_OR_ANEW}"
                )
            for name, value in self._settings.items():
                if name != "params" and not _alike(value, group[name]):
                    raise ConfigError(f"The state of the optimizer in {checkpoint} has no valid `{name}`: {ANOTHER}")
            for weight in [] if sharded else group["params"]:
                if not _fits(self._optimizer.state.get(weight, {}), weight):
                    raise ConfigError(
                        f"The state of the optimizer in {checkpoint} has tensors of another shape than the weights: "
                        f"{ANOTHER}"
                    )
        for name, value in vars(self._schedule).items():
            known = name in self._attributes
            if not _alike(self._attributes[name], value) if known else name in dir(type(self._schedule)):
                raise ConfigError(f"The schedule in {checkpoint} has no valid `{name}`: {ANOTHER}")


def _alike(before: Any, after: Any) -> bool:
    """Whether a setting is a number where it was one, and otherwise of the same type."""
    if type(before) is bool:
        return after is None or type(after) is bool
    if type(before) in (int, float):
        return type(after) in (int, float) and (math.isfinite(after) or after == before)
    if type(before) in (tuple, list):
        return type(after) in (tuple, list) and len(after) == len(before) and all(map(_alike, before, after))
    return before is None or isinstance(after, type(before))


def _fits(state: dict[str, Any], weight: torch.Tensor) -> bool:
    """Whether the state of a weight has its shape, and a number of steps."""
    tensors = [state[name] for name in _OF_A_WEIGHT if name in state]
    step = state.get("step", 0)
    counts = type(step) in (int, float) or (torch.is_tensor(step) and step.is_floating_point() and step.numel() == 1)
    return counts and all(
        torch.is_tensor(each) and (each.shape, each.stride()) == (weight.shape, weight.stride()) for each in tensors
    )
