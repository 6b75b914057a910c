"""What `trl-sgpo init` writes: a recipe with starting values for a GPU, and a reward function."""

import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..data.columns import Columns
from ..inference.model_files import ADAPTER_WEIGHTS, WHOLE_WEIGHTS


if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_SIZE, GENERATIONS = 2, 8

ANSWERS = '''\
"""The reward function: change it to the check that your data needs."""

from trl_sgpo.data.tasks import final_answer, same_answer


def reward(completions, solution, **kwargs):
    """1.0 where the final answer is the solution, 0.0 where not, None where there is no solution."""
    rewards = []
    for completion, gold in zip(completions, solution, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        answer = final_answer(text)  # after ####, in \\boxed{} or after "answer is"
        right = answer is not None and gold is not None and same_answer(answer, gold)
        rewards.append(None if gold is None else float(right))
    return rewards
'''

NO_ANSWERS = '''\
"""The reward function. It only checks that there is an answer: change it to check that the answer is right."""

from trl_sgpo.data.tasks import final_answer


def reward(completions, prompts, **kwargs):
    """1.0 where an execution ends with an answer, 0.0 where not. Columns of the data are arguments by their names."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(final_answer(text) is not None) for text in texts]  # after ####, in \\boxed{} or after "answer is"
'''


@dataclass(frozen=True)
class Size:
    """Settings for a GPU's memory and the models that are usually trained on it."""

    vram: float
    micro_batch: int
    rows: int
    strategy: int
    execution: int


MIN_TO_REPORT = 40 * BLOCK_SIZE
"""Number of problems from which a tenth is kept for the report."""
SIZES = (
    Size(0, micro_batch=8, rows=32, strategy=64, execution=128),
    Size(4, micro_batch=2, rows=64, strategy=128, execution=256),
    Size(12, micro_batch=4, rows=64, strategy=128, execution=384),
    Size(16, micro_batch=4, rows=64, strategy=128, execution=512),
    Size(24, micro_batch=8, rows=64, strategy=192, execution=768),
    Size(40, micro_batch=16, rows=64, strategy=256, execution=1024),
)
FULL_SHARE = 0.3  # share of the memory for weights in 16 bits; larger weights are quantized
QUANTIZED_SHARE = 0.6  # share of the memory for quantized weights


def sections(
    model: str,
    data: str,
    config: str | None,
    columns: Columns,
    rows: "Dataset",
    vram: float,
    rewards: Path | None,
    output_dir: str,
) -> dict[str, dict[str, Any]]:
    """Keys of the recipe, by the title of their section."""
    size = [each for each in SIZES if vram >= each.vram][-1]
    problems: dict[str, Any] = {"dataset_name": data}
    title, report = "Data: unseen problems are generated for the report before and after training", 64
    if config is not None:
        problems["dataset_config"] = config
    problems |= {key: value for key, value in asdict(columns).items() if value is not None}
    if not data.startswith(("reasoning_gym/", "list_functions/", "word_programs/")):
        if len(rows) >= MIN_TO_REPORT:
            report = min(report, len(rows) // 10)
            title = "Data: a tenth of the problems is kept for the report before and after training"
            rows = rows.select(range(len(rows) * 9 // 10))
            problems |= {"dataset_train_split": "train[:90%]", "dataset_test_split": "train[90%:]"}
        else:
            title, report = "Data: too few problems to keep some of them for a report", 0
    function = "answer_reward" if rewards is None else ".".join((*rewards.with_suffix("").parts, "reward"))
    return {
        "Model": {"model_name_or_path": model, **precision(model, vram)},
        "LoRA": {
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target_modules": ["all-linear"],
        },
        title: problems | _classes(rows) | {"report_problems": report},
        "Reward: the first function is the verifier": {"reward_funcs": [function]},
        "SGPO": {
            "transfer_block_size": BLOCK_SIZE,
            "num_generations": GENERATIONS,
            "max_strategy_length": size.strategy,
            "max_completion_length": size.execution,
            "execution_prompt": "Now apply this strategy to the problem, step by step. End with #### and the answer.",
            "num_retrieved": 1,
        },
        f"Training: {size.rows} rows a step, {size.rows // GENERATIONS} problems": {
            "per_device_train_batch_size": size.micro_batch,
            "gradient_accumulation_steps": size.rows // size.micro_batch,
            "gradient_checkpointing": vram > 0,
            "max_steps": 200,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "log_completions": True,
            "num_completions_to_print": 0,
            "report_to": "none",
            "save_strategy": "steps",
            "save_steps": 20,
            "save_total_limit": 2,
            "seed": 42,
            "output_dir": output_dir,
        },
    }


def precision(model: str, vram: float) -> dict[str, Any]:
    """Keys for the precision of the weights."""
    if vram == 0:  # bfloat16 is slow on CPUs that have no instructions for it
        return {"dtype": "float32", "bf16": False, "use_cpu": True}
    weights = _weights(model)
    quantize = vram < 24 if weights is None else weights > FULL_SHARE * vram
    if weights is not None and weights * 0.3 > QUANTIZED_SHARE * vram:
        print(f"{model} may not fit into {vram:g} GB, not even in 4 bits: take a smaller one.", file=sys.stderr)
    keys: dict[str, Any] = {"dtype": "bfloat16"}
    if _lacks_bfloat16():
        keys = {"dtype": "float16", "bf16": False, "fp16": True}
    return keys | ({"load_in_4bit": True} if quantize else {})


def _weights(model: str) -> float | None:
    """GB of the weights in 16 bits, by their files or by the number of parameters in the name."""
    if Path(model).is_dir():
        files = {path for name in (*WHOLE_WEIGHTS, ADAPTER_WEIGHTS) for path in Path(model).glob(name)}
        return sum(path.stat().st_size for path in files) / 1e9
    size = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)\s?([BbMm])(?![A-Za-z])", model.split("/")[-1])
    if size is None:
        return None
    return 2 * float(size[1]) / (1 if size[2] in "Bb" else 1000)


def _lacks_bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _classes(rows: "Dataset") -> dict[str, Any]:
    if "problem_class" not in rows.column_names:
        return {"num_clusters": max(1, min(16, len(rows) // 16))}
    sizes = Counter(rows["problem_class"])
    return {"small_classes": "merge"} if min(sizes.values()) < 2 * BLOCK_SIZE else {}


def recipe_text(sections: dict[str, dict[str, Any]], recipe: Path, vram: float) -> str:
    """The recipe's file."""
    memory = f"a GPU of {vram:g} GB" if vram else "a CPU"
    lines = [
        f"# trl-sgpo init --try {recipe}      16 rollouts, and what to change before training",
        f"# trl-sgpo train --config {recipe}",
        "#",
        f"# Starting values for {memory}. Out of memory: halve per_device_train_batch_size and double",
        "# gradient_accumulation_steps, or lower max_completion_length. Keys: docs/recipes.md.",
        "# If rewards stay at 0, the model needs a warm start first: docs/bootstrap.md.",
    ]
    if any(values.get("dtype") == "bfloat16" for values in sections.values()):
        lines.append("# GPUs before Ampere (T4, V100, RTX 20) need dtype: float16, bf16: false and fp16: true.")
    for title, values in sections.items():
        lines += ["", f"# {title}", yaml.safe_dump(values, sort_keys=False, width=119, allow_unicode=True).rstrip()]
    return "\n".join(lines) + "\n"
