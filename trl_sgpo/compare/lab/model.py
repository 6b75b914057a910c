"""
The laboratory's model: 0.6M parameters, trained from scratch on list functions when a command first uses it.

Its training data is common to all arms of an experiment: problems of one, two and four operations with their
strategies, and executions of given strategies, also of answers to other problems written in place of a strategy. The
data has no problem of three operations together with its strategy, and no held-out composition.
"""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

from ...data.worked import Trace
from ...inference.weights import lab_directory, lab_seed, require_model
from ...method.prompts import RETRIEVED_HEADER
from .list_functions import (
    LENGTH,
    NUMBER_WORDS,
    OPERATIONS,
    Program,
    compositions,
    execution,
    question,
    shortcut,
    strategy,
)


EXAMPLES = 100_000
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_WORDS = ("then", ":", ".", "####", "For", "lists", "To", "solve", "write", "In", "short", "answer")
_ASKED = ("strategy?", "apply", ">")


def prepare_model(name: str) -> None:
    """Trains a laboratory's model if `name` is that of one, such as `trl-sgpo/lab`, and it does not exist yet."""
    seed = lab_seed(name)
    if seed is not None and not os.path.isdir(name) and not lab_directory(seed).is_dir():
        build_lab_model(lab_directory(seed), seed)


def fetch_model(name: str) -> str:
    """
    Finds a model's weights, as [`~trl_sgpo.inference.weights.require_model`] does, after [`prepare_model`].

    Args:
        name (`str`):
            A local directory, a Hub id, or `trl-sgpo/lab`.

    Returns:
        `str`: What to pass to `from_pretrained`.

    Raises:
        [`~trl_sgpo.errors.ModelError`]: There are no such weights.
    """
    prepare_model(name)
    return require_model(name)


def lab_tokenizer() -> Any:
    """A tokenizer of whole words with a chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
    spoken = [word for _, words in OPERATIONS.values() for word in words]
    vocabulary = [*special, *_WORDS, *_ASKED, *OPERATIONS, *spoken, *map(str, range(10)), *NUMBER_WORDS]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.add_tokens([AddedToken(RETRIEVED_HEADER.strip(), normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def lab_traces(size: int, seed: int) -> list[Trace]:
    """
    Training data of the laboratory's model.

    Args:
        size (`int`):
            Number of traces.
        seed (`int`):
            Seed of the draws.

    Returns:
        `list[Trace]`: Half of them are problems of one, two and four operations with their strategies. The other half
        are problems of up to four operations with a given strategy that was written for another program; in a quarter
        of these an answer stands in place of the strategy.
    """
    rng = random.Random(seed)
    triples, longer = [*compositions()["seen"], *compositions()["other"]], set(compositions()["longer"])

    def drawn(lengths: tuple[int, ...]) -> Program:
        while True:
            program: Program = tuple(rng.choices(list(OPERATIONS), k=rng.choice(lengths)))
            if program not in longer:
                return program

    traces = []
    for index in range(size):
        given = index % 2 == 1
        program = drawn((1, 2, 4))
        asked = rng.choice([rng.choice(triples), drawn((1, 2, 4))]) if given else program
        if given and rng.random() < 0.5:
            program = rng.choice(triples)
        digits = [rng.randrange(10) for _ in range(LENGTH)]
        prompt = [{"role": "user", "content": question(asked, digits, rng)}]
        how, steps = strategy(program), execution(program, digits)
        if given and rng.random() < 0.25:
            answer = [rng.randrange(10) for _ in range(LENGTH)]
            how, steps = shortcut(answer, rng), f"#### {' '.join(map(str, answer))}"
        traces.append(Trace(prompt, how, steps, f"length-{len(asked)}", given=given))
    return traces


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def lab_config(tokenizer: Any) -> Any:
    """Configuration of the laboratory's model, a [`~transformers.LlamaConfig`]."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        **_special_ids(tokenizer),
    )


def build_lab_model(directory: Path, seed: int = 0) -> None:
    """Trains a laboratory's model and saves it. The directory appears only when it is complete."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    from ...data.warmstart import warmstart
    from ...sgpo_config import SGPOConfig

    print(f"Training the laboratory's model from scratch into {directory} (once, about 6 minutes)", flush=True)
    tokenizer = lab_tokenizer()
    config = lab_config(tokenizer)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        untrained = Path(temporary, "untrained")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(**_special_ids(tokenizer))
        model.save_pretrained(untrained)
        tokenizer.save_pretrained(untrained)
        warmstart(
            str(untrained),
            lab_traces(EXAMPLES, seed=seed),
            SGPOConfig(
                temporary,
                strategy_prompt="{problem} {strategies} strategy?",
                execution_prompt="apply",
                seed=seed,
                adam_beta2=0.98,
                disable_tqdm=os.environ.get("CI") is not None,
                gradient_checkpointing=False,
                bf16=False,
            ),
            Path(temporary, "trained"),
            learning_rate=3e-3,
            batch_size=64,
            plain_share=0.25,
            full=True,
        )
        try:
            os.rename(Path(temporary, "trained"), directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process has already written it
                raise
