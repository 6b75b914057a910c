"""
Evaluates, measures and trains three steps, with tensorboard, trackio and wandb at once.

Arguments of `main`: OUT MODEL. What was logged is in `logs.json` in OUT, and trackers write where their variables say.
"""

import json
from pathlib import Path

import wandb
from models import evenness, hash_embedder, problems

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.bank import StrategyBank
from trl_sgpo.evaluation.block_transfer import measure_transfer


def main(arguments: list[str]) -> None:
    directory, model = Path(arguments[0]), arguments[1]
    args = SGPOConfig(
        str(directory / "run"),
        per_device_train_batch_size=24,
        per_device_eval_batch_size=4,
        num_generations=6,
        num_generations_eval=1,
        num_plain_rollouts=2,
        max_strategy_length=8,
        max_completion_length=8,
        max_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        bank_min_lift=-1.0,
        log_completions=True,
        num_completions_to_print=0,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        report_to=["tensorboard", "trackio", "wandb"],
        project="tracked",
        run_name="three-steps",
    )
    with StrategyBank(directory / "bank", hash_embedder) as bank:
        trainer = SGPOTrainer(
            model=model,
            reward_funcs=evenness,
            args=args,
            train_dataset=problems(),
            eval_dataset=problems(4),
            strategy_bank=bank,
        )
        measure_transfer(trainer, problems(4), 4)
        trainer.evaluate()
        trainer.train()
        measure_transfer(trainer, problems(4), 4)
        (directory / "logs.json").write_text(json.dumps(trainer.state.log_history))
    wandb.finish()  # as at the exit of a command; a forked process has none
