"""Folders of models that someone else wrote: they name no files outside, and are of a real model's size."""

import math
import os
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .adapters import ADAPTER_FILE, MAX_LAYERS, check_adapter_settings
from .growth import check_growth
from .json_text import parse_json, texts_in
from .opening import check_opens
from .patterns import may_match_for_ever
from .splitting import check_splitting


OTHER_MODEL = "use one whose tokenizer is in its own files."
AGAIN = "copy or download the files again, or save the model again with `save_pretrained`."
MAX_EXPERTS = 100_000
_MAX_CLASS = 200  # characters of a name
MAX_BYTES = 2**28  # of a file other than weights
MAX_HEADER = 2**25  # of a file of weights

_LOOPS, MAX_LOOPS = (
    re.compile(r".*(?:loops|passes|cycles|sinkhorn_iters)|pretraining_tp"),
    1000,
)  # of a forward pass
_MODELS = ("Model", "Encoder", "Decoder", "LMHead", "_V3")
_LAYERS = re.compile(r"(?:num_|n_|.*_)?(?:layers?|blocks|stages|depths?)")
_TEMPLATE = re.compile(r"\w[\w.\-]{0,99}")  # its name, of which a file is made when the tokenizer is saved
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_EXPERTS = re.compile(r"(?:num_|n_).*experts")
_OTHER_FILES = ("configuration_files", "fast_tokenizer_files")  # that libraries read in place of those checked here
# Arguments with which a library finds a tokenizer's files. It takes them from the tokenizer's settings, too
_PLACES = (
    "gguf_file", "tokenizer_object", "cache_dir", "force_download", "proxies", "token", "revision", "subfolder",
    "repo_type", "user_agent", "tqdm_class",
)  # fmt: skip
_KERNELS = ("attn_implementation", "experts_implementation")
_INERT = ("name_or_path", "tokenizer_file", "special_tokens_map_file")  # written by transformers 4, and overwritten
_WEIGHTS = (".safetensors", ".gguf")
_OF_A_RANK = re.compile(r"shard-\d+-")  # transformers reads such files in place of model.safetensors
_READ_WHOLE = (".json", ".jinja", ".txt", ".model", ".bpe", ".codes", ".spm", ".vocab", ".tiktoken", ".tokenizer")
_CONFIG, _TOKENIZER, _VOCABULARY = "config.json", "tokenizer_config.json", "tokenizer.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_AUDIO = "audio_tokenizer_config.json"  # of which a library takes any class, from anywhere
_OF_ADDED_TOKEN = {"content", "lstrip", "rstrip", "normalized", "single_word", "special", "__type", "id"}
_PROCESSORS = {
    "processor_class": re.compile(r"\w{1,80}Processor"),
    "image_processor_type": re.compile(r"\w{1,80}ImageProcessor(?:Fast|Pil)?|\w{1,80}FeatureExtractor"),
    "video_processor_type": re.compile(r"\w{1,80}VideoProcessor"),
    "feature_extractor_type": re.compile(r"\w{1,80}FeatureExtractor|\w{1,80}ImageProcessor(?:Fast|Pil)?"),
}
_TEXTS = ("chat_template", "added_tokens_decoder")


def is_within(file: str | Path, directory: str | Path) -> bool:
    """Whether a file, after links, lies in a directory. Files of a Hub snapshot may be links to the cache's blobs."""
    place, folder = Path(file).resolve(), Path(directory).resolve()
    if place.is_relative_to(folder):
        return True

    from huggingface_hub import constants

    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots":
            blobs = snapshot.parent.parent / "blobs"
            own = blobs.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())  # where they may be on another disk
            if place.is_relative_to(blobs.resolve() if own else blobs):
                return True
    return False


def own_file(directory: Path, name: str) -> Path:
    """
    The path of a file that is read to be published.

    Args:
        directory (`Path`):
            The folder of a run or an evaluation.
        name (`str`):
            The file in it, which need not exist.

    Raises:
        [`ModelError`]: It is a link out of the folder.
    """
    if not is_within(directory / name, directory):
        raise ModelError(
            f"{directory / name} is a link out of its folder and is not published: replace it by the file."
        )
    return directory / name


