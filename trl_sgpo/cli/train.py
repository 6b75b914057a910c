"""`trl-sgpo train`: what `trl grpo` is, for SGPO."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers.utils import logging as transformers_logging
from trl import get_peft_config, get_quantization_config

from ..bank.embedding import load_embedder
from ..bank.files import BANK_DIRECTORY
from ..bank.statistics import best_known_lift
from ..bank.strategy import problem_id
from ..checks.command import INTERRUPTED
from ..checks.damaged import expect_readable
from ..checks.json_text import read_json
from ..checks.secrets import arguments_without_secrets
from ..checks.setup import setup_problems
from ..checks.sharding import FSDP_ON_CPUS, SHARDED_CHECKPOINTS
from ..checks.terminal import printable
from ..compare.lab.model import fetch_model
from ..data.classes import with_classes
from ..data.loading import load_data, load_rewards, reward_problems, without_long_problems
from ..data.warmstart import warmstart_model
from ..errors import ConfigError, DataError, SGPOError
from ..evaluation.block_transfer import TransferScore, chosen_problems, measure_transfer
from ..evaluation.digest import changes, depends_on, digest
from ..files import write_file
from ..hub.card_results import check_scores
from ..hub.push import claim
from ..inference.pretrained import load_config, load_tokenizer, loading
from ..inference.settings import TwoPhaseSettings
from ..method.context_length import check_context_length, shown_strategies
from ..method.conversation import check_system_role
from ..method.reward_functions import check_columns_read
from ..recipe import Recipe, model_init_kwargs, read_recipe, resume_point
from ..report.run_files import BEFORE_FILE, REPORT_FILE
from ..run.directory import Run, begin_run, last_checkpoint
from ..run.output_lock import held
from ..run.step_lines import print_step_lines, training_columns, training_legend
from ..sgpo_trainer import SGPOTrainer
from ..vram.check import check_memory
from .scores import print_scores


logger = transformers_logging.get_logger(__name__)

_LAUNCHED = "TRL_SGPO_LAUNCHED"


def main(argv: list[str]) -> int:
    """Trains a recipe, through `accelerate launch` if the recipe sets its options or several GPUs are visible."""
    recipe = read_recipe(argv, "trl-sgpo train", _problems)
    launched = _LAUNCHED in os.environ
    try:
        if not launched and "LOCAL_RANK" not in os.environ and _needs_launcher(recipe):
            return _launch(recipe)
        with held(recipe.training.output_dir, recipe.training.should_save):
            train(recipe)
    except KeyboardInterrupt:
        if launched:
            return INTERRUPTED  # the launching process says it
        raise KeyboardInterrupt(_what_is_kept(argv, recipe.training.output_dir)) from None
    return 0


def _what_is_kept(argv: list[str], output_dir: str) -> str:
    """What an interrupted run leaves, and the command that goes on."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        return f"{output_dir} holds no checkpoint yet (`save_steps`): the same command starts anew."
    command = _command(["train"], argv, resume_from_checkpoint="true")
    return f"{checkpoint} is kept. To go on from there: {command}"


def _command(name: list[str], argv: list[str], **changed: str | None) -> str:
    """A command with options as they were given, but for some that are set, or left out where the value is `None`."""
    groups: list[list[str]] = [[]]
    for argument in argv:  # an option and its values
        groups += [[]] if argument.startswith("--") else []
        groups[-1].append(argument)
    kept = [group for group in groups if not group or _key(group[0]) not in changed]
    options = [[f"--{key}", value] for key, value in changed.items() if value is not None]
    return shlex.join(["trl-sgpo", *name, *arguments_without_secrets([*chain.from_iterable([*kept, *options])])])


def _key(option: str) -> str:
    return option.lstrip("-").partition("=")[0].replace("-", "_")


def _problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [*setup_problems(values), *reward_problems(values)]


def _needs_launcher(recipe: Recipe) -> bool:
    return bool(recipe.launch) or os.path.isfile(default_config_file) or torch.cuda.device_count() > 1


def _launch(recipe: Recipe) -> int:
    command = ["--module", "trl_sgpo.cli.main", "train", *recipe.own]
    arguments = launch_command_parser().parse_args([*recipe.launch, *command])
    config = load_config_from_file(arguments.config_file) if arguments.config_file is not None else None
    asked = None if config is None else config.distributed_type
    if arguments.use_fsdp or asked == DistributedType.FSDP:
        _check_fsdp(vars(arguments) if config is None else config.fsdp_config or {})
    os.environ[_LAUNCHED] = "1"
    deepspeed = arguments.use_deepspeed or asked == DistributedType.DEEPSPEED
    if not (deepspeed or torch.accelerator.is_available()) and (arguments.num_processes or 1) > 1:
        # Without these, accelerate starts a single process on a CPU. With them, it does not use DeepSpeed
        arguments.multi_gpu, arguments.cpu = True, False
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise
    return 0


