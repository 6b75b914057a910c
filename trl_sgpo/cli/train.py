"""`trl-sgpo train`: what `trl grpo` is, for SGPO."""

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import AutoTokenizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging
from trl import get_peft_config, get_quantization_config

from ..data.bootstrap import warmstart
from ..data.synthetic import read_traces
from ..data.worked import Trace, traces
from ..errors import ConfigError, DataError, ModelError, SGPOError
from ..evaluation.transfer_score import TransferScore, measure_transfer, wilson_interval
from ..hub.model_card import REPORT_FILE
from ..hub.push import claim
from ..inference.weights import require_model
from ..method.prompts import problem_text
from ..recipe import Recipe, load_data, load_rewards, model_init_kwargs, read_recipe
from ..sgpo_config import SGPOConfig
from ..sgpo_trainer import SHARDED_CHECKPOINTS, SGPOTrainer, with_classes
from ..vram.advice import in_words
from ..vram.estimate import GIB
from .estimate import report
from .text import printable


logger = transformers_logging.get_logger(__name__)

_LAUNCHED = "TRL_SGPO_LAUNCHED"


def main(argv: list[str]) -> int:
    """Trains as the recipe says, through `accelerate launch` where it is asked for or several GPUs are visible."""
    recipe = read_recipe(argv, "trl-sgpo train")
    if _LAUNCHED not in os.environ and "LOCAL_RANK" not in os.environ and _needs_launcher(recipe):
        return _launch(recipe)
    train(recipe)
    return 0


def _needs_launcher(recipe: Recipe) -> bool:
    return bool(recipe.launch) or os.path.isfile(default_config_file) or torch.cuda.device_count() > 1


def _launch(recipe: Recipe) -> int:
    arguments = launch_command_parser().parse_args([*recipe.launch, "--module", "trl_sgpo.cli.train", *recipe.own])
    _check_sharding(arguments)
    os.environ[_LAUNCHED] = "1"
    if not torch.accelerator.is_available() and (arguments.num_processes or 1) > 1:
        # Processes on a CPU are started as those on GPUs are; otherwise a single one is, whatever is asked for
        arguments.multi_gpu, arguments.cpu = True, False
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def _check_sharding(arguments: argparse.Namespace) -> None:
    """On CPUs accelerate takes FSDP for DDP without saying so. Sharded checkpoints are refused before a warm start."""
    sharded, settings = arguments.use_fsdp, vars(arguments)
    if arguments.config_file is not None:
        config = load_config_from_file(arguments.config_file)
        sharded |= config.distributed_type == DistributedType.FSDP
        settings = config.fsdp_config or {}
    if not sharded:
        return
    if not torch.accelerator.is_available():
        raise ConfigError(
            "FSDP needs GPUs, and there are none: on CPUs, `--accelerate_config recipes/accelerate/ddp.yaml` or "
            "`--num_processes 2` trains with the whole model in every process."
        )
    states = str(settings.get("fsdp_state_dict_type") or "").upper()
    if states != "FULL_STATE_DICT" and (states or int(settings.get("fsdp_version") or 1) == 2):  # accelerate's default
        raise ConfigError(SHARDED_CHECKPOINTS)


def train(recipe: Recipe) -> SGPOTrainer:
    """
    Warm-starts, trains, saves and reports as the recipe says.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe.

    Returns:
        [`SGPOTrainer`]: After training.
    """
    script, training = recipe.script, recipe.training
    rewards = load_rewards(script)
    check_memory(recipe)
    _advise_on_bfloat16(recipe)
    model = require_model(recipe.model.model_name_or_path)
    data = load_data(recipe)
    if training.push_to_hub and training.process_index == 0:  # before the warm start, too
        name = training.hub_model_id or Path(training.output_dir).absolute().name
        claim(name, training.hub_token, training.hub_private_repo)
    # Before the warm start, so that a dataset that cannot work says so at once
    train_dataset = with_classes(
        without_long_problems(data[script.dataset_train_split], script.max_problem_tokens, model), training
    )
    training.model_init_kwargs = model_init_kwargs(recipe)
    checkpoint = resume_point(training)
    if script.warmstart_traces > 0 or script.warmstart_file is not None:
        model = warmstart_model(recipe, model, train_dataset)
    trainer = SGPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
    )
    trainer.run_record.recipe = asdict(script) | asdict(recipe.model) | asdict(recipe.mixture)
    trainer.facts = replace(
        trainer.facts,
        base_model=recipe.model.model_name_or_path,
        datasets=tuple(part.path for part in recipe.mixture.datasets) or (script.dataset_name,),
        settings={**trainer.facts.settings, "warmstart_traces": script.warmstart_traces},
    )
    reports = script.report_problems > 0 and trainer.accelerator.num_processes == 1 and not training.use_vllm
    unseen = data[script.dataset_test_split] if reports else None
    before = _measure_before(trainer, unseen, script.report_problems, checkpoint) if reports else None
    if trainer.accelerator.is_main_process:
        Path(training.output_dir, REPORT_FILE).unlink(missing_ok=True)  # of an earlier run
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training.output_dir, _internal_call=True)  # pushed below, with the report
    trainer.accelerator.print(f"Model and strategy bank saved to {training.output_dir}.")
    if before is not None:
        after = _measure(trainer, unseen, script.report_problems)
        scores = {"before": _to_json(before), "after": _to_json(after)}
        Path(training.output_dir, REPORT_FILE).write_text(json.dumps(scores, indent=2))
        print_report(trainer, before, after, recipe)
    trainer.create_model_card()
    failure: SGPOError | None = None
    if training.push_to_hub:
        try:
            commit = trainer.push_to_hub()
            trainer.accelerator.print(f"Pushed to {trainer.hub_model_id} as {commit}.")
        except SGPOError as error:
            failure = error
    if trainer.strategy_bank is not None:
        trainer.strategy_bank.close()
    trainer.accelerator.wait_for_everyone()  # a process that ends while another still saves can abort
    trainer.end()
    if failure is not None:
        raise failure
    return trainer