def _is_of_the_cache(file: Path) -> bool:
    """Whether a file, after links, is one of a model in the user's own Hub cache."""
    from huggingface_hub import constants

    place = file.resolve().parent
    return any(place == blobs.resolve() for blobs in Path(constants.HF_HUB_CACHE).glob("models--*/blobs"))


def check_model_folder(directory: Path, source: str | Path) -> None:
    """
    Checks a model's folder before a library reads it.

    Args:
        directory (`Path`):
            The folder.
        source (`str` or `Path`):
            How the user named the model, for messages.

    Raises:
        [`ModelError`]: A file is none, is too large, or a link out of the folder and no weights; weights are named
            elsewhere or not in safetensors; settings name other files or models, or have sizes of no real model.
    """
    files = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    for path in files:
        _check_file(path, directory)
    if (directory / _AUDIO).exists():
        raise ModelError(f"{source} names another model in {_AUDIO}, which is not loaded: remove that file.")
    for path in directory.glob("*.index*.json"):  # and of variants
        _check_index(path)
    for name, check in (
        (_CONFIG, check_model_settings),
        (_TOKENIZER, partial(check_tokenizer_settings, directory=directory)),
        ("special_tokens_map.json", partial(_check_special_tokens, directory=directory)),
        (_VOCABULARY, check_growth),
        (_VOCABULARY, check_splitting),
        ("tekken.json", check_splitting),
        ("processor_config.json", _check_processor),
        ("preprocessor_config.json", _check_processor),
        ("video_preprocessor_config.json", _check_processor),
        (ADAPTER_FILE, check_adapter_settings),
    ):
        if (directory / name).is_file():
            check(source, _read(directory / name))
    if (directory / ADAPTER_FILE).is_file() and not (directory / _ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"The adapter in {source} has no {_ADAPTER_WEIGHTS}, and other files of weights can run code when they "
            "are read: save it again with `save_pretrained`."
        )
    check_opens(source, directory, files, weights_in(directory))


def weights_in(directory: Path) -> list[Path]:
    """The files of whole weights that a library would read from a folder, existing or not."""
    config = directory / _CONFIG
    if config.is_file() and (named := _read(config).get("transformers_weights")):
        return [directory / str(named)]
    index = directory / "model.safetensors.index.json"
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    names = _read(index).get("weight_map")
    return [directory / name for name in sorted(set(names.values()))] if isinstance(names, dict) else []


def base_of_adapter(directory: Path) -> str | None:
    """The base that an adapter's folder names, `None` if it is no adapter."""
    if not (directory / ADAPTER_FILE).is_file():
        return None
    base = _read(directory / ADAPTER_FILE).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _check_file(path: Path, directory: Path) -> None:
    if path.is_dir() or not path.exists():
        return
    if not path.is_file():
        raise ModelError(f"{path} is no file, such as a pipe or a device: remove it.")
    if _OF_A_RANK.match(path.name) is not None:
        raise ModelError(
            f"{path} is a part of a distributed checkpoint, in which weights may be missing: save the model again "
            "with `save_pretrained` in one process."
        )
    if path.suffix not in _WEIGHTS:
        if path.suffix != ".md" and not is_within(path, directory) and not _is_of_the_cache(path):
            raise ModelError(f"{path} is a link out of the model's folder: replace it by the file.")
        if path.suffix in _READ_WHOLE and path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} is larger than {MAX_BYTES >> 20} MiB: save the model again.")
    elif path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < length <= path.stat().st_size:  # a length beyond the file is a damaged file
            raise ModelError(f"{path} has a header of more than {MAX_HEADER >> 20} MiB: save the model again.")


def _check_index(path: Path) -> None:
    names = _read(path).get("weight_map")
    for name in set(names.values()) if isinstance(names, dict) else ():
        if not _is_weights(name):
            raise ModelError(f"{path} names {name!r}: weights must be files of safetensors beside it.")


