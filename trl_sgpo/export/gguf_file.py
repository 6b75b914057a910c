"""
Writes a model as a GGUF file, which llama.cpp, Ollama and LM Studio run.

llama.cpp's converter is not a package. This one writes the three architectures below, with tensor names, keys,
quantization and special tokens of llama.cpp's library `gguf`.
"""

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
    get_tensor_name_map,
    quantize,
)
from transformers import GgufConfig, PreTrainedModel

from .._version import __version__
from ..errors import ModelError
from ..inference.pretrained import load_config, load_model
from .gguf_tokenizer import OTHERWISE, split_name, write_tokenizer


ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32


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
            f"{config.model_type}. {OTHERWISE}"
        )
    if _rope(config)["rope_type"] not in ("default", "llama3"):
        raise ModelError(f"Positions scaled by {_rope(config)['rope_type']} are not written as GGUF. {OTHERWISE}")
    if vars(config).get("use_sliding_window") or vars(config).get("mlp_bias"):
        raise ModelError(f"A sliding window and biases of the MLP are not written as GGUF. {OTHERWISE}")
    split_name(tokenizer)


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
    write_tokenizer(writer, tokenizer, tokenizer_directory, config.vocab_size)
    if turn_end != tokenizer.eos_token:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(turn_end))
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, tensor in _tensors(model):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"GGUF has no name for {name} of a {config.model_type} model. {OTHERWISE}")
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
