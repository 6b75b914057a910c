"""
GGUF files of `trl-sgpo export` in llama.cpp.

`make test-llama-cpp` builds llama.cpp in an environment of its own, `.venv-llama-cpp`, and runs these tests in that of
the package; `make test` does not collect them.
"""

import itertools
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from models import CHAT_TEMPLATE, save_tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trl_sgpo.cli.main import main
from trl_sgpo.compare.lab.model import fetch_model
from trl_sgpo.export.export import TOLERANCES, ExportPlan, export, load_unmerged
from trl_sgpo.export.gguf_tokenizer import _PROBES, _SPLITS
from trl_sgpo.export.parity import Parity, compare, logits_on, probes
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.prompts import strategy_prompt


ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-llama-cpp" / "bin" / "python"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXTS = [
    *(text for text in _PROBES if text),
    "2026 has 12 months and 365 days; 1234567 + 89 = 1234656.",
    "<|im_start|>user\nWhat is 17 + 26?<|im_end|>\n<|im_start|>assistant\n",
    (ROOT / "README.md").read_text(encoding="utf-8"),
]


def save_run(directory: Path, base: str) -> str:
    """A random adapter on a base, as a run leaves it."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1 if model.config.hidden_size < 100 else 0.01)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    limits = {"max_strategy_length": 16, "max_completion_length": 16}
    TwoPhaseSettings(**limits, trained_on={"dtype": "float32"}).save(directory)
    return str(directory)


def read(file: Path, sequences: list[list[int]], prompt: list[int], new_tokens: int = 24) -> dict[str, np.ndarray]:
    """What llama.cpp makes of a file."""
    request, answer = file.with_suffix(".json"), file.with_suffix(".npz")
    request.write_text(
        json.dumps({"sequences": sequences, "texts": TEXTS, "prompt": prompt, "new_tokens": new_tokens})
    )
    command = [str(PYTHON), str(Path(__file__).with_name("llama_cpp_reader.py")), str(file), str(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, env={}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(answer))


def logits_at(found: dict[str, np.ndarray], sequences: list[list[int]]) -> torch.Tensor:
    """As `logits_on` has them."""
    rows = []
    for index, sequence in enumerate(sequences):
        kept = torch.linspace(0, len(sequence) - 1, min(48, len(sequence))).round().long()
        rows.append(torch.tensor(found[f"logits_{index}"])[kept])
    logits = torch.cat(rows)
    return logits - logits.mean(dim=-1, keepdim=True)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], new_tokens: int = 24) -> list[int]:
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def behind(model: Any, prompt: list[int], chosen: list[int]) -> torch.Tensor:
    """By how much the model's logit of each token is below its highest one, relative to the spread of its logits."""
    logits = model(input_ids=torch.tensor([[*prompt, *chosen]])).logits[0, len(prompt) - 1 : -1]
    gaps = logits.max(dim=-1).values - logits.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    return gaps / logits.std(dim=-1)