def _check_fsdp(settings: Mapping[str, Any]) -> None:
    """Refuses FSDP on CPUs, where accelerate silently uses DDP, and sharded checkpoints."""
    if not torch.accelerator.is_available():
        raise ConfigError(FSDP_ON_CPUS)
    states = str(settings.get("fsdp_state_dict_type") or "").upper()
    if states != "FULL_STATE_DICT" and (states or int(settings.get("fsdp_version") or 1) == 2):  # accelerate's default
        raise ConfigError(SHARDED_CHECKPOINTS)


def train(recipe: Recipe) -> SGPOTrainer:
    """
    Runs a recipe: warm start, training, saving, measurements before and after, push.

    Args:
        recipe ([`~trl_sgpo.recipe.Recipe`]):
            The recipe.

    Returns:
        [`SGPOTrainer`]: After training.
    """
    script, training = recipe.script, recipe.training
    training.disable_tqdm = training.disable_tqdm or not sys.stderr.isatty()  # bars are no lines of a log
    rewards = load_rewards(script)
    quantization_config, peft_config = get_quantization_config(recipe.model), get_peft_config(recipe.model)
    check_memory(recipe)
    _advise_on_bfloat16(recipe)
    model = fetch_model(recipe.model.model_name_or_path)
    data = load_data(recipe)
    if training.push_to_hub and training.process_index == 0:  # raises errors before the warm start
        name = training.hub_model_id or Path(training.output_dir).absolute().name
        claim(name, training.hub_token, training.hub_private_repo)
    # Before the warm start, so that errors of dataset, chat template and embedding model are raised at once
    train_dataset = with_classes(
        without_long_problems(data[script.dataset_train_split], script.max_problem_tokens, model), training
    )
    check_columns_read(rewards, train_dataset.column_names)
    config, tokenizer = load_config(model), load_tokenizer(model)
    check_system_role(tokenizer, train_dataset[0]["prompt"], training.chat_template_kwargs)
    also = None
    if training.eval_strategy != "no" or script.report_problems > 0:
        also = _unseen(data[script.dataset_test_split], train_dataset, script.dataset_test_split)
    prompts = [*train_dataset["prompt"], *([] if also is None else also["prompt"])]
    conversation = TwoPhaseSettings.from_config(training).conversation(tokenizer)
    check_context_length(config, conversation, prompts, training, shown_strategies(training))
    if training.use_bank and training.process_index == 0:
        load_embedder(training.embedding_model)
    training.model_init_kwargs = model_init_kwargs(recipe)
    with training.main_process_first(local=training.save_on_each_node):
        checkpoint = resume_point(training)
        run = _begin_run(recipe, checkpoint) if training.should_save else None
    if script.warmstart_traces > 0 or script.warmstart_file is not None:
        model = warmstart_model(recipe, model, train_dataset)
    with loading(model):
        trainer = SGPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=also if training.eval_strategy != "no" else None,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
    print_step_lines(trainer, training_columns(training), training_legend(training))
    trainer.run = run
    trainer.run_record.recipe = asdict(script) | asdict(recipe.model) | asdict(recipe.mixture) | asdict(recipe.columns)
    trainer.facts = replace(
        trainer.facts,
        base_model=recipe.model.model_name_or_path,
        datasets=tuple(part.path for part in recipe.mixture.datasets) or (script.dataset_name,),
        settings={**trainer.facts.settings, "warmstart_traces": script.warmstart_traces},
    )
    reports = script.report_problems > 0 and trainer.accelerator.num_processes == 1 and not training.use_vllm
    before = None
    if reports:
        of = _measured_on(trainer, also, script.report_problems, rewards)
        before = _measure_before(trainer, also, script.report_problems, of, checkpoint)
    if trainer.accelerator.is_main_process:
        Path(training.output_dir, REPORT_FILE).unlink(missing_ok=True)  # of the run that is resumed
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training.output_dir, _internal_call=True)  # pushed below, with the report
    trainer.accelerator.print(f"Model and strategy bank saved to {training.output_dir}.")
    if reports:
        scores = {} if before is None else {"before": before}
        trainer.accelerator.print("Measuring after training …")
        scores["after"] = _measure(trainer, also, script.report_problems)
        write_file(Path(training.output_dir, REPORT_FILE), json.dumps(scores, indent=2))
        print_results(trainer, scores, recipe)
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
    trainer.accelerator.wait_for_everyone()  # a process that exits while another still saves can abort it
    trainer.end()
    if failure is not None:
        raise failure
    return trainer


def _begin_run(recipe: Recipe, checkpoint: str | None) -> Run:
    """Makes the output folder that of this run, before a warm start or a bank is written there."""
    training = recipe.training
    bank = Path(training.output_dir, BANK_DIRECTORY)
    continued = training.bank_path is not None and Path(training.bank_path).resolve() == bank.resolve()
    inputs = [recipe.model.model_name_or_path, recipe.script.reward_model_name_or_path]
    inputs += [] if continued else [training.bank_path]
    return begin_run(training.output_dir, checkpoint, [BANK_DIRECTORY] if continued else [], inputs)


