"""
Training methods of a comparison, one function each: from the same warm-started model and data to a trained model.

SFT imitates worked solutions, RFT the model's own right answers. RLHF, PRM and GRPO optimise plain answers with TRL's
`GRPOTrainer`: against a reward model of preferences, against the verifier with a process reward, against the verifier.
SGPO optimises strategies and executions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from trl import GRPOTrainer, get_peft_config, get_quantization_config

from ..data.classes import CLASS_COLUMN
from ..data.loading import load_rewards
from ..data.warmstart import two_phase_examples, warmstart
from ..data.worked import Trace, solutions, traces
from ..errors import ConfigError, DataError
from ..inference.loading import how_trained
from ..inference.model import Decoding, TwoPhaseModel
from ..inference.settings import TwoPhaseSettings
from ..method.conversation_trainer import ConversationGRPOTrainer
from ..method.credit import Credit
from ..method.rollout import Rollout, RolloutBatch, written_strategies
from ..recipe import Recipe, model_init_kwargs
from ..sgpo_config import SGPOConfig
from ..sgpo_trainer import SGPOTrainer
from ..speed.lm_head import project_labelled_tokens_only
from .budget import TokenBudget
from .config import Arm
from .prm import ProcessReward, step_labels, train_process_reward_model
from .rft import right_answers
from .rlhf import preference_pairs, train_reward_model


# Called during training with the trainer
Measure = Callable[[Any], float]


@dataclass(frozen=True)
class Task:
    """
    Input of a training method.

    Args:
        arm ([`Arm`]):
            The arm.
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            Recipe with the arm's overrides, seed and output directory.
        model (`str`):
            Directory of the warm-started model.
        dataset ([`~datasets.Dataset`]):
            Problems to train on.
        budget (`int`):
            Tokens that may be generated.
        points (`list[int]`):
            Numbers of tokens at which the model is measured.
        measure (`Callable`):
            Returns the model's accuracy.
        checkpoint (`str`, *optional*):
            Checkpoint to resume from.
        keep_best (`bool`, *optional*, defaults to `False`):
            Whether the weights at the point with the best accuracy are kept, the first of equal ones, and not the
            last weights.
    """

    arm: Arm
    recipe: Recipe
    model: str
    dataset: Dataset
    budget: int
    points: list[int]
    measure: Measure
    checkpoint: str | None = None
    keep_best: bool = False


@dataclass(frozen=True)
class TrainedArm:
    """
    Result of a training method.

    Args:
        model (`str`):
            Directory of the trained model.
        generated (`int`):
            Tokens generated.
        labelled (`int`):
            Tokens among these that were generated to label data for a reward model.
        trained (`int`):
            Tokens of worked solutions trained on.
        curve (`list[dict]`):
            Measurements during training.
        log (`list[dict]`):
            Metrics of the steps.
        details (`dict`):
            Further figures of the method.
    """

    model: str
    generated: int
    labelled: int
    trained: int
    curve: list[dict[str, float]]
    log: list[dict[str, Any]]
    details: dict[str, Any]


def train_arm(task: Task) -> TrainedArm:
    """Trains an arm."""
    return _METHODS[task.arm.method](task)


def plain_settings(config: SGPOConfig) -> TwoPhaseSettings:
    """Settings under which a plain answer may be as long as strategy and execution together."""
    settings = TwoPhaseSettings.from_config(config)
    return replace(settings, max_completion_length=config.max_plain_length)


def _base(task: Task) -> TrainedArm:
    return TrainedArm(task.model, generated=0, labelled=0, trained=0, curve=[], log=[], details={})


def _sft(task: Task) -> TrainedArm:
    """Trains on the data's worked solutions, or on made ones, until the trained tokens reach the budget."""
    training, script = task.recipe.training, task.recipe.script
    tokenizer = TwoPhaseModel.from_pretrained(task.model).tokenizer
    rounds, chosen, tokens = 0, [], 0
    while tokens < task.budget:
        shuffled = task.dataset.shuffle(seed=training.seed + rounds)
        more = solutions(shuffled) or traces(shuffled, 1, seed=training.seed + 1000 + rounds)
        examples = two_phase_examples(more, tokenizer, training, training.seed, script.warmstart_plain_share)
        lengths = [sum(label != -100 for label in example["labels"]) for example in examples]
        for trace, length in zip(more, lengths, strict=True):
            if tokens >= task.budget:
                break
            chosen.append(trace)
            tokens += length
        rounds += 1
    model = _imitating(task, chosen, script.warmstart_plain_share)
    details = {"traces": len(chosen)}
    return TrainedArm(model, generated=0, labelled=0, trained=tokens, curve=[], log=[], details=details)


