"""Whether the rows of a problem, of a device and of a generation are whole transfer blocks."""

from typing import Any

from ..errors import ConfigError


def check_block(args: Any) -> None:
    """
    Checks the rows of a problem: n * K + b executions of strategies and m plain ones, or plain ones only.

    Raises:
        [`ConfigError`]: They do not add up to `num_generations`, leave a strategy with nothing to be compared with, or
            leave plain answers with nothing to learn from.
    """
    _check_geometry(args)
    _check_plain_answers(args)


def _check_geometry(args: Any) -> None:
    K, G, b, m = args.transfer_block_size, args.num_generations, args.num_bank_rollouts, args.num_plain_rollouts
    if K < 1 or b < 0 or m < 0:
        raise ConfigError(
            f"`transfer_block_size` must be at least 1, and `num_bank_rollouts` and `num_plain_rollouts` at least 0, "
            f"got {K}, {b} and {m}."
        )
    if args.strategy_column is not None:
        _check_given(args)
        if b + m == G:
            return  # no strategy is written
    if m == G and b == 0:
        return  # GRPO
    own, others = G - b - m, b + m
    taken = f"num_bank_rollouts ({b})" + (f" + num_plain_rollouts ({m})" if m else "")
    fit = max(own - own % K, K, 2) + others
    if own < K or own % K:
        single = K > 1 and own >= 2 and args.execution_baseline == "problem"
        raise ConfigError(
            f"num_generations ({G}) must be n * transfer_block_size ({K}) + {taken} with n >= 1: "
            f"set num_generations to {fit} or {fit + K}{', or transfer_block_size to 1' if single else ''}."
            f"{_batch_of(args, fit)}{_batch_of(args, fit + K)}"
        )
    if own < 2:
        raise ConfigError(
            f"A block needs at least 2 strategies to compare, but num_generations ({G}) - {taken.replace('+', '-')} "
            f"leaves {own}: set num_generations to {fit}.{_batch_of(args, fit)}"
        )
    n, more = own // K, f"set num_generations to {2 * K + others}"
    if K > 1 and n == 1 and args.transfer_weight == 0 and args.correctness_weight != 0:
        raise ConfigError(
            "`transfer_weight` is 0 and each problem writes one strategy, which can be compared with those of "
            f"other problems only, and that rewards transfer: {more}, or set transfer_block_size to 1, or "
            "transfer_weight above 0."
        )
    if K > 1 and own + b - n == 1 and args.correctness_weight == 0 and args.transfer_weight != 0:
        raise ConfigError(
            "`correctness_weight` is 0 and each problem executes one borrowed strategy, which can be compared "
            f"with its own only, and that rewards correctness: {more}, or set correctness_weight above 0."
        )
    if K == 1 and args.execution_baseline != "problem":
        raise ConfigError(
            f"execution_baseline={args.execution_baseline!r} needs strategies executed on several problems: set "
            "transfer_block_size to 2 or more, or execution_baseline to 'problem'."
        )


def _check_given(args: Any) -> None:
    if args.use_bank or args.transfer_block_size != 1 or args.num_bank_rollouts < 2:
        raise ConfigError(
            "`strategy_column` gives each problem its strategy: set `use_bank` to false, `transfer_block_size` to 1, "
            "and `num_bank_rollouts` to the number of its executions, at least 2."
        )


def _check_plain_answers(args: Any) -> None:
    kind, own, m = args.internalize, args.own_strategies, args.num_plain_rollouts
    if args.retrieve_when == "plain_fails" and not (m and args.use_bank and args.num_retrieved):
        raise ConfigError(
            "`retrieve_when: plain_fails` needs plain rows and strategies to show: set `num_plain_rollouts` and "
            "`num_retrieved` above 0, and `use_bank` to true."
        )
    if kind == "none" and args.internalize_weight is not None:
        raise ConfigError("`internalize_weight` is set but `internalize` is `none`: set `internalize`, or remove it.")
    if kind == "distill" and own < 1:
        other = "lower `num_plain_rollouts`" if m == args.num_generations else "set `internalize: kl`"
        raise ConfigError(
            "`internalize: distill` learns from strategies that the model writes, and no row writes one: raise "
            f"`num_generations`, or {other}."
        )
    if kind == "kl" and m == args.num_generations:
        raise ConfigError(
            "`internalize: kl` learns from rows with strategies, and all rows are plain: set `num_plain_rollouts` "
            "below `num_generations`."
        )
    if kind == "contrast" and (m < 2 or own < 1 or args.transfer_block_size < 2):
        raise ConfigError(
            "`internalize: contrast` changes plain rows by strategies that solve other problems of their class: set "
            "`num_plain_rollouts` to at least 2 (one alone has no advantage to change) and below `num_generations`, "
            "and `transfer_block_size` to at least 2."
        )


def _batch_of(args: Any, generations: int) -> str:
    """What batches lack for another value of `num_generations`, so that one message names all changes."""
    block, steps = args.transfer_block_size * generations, args.steps_per_generation
    rows = args.per_device_train_batch_size * (steps or args.gradient_accumulation_steps)
    text = ""
    if args.generation_batch_size is None and rows % block:
        name = "gradient_accumulation_steps" if steps is None else "steps_per_generation"
        text += f" With {generations}, per_device_train_batch_size * {name} ({rows}) must be a multiple of {block}."
    evaluated = args.num_generations_eval or generations
    if args.eval_strategy != "no" and args.per_device_eval_batch_size % evaluated:
        text += (
            f" With {generations}, per_device_eval_batch_size ({args.per_device_eval_batch_size}) must be a "
            f"multiple of {evaluated}."
        )
    return text


def check_local_batch(args: Any) -> None:
    """
    Checks the rows of a device, before TRL does, whose message names no fix.

    Raises:
        [`ConfigError`]: They are no whole blocks.
    """
    rows = args.per_device_train_batch_size
    per_generation = args.steps_per_generation or args.gradient_accumulation_steps
    name = "gradient_accumulation_steps" if args.steps_per_generation is None else "steps_per_generation"
    if missing := _missing_rows(args, rows * per_generation):
        raise _no_whole_blocks(
            args,
            f"per_device_train_batch_size ({rows}) * {name} ({per_generation}) = {rows * per_generation}",
            f"set per_device_train_batch_size or {name} so that it is {rows * per_generation + missing}",
        )


def check_generation_batch(args: Any) -> None:
    """
    Checks the rows of a generation, after TRL, which finds the number of devices.

    Raises:
        [`ConfigError`]: A device has no whole blocks.
    """
    total, devices = args.generation_batch_size, args.world_size
    if missing := _missing_rows(args, total // devices):
        raise _no_whole_blocks(
            args,
            f"generation_batch_size ({total}) / number of devices ({devices}) = {total // devices}",
            f"set generation_batch_size to {total + missing * devices}",
        )


def _missing_rows(args: Any, local: int) -> int:
    return -local % (args.transfer_block_size * args.num_generations)


def _no_whole_blocks(args: Any, local: str, fix: str) -> ConfigError:
    K, G = args.transfer_block_size, args.num_generations
    return ConfigError(
        f"One device generates {local} rows at a time, which must be a multiple of transfer_block_size ({K}) * "
        f"num_generations ({G}) = {K * G}, so that a block stays on one device: {fix}."
    )
