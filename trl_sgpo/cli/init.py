"""`trl-sgpo init`: writes a recipe, and a reward function, for a model, data and GPU."""

import argparse
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from ..checks.arguments import Parser
from ..checks.paths import check_file
from ..errors import ConfigError, DataError, SGPOError


if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
BLOCK_SIZE, GENERATIONS = 2, 8

_T = TypeVar("_T")

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


def main(argv: list[str]) -> int:
    """Asks for missing options and writes the files."""
    options = _parser().parse_args(argv)
    recipe = Path(options.output)
    rewards = None if options.reward_file is None else Path(options.reward_file)
    try:
        _check_paths(recipe, rewards, options.overwrite)
        model = _get(options.model, "--model", "Model, a Hub id or directory", DEFAULT_MODEL, _check_model)
        data, rows = _get(
            options.data,
            "--data",
            "Problems, a file, Hub id or reasoning-gym family like lcm+gcd",
            None,
            lambda text: _load(text, options.data_config),
        )
        memory = _memory()
        vram = _get(
            options.vram, "--vram", "Memory of the GPU in GB, 0 for none", f"{memory:g}", _check_vram, always=memory
        )
        solutions = "solution" in rows.column_names and any(value is not None for value in rows["solution"])
        if rewards is None and not solutions:
            rewards = _get(None, "--reward_file", _NO_SOLUTIONS, "my_rewards.py", _reward_path)
        elif rewards is None and _asking() and _agrees("A reward function in a file of your own?"):
            rewards = _get(None, "--reward_file", "Its file", "my_rewards.py", _reward_path)
        _check_paths(recipe, rewards, options.overwrite)
    except EOFError:
        raise ConfigError("Stopped: nothing is written.") from None
    output_dir = options.output_dir or f"runs/{recipe.stem}"
    sections = _sections(model, data, options.data_config, rows, vram, rewards, solutions, output_dir)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(_text(sections, recipe, vram), encoding="utf-8")
    print(f"Recipe: {recipe}")
    if rewards is not None:
        rewards.parent.mkdir(parents=True, exist_ok=True)
        rewards.write_text(ANSWERS if solutions else NO_ANSWERS, encoding="utf-8")
        print(f"Reward function: {rewards}, imported from the directory that you train in")
    print(
        f"\nNext:\n  train             trl-sgpo train --config {recipe}\n"
        f"  solve a problem   trl-sgpo solve --model {output_dir}\n"
        f"  what it learnt    trl-sgpo bank list {output_dir}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo init",
        allow_abbrev=False,
        description="Write a recipe for a model, problems and a GPU. Missing options are asked for in a terminal.",
    )
    parser.add_argument("--model", metavar="DIR_OR_ID", help="directory or Hub id of the model to train")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help=f"problems: a {', '.join(FILE_ENDINGS)} file, a Hub id, or reasoning-gym families, as lcm+gcd",
    )
    parser.add_argument(
        "--data_config", metavar="NAME", help="configuration of a Hub dataset, as main of openai/gsm8k"
    )
    parser.add_argument("--vram", metavar="GB", help="memory of the GPU, 0 to train without (that of this machine's)")
    parser.add_argument("--output", default="recipe.yaml", metavar="FILE", help="the recipe (recipe.yaml)")
    parser.add_argument(
        "--reward_file", metavar="FILE", help="write a reward function to change, as my_rewards.py, and train with it"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="of the training (runs/ and the recipe's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


# Asking and checking


_NO_SOLUTIONS = "The problems have no solutions to check answers with, so you write a reward function. Its file"


def _asking() -> bool:
    return sys.stdin.isatty()


def _agrees(question: str) -> bool:
    return input(f"{question} [y/N] ").strip().casefold() in ("y", "yes")


def _get(
    given: str | None,
    option: str,
    question: str,
    default: str | None,
    check: Callable[[str], _T],
    always: float | None = None,
) -> _T:
    """The given option, or the answer to the question, once it passes the check."""
    if given is not None:
        return check(given)
    if not _asking():
        if always is not None:
            return check(str(always))
        raise ConfigError(f"{question}: name it by `{option}`, or start in a terminal to be asked.")
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            if answer:
                return check(answer)
        except SGPOError as error:
            print(error)


def _check_paths(recipe: Path, rewards: Path | None, overwrite: bool) -> None:
    if recipe.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`--output {recipe}` is a YAML file: give it the ending .yaml.")
    if rewards is not None:
        _reward_path(str(rewards))
    check_file("--output", recipe)
    for path in (recipe, rewards):
        if path is not None and path.exists() and not overwrite:
            raise ConfigError(f"{path} exists: choose another name, or replace it with `--overwrite`.")


def _reward_path(text: str) -> Path:
    path = Path(text)
    names = path.with_suffix("").parts
    if path.suffix != ".py" or path.is_absolute() or not all(name.isidentifier() for name in names):
        raise ConfigError(
            f"`--reward_file {text}` is imported: give it a name like my_rewards.py, below this directory."
        )
    spec = importlib.util.find_spec(names[0])
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != path.resolve():
        raise ConfigError(f"`--reward_file {text}` would hide the installed module {names[0]}: choose another name.")
    return path


def _check_model(name: str) -> str:
    from ..compare.lab.model import fetch_model

    fetch_model(name)
    return name


def _check_vram(text: str) -> float:
    try:
        vram = float(text.casefold().removesuffix("gb"))
    except ValueError:
        vram = -1.0
    if not 0 <= vram < 10_000:
        raise ConfigError(f"`--vram {text}` is no memory of a GPU: give it in GB, like 16, or 0 to train without one.")
    if 0 < vram < SIZES[1].vram:
        raise ConfigError(
            f"{vram:g} GB are too little to train on: give at least {SIZES[1].vram:g}, or 0 for the CPU."
        )
    return vram


def _memory() -> float:
    """Memory of the first GPU in GB, 0 without one."""
    import torch

    return round(torch.cuda.get_device_properties(0).total_memory / 2**30) if torch.cuda.is_available() else 0.0


def _load(text: str, config: str | None) -> tuple[str, "Dataset"]:
    """The problems' path in recipes, and the problems."""
    from ..data.tasks import load_problems

    path = text
    if "/" not in text.partition("?")[0] and Path(text).suffix not in FILE_ENDINGS:
        path = f"reasoning_gym/{text}"
    try:
        rows = load_problems(path, "train", config)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{path} cannot be loaded ({str(error).splitlines()[0]}): it needs a split `train` and, where it has "
            "several configurations, one of them as `--data_config`."
        ) from error
    if len(rows) < BLOCK_SIZE:
        raise DataError(f"{path} has {len(rows)} problems: at least {BLOCK_SIZE} are needed, better hundreds.")
    return path, rows


