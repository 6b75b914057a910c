"""Tiny random models and a tokenizer, made on the spot, so that tests need neither network nor downloads."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
ROWS_APART = ("doge", "mixtral", "nemotron")
"""Architectures whose rows cannot be packed: attention of their own, or a router loss."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "gemma": _SMALL,
    "mistral": _SMALL,
    "phi": {key: value for key, value in _SMALL.items() if key not in ("num_key_value_heads", "head_dim")},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "smollm3": {**_SMALL, "no_rope_layers": [1, 0]},
    "gemma3_text": {**_SMALL, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _SMALL,
    "nemotron": _SMALL,
    "doge": _SMALL,
    "mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens, with or without a chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["To add numbers, add them. What is 1 + 2? #### 3"], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    wrapped.chat_template = CHAT_TEMPLATE if chat else None
    return wrapped


def save_tiny_model(directory: Path, architecture: str = "llama", chat: bool = True, **sizes: Any) -> str:
    """Saves a tiny random model, or one of other sizes, with its tokenizer and returns the directory."""
    torch.manual_seed(0)
    tok = tokenizer(chat)
    special = {"vocab_size": len(tok), "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(architecture, **{**special, **ARCHITECTURES[architecture], **sizes})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=0, bos_token_id=1, pad_token_id=2)
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    return str(directory)


def padded(groups: list[tuple[list[int], list[list[int]]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows of prompts and their completions as TRL has them: prompts padded on the left, completions on the right."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    P, T = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids = [[2] * (P - len(p)) + p + c + [2] * (T - len(c)) for p, c in rows]
    mask = [[0] * (P - len(p)) + [1] * (len(p) + len(c)) + [0] * (T - len(c)) for p, c in rows]
    return torch.tensor(ids), torch.tensor(mask), P


def hash_embedder(texts: list[str]) -> np.ndarray:
    """Deterministic stand-in for a sentence embedder: hashed words, 32 dimensions."""
    vectors = np.zeros((len(texts), 32), dtype=np.float32)
    for row, text in enumerate(texts):
        for word in text.casefold().split():
            vectors[row, hashlib.sha256(word.encode()).digest()[0] % 32] += 1
        vectors[row, 0] += 1e-3
    return vectors


def problems(size: int = 8, classes: int = 2, chat: bool = True) -> Any:
    """A dataset of small sums in `classes` classes."""
    from datasets import Dataset

    rows = []
    for index in range(size):
        question = f"Kind {index % classes}: what is {index} + {index % 5}?"
        prompt = [{"role": "user", "content": question}] if chat else question
        rows.append({"prompt": prompt, "solution": str(index + index % 5), "problem_class": f"kind-{index % classes}"})
    return Dataset.from_list(rows)


def evenness(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward with signal for random text: 1 when the number of vowels is even."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(text.count(vowel) for vowel in "aeiou") % 2 == 0) for text in texts]