def check(directory: Path, run: str, base: str, kind: str) -> Parity:
    """Exports a run and compares logits, tokens and greedy text of llama.cpp with those of the unmerged adapter."""
    export(ExportPlan(run, str(directory / f"out-{kind}"), gguf=kind))
    (file,) = (directory / f"out-{kind}").glob("*.gguf")
    settings, tokenizer = TwoPhaseSettings.load(run), AutoTokenizer.from_pretrained(run)
    sequences = probes(tokenizer, settings)
    prompt = settings.conversation(tokenizer).request([{"role": "user", "content": "What is 17 + 26?"}], [])
    model = load_unmerged(run, base, settings.trained_on, torch.float32)
    found = read(file, sequences, prompt)
    for index, text in enumerate(TEXTS):
        assert found[f"tokens_{index}"].tolist() == tokenizer(text)["input_ids"], text[:80]
    parity = compare(logits_on(model, sequences), logits_at(found, sequences))
    print(f"{Path(base).name} {kind}: {parity}")
    assert parity.error <= TOLERANCES[{"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(kind, kind)]
    if kind in ("f32", "f16"):
        assert found["greedy"].tolist() == greedy(model, prompt)
    else:  # where two tokens are nearly as likely, rounded weights may choose the other one
        gaps = behind(model, prompt, found["greedy"].tolist())
        print(f"greedy tokens: {(gaps == 0).sum()} of {len(gaps)} the likeliest ones, largest gap {gaps.max():.2g}")
        assert gaps.max() < 6 * parity.error
    return parity


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base = fetch_model(SMOLLM2)
    return save_run(tmp_path_factory.mktemp("smollm2"), base), base


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smollm2(tmp_path: Path, smollm2: tuple[str, str], kind: str) -> None:
    check(tmp_path, *smollm2, kind)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tiny_models(tmp_path: Path, architecture: str, kind: str) -> None:
    base = save_tiny_model(tmp_path / architecture, architecture, **_sizes(architecture))
    run = save_run(tmp_path / "run", base)
    check(tmp_path, run, base, kind)


def test_scaled_positions(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "llama3", rope_parameters=LLAMA3_ROPE)
    check(tmp_path, save_run(tmp_path / "run", base), base, "f32")


def _sizes(architecture: str) -> dict[str, int]:
    return {"head_dim": 128} if architecture == "qwen3" else {}  # transformers reads no other from GGUF


def split_by(raw: Tokenizer, split: str) -> Tokenizer:
    saved = json.loads(raw.to_str())
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": _SPLITS[split]}
    saved["model"]["ignore_merges"] = split == "llama-bpe"
    return Tokenizer.from_str(json.dumps(saved))


@pytest.fixture(scope="module")
def unsplit() -> Tokenizer:
    """Its merges go across words, digits and lines, so each split leads to other tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator([text for each in TEXTS for text in each.split("\n\n")], trainer)
    tokens = {split: [split_by(raw, split).encode(text).ids for text in TEXTS] for split in _SPLITS}
    assert all(tokens[one] != tokens[other] for one, other in itertools.combinations(_SPLITS, 2))
    return raw


@pytest.mark.parametrize("split", _SPLITS)
def test_splits_of_text(tmp_path: Path, unsplit: Tokenizer, split: str) -> None:
    raw = split_by(unsplit, split)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    base = save_tiny_model(tmp_path / split, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    check(tmp_path, save_run(tmp_path / "run", base), base, "f32")


@contextmanager
def server(file: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "llama_cpp.server", "--model", str(file), "--port", str(port), "--n_ctx", "2048"]
    path = file.with_name("server.log")
    with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env={}) as process:
        try:
            for _ in range(120):
                assert process.poll() is None, path.read_text()[-2000:]
                try:
                    httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def test_solve_behind_its_server(tmp_path: Path, smollm2: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Strategies behind the server are those of the run, once its penalty of repetition is that of training."""
    run, _ = smollm2
    settings = TwoPhaseSettings.load(run)
    export(ExportPlan(run, str(tmp_path / "out"), gguf="f16"))
    (file,) = (tmp_path / "out").glob("*.gguf")
    problem = "What is 2 times 3?"
    (tmp_path / "problems.jsonl").write_text(json.dumps({"problem": problem}) + "\n")
    messages = strategy_prompt([{"role": "user", "content": problem}], settings.strategy_prompt, [], True)
    request = {"messages": messages, "max_tokens": settings.max_strategy_length, "temperature": 0}
    answered = {}
    with server(file) as url:
        for name, source in (("server", ["--server", url, "--run", run]), ("run", ["--model", run])):
            output = tmp_path / f"{name}.jsonl"
            files = ["--input", str(tmp_path / "problems.jsonl"), "--output", str(output)]
            assert main(["solve", *source, *files]) == 0, capsys.readouterr().err
            answered[name] = json.loads(output.read_text())
        for name, more in (("server", {}), ("run", {"repeat_penalty": 1.0})):  # the server's own is 1.1
            answer = httpx.post(f"{url}/chat/completions", json=request | more, timeout=300).json()
            assert answer["choices"][0]["message"]["content"].strip() == answered[name]["strategy"]
    assert all(each["strategy"] and each["execution"] for each in answered.values())