def _rft(task: Task) -> TrainedArm:
    """Trains on the model's own right plain answers, sampled until the budget is spent."""
    training, script = task.recipe.training, task.recipe.script
    policy = _sampler(task)
    found = right_answers(
        policy,
        list(task.dataset.shuffle(seed=training.seed)),
        load_rewards(script)[0],
        task.budget,
        Decoding(greedy=False, temperature=training.temperature, seed=training.seed),
    )
    if not found:
        raise DataError(
            f"None of the plain answers that the model samples within {task.budget:,} tokens is right: raise `budget` "
            "or `temperature`, or use problems that the model solves some of the time."
        )
    model = _imitating(task, found, plain_share=1.0)
    details = {"right_answers": len(found)}
    return TrainedArm(
        model, generated=policy.generated_tokens, labelled=0, trained=0, curve=[], log=[], details=details
    )


def _imitating(task: Task, examples: list[Trace], plain_share: float) -> str:
    """Directory of the model after supervised steps on texts, a share of which are plain answers."""
    return warmstart(
        task.model,
        examples,
        task.recipe.training,
        Path(task.recipe.training.output_dir, "model"),
        learning_rate=task.arm.settings["sft_learning_rate"],
        model_init_kwargs=model_init_kwargs(task.recipe),
        batch_size=task.recipe.script.warmstart_batch_size,
        plain_share=plain_share,
        full=not task.recipe.model.use_peft,
    )


def _grpo(task: Task) -> TrainedArm:
    return _train_grpo(task, load_rewards(task.recipe.script), labelled=0, details={})


def _rlhf(task: Task) -> TrainedArm:
    """Trains a reward model on pairs of right and wrong answers, then optimises against it."""
    training, settings = task.recipe.training, task.arm.settings
    policy = _sampler(task)
    pairs = preference_pairs(
        policy,
        list(task.dataset.shuffle(seed=training.seed)),
        load_rewards(task.recipe.script)[0],
        int(settings["label_share"] * task.budget),
        Decoding(greedy=False, temperature=training.temperature, seed=training.seed),
    )
    reward = train_reward_model(
        task.model,
        pairs,
        training,
        Path(training.output_dir, "reward"),
        learning_rate=settings["reward_learning_rate"],
        epochs=settings["reward_epochs"],
    )
    return _train_grpo(task, [reward], labelled=policy.generated_tokens, details={"pairs": len(pairs)})


def _prm(task: Task) -> TrainedArm:
    """Trains a process reward model on step labels, then optimises outcome plus process reward."""
    training, settings = task.recipe.training, task.arm.settings
    policy = _sampler(task)
    verifier = load_rewards(task.recipe.script)[0]
    labels = step_labels(
        policy,
        list(task.dataset.shuffle(seed=training.seed)),
        verifier,
        int(settings["label_share"] * task.budget),
        Decoding(greedy=False, temperature=training.temperature, seed=training.seed),
        separator=settings["step_separator"],
        rollouts=settings["step_rollouts"],
    )
    reward = train_process_reward_model(
        task.model,
        labels,
        training,
        Path(training.output_dir, "reward"),
        learning_rate=settings["reward_learning_rate"],
        epochs=settings["reward_epochs"],
        full=not task.recipe.model.use_peft,
    )
    process = ProcessReward(reward, settings["step_separator"], settings["step_aggregation"])
    return _train_grpo(
        task, [verifier, process], labelled=policy.generated_tokens, details={"labelled_solutions": len(labels)}
    )


def _sampler(task: Task) -> TwoPhaseModel:
    training = task.recipe.training
    rows = training.per_device_train_batch_size * training.steps_per_generation
    return TwoPhaseModel.from_pretrained(task.model, plain_settings(training), batch_size=rows)


def _train_grpo(task: Task, rewards: list[Any], labelled: int, details: dict[str, Any]) -> TrainedArm:
    training = task.recipe.training
    config = training.to_grpo(
        max_completion_length=training.max_plain_length,
        model_init_kwargs=model_init_kwargs(task.recipe),
    )
    trainer = ConversationGRPOTrainer(
        model=task.model,
        reward_funcs=rewards,
        args=config,
        train_dataset=task.dataset,
        quantization_config=get_quantization_config(task.recipe.model),
        peft_config=get_peft_config(task.recipe.model),
    )
    trained = _train(task, trainer, labelled, details)
    if isinstance(trainer.model, PeftModel):  # whose weights fit a base that is quantized as in training only
        settings = replace(plain_settings(training), trained_on=how_trained(trainer.model))
        settings.of_model(trainer.processing_class).save(trained.model)
    return trained


