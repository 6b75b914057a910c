"""What SGPO sets otherwise than GRPO: lengths of two phases, rows of a block, rewards, and what it refuses."""

from math import gcd, lcm
from pathlib import Path

from .conversion import Conversion, in_short


BLOCK_SIZE = 2  # SGPO's default
TRL_DEFAULTS = {
    "num_generations": 8,
    "max_completion_length": 512,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
}
STRATEGY_SHARE, MOST_STRATEGY = 4, 128  # a quarter of a completion, at most 128 tokens

OPEN_R1_REWARDS = {
    "accuracy": "accuracy_reward",
    "format": "think_format_reward",
    "soft_overlong_punishment": "get_soft_overlong_punishment",
}
"""Names of open-r1's reward functions, and TRL's functions of the same check."""
VERIFIERS = ("accuracy_reward", "reasoning_accuracy_reward", "answer_reward")
REWARDS = (*VERIFIERS, "think_format_reward", "get_soft_overlong_punishment")


def convert_values(of: Conversion) -> None:
    """Sets what a recipe of GRPO sets otherwise."""
    _refused(of)
    _rewards(of)
    _lengths(of)
    _rows(of)
    _classes(of)


def _refused(of: Conversion) -> None:
    if of.is_on("trust_remote_code"):
        of.drop("trust_remote_code", "code of a model's repository is not run")
    if of.is_on("dataset_streaming"):
        of.drop("dataset_streaming", "problems are sorted into classes, for which all are read")
    if of.values.get("resume_from_checkpoint") is not None:
        of.drop("resume_from_checkpoint", "a checkpoint of GRPO is none of SGPO")
    if of.values.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        of.set("multi_objective_aggregation", "sum_then_normalize", "outcomes are weighted sums of the rewards")
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if of.is_on(key)), None)
    if of.is_on("use_vllm") and quantized is not None:
        of.drop("use_vllm", f"with `{quantized}`, vLLM would generate with other weights than are trained")


def _rewards(of: Conversion) -> None:
    """Names of reward functions, and the verifier first."""
    names = of.values.get("reward_funcs")
    if names is None:
        return
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        of.problems.append(f"`reward_funcs` must be a list of names, got {in_short('reward_funcs', names)}.")
        return
    known = [OPEN_R1_REWARDS.get(name, name) for name in names]
    if wrong := [name for name in known if name not in REWARDS and "." not in name]:
        of.problems += [
            f"`reward_funcs` names {name!r}, which is none of {', '.join(REWARDS)}: write a function of your own as a "
            "dotted path, like my_rewards.reward."
            for name in wrong
        ]
        return
    if known != names:
        of.set("reward_funcs", known, "TRL's functions of the same check")
    if of.values.get("reward_model_name_or_path") is not None:
        of.said("reward_model_name_or_path", "set", "kept", "it comes first and is the verifier: better a function")
        return
    first = next((index for index, name in enumerate(known) if name in VERIFIERS), None)
    if first is None:
        of.said("reward_funcs", known[0], "kept", "the first one is the verifier of outcomes")
    elif first > 0:
        order = [first, *(index for index in range(len(known)) if index != first)]
        weights = of.values.get("reward_weights")
        of.set("reward_funcs", [known[index] for index in order], "the first one is the verifier of outcomes")
        if isinstance(weights, list) and len(weights) == len(order):
            of.set("reward_weights", [weights[index] for index in order], "in the order of the functions")


def _lengths(of: Conversion) -> None:
    """A completion's tokens are shared by the two phases."""
    whole = of.number("max_completion_length", TRL_DEFAULTS["max_completion_length"])
    strategy = max(min(whole // STRATEGY_SHARE, MOST_STRATEGY), 1)
    of.set("max_strategy_length", strategy, f"the strategy's part of the {whole} tokens of a completion")
    of.set("max_completion_length", max(whole - strategy, 1), "the execution's part of them")


def _rows(of: Conversion) -> None:
    """Rows of a problem, of a device and of an evaluation are whole blocks."""
    G = of.number("num_generations", TRL_DEFAULTS["num_generations"])
    rows = max(G + G % BLOCK_SIZE, 2)
    strategies = rows // BLOCK_SIZE
    of.set("transfer_block_size", BLOCK_SIZE, "problems that execute each other's strategies")
    of.set("num_generations", rows, f"rows of a problem: {strategies} strategies, executed on {BLOCK_SIZE} problems")
    block = BLOCK_SIZE * rows
    batch = of.number("per_device_train_batch_size", TRL_DEFAULTS["per_device_train_batch_size"])
    of.set("per_device_train_batch_size", batch, "TRL's default; SGPO's is 16")
    if of.values.get("generation_batch_size") is not None:
        devices = of.number("num_processes", 1)
        total, step = of.number("generation_batch_size", 1), lcm(block, batch) * devices
        of.set("generation_batch_size", -(-total // step) * step, f"whole blocks of {block} rows on each device")
    else:
        given = of.values.get("steps_per_generation") is not None
        key = "steps_per_generation" if given else "gradient_accumulation_steps"
        step = block // gcd(block, batch)
        steps = -(-of.number(key, 1) // step) * step
        of.set(key, steps, f"whole blocks of {block} rows on each device, {batch * steps} rows in all")
    if of.values.get("eval_strategy", "no") not in ("no", False):
        whole = of.number("num_generations_eval", rows)
        size = of.number("per_device_eval_batch_size", TRL_DEFAULTS["per_device_eval_batch_size"])
        of.set("per_device_eval_batch_size", -(-size // whole) * whole, f"all {whole} rows of a problem")


def _classes(of: Conversion) -> None:
    if "class_column" not in of.values:
        of.set("small_classes", "merge", "classes are clusters of the problems, unless a column names them")


def move_outputs(of: Conversion, stem: str) -> None:
    """Leaves the outputs of GRPO where they are."""
    directory = of.values.get("output_dir") or f"runs/{stem}"
    if isinstance(directory, str):  # another value is left to the check of the recipe
        of.set("output_dir", f"{Path(directory).as_posix()}-sgpo", "what GRPO wrote stays")
    if isinstance(of.values.get("hub_model_id"), str):
        of.set("hub_model_id", f"{of.values['hub_model_id']}-sgpo", "what GRPO pushed stays")