def _advise_on_bfloat16(recipe: Recipe) -> None:
    used = recipe.training.bf16 or recipe.model.dtype == "bfloat16"
    if used and not torch.accelerator.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "This CPU has no instructions for bfloat16, which takes about seven times longer on it than float32: add "
            "`--dtype float32 --bf16 false`."
        )


def _unseen(problems: Dataset, trained: Dataset, split: str) -> Dataset:
    """The problems of a split that are not among those that are trained on."""
    known = set(map(problem_id, trained["prompt"]))
    kept = [index for index, prompt in enumerate(problems["prompt"]) if problem_id(prompt) not in known]
    if not kept:
        raise DataError(
            f"All problems of the split `{split}` are trained on: name another `dataset_test_split`, or set "
            "`report_problems: 0` and `eval_strategy: no`."
        )
    if len(kept) < len(problems):
        print(
            f"{len(problems) - len(kept)} of {len(problems)} problems of the split `{split}` are trained on and left "
            "out of measurements."
        )
    return problems.select(kept)


Scores = dict[str, dict[str, Any]]
"""By decoding, the values of a [`TransferScore`]."""


def _measure(trainer: SGPOTrainer, unseen: Dataset, problems: int) -> Scores:
    def measured(greedy: bool) -> dict[str, Any]:
        def tell(done: int, of: int) -> None:
            if trainer.accelerator.is_main_process:
                print(f"  {done} of {of}, {'greedy' if greedy else 'sampled'}", flush=True)

        return measure_transfer(trainer, unseen, problems, greedy, tell).to_dict()

    return {"sampled": measured(greedy=False), "greedy": measured(greedy=True)}


def _measured_on(trainer: SGPOTrainer, unseen: Dataset, problems: int, rewards: list[Any]) -> dict[str, Any]:
    """What figures before and after training must have in common."""
    chosen = unseen.select(chosen_problems(trainer, unseen, problems))
    return {
        **asdict(TwoPhaseSettings.from_config(trainer.args)),
        "problems": digest([list(map(problem_id, chosen["prompt"])), trainer.geometry.problems])[:16],
        "verifier": depends_on(rewards=rewards[:1])["verifier_source"],
        **{name: vars(trainer.args)[name] for name in ("seed", "temperature", "top_p", "top_k", "min_p")},
    }


def _measure_before(
    trainer: SGPOTrainer, unseen: Dataset, problems: int, of: dict[str, Any], checkpoint: str | None
) -> Scores | None:
    """Figures before training, `None` if a resumed run has none that can be compared with those after it."""
    path = Path(trainer.args.output_dir) / BEFORE_FILE
    if checkpoint is None:
        print(f"Measuring on up to {problems} unseen problems before training …")
        scores = _measure(trainer, unseen, problems)
        write_file(path, json.dumps({"of": of, "scores": scores}))
        return scores
    with expect_readable(path):
        stored = read_json(path) if path.is_file() else {}
        found = changes(stored.get("of", {}), of) if stored else "nothing was measured before training"
        if found is None:
            check_scores(stored["scores"])
            return {decoding: TransferScore(**score).to_dict() for decoding, score in stored["scores"].items()}
    print(f"There are no figures before training, as those after it would be measured otherwise: {found}.")
    return None


def print_results(trainer: SGPOTrainer, scores: dict[str, Scores], recipe: Recipe) -> None:
    """Prints figures before and after training, the best strategies, and commands to run next."""
    from ..checks.console import console

    terminal = console()
    print_scores(scores, trainer.state.log_history)
    bank = trainer.strategy_bank
    if bank is not None and len(bank) > 0:
        trusted = sum(strategy.trust == "trusted" for strategy in bank.strategies())
        best = bank.best(3)
        terminal.print(f"\nStrategies in {bank.path}: {len(bank)}, of which {trusted} trusted. The best {len(best)}:")
        for strategy in best:
            tally = f"{strategy.problem_class}, {strategy.trust}, right {strategy.successes:g} of {strategy.trials}"
            tally += f", {best_known_lift(strategy)}"
            terminal.print(f"  • {printable(strategy.text)} ({tally})", highlight=False)
    output_dir = recipe.training.output_dir
    steps, own = str(2 * trainer.state.global_step), recipe.own
    longer = _command(["train"], own, max_steps=steps, resume_from_checkpoint="true")
    measured_here = _command(["bench", "step"], own, resume_from_checkpoint=None)
    model = "Qwen/Qwen2.5-0.5B-Instruct"
    other = _command(["train"], own, model_name_or_path=model, output_dir="runs/qwen", resume_from_checkpoint=None)
    terminal.print(
        f"\nNext:\n  see curves, rollouts  trl-sgpo report {output_dir}\n"
        f"  read what it learnt   trl-sgpo bank list {output_dir}\n"
        f"  train longer          {longer}\n"
        f"  another model         {other}\n"
        f"  what SGPO costs here  {measured_here}",
        highlight=False,
        soft_wrap=True,
    )