def _sgpo(task: Task) -> TrainedArm:
    return _train_sgpo(task, SGPOTrainer)


class JointAdvantageTrainer(SGPOTrainer):
    """Ablation: strategy tokens get the advantage of their own row's execution, as in GRPO on the whole row."""

    def credit_of(self, rollouts: list[Rollout], rewards: torch.Tensor) -> Credit:
        credit = super().credit_of(rollouts, rewards)
        return replace(credit, strategy=credit.execution)


def _joint(task: Task) -> TrainedArm:
    return _train_sgpo(task, JointAdvantageTrainer)


class WrongStrategyTrainer(SGPOTrainer):
    """Control: plain answers learn from strategies of another class, in place of those that led to right answers."""

    def internalize(
        self, output: dict[str, Any], rollouts: Sequence[Rollout], credit: Credit, batch: RolloutBatch
    ) -> dict[str, Any]:
        return super().internalize(output, with_strategies_of_other_classes(rollouts, batch), credit, batch)


def with_strategies_of_other_classes(rollouts: Sequence[Rollout], batch: RolloutBatch) -> list[Rollout]:
    """Rows whose own strategies are ones that were written for another class of the batch."""
    written = written_strategies(rollouts)
    classes = [problem.problem_class for problem in batch.written_for()]
    wrong = []
    for place, name in enumerate(classes):
        later = [(place + step) % len(classes) for step in range(1, len(classes))]
        others = [written[other] for other in later if classes[other] != name and written[other].flaw is None]
        wrong.append(others[0] if others else replace(written[place], flaw="of its own class"))
    following = iter(wrong)
    return [replace(row, strategy=next(following)) if row.source == "own" else row for row in rollouts]


def _internalize_wrong(task: Task) -> TrainedArm:
    training = task.recipe.training
    blocks = training.generation_batch_size // (
        training.world_size * training.transfer_block_size * training.num_generations
    )
    if blocks < 2 or len(set(task.dataset[CLASS_COLUMN])) < 2:
        raise ConfigError(
            "The method `internalize_wrong` takes strategies of other classes, and a step has problems of one: use "
            "data of several classes, and set `per_device_train_batch_size` to two transfer blocks or more."
        )
    return _train_sgpo(task, WrongStrategyTrainer)


def _train_sgpo(task: Task, trainer_class: type[SGPOTrainer]) -> TrainedArm:
    training = task.recipe.training
    training.model_init_kwargs = model_init_kwargs(task.recipe)
    trainer = trainer_class(
        model=task.model,
        reward_funcs=load_rewards(task.recipe.script),
        args=training,
        train_dataset=task.dataset,
        quantization_config=get_quantization_config(task.recipe.model),
        peft_config=get_peft_config(task.recipe.model),
    )
    try:
        return _train(task, trainer, labelled=0, details={})
    finally:
        if trainer.strategy_bank is not None:
            trainer.strategy_bank.close()


def _train(task: Task, trainer: GRPOTrainer, labelled: int, details: dict[str, Any]) -> TrainedArm:
    trainer.remove_callback(PrinterCallback)
    directory = Path(trainer.args.output_dir, "model")

    def measured() -> float:
        accuracy = task.measure(trainer)
        if task.keep_best and accuracy > max((point["accuracy"] for point in budget.curve), default=-1.0):
            trainer.save_model(str(directory))
        return accuracy

    budget = TokenBudget(task.budget, labelled, task.points, measured).count_in(trainer)
    with project_labelled_tokens_only(trainer.accelerator.device):  # a faster LM head on CPUs, as in SGPO
        trainer.train(resume_from_checkpoint=task.checkpoint)
    if not task.keep_best:
        trainer.save_model(str(directory))
    return TrainedArm(
        str(directory),
        generated=budget.spent,
        labelled=labelled,
        trained=0,
        curve=budget.curve,
        log=[entry for entry in trainer.state.log_history if "loss" in entry],
        details=details | {"steps": trainer.state.global_step},
    )


_METHODS: dict[str, Callable[[Task], TrainedArm]] = {
    "base": _base,
    "sft": _sft,
    "rft": _rft,
    "rlhf": _rlhf,
    "prm": _prm,
    "grpo": _grpo,
    "grpo_best": _grpo,
    "sgpo": _sgpo,
    "joint": _joint,
    "internalize_wrong": _internalize_wrong,
}
