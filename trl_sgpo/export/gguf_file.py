"""
Writes a model as a GGUF file, which llama.cpp, Ollama and LM Studio run.

llama.cpp's converter is not a package. This one writes the three architectures below, with tensor names, keys,
quantization and special tokens of llama.cpp's library `gguf`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    SpecialVocab,
    TokenType,
    get_tensor_name_map,
    quantize,
)
from transformers import GgufConfig, PreTrainedModel

from .._version import __version__
from ..errors import ModelError
from ..inference.pretrained import load_config, load_model


ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# llama.cpp's name of the splitting of text before merges. A wrong one gives other tokens than in training
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}}, {"type": "ByteLevel", "use_regex": False}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}}, {"type": "ByteLevel", "use_regex": False}],
}

_OTHERWISE = (
    "Export it with `--merge` and convert that directory with llama.cpp's own `convert_hf_to_gguf.py`, which knows "
    "more models."
)


def check_convertible(config: Any, tokenizer: Any) -> None:
    """
    Raises an error, before any long work, for a model that this file cannot write.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Raises:
        [`ModelError`]: Another architecture, positions or a tokenizer that is not known here.
    """
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"GGUF files are written of {', '.join(ARCHITECTURES)} models (SmolLM2 is a llama model), not of "
            f"{config.model_type}. {_OTHERWISE}"
        )
    if _rope(config)["rope_type"] not in ("default", "llama3"):
        raise ModelError(f"Positions scaled by {_rope(config)['rope_type']} are not written as GGUF. {_OTHERWISE}")
    if vars(config).get("use_sliding_window") or vars(config).get("mlp_bias"):
        raise ModelError(f"A sliding window and biases of the MLP are not written as GGUF. {_OTHERWISE}")
    split_name(tokenizer)


def split_name(tokenizer: Any) -> str:
    """
    llama.cpp's name for how a tokenizer splits text.

    Raises:
        [`ModelError`]: The tokenizer is no byte-level BPE, or splits in a way that has no name here.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"Only fast tokenizers are written as GGUF. {_OTHERWISE}")
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = saved["pre_tokenizer"] or {"type": "none"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    if saved["model"]["type"] == "BPE" and not saved["model"]["byte_fallback"]:
        for name, known in _SPLITS.items():
            if len(steps) == len(known) and all(
                wanted.items() <= step.items() and not step.get("add_prefix_space") and not step.get("invert")
                for wanted, step in zip(known, steps, strict=True)
            ):
                return name
    raise ModelError(
        f"This tokenizer ({saved['model']['type']}, split by {', '.join(step['type'] for step in steps)}) is not "
        f"written as GGUF. {_OTHERWISE}"
    )


def write_gguf(
    model: PreTrainedModel, tokenizer: Any, tokenizer_directory: Path, path: Path, file_type: str, turn_end: str
) -> None:
    """
    Writes a model and its tokenizer as one file.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, without adapters and not quantized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        tokenizer_directory (`Path`):
            Where the tokenizer is saved.
        path (`Path`):
            The file.
        file_type (`str`):
            `"f32"`, `"f16"`, `"bf16"` or `"q8_0"`, of matrices; what is small is kept in float32.
        turn_end (`str`):
            Token that ends an assistant's turn, at which programs stop to generate.

    Raises:
        [`ModelError`]: A tensor of which GGUF does not know the name.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    quantization, file_kind = FILE_TYPES[file_type]
    writer = GGUFWriter(path, config.model_type)
    writer.add_name(path.stem)
    writer.add_description(f"exported by trl-sgpo {__version__}")
    writer.add_file_type(file_kind)
    writer.add_quantization_version(2)
    _write_sizes(writer, config)
    _write_tokenizer(writer, tokenizer, tokenizer_directory, config.vocab_size)
    if turn_end != tokenizer.eos_token:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(turn_end))
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, tensor in _tensors(model):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"GGUF has no name for {name} of a {config.model_type} model. {_OTHERWISE}")
        tensors[gguf_name] = tensor
    if _rope(config)["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(model)
    # Sizes first, then one tensor at a time: all of them would need the memory of a second model
    for gguf_name, tensor in tensors.items():
        kind = _kind(tensor, quantization)
        block, size = GGML_QUANT_SIZES[kind]
        shape = tuple(tensor.shape)
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        writer.write_tensor_data(quantize(values, _kind(tensor, quantization)))
    writer.close()


def _kind(tensor: torch.Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and tensor.size(-1) % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def rope_factors(model: PreTrainedModel) -> torch.Tensor:
    """Unscaled frequencies divided by the model's."""
    used = model.model.rotary_emb.inv_freq.float()
    exponents = torch.arange(len(used), dtype=torch.float32) / len(used)
    return _rope(model.config)["rope_theta"] ** -exponents / used.cpu()


def _write_sizes(writer: GGUFWriter, config: Any) -> None:
    head = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(head)


def _write_tokenizer(writer: GGUFWriter, tokenizer: Any, directory: Path, vocab_size: int) -> None:
    words = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = [
        TokenType.UNUSED
        if index not in words
        else TokenType.NORMAL
        if index not in added
        else TokenType.CONTROL
        if added[index].special
        else TokenType.USER_DEFINED
        for index in range(vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(kinds)
    SpecialVocab(directory, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        projection = name.split(".")[-2] if "." in name else ""
        if config.model_type == "llama" and projection in heads:
            tensor = _pairs_together(tensor, heads[projection])
        yield name, tensor


def _pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's llama rotates neighbouring dimensions of a head, transformers those half a head apart."""
    halves = weight.reshape(heads, 2, weight.size(0) // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def read_gguf(path: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """
    Reads a GGUF file back with transformers.

    Args:
        path (`Path`):
            The file.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model that was written. Only how it scales positions is taken from it: transformers
            does not read this from GGUF files.
        dtype (`torch.dtype`):
            Data type to compute in.
    """
    from_file = load_config(path.parent, gguf_file=path.name)
    if _rope(config)["rope_type"] == "llama3":
        from_file.rope_parameters = config.rope_parameters
    return load_model(
        path.parent,
        gguf_file=path.name,
        config=from_file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