def _advise_on_bfloat16(recipe: Recipe) -> None:
    used = recipe.training.bf16 or recipe.model.dtype == "bfloat16"
    if used and not torch.accelerator.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "This CPU has no instructions for bfloat16, which takes about seven times longer on it than float32: add "
            "`--dtype float32 --bf16 false`."
        )


def without_long_problems(dataset: Dataset, limit: int | None, model: str) -> Dataset:
    """
    Leaves out problems with more tokens than `limit`, and says how many.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems.
        limit (`int`, *optional*):
            Tokens of a problem's text. If `None`, all problems are kept.
        model (`str`):
            The model whose tokenizer counts.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        [`DataError`]: If no problem is left.
    """
    if limit is None:
        return dataset
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(ids) for ids in tokenizer([problem_text(prompt) for prompt in dataset["prompt"]])["input_ids"]]
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise DataError(f"All problems have more than {limit} tokens: set `max_problem_tokens` to {max(lengths)}.")
    if len(kept) < len(dataset):
        print(f"{len(dataset) - len(kept)} of {len(dataset)} problems have more than {limit} tokens and are left out.")
    return dataset.select(kept)


def check_memory(recipe: Recipe) -> None:
    """
    Refuses a recipe that is estimated to need more memory than it states or the GPU has, before weights are loaded.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe.

    Raises:
        [`ConfigError`]: It does not fit. Names the change that would make it fit.
    """
    script, limits = recipe.script, {}
    if script.vram_gb is not None:
        limits["`vram_gb` of the recipe"] = script.vram_gb
    if torch.cuda.is_available():
        limits["this GPU"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    if not script.check_memory or not limits or recipe.training.use_vllm:
        return
    where = min(limits, key=limits.__getitem__)
    try:
        result = report(recipe, recipe.path or "", limits[where], "cuda")
    except ModelError:
        return  # `require_model` says what is wrong
    if result["peak"] <= limits[where] * GIB:
        return
    change = "train a smaller model" if result["change"] is None else f"add `{in_words(result['change'])}`"
    raise ConfigError(
        f"Training needs an estimated {result['peak'] / GIB:.1f} GB, more than {where} allows "
        f"({limits[where]:.1f} GB): {change}. `trl-sgpo estimate` shows the parts; `--check_memory false` starts "
        "anyway."
    )


def warmstart_model(recipe: Recipe, model: str, dataset: Dataset) -> str:
    """
    Fine-tunes the model on two-phase traces, of a file or worked ones, unless an earlier run of the recipe did.

    Returns:
        `str`: Directory of the fine-tuned model.
    """
    script, training = recipe.script, recipe.training
    if script.warmstart_file is None:
        chosen = _worked_traces(recipe, dataset)
    else:
        chosen = read_traces(script.warmstart_file)
        random.Random(training.seed).shuffle(chosen)
        chosen = chosen[: script.warmstart_traces or len(chosen)]
    return warmstart(
        model,
        chosen,
        training,
        Path(training.output_dir) / "warmstart",
        learning_rate=script.warmstart_learning_rate,
        model_init_kwargs=model_init_kwargs(recipe),
        batch_size=script.warmstart_batch_size,
        plain_share=script.warmstart_plain_share,
        full=not recipe.model.use_peft,
    )


def _worked_traces(recipe: Recipe, dataset: Dataset) -> list[Trace]:
    wanted, seed = recipe.script.warmstart_traces, recipe.training.seed
    repeats = -(-wanted // len(dataset)) + 1
    worked = traces(dataset.shuffle(seed=seed), per_problem=repeats, seed=seed)
    # Every problem's first trace, then every problem's second one
    in_rounds = [worked[i] for start in range(repeats) for i in range(start, len(worked), repeats)]
    return in_rounds[:wanted]


def resume_point(training: SGPOConfig) -> str | None:
    """
    Finds the checkpoint to resume from.

    Args:
        training ([`SGPOConfig`]):
            Its `resume_from_checkpoint` is a directory, or true for the last complete checkpoint in `output_dir`.

    Returns:
        `str` or `None`: A directory, or `None` to start anew.

    Raises:
        [`ConfigError`]: The directory named is no complete checkpoint.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).casefold() in ("false", "no", "none", ""):
        return None
    if str(wanted).casefold() not in ("true", "yes"):
        if not _is_complete(Path(wanted)):
            raise ConfigError(
                f"{wanted} is no complete checkpoint: set `resume_from_checkpoint` to true for the last complete one "
                f"in {training.output_dir}."
            )
        return str(wanted)
    found = sorted(
        (int(path.name.rsplit("-", 1)[1]), str(path))
        for path in Path(training.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rsplit("-", 1)[1].isdigit() and _is_complete(path)
    )
    if not found:
        print(f"{training.output_dir} holds no complete checkpoint: training starts anew.")
        return None
    print(f"Resuming from {found[-1][1]}.")
    return found[-1][1]


def _is_complete(checkpoint: Path) -> bool:
    """A checkpoint is complete once its trainer state, which is written last, can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


Scores = dict[str, TransferScore]


def _to_json(scores: Scores) -> dict[str, Any]:
    return {decoding: score.to_dict() for decoding, score in scores.items()}


def _measure(trainer: SGPOTrainer, unseen: Dataset, problems: int) -> Scores:
    return {
        "sampled": measure_transfer(trainer, unseen, problems, greedy=False),
        "greedy": measure_transfer(trainer, unseen, problems),
    }


def _measure_before(trainer: SGPOTrainer, unseen: Dataset, problems: int, checkpoint: str | None) -> Scores:
    path = Path(trainer.args.output_dir) / "before.json"
    if checkpoint is not None and path.is_file():
        return {decoding: TransferScore(**score) for decoding, score in json.loads(path.read_text()).items()}
    trainer.bank_session.set_aside_old_bank()
    print(f"Measuring on up to {problems} unseen problems before training …")
    scores = _measure(trainer, unseen, problems)
    path.write_text(json.dumps(_to_json(scores)))
    return scores


def print_report(trainer: SGPOTrainer, before: Scores, after: Scores, recipe: Recipe) -> None:
    """Prints accuracy and transfer before and after training, strategies from the bank, and what to run next."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{after['greedy'].problems} unseen problems, with 95% intervals")
    for name in ("", "before", "after"):
        table.add_column(name)
    for decoding in ("sampled", "greedy"):
        scores = (before[decoding], after[decoding])
        table.add_row(
            f"accuracy with own strategy, {decoding}", *(_with_interval(s.accuracy, s.problems) for s in scores)
        )
        table.add_row(
            f"strategy transfer score, {decoding}", *(_with_interval(s.transfer, s.transfers) for s in scores)
        )
    console.print(table)
    correct = [log["sgpo/correctness"] for log in trainer.state.log_history if "sgpo/correctness" in log]
    if len(correct) >= 4:
        quarter = len(correct) // 4
        first, last = sum(correct[:quarter]) / quarter, sum(correct[-quarter:]) / quarter
        console.print(f"Sampled correctness, first and last quarter of steps: {first:.3f} → {last:.3f}")
    bank = trainer.strategy_bank
    if bank is not None and len(bank) > 0:
        trusted = sum(strategy.trust == "trusted" for strategy in bank.strategies())
        console.print(f"\nThree of the {len(bank)} strategies in {bank.path}, {trusted} of them trusted:")
        for strategy in bank.best(3):
            tally = f"{strategy.problem_class}, {strategy.trust}, right {strategy.successes:g} of {strategy.trials}"
            console.print(f"  • {printable(strategy.text)} ({tally})", highlight=False, markup=False)
    output_dir, path = recipe.training.output_dir, recipe.path
    console.print(
        f"\nNext:\n  see curves, rollouts  trl-sgpo report {output_dir}\n"
        f"  read what it learnt   trl-sgpo bank list {output_dir}\n"
        f"  train longer          trl-sgpo train --config {path} --max_steps {2 * trainer.state.global_step} "
        "--resume_from_checkpoint true\n"
        f"  another model         trl-sgpo train --config {path} --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct "
        "--output_dir runs/qwen\n"
        f"  what SGPO costs here  trl-sgpo bench step --config {path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _with_interval(rate: float, trials: int) -> str:
    if trials == 0:
        return "not measured"
    low, high = wilson_interval(rate, trials)
    return f"{rate:.2f} [{low:.2f}, {high:.2f}]"


def _main_of_launched_process() -> Any:
    try:
        return main(sys.argv[1:])
    except SGPOError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"trl-sgpo train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_main_of_launched_process())
