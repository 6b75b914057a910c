"""
Trains `SharedPromptGRPOTrainer` on ranks, with and without packed rows, and saves what each has learnt.

Arguments of `main`: OUT MODEL. With ACCELERATE_USE_FSDP=true or ACCELERATE_USE_DEEPSPEED=true ranks share the weights.
"""

import os
from pathlib import Path

import torch
from models import evenness, problems
from trl import GRPOConfig
from two_ranks import shard_on_cpus, weights

from trl_sgpo import SharedPromptGRPOTrainer


def main(arguments: list[str]) -> None:
    directory, model = Path(arguments[0]), arguments[1]
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_cpus()
    results = {}
    for share in (True, False):
        args = GRPOConfig(
            str(directory / f"run-{share}"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=12,
            max_steps=2,
            logging_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            bf16=False,
        )
        trainer = SharedPromptGRPOTrainer(model, evenness, args, train_dataset=problems(), share_prompts=share)
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.accelerator.unwrap_model(trainer.model_wrapped))
        results["packed" if share else "plain"] = {
            "shares": trainer.shares_prompts,
            "backend": trainer.accelerator.distributed_type.value,
            "ranks": trainer.accelerator.num_processes,
            "steps": {name: after[name] - before[name] for name in before},
        }
    if args.process_index == 0:
        torch.save(results, directory / "result.pt")
    trainer.accelerator.wait_for_everyone()