# The recipe


def _sections(
    model: str,
    data: str,
    config: str | None,
    rows: "Dataset",
    vram: float,
    rewards: Path | None,
    solutions: bool,
    output_dir: str,
) -> dict[str, dict[str, Any]]:
    size = [each for each in SIZES if vram >= each.vram][-1]
    problems: dict[str, Any] = {"dataset_name": data}
    report = 64
    if config is not None:
        problems["dataset_config"] = config
    if not data.startswith(("reasoning_gym/", "list_functions/")):
        report = min(report, len(rows) // 10)
        if report >= 4 * BLOCK_SIZE:
            problems |= {"dataset_train_split": "train[:90%]", "dataset_test_split": "train[90%:]"}
        else:
            report = 0
    function = "answer_reward" if rewards is None else ".".join((*rewards.with_suffix("").parts, "reward"))
    return {
        "Model": {"model_name_or_path": model, **_precision(model, vram)},
        "LoRA": {
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target_modules": ["all-linear"],
        },
        "Data: some problems are kept for the report before and after training": problems
        | _classes(rows)
        | {"report_problems": report},
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


def _precision(model: str, vram: float) -> dict[str, Any]:
    if vram == 0:
        return {"dtype": "bfloat16", "use_cpu": True}
    weights = _weights(model)
    quantize = vram < 24 if weights is None else weights > FULL_SHARE * vram
    if weights is not None and weights * 0.3 > QUANTIZED_SHARE * vram:
        print(f"{model} may not fit into {vram:g} GB, not even in 4 bits: take a smaller one.", file=sys.stderr)
    precision: dict[str, Any] = {"dtype": "bfloat16"}
    if _lacks_bfloat16():
        precision = {"dtype": "float16", "bf16": False, "fp16": True}
    return precision | ({"load_in_4bit": True} if quantize else {})


def _weights(model: str) -> float | None:
    """GB of the weights in 16 bits, by their files or by the number of parameters in the name."""
    if Path(model).is_dir():
        return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 1e9
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


def _text(sections: dict[str, dict[str, Any]], recipe: Path, vram: float) -> str:
    memory = f"a GPU of {vram:g} GB" if vram else "a CPU"
    lines = [
        f"# trl-sgpo train --config {recipe}",
        "#",
        f"# Starting values for {memory}. Out of memory: halve per_device_train_batch_size and double",
        "# gradient_accumulation_steps, or lower max_completion_length. Keys: docs/recipes.md.",
        "# If rewards stay at 0, the model needs a warm start first: docs/bootstrap.md.",
    ]
    if vram:
        lines.append("# GPUs before Ampere (T4, V100, RTX 20) need dtype: float16, bf16: false and fp16: true.")
    for title, values in sections.items():
        lines += ["", f"# {title}", yaml.safe_dump(values, sort_keys=False, width=119, allow_unicode=True).rstrip()]
    return "\n".join(lines) + "\n"