def _is_weights(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and os.path.basename(name) == name


def check_model_settings(source: str | Path, settings: Any) -> None:
    """
    Checks the number of layers, which a library builds one by one before it looks for their weights, and that no code
    and no other files are named.

    Args:
        source (`str` or `Path`):
            Directory or Hub id, for the message.
        settings (`dict`):
            Content of its `config.json`.

    Raises:
        [`ModelError`]: There are more than 10,000, or more than 100,000 experts, or a size is below 1, or other files
            are named, or a kernel of the Hub, which is native code.
    """
    if isinstance(settings, list):
        for part in settings:
            check_model_settings(source, part)
    elif isinstance(settings, dict):
        loops = {
            key: value
            for key, value in settings.items()
            if isinstance(value, int) and value > 1 and _LOOPS.fullmatch(str(key))
        }
        if math.prod(loops.values()) > MAX_LOOPS:
            told = " × ".join(f"{key}: {value:.0e}" for key, value in loops.items())
            raise ModelError(f"The config of {source} has `{told}`: name a model of real size.")
        for key, value in settings.items():
            if key in _OTHER_FILES or (key == "transformers_weights" and not _is_weights(value)):
                raise ModelError(f"The config of {source} names other files as `{key}`: leave it out.")
            if str(key).strip("_").startswith(_KERNELS) and any("/" in text for text in texts_in(value)):
                raise ModelError(
                    f"The config of {source} names code of another repository as `{key}`: leave it out there, and "
                    "name the kernel yourself if you trust it."
                )
            if key == "backbone" and "/" in str(value):  # of which a library asks the Hub
                raise ModelError(
                    f"The config of {source} names another model as `{key}`: use one whose parts are in its own files."
                )
            if key == "quantization_config" and any(map(may_match_for_ever, texts_in(value))):
                raise ModelError(
                    f"The config of {source} has patterns in `{key}` that may match for ever: use names of modules."
                )
            if key == "tokenizer_class":
                _check_tokenizer_class(source, value)
            if key == "architectures":
                _check_architectures(source, value)
            if key in _PROCESSORS and value is not None:
                _check_processor_class(source, key, value)
            if key == "model_type" and value == "rag":
                raise ModelError(f"{source} is a model of the type `rag`, whose tokenizer loads others: {OTHER_MODEL}")
            # Where it is the part of a head with positions, there may be none
            without_positions = key == "head_dim" and value == 0 and "qk_nope_head_dim" in settings
            if key in _SIZES and isinstance(value, int) and value < 1 and not without_positions:
                raise ModelError(f"The config of {source} has `{key}: {value}`: {AGAIN}")
            if key == "sliding_window" and not (value is None or (isinstance(value, int) and value >= 0)):
                raise ModelError(f"The config of {source} has `{key}: {value!r}`: {AGAIN}")
            layers, experts = _LAYERS.fullmatch(str(key)), _EXPERTS.fullmatch(str(key))
            most = MAX_LAYERS if layers else MAX_EXPERTS if experts else math.inf
            if isinstance(value, int) and value > most:
                raise ModelError(f"The config of {source} has `{key}: {value:.0e}`: name a model of real size.")
            check_model_settings(source, value)


def check_tokenizer_settings(source: str | Path, settings: dict[str, Any], directory: Path) -> None:
    """
    Checks that a tokenizer reads no file but those of its repository.

    Args:
        source (`str` or `Path`):
            Directory or Hub id, for the message.
        settings (`dict`):
            Content of its `tokenizer_config.json`.
        directory (`Path`):
            The folder that it is in.

    Raises:
        [`ModelError`]: A setting names a file or where files are, the class loads other tokenizers or models, or an
            added token has unknown keys.
    """
    _check_tokenizer_class(source, settings.get("tokenizer_class"))
    if settings.get("processor_class") is not None:
        _check_processor_class(source, "processor_class", settings["processor_class"])
    if any(token.keys() - _OF_ADDED_TOKEN for token in _added_tokens(settings)):
        # The tokenizer's library would print them, past all escaping
        raise ModelError(f"The tokenizer of {source} has added tokens with unknown keys: {AGAIN}")
    templates = settings.get("chat_template")
    for template in templates if isinstance(templates, list) else []:
        name = template.get("name") if isinstance(template, dict) else None
        if not (isinstance(name, str) and _TEMPLATE.fullmatch(name)):
            raise ModelError(f"The tokenizer of {source} has a chat template without a plain name: {AGAIN}")
    for key, value in settings.items():
        if key in (*_TEXTS, *_INERT):
            continue
        is_file_name = key in _OTHER_FILES or (key in ("vocab", "merges") and isinstance(value, str))
        # The positional arguments of the tokenizer's class, too
        is_file_name |= key in ("init_inputs", *_PLACES) and bool(value)
        if is_file_name or any(_is_path_of_a_file(text, key, directory) for text in texts_in(value)):
            raise ModelError(
                f"The tokenizer of {source} names a file as `{key}` in its {_TOKENIZER}: use one whose vocabulary is "
                "in its own files, such as tokenizer.json."
            )


@cache
def _library_names() -> frozenset[str]:
    """Listing them takes 0.15 s."""
    import transformers

    return frozenset(dir(transformers))


def _check_tokenizer_class(source: str | Path, name: Any) -> None:
    """A library takes any of its classes, and unknown ones for a plain tokenizer."""
    plain = re.sub("(Fast)*$", "", str(name)[:_MAX_CLASS])
    of_others = plain in _library_names() and not plain.endswith(("Tokenizer", "Backend"))
    if len(str(name)) > _MAX_CLASS:
        raise ModelError(f"{source} names its tokenizer in more than {_MAX_CLASS} characters: {OTHER_MODEL}")
    if of_others or plain in ("AutoTokenizer", "RagTokenizer"):
        raise ModelError(f"{source} names {name} as its tokenizer, which loads other files: {OTHER_MODEL}")


def _check_architectures(source: str | Path, names: Any) -> None:
    """TRL takes the first of them, any class of a library, and unknown ones for a language model."""
    for name in names if isinstance(names, list) else []:
        is_model = str(name).endswith(_MODELS) or "For" in str(name)
        if str(name) in _library_names() and (not is_model or str(name).startswith("Auto")):
            raise ModelError(f"The config of {source} names {name!r} in `architectures`, which is no model: {AGAIN}")


def _check_special_tokens(source: str | Path, settings: dict[str, Any], directory: Path) -> None:
    """Its values replace the names of the tokenizer's files that were found in the repository."""
    if named := [key for key in settings if key in _INERT or key.endswith("_file")]:
        raise ModelError(f"The special tokens of {source} name a file as `{named[0]}`: {AGAIN}")
    check_tokenizer_settings(source, settings, directory)


def _check_processor(source: str | Path, settings: dict[str, Any]) -> None:
    if settings.get("audio_tokenizer"):
        raise ModelError(f"The processor of {source} names a model as `audio_tokenizer`, which is not loaded.")
    check_model_settings(source, settings)


def _check_processor_class(source: str | Path, key: str, name: Any) -> None:
    """A library takes any of its classes, models too, which read weights in their own way."""
    if not (isinstance(name, str) and _PROCESSORS[key].fullmatch(name)) or name.startswith(("Auto", "Bark")):
        raise ModelError(f"{source} names {name!r:.80} as `{key}`, which is none: use a model that has its own.")


def _added_tokens(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in settings.items():
        if key.endswith("_token"):
            yield from [value] if isinstance(value, dict) else []
        elif key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
            yield from (part for part in parts if isinstance(part, dict))


def _is_path_of_a_file(text: str, key: str, directory: Path) -> bool:
    """Whether a text leads to a file, from the folder or from where a library runs, and may be meant to."""
    if "\0" in text:
        return False
    if os.path.basename(text) == text:
        return key.endswith("_file") and os.path.isfile(text) and not is_within(text, directory)
    return os.path.isfile(text) or os.path.isfile(directory / text)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read: {AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: {AGAIN}")
    return content
