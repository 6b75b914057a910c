"""Process rewards: steps labelled by how often they lead to a right answer, and a model trained on the labels."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from ..errors import DataError, ModelError
from ..files import unfinished_directory
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.settings import TwoPhaseSettings
from ..inference.verifier import Verifier, verify
from ..method.conversation import prompt_ids
from ..method.prompts import Prompt
from .rlhf import check_sampling, fingerprint, finish_directory, is_made_of, split_by_problem, training_settings


if TYPE_CHECKING:
    from datasets import Dataset

    from ..sgpo_config import SGPOConfig


def split_steps(text: str, separator: str) -> list[str]:
    """
    Splits a solution into steps, each with the separator that ends it.

    Args:
        text (`str`):
            A solution.
        separator (`str`):
            What ends a step, such as a line break. Not empty.

    Returns:
        `list[str]`: Steps that make up the text. A blank one is part of its neighbour.
    """
    steps: list[str] = []
    for piece in text.split(separator):
        if steps:
            steps[-1] += separator
        if steps and not piece.strip():
            steps[-1] += piece
        else:
            steps.append(piece)
    if len(steps) > 1 and not steps[0].replace(separator, "").strip():
        steps[:2] = [steps[0] + steps[1]]
    return steps if text else []


def solution_ids(tokenizer: Any, steps: list[str]) -> tuple[list[int], list[int]]:
    """
    Tokenises a solution whole, as the policy does, and finds where its steps end.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer.
        steps (`list[str]`):
            The steps of the solution.

    Returns:
        `tuple[list[int], list[int]]`: The tokens, and for each step how many of them make up the solution so far. A
        token that reaches into the next step is not counted.
    """
    encoded = tokenizer("".join(steps), add_special_tokens=False, return_offsets_mapping=True)
    token_ends = [end for _, end in encoded["offset_mapping"]]
    counts, length = [], 0
    for step in steps:
        length += len(step)
        counts.append(sum(end <= length for end in token_ends))
    return encoded["input_ids"], counts


def step_labels(
    model: TwoPhaseModel,
    rows: list[dict[str, Any]],
    verifier: Verifier,
    max_tokens: int,
    decoding: Decoding,
    separator: str,
    solutions: int = 2,
    rollouts: int = 4,
) -> "Dataset":
    """
    Labels the steps of sampled solutions as in [Math-Shepherd](https://huggingface.co/papers/2312.08935).

    A step's label is the fraction of right answers among `rollouts` continuations after it, the last step's the
    outcome itself. The paper's other label, whether any continuation is right, depends on how many there are and is 1
    almost everywhere for a policy that often succeeds. The fraction estimates the same probability for any number.

    Args:
        model ([`TwoPhaseModel`]):
            The policy. It solves without strategies.
        rows (`list[dict]`):
            Problems, of equal columns. They are used in this order until the tokens are spent.
        verifier (`Callable`):
            Reward function that checks answers.
        max_tokens (`int`):
            Tokens that may be generated, for solutions and continuations together.
        decoding ([`Decoding`]):
            How to sample.
        separator (`str`):
            What ends a step, see [`split_steps`].
        solutions (`int`, *optional*, defaults to `2`):
            Solutions of each problem. Equal ones are labelled once.
        rollouts (`int`, *optional*, defaults to `4`):
            Continuations after each step.

    Returns:
        [`~datasets.Dataset`]: With `prompt`, `completions` (the steps) and `labels` (a number for each).

    Raises:
        [`DataError`]: The budget is too small to label a solution.
    """
    from datasets import Dataset

    check_sampling(decoding)
    end = model.generated_tokens + max_tokens
    seed = decoding.seed
    size = max(1, model.batch_size // solutions)
    examples = []
    for start in range(0, len(rows), size):
        sampled = [row for row in rows[start : start + size] for _ in range(solutions)]
        sampled = sampled[: _affordable(model, end)]
        if not sampled:
            break
        prompts = [row["prompt"] for row in sampled]
        texts = model.continue_from(prompts, [[]] * len(sampled), replace(decoding, seed=seed))
        seed += 1
        outcomes = verify(verifier, sampled, texts)
        pending, seen = [], set()
        for position, (row, text, outcome) in enumerate(zip(sampled, texts, outcomes, strict=True)):
            steps, key = split_steps(text, separator), (position // solutions, text)
            if steps and outcome == outcome and key not in seen:
                pending.append((row, steps, outcome))
            seen.add(key)
        while pending:
            count = _fitting([(len(steps) - 1) * rollouts for _, steps, _ in pending], _affordable(model, end))
            if count == 0:
                break
            group, pending = pending[:count], pending[count:]
            examples += _label(model, group, verifier, replace(decoding, seed=seed), rollouts)
            seed += 1
    if not examples:
        raise DataError(
            f"{max_tokens} tokens do not suffice to label the steps of one solution: raise `max_tokens`, or lower "
            "`rollouts` or `max_completion_length`."
        )
    return Dataset.from_list(examples)


def _affordable(model: TwoPhaseModel, end: int) -> int:
    """Number of texts that cannot exceed `end` generated tokens, whatever their length."""
    return max(0, end - model.generated_tokens) // model.settings.max_completion_length


def _fitting(costs: list[int], room: int) -> int:
    """Length of the longest prefix of the costs whose sum fits."""
    for count, cost in enumerate(costs):
        room -= cost
        if room < 0:
            return count
    return len(costs)


def _label(
    model: TwoPhaseModel,
    group: list[tuple[dict[str, Any], list[str], float]],
    verifier: Verifier,
    decoding: Decoding,
    rollouts: int,
) -> list[dict[str, Any]]:
    continued, prefixes = [], []
    for row, steps, _ in group:
        ids, counts = solution_ids(model.tokenizer, steps)
        for count in counts[:-1]:
            continued += [row] * rollouts
            prefixes += [ids[:count]] * rollouts
    if prefixes:
        texts = model.continue_from([row["prompt"] for row in continued], prefixes, decoding)
        outcomes = torch.tensor(verify(verifier, continued, texts)).view(-1, rollouts).nanmean(1).nan_to_num().tolist()
    else:
        outcomes = []
    examples, start = [], 0
    for row, steps, outcome in group:
        stop = start + len(steps) - 1
        labels = [*outcomes[start:stop], outcome]
        examples.append({"prompt": row["prompt"], "completions": steps, "labels": labels})
        start = stop
    return examples


def train_process_reward_model(
    policy_dir: str,
    dataset: "Dataset",
    config: "SGPOConfig",
    output_dir: str | os.PathLike[str],
    learning_rate: float = 1e-4,
    epochs: float = 1,
    full: bool = True,
) -> str:
    """
    Trains a model to predict, at the last token of each step, the probability of a right answer.

    It starts from the policy's weights, with a new token classification head of one logit, and minimises the cross
    entropy to the labels. A tenth of the problems is held out. `held_out.json` has, for their steps, the `accuracy` at
    a threshold of 0.5 and the `auc`: how often, of two steps, the one with the higher label has the higher one. The
    directory appears only when it is complete.

    Args:
        policy_dir (`str`), dataset ([`~datasets.Dataset`]):
            Directory of the policy, and labels of [`step_labels`].
        config ([`SGPOConfig`]):
            Its seed, precision, device and reporting are used.
        output_dir (`str`):
            Where the model is saved. A model of the same policy, labels and settings is kept.
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate, decayed linearly to 0.
        epochs (`float`, *optional*, defaults to `1`):
            Passes over the solutions.
        full (`bool`, *optional*, defaults to `True`):
            Whether to train the whole model, or the head and a LoRA adapter, which is merged.

    Returns:
        `str`: `output_dir`

    Raises:
        [`ModelError`]: The policy's architecture has no token classification head.
    """
    from datasets import Dataset
    from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments
    from trl.trainer.utils import disable_dropout_in_model

    from ..inference.pretrained import load_model, load_tokenizer

    template_kwargs = config.chat_template_kwargs
    optional = [part for part in (template_kwargs, None if full else "adapter") if part]
    made_of = fingerprint([policy_dir, dataset.to_list(), learning_rate, epochs, config.seed, *optional])
    if is_made_of(output_dir, made_of):
        return str(output_dir)
    tokenizer = load_tokenizer(policy_dir)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(config.seed)
    try:
        model = load_model(policy_dir, AutoModelForTokenClassification, num_labels=1, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(
            f"The model {policy_dir} cannot score steps, as transformers has no token classification head for its "
            f"architecture ({str(error).splitlines()[0]}): use a Llama, Mistral, Qwen or Gemma model."
        ) from error
    disable_dropout_in_model(model)
    if not full:
        adapter = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=["score"], task_type="TOKEN_CLS"
        )
        model = get_peft_model(model, adapter)
    training, held_out = split_by_problem(dataset.to_list(), config.seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(output_dir), **training_settings(config, learning_rate, epochs)),
        train_dataset=Dataset.from_list(
            [training_example(tokenizer, **row, chat_template_kwargs=template_kwargs) for row in training]
        ),
        data_collator=lambda examples: _collate(examples, tokenizer.pad_token_id),
        compute_loss_func=step_loss,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model if full else model.merge_and_unload()
        solutions = [(row["prompt"], row["completions"]) for row in held_out]
        probabilities = step_probabilities(model, tokenizer, solutions, chat_template_kwargs=template_kwargs)
        scores = torch.tensor([p for steps in probabilities for p in steps])
        labels = torch.tensor([label for row in held_out for label in row["labels"]])
        accuracy = ((scores >= 0.5) == (labels >= 0.5)).float().mean().item() if held_out else None
        figures = {"steps": len(labels), "accuracy": accuracy, "auc": concordance(scores, labels)}
        with unfinished_directory(Path(output_dir)) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            TwoPhaseSettings.from_config(config).save(unfinished)
            finish_directory(unfinished, output_dir, made_of, figures)
    trainer.accelerator.wait_for_everyone()
    return str(output_dir)


def training_example(
    tokenizer: Any,
    prompt: Prompt,
    completions: list[str],
    labels: list[float],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokens of a prompt and its solution, and labels that are -100 but at the last token of each step."""
    before = prompt_ids(tokenizer, prompt, chat_template_kwargs)
    ids, counts = solution_ids(tokenizer, completions)
    marked = [-100.0] * (len(before) + len(ids))
    for count, label in zip(counts, labels, strict=True):
        marked[len(before) + count - 1] = label
    return {"input_ids": before + ids, "labels": marked}


def step_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> Any:
    """Mean cross entropy between the logits and the labels that are not -100."""
    marked = labels != -100
    logits = outputs.logits.squeeze(-1)[marked].float()
    loss = binary_cross_entropy_with_logits(logits, labels[marked].float(), reduction="sum")
    return loss / (marked.sum() if num_items_in_batch is None else num_items_in_batch)


def concordance(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """
    How often, of two items with different labels, the one with the higher label has the higher score.

    With labels 0 and 1 it is the area under the ROC curve. Equal scores count half.

    Args:
        scores (`torch.Tensor` of shape `(N,)`):
            Scores.
        labels (`torch.Tensor` of shape `(N,)`):
            Labels.

    Returns:
        `float` or `None`: `None` if all labels are equal.
    """
    won = pairs = 0.0
    for score, label in zip(scores, labels, strict=True):
        lower = scores[labels < label]
        won += (score > lower).sum().item() + (score == lower).sum().item() / 2
        pairs += len(lower)
    return won / pairs if pairs else None


def _collate(examples: list[dict[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if "labels" in examples[0]:
        labels = [torch.tensor(example["labels"]) for example in examples]
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return batch


@torch.inference_mode()
def step_probabilities(
    model: Any,
    tokenizer: Any,
    solutions: list[tuple[Prompt, list[str]]],
    batch_size: int = 32,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[float]]:
    """
    The probability of a right answer after each step.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Process reward model. It is set to evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer.
        solutions (`list[tuple[str | list[dict], list[str]]]`):
            Prompts and the steps of a solution.
        batch_size (`int`, *optional*, defaults to `32`):
            Solutions scored at a time.
        chat_template_kwargs (`dict`, *optional*):
            Passed on to the chat template.

    Returns:
        `list[list[float]]`: A probability for each step.
    """
    model.eval()
    probabilities: list[list[float]] = []
    for start in range(0, len(solutions), batch_size):
        examples, ends = [], []
        for prompt, steps in solutions[start : start + batch_size]:
            before = prompt_ids(tokenizer, prompt, chat_template_kwargs)
            ids, counts = solution_ids(tokenizer, steps)
            examples.append({"input_ids": before + ids})
            ends.append([len(before) + count - 1 for count in counts])
        batch = _collate(examples, tokenizer.pad_token_id)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        scores = logits.squeeze(-1).float().sigmoid().cpu()
        probabilities += [row[end].tolist() for row, end in zip(scores, ends, strict=True)]
    return probabilities


class ProcessReward:
    """
    TRL reward function: the probability of a right answer after each step of a completion, over its steps.

    The minimum is what Math-Shepherd ranks solutions by. A solution is as good as its worst step, and, unlike a mean
    or a sum, it cannot be raised by adding easy steps, which policies learn to do
    ([PURE](https://huggingface.co/papers/2504.15275)). It favours solutions of few steps, which the mean does not.

    Args:
        directory (`str`):
            A model of [`train_process_reward_model`].
        separator (`str`):
            What ends a step, as in [`step_labels`].
        aggregation (`str`, *optional*, defaults to `"min"`):
            `"min"` or `"mean"` of the steps.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions scored at a time.
    """

    def __init__(self, directory: str, separator: str, aggregation: str = "min", batch_size: int = 32):
        from transformers import AutoModelForTokenClassification

        from ..inference.pretrained import load_model, load_tokenizer

        self.__name__ = "process_reward"
        self.separator = separator
        self.aggregation = aggregation
        self.batch_size = batch_size
        try:
            self.model = load_model(directory, AutoModelForTokenClassification)
            self.tokenizer = load_tokenizer(directory)
        except OSError as error:
            raise ModelError(f"The process reward model {directory} cannot be loaded: {error}") from error
        self.chat_template_kwargs = TwoPhaseSettings.load(directory).chat_template_kwargs
        if torch.accelerator.is_available():
            self.model = self.model.to(torch.accelerator.current_accelerator())

    def __call__(self, prompts: list[Prompt], completions: list[Any], **kwargs: Any) -> list[float]:
        """
        Scores completions.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts.
            completions (`list[str | list[dict]]`):
                A completion of each, as text or messages.
            **kwargs:
                Not used, the dataset's columns.

        Returns:
            `list[float]`: In [0, 1]; 0 for an empty completion.
        """
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        solutions = [(p, split_steps(text, self.separator)) for p, text in zip(prompts, texts, strict=True)]
        scored = step_probabilities(self.model, self.tokenizer, solutions, self.batch_size, self.chat_template_kwargs)
        if self.aggregation == "mean":
            return [sum(steps) / max(len(steps), 1) for steps in scored]
        return [min(steps, default=0.0) for steps in scored]
