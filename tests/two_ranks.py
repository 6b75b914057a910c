"""
Trains three steps with scripted generations and saves what each step computed.

Arguments of `main`: OUT MODEL SCALE_REWARDS [CHECKPOINT]. Two ranks with one transfer block each have to do what one
rank does with two. With ACCELERATE_USE_FSDP=true or ACCELERATE_USE_DEEPSPEED=true they share the weights, too.
"""

import os
import random
from collections import Counter
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from models import evenness, hash_embedder, problems
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.bank import StrategyBank
from trl_sgpo.errors import RewardError


def scripted(trainer, prompt_ids, images, fields, num_generations):
    """Tokens that depend on a context and on how often it occurred among those of its batch, and an end token."""
    seen: Counter[tuple[int, ...]] = Counter()
    answers = []
    for ids in map(tuple, prompt_ids):
        seen[ids] += 1
        rng = random.Random(f"{ids} {seen[ids]}")
        answers.append([*(rng.randrange(3, 259) for _ in range(rng.randrange(4, 10))), 0])
    return answers, None


def shard_on_cpus() -> None:
    """Has accelerate use FSDP on CPUs, where it would take DDP without saying so. PyTorch can do it."""
    prepare = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, gathered from all ranks."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters([*model.parameters()]):
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in parameters.items()}


def endless(completions, trainer_state, **kwargs):
    """As `evenness`, but the last rank returns an infinite reward in the second step."""
    rewards = evenness(completions)
    if trainer_state.global_step == 1 and PartialState().is_last_process:
        rewards[-1] = float("inf")
    return rewards


class Recording(SGPOTrainer):
    """Keeps each row's advantages token by token, before rows are shuffled."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        lengths = output["completion_mask"].sum(1).tolist()
        self.rows += [
            {
                "step": self.state.global_step,
                "prompt": row["prompt"][0]["content"],
                "source": row["rollout"].source,
                "strategy": row["rollout"].strategy.text,
                "advantages": advantages[:length].tolist(),
                "retrieved": "quoted" in self.processing_class.decode(prompt),
            }
            for row, advantages, length, prompt in zip(
                inputs, output["advantages"], lengths, output["prompt_ids"], strict=True
            )
        ]
        return output


def main(arguments: list[str]) -> None:
    directory, (model, scale_rewards, *checkpoint) = Path(arguments[0]), arguments[1:]
    generate, GRPOTrainer._generate_single_turn = GRPOTrainer._generate_single_turn, scripted
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_cpus()
    method = os.environ.get("INTERNALIZE", "none")
    plain = 0 if method == "none" else 2
    adam = "ADAM" in os.environ  # plain gradient descent has no state that a checkpoint could lose
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    args = SGPOConfig(
        str(directory / "run"),
        per_device_train_batch_size=4 * (4 + plain) // ranks,
        num_generations=4 + plain,
        num_plain_rollouts=plain,
        internalize=method,
        internalize_snapshot_steps=2,
        max_strategy_length=12,
        max_completion_length=12,
        max_steps=3,
        logging_steps=1,
        optim="adamw_torch" if adam else "sgd",
        learning_rate=1e-3 if adam else 1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        scale_rewards=scale_rewards,
        bank_min_lift=-1.0,
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        bf16=False,
    )
    bank = StrategyBank(directory / "bank", hash_embedder) if args.process_index == 0 else None
    reward = endless if "ENDLESS" in os.environ else evenness
    trainer = Recording(model=model, reward_funcs=reward, args=args, train_dataset=problems(), strategy_bank=bank)
    trainer.rows = []
    before = weights(trainer.model)
    try:
        trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    except RewardError as error:
        (directory / f"error_{args.process_index}.txt").write_text(str(error))
        return
    rows = gather_object(trainer.rows)
    after = weights(trainer.accelerator.unwrap_model(trainer.model_wrapped))
    trainer.generation_config.do_sample = False
    written, _ = generate(trainer, [[1, 40 + row, 70, 7 * row + 3] for row in range(4)], None, {}, 1)
    if bank is not None:
        torch.save(
            {
                "ranks": trainer.accelerator.num_processes,
                "backend": trainer.accelerator.distributed_type.value,
                "rows": rows,
                "steps": {name: after[name] - before[name] for name in before},
                "written": written,
                "bank": {s.id: (s.successes, s.trials, s.lift, s.step) for s in bank.strategies()},
                "logs": trainer.state.log_history,
                "checkpoint": sorted(path.name for path in (directory / "run" / "checkpoint-3").iterdir()),
            },
            directory / "result.pt",
        )
    trainer.accelerator.wait_for_everyone()
    trainer.end()
