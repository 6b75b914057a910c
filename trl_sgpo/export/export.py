"""Exports a trained model without adapter and 4-bit weights, after a check that its logits are the same."""

import gc
import importlib.util
import json
import os
import shutil
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from .._version import __version__
from ..bank.exchange import export_bank
from ..bank.export_files import published
from ..bank.files import BANK_DIRECTORY
from ..bank.snapshot import open_read_only
from ..compare.lab.model import fetch_model
from ..errors import ConfigError, ModelError
from ..files import unfinished_directory
from ..hub.pull import pull_run
from ..inference.checked import checked_folder
from ..inference.loading import ADAPTER_FILE, base_of, is_adapter, load_base
from ..inference.pretrained import load_adapter, load_adapter_config, load_config, load_model, load_tokenizer, loading
from ..inference.settings import TwoPhaseSettings
from ..speed.merging import sharing_refusal
from .parity import Parity, compare, logits_on, probes


EXPORT_FILE = "export.json"
STRATEGIES_DIRECTORY = "strategies"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest error of the logits, by data type of the weights (docs/export.md)
TOLERANCES = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05, "q8_0": 0.05}
_GGUF_TOLERANCES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}


@dataclass(frozen=True)
class ExportPlan:
    """
    Options of an export.

    Args:
        model (`str`):
            Directory or Hub id of a trained model.
        output_dir (`str`):
            Directory to write, which must not exist.
        merge (`bool`, *optional*, defaults to `False`):
            Whether to write the model for transformers, with the adapter merged.
        gguf (`str`, *optional*):
            Type of a GGUF file to write. None is written by default.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the model for transformers; `"auto"` is that of the base.
        base (`str`, *optional*, defaults to `"trained"`):
            `"trained"` merges into the weights that the adapter was trained on, `"original"` into those that they
            were quantized from.
        compute_dtype (`str`, *optional*, defaults to `"float32"`):
            Data type to merge and check in.
        license (`str`, *optional*, defaults to `"other"`):
            Licence of the exported strategies.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an earlier export.
    """

    model: str
    output_dir: str
    merge: bool = False
    gguf: str | None = None
    dtype: str = "auto"
    base: str = "trained"
    compute_dtype: str = "float32"
    license: str = "other"
    overwrite: bool = False


@dataclass(frozen=True)
class Written:
    """One form of the exported model, its parity with the trained model and the tolerance."""

    name: str
    kind: str
    tolerance: float
    parity: Parity


