"""
Log-probabilities of sampled tokens, when they are sampled and when they are trained, for tiny random models of many
architectures with a LoRA adapter: by the plain path, with shared prompts, and with merged adapters too.

    PYTHONPATH=tests python -m benchmarks.sampling --output docs/results/sampling.md
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import evenness, problems, tokenizer
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from trl import GRPOConfig

from trl_sgpo import SharedPromptGRPOTrainer
from trl_sgpo.speed.generation import left_padded


_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_ALL_HEADS = {name: value for name, value in _COMMON.items() if name not in ("num_key_value_heads", "head_dim")}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _COMMON),
    **dict.fromkeys(("smollm3", "olmo", "olmo2", "granite", "cohere", "cohere2", "stablelm", "starcoder2"), _COMMON),
    **dict.fromkeys(("glm", "glm4", "helium", "exaone4", "nemotron", "ernie4_5", "arcee", "bitnet"), _COMMON),
    **dict.fromkeys(("phi", "gpt_neox", "falcon", "biogpt"), _ALL_HEADS),
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "opt": {**_ALL_HEADS, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
}
PATHS = ("plain", "shared", "merged")

_PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
_RESTS = [[12], [13, 14, 15], [16, 17], [18]]
_LIMIT = 8


@dataclass(frozen=True)
class Differences:
    """
    Largest differences of the log-probabilities of sampled tokens.

    Args:
        used (`str`):
            Fast paths that the start check allows.
        of_path (`dict[str, float]`):
            Between sampling and training, by each path.
        reading (`float`):
            Between training and a forward pass of each row alone, without padding, by the plain path.
    """

    used: str
    of_path: dict[str, float]
    reading: float


def make(architecture: str, directory: Path, **kwargs: Any) -> SharedPromptGRPOTrainer:
    """A trainer for a tiny random model without dropout, with an adapter on its linear layers."""
    torch.manual_seed(0)
    tok = tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tok),
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=2,
        **ARCHITECTURES[architecture],
    )
    for name in vars(config):
        if "drop" in name and isinstance(vars(config)[name], float):
            vars(config)[name] = 0.0
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default is so small that all tokens are about equally likely, whatever the prompt
        for weight in filter(lambda weight: weight.dim() == 2, model.parameters()):
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config = GenerationConfig(eos_token_id=0, bos_token_id=1, pad_token_id=2)
    args = GRPOConfig(
        str(directory),
        **{
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 1,
            "learning_rate": 3e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **kwargs,
        },
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return SharedPromptGRPOTrainer(model, evenness, args, problems(), processing_class=tok, peft_config=lora)


@contextmanager
def _only(trainer: SharedPromptGRPOTrainer, path: str) -> Iterator[None]:
    names = ("shares_prompts", "shares_prefixes", "drops_finished_rows", "merges_adapters")
    before = {name: vars(trainer)[name] for name in names}
    vars(trainer).update({name: before[name] and path != "plain" for name in names})
    trainer.merges_adapters = before["merges_adapters"] and path == "merged"
    try:
        yield
    finally:
        vars(trainer).update(before)


@torch.no_grad()
def differences(trainer: SharedPromptGRPOTrainer) -> Differences:
    """Samples rows of different lengths by each path and scores them as training does."""
    trainer.model.eval()
    prompts = [prompt for prompt in _PROMPTS for _ in _RESTS]
    contexts = [prompt + rest for prompt in _PROMPTS for rest in _RESTS]
    of_path, reading = {}, 0.0
    for path in PATHS:
        torch.manual_seed(1)
        with _only(trainer, path):
            with trainer.fast_generation(prompts):
                completions, sampled = trainer.generate(contexts, _LIMIT)
            rests = [context[len(prompt) :] for context, prompt in zip(contexts, prompts, strict=True)]
            rows = [rest + ids for rest, ids in zip(rests, completions, strict=True)]
            prompt_ids, prompt_mask = left_padded(prompts, 2, trainer.model.device)
            row_ids, row_mask = (x.flip(1) for x in left_padded([row[::-1] for row in rows], 2, trainer.model.device))
            ids, mask = torch.cat([prompt_ids, row_ids], dim=1), torch.cat([prompt_mask, row_mask], dim=1)
            scored = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, row_ids.size(1))[0]
        trained = [
            values[len(rest) : len(row)] for values, rest, row in zip(scored.tolist(), rests, rows, strict=True)
        ]
        of_path[path] = _largest(sampled, trained)
        if path == "plain":
            reading = _largest(trained, list(map(lambda *row: _alone(trainer.model, *row), contexts, completions)))
    used = {"packed": trainer.shares_prompts, "prefixes": trainer.shares_prefixes, "merged": trainer.merges_adapters}
    trainer.model.train()
    return Differences(", ".join(name for name, on in used.items() if on), of_path, reading)


def _alone(model: Any, context: list[int], completion: list[int]) -> list[float]:
    ids = torch.tensor([context + completion])
    log_probs = model(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(dim=-1)
    return log_probs.gather(1, ids[0, len(context) :].unsqueeze(1)).squeeze(1).tolist()


def _largest(some: list[list[float]], other: list[list[float]]) -> float:
    pairs = [pair for rows in zip(some, other, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def measure(architecture: str, directory: Path) -> tuple[Differences, Differences, dict[str, Any]]:
    """Differences with a new adapter, those after one step, and what that step logged."""
    trainer = make(architecture, directory)
    before = differences(trainer)
    trainer.train()
    trainer._check_paths()  # as before the second step
    return before, differences(trainer), trainer.state.log_history[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    lines = [
        "| Architecture | Fast paths | At first: plain | shared | merged | After a step: plain | shared | merged "
        "| Rows alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    options = parser.parse_args()
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as directory:
            before, after, _ = measure(architecture, Path(directory))
        values = [*before.of_path.values(), *after.of_path.values(), max(before.reading, after.reading)]
        lines.append(
            " | ".join([f"| {architecture}", after.used or "none", *(f"{value:.0e}" for value in values)]) + " |"
        )
        print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
