"""Preferences: pairs of a right and a wrong answer, and the reward model trained on them."""

import hashlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checks.json_text import read_object
from ..errors import ConfigError, DataError
from ..files import unfinished_directory, write_file
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.verifier import Verifier, verify
from ..method.conversation import answer_ids


if TYPE_CHECKING:
    from datasets import Dataset

    from ..sgpo_config import SGPOConfig

HELD_OUT_FILE = "held_out.json"


def preference_pairs(
    model: TwoPhaseModel,
    rows: list[dict[str, Any]],
    verifier: Verifier,
    max_tokens: int,
    decoding: Decoding,
    samples: int = 4,
) -> "Dataset":
    """
    Samples answers and pairs right with wrong ones of the same problem.

    Every round samples `samples` answers to each problem that has fewer than `samples` pairs, until another group of
    problems could exceed `max_tokens`. A text is in one pair at most.

    Args:
        model ([`TwoPhaseModel`]):
            Model that answers, without strategies.
        rows (`list[dict]`):
            Problems, of equal columns.
        verifier (`Callable`):
            Reward function that checks answers.
        max_tokens (`int`):
            Tokens that may be generated.
        decoding ([`Decoding`]):
            How to sample.
        samples (`int`, *optional*, defaults to `4`):
            Answers a problem and round, and most pairs of a problem.

    Returns:
        [`~datasets.Dataset`]: With `prompt`, `chosen` and `rejected`, conversations where the prompts are.

    Raises:
        [`DataError`]: No problem has both a right and a wrong answer.
    """
    from datasets import Dataset

    check_sampling(decoding)
    end = model.generated_tokens + max_tokens
    right: list[dict[str, None]] = [{} for _ in rows]
    wrong: list[dict[str, None]] = [{} for _ in rows]
    waiting: list[int] = []
    seed = decoding.seed
    while True:
        if not waiting:
            waiting = [index for index in range(len(rows)) if min(len(right[index]), len(wrong[index])) < samples]
        affordable = max(0, end - model.generated_tokens) // (samples * model.settings.max_completion_length)
        group = waiting[: min(affordable, max(1, model.batch_size // samples))]
        if not group:
            break
        waiting = waiting[len(group) :]
        asked = [index for index in group for _ in range(samples)]
        prompts = [rows[index]["prompt"] for index in asked]
        texts = model.continue_from(prompts, [[]] * len(asked), replace(decoding, seed=seed))
        seed += 1
        outcomes = verify(verifier, [rows[index] for index in asked], texts)
        for index, text, outcome in zip(asked, texts, outcomes, strict=True):
            if outcome > 0.5:
                right[index][text] = None
            elif outcome < 0.5:
                wrong[index][text] = None
    pairs = []
    for row, good, bad in zip(rows, right, wrong, strict=True):
        for chosen, rejected in list(zip(good, bad, strict=False))[:samples]:
            pairs.append(_pair(row["prompt"], chosen, rejected))
    if not pairs:
        raise DataError(
            f"None of {len(rows)} problems has both a right and a wrong answer within {max_tokens} tokens "
            f"({sum(map(len, right))} right, {sum(map(len, wrong))} wrong): raise `max_tokens` (`label_share` in a "
            "comparison) or the temperature, or "
            "use problems that the model solves some of the time."
        )
    return Dataset.from_list(pairs)


def check_sampling(decoding: Decoding) -> None:
    """Raises [`ConfigError`] when `decoding` gives one text a prompt only."""
    if decoding.greedy:
        raise ConfigError("Greedy answers to one problem are all the same: use `Decoding(greedy=False)`.")


def _pair(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    messages = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"prompt": prompt, "chosen": messages[0], "rejected": messages[1]}


def train_reward_model(
    policy_dir: str,
    pairs: "Dataset",
    config: "SGPOConfig",
    output_dir: str | os.PathLike[str],
    learning_rate: float = 1e-4,
    epochs: float = 1,
) -> str:
    """
    Trains a reward model on pairs with TRL's [`~trl.RewardTrainer`], starting from the policy's weights.

    Pairs are tokenized here as for scoring: [`~trl.RewardTrainer`] would append the end token to plain texts.

    A tenth of the problems is held out. The accuracy on their pairs is written to `held_out.json` beside the
    model. The directory appears only when it is complete.

    Args:
        policy_dir (`str`):
            Directory of the policy.
        pairs ([`~datasets.Dataset`]):
            See [`preference_pairs`].
        config ([`SGPOConfig`]):
            Its seed, precision, device and reporting are used.
        output_dir (`str`):
            Where the model is saved. A model of the same policy, pairs and settings is kept.
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate, decayed linearly to 0.
        epochs (`float`, *optional*, defaults to `1`):
            Passes over the pairs.

    Returns:
        `str`: `output_dir`, which is a reward function of [`~trl.GRPOTrainer`].
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from ..inference.pretrained import load_tokenizer

    template_kwargs = config.chat_template_kwargs
    parts = [policy_dir, pairs.to_list(), learning_rate, epochs, config.seed]
    made_of = fingerprint([*parts, template_kwargs] if template_kwargs else parts)
    if is_made_of(output_dir, made_of):
        return str(output_dir)
    tokenizer = load_tokenizer(policy_dir)
    training, held_out = (
        [
            {
                key: answer_ids(tokenizer, [row["prompt"]], [row[key[:-4]]], template_kwargs)[0]
                for key in ("chosen_ids", "rejected_ids")
            }
            for row in part
        ]
        for part in split_by_problem(pairs.to_list(), config.seed)
    )
    torch.manual_seed(config.seed)  # of the new head
    trainer = RewardTrainer(
        model=policy_dir,
        args=RewardConfig(
            str(output_dir),
            per_device_eval_batch_size=1,  # TRL averages the accuracy over batches
            max_length=None,
            **training_settings(config, learning_rate, epochs),
        ),
        train_dataset=Dataset.from_list(training),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"] if held_out else None
    if trainer.accelerator.is_main_process:
        with unfinished_directory(Path(output_dir)) as unfinished:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            finish_directory(unfinished, output_dir, made_of, {"pairs": len(held_out), "accuracy": accuracy})
    trainer.accelerator.wait_for_everyone()
    return str(output_dir)


def split_by_problem(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Splits rows into nine tenths to train on and the rest, so that no prompt is in both."""
    keys = [json.dumps(row["prompt"]) for row in rows]
    problems = sorted(set(keys))
    random.Random(seed).shuffle(problems)
    held = set(problems[: max(1, len(problems) // 10)] if len(problems) > 1 else [])
    training = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    return training, [row for row, key in zip(rows, keys, strict=True) if key in held]


def training_settings(config: "SGPOConfig", learning_rate: float, epochs: float) -> dict[str, Any]:
    """Training arguments that reward models of both kinds have in common."""
    return {
        "per_device_train_batch_size": 8,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": config.seed,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "use_cpu": config.use_cpu,
        "gradient_checkpointing": config.gradient_checkpointing,
        "disable_tqdm": config.disable_tqdm,
    }


def fingerprint(parts: list[Any]) -> str:
    """Digest of everything that a directory is made from."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_made_of(directory: str | os.PathLike[str], made_of: str) -> bool:
    """Whether a directory is complete and has this fingerprint."""
    return (read_object(Path(directory, HELD_OUT_FILE)) or {}).get("made_of") == made_of


def finish_directory(
    unfinished: Path, output_dir: str | os.PathLike[str], made_of: str, held_out: dict[str, Any]
) -> None:
    """Adds the held-out figures and moves the directory to `output_dir`."""
    write_file(unfinished / HELD_OUT_FILE, json.dumps({"made_of": made_of, **held_out}, indent=2))
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(unfinished, output_dir)