def export(plan: ExportPlan) -> dict[str, Any]:
    """
    Exports a trained model. The directory appears only when all of its content has been checked.

    Args:
        plan ([`ExportPlan`]):
            Options of an export.

    Returns:
        `dict`: What is written to `export.json`: sources, parity and tolerance of each form.

    Raises:
        [`ConfigError`]: Invalid options.
        [`ModelError`]: There are no such weights, they cannot be exported, or an export failed its check.
    """
    output = Path(plan.output_dir)
    _check_output(output, plan)
    source = _local(plan.model)
    settings = TwoPhaseSettings.load(source)
    tokenizer = load_tokenizer(source)
    adapter = is_adapter(source)
    if adapter and load_adapter_config(source).is_prompt_learning:
        raise ModelError(f"{plan.model} is no adapter of weights: only such can be merged. Use it with PEFT.")
    base = _local(base_of(source)) if adapter else source
    config = load_config(base)
    quantized = adapter and "quantization_config" in (settings.trained_on or {})
    if plan.base == "original" and not quantized:
        raise ConfigError(f"{plan.model} was not trained on quantized weights: leave out `--base original`.")
    _check_convertible(plan, config, tokenizer)
    with loading(base):
        _check_memory(config, plan.compute_dtype)
    with unfinished_directory(output) as unfinished:
        report = _write(plan, source, base, settings, tokenizer, unfinished)
        if Path(source, BANK_DIRECTORY).is_dir():
            with open_read_only(source) as bank:
                export_bank(bank, unfinished / STRATEGIES_DIRECTORY, license=plan.license)
        (unfinished / EXPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        if plan.overwrite:
            shutil.rmtree(output, ignore_errors=True)
        os.replace(unfinished, output)
    return report


def _write(
    plan: ExportPlan,
    source: str,
    base: str,
    settings: TwoPhaseSettings,
    tokenizer: Any,
    directory: Path,
) -> dict[str, Any]:
    sequences = probes(tokenizer, settings)
    compute = _DTYPES[plan.compute_dtype]
    adapter = is_adapter(source)
    own_dtype = load_config(base).dtype or torch.float32
    report: dict[str, Any] = {
        "model": published(plan.model),
        "base": published(base) if adapter else None,
        "trained_on": settings.trained_on,
        "merged_into": plan.base if adapter else None,
        "computed_in": plan.compute_dtype,
    }

    if adapter:
        print(f"The adapter is merged into {base}, which its {ADAPTER_FILE} names.", flush=True)
    print(f"Loading {plan.model} …", flush=True)
    model = load_unmerged(source, base, settings.trained_on, compute)
    if isinstance(model, PeftModel) and (reason := sharing_refusal(model)):
        raise ModelError(f"The adapter of {plan.model} cannot be merged: {reason}. Use it with PEFT.")
    with loading(plan.model):
        reference = logits_on(model, sequences)
    effect = None
    if adapter:
        effect = _without_adapter(model, sequences, reference)
        report["effect_of_adapter"] = effect.error
    if plan.base == "original":
        del model
        gc.collect()
        trained_logits = reference
        model = load_unmerged(source, base, {"dtype": own_dtype}, compute)
        reference = logits_on(model, sequences)
        effect = _without_adapter(model, sequences, reference)
        report["difference_to_trained"] = asdict(compare(trained_logits, reference))
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()

    tokenizer.save_pretrained(directory)
    replace(settings, trained_on=None).save(directory)
    forms: list[tuple[str, str]] = []
    if plan.gguf is not None:
        from .gguf_file import write_gguf
        from .gguf_tokenizer import check_tokens

        name = f"{Path(plan.model).name}-{plan.gguf}.gguf"
        print(f"Writing {name} …", flush=True)
        turn_end = settings.conversation(tokenizer).end_token
        write_gguf(model, tokenizer, directory, directory / name, plan.gguf, turn_end)
        check_tokens(directory / name, tokenizer)
        forms.append((name, _GGUF_TOLERANCES[plan.gguf]))
    config = model.config
    if plan.merge:
        dtype = own_dtype if plan.dtype == "auto" else _DTYPES[plan.dtype]
        kind = str(dtype).removeprefix("torch.")
        print(f"Writing the model in {kind} …", flush=True)
        model.to(dtype).save_pretrained(directory)
        forms.append(("model", kind))
    del model
    gc.collect()

    checked = []
    for name, kind in forms:
        print(f"Checking {name} …", flush=True)
        exported = _read(directory, name, config, compute)
        checked.append(Written(name, kind, TOLERANCES[kind], compare(reference, logits_on(exported, sequences))))
        del exported
        gc.collect()
    for form in checked:
        _check_parity(form, effect)
    report["positions"] = len(reference)
    report["forms"] = [asdict(form) for form in checked]
    report["trl_sgpo_version"] = __version__
    return report


def load_unmerged(source: str, base: str, trained_on: dict[str, Any] | None, compute: torch.dtype) -> Any:
    """
    Loads a trained model in a data type to compute in. 4-bit weights are dequantized, which keeps their values, and an
    adapter is added unmerged.

    Args:
        source (`str`):
            Directory of the trained model or adapter.
        base (`str`):
            Directory of an adapter's base.
        trained_on (`dict`, *optional*):
            How the base was loaded in training.
        compute (`torch.dtype`):
            Data type to compute in.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: On the CPU.
    """
    try:
        if not is_adapter(source):
            return load_model(source, dtype=compute).eval()
        model = load_base(base, trained_on, device_map={"": "cpu"})
        if "quantization_config" in vars(model.config):
            with redirect_stderr(StringIO()):
                model = model.dequantize(dtype=compute)
        return load_adapter(model.to(compute), source).to(compute).eval()
    except (OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{source} cannot be loaded: {error}") from error


def _without_adapter(model: PeftModel, sequences: list[list[int]], reference: torch.Tensor) -> Parity:
    with model.disable_adapter():
        return compare(reference, logits_on(model, sequences))


def _read(directory: Path, name: str, config: Any, compute: torch.dtype) -> PreTrainedModel:
    if name.endswith(".gguf"):
        from .gguf_file import read_gguf

        with redirect_stderr(StringIO()):  # one of its progress bars cannot be turned off
            return read_gguf(directory / name, config, compute).eval()
    return load_model(directory, dtype=compute).eval()


def _check_parity(form: Written, effect: Parity | None) -> None:
    parity = form.parity
    if not parity.error <= form.tolerance:
        raise ModelError(
            f"The export failed its check: the logits of {form.name} are not those that were trained ({parity}; "
            f"allowed is an error of {form.tolerance:g} in {form.kind}). Nothing was written. Export to float32 to "
            "see whether rounding is the cause; if not, this adapter cannot be merged with these versions of PEFT and "
            "transformers."
        )
    if effect is not None and effect.error > 0 and parity.error > effect.error / 2:
        raise ModelError(
            f"The export failed its check: in {form.kind}, the logits of {form.name} are off by {parity.error:.2g}, "
            f"and all that training changed is {effect.error:.2g}. Nothing was written. Take a finer type, such as "
            "`--dtype float32` or `--gguf f16`, or keep the adapter apart."
        )


# Before any long work


def _check_output(output: Path, plan: ExportPlan) -> None:
    if not plan.merge and plan.gguf is None:
        raise ConfigError("Say what to write: `--merge` for transformers, `--gguf` for llama.cpp, or both.")
    if plan.dtype != "auto" and not plan.merge:
        raise ConfigError("`--dtype` is that of `--merge`; the type of a GGUF file is named by `--gguf`.")
    if not output.exists():
        return
    if not plan.overwrite:
        raise ConfigError(f"{output} exists: name another `--output_dir`, or pass `--overwrite` to replace an export.")
    if not (output / EXPORT_FILE).is_file():
        raise ConfigError(f"{output} is no export, so it is not overwritten: name another `--output_dir`.")
    if output.resolve() == Path(plan.model).resolve():
        raise ConfigError("`--output_dir` is the model itself: name another directory.")


def _local(name: str) -> str:
    """The folder of a model. Of a repository on the Hub, only the files of a model are downloaded."""
    source = fetch_model(name)
    if os.path.isdir(source):
        return source
    return str(pull_run(source) or checked_folder(source, {}, weights=True)[0])


def _check_convertible(plan: ExportPlan, config: Any, tokenizer: Any) -> None:
    if plan.gguf is None:
        return
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF files need the library `gguf`: run `pip install 'trl-sgpo[offline]'`.")
    from .gguf_file import check_convertible

    check_convertible(config, tokenizer)


def _check_memory(config: Any, compute_dtype: str) -> None:
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    needed = 1.1 * size * _DTYPES[compute_dtype].itemsize
    available = psutil.virtual_memory().available
    if needed > available:
        fix = "`--compute_dtype bfloat16` halves that" if compute_dtype == "float32" else "use a machine with more"
        raise ConfigError(
            f"Merging and checking in {compute_dtype} takes {needed / 2**30:.1f} GiB of memory, and "
            f"{available / 2**30:.1f} are free: {fix}."
        )
