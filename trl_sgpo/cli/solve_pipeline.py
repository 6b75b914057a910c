"""The pipeline that `trl-sgpo solve` uses: a model or a server, and a bank."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.terminal import printable
from ..errors import BankError, BankInUseError, ConfigError


if TYPE_CHECKING:
    from ..bank.strategy import Strategy
    from ..inference.pipeline import SGPOPipeline

_CLASSES = 6  # named in the line about the bank
LIMITS = ("max_strategy_length", "max_completion_length", "num_retrieved")


def open_pipeline(options: argparse.Namespace) -> "SGPOPipeline":
    """Opens what the options of `solve` name, and says on standard error which bank is used."""
    from ..compare.lab.model import prepare_model
    from ..inference.pipeline import SGPOPipeline
    from ..inference.server import TOKEN_VARIABLE

    bank = options.bank or "auto" if _shows_strategies(options) else None
    try:
        if options.server is not None:
            pipeline = SGPOPipeline.from_server(
                options.server,
                options.model,
                bank,
                options.run,
                revision=options.revision,
                trust_bank=options.trust_bank,
                embedding_model=options.embedding_model,
                token=os.environ.get(TOKEN_VARIABLE),
                concurrency=options.concurrency,
                timeout=options.timeout,
                retries=2 if options.input is None else 5,
            )
        else:
            _check_device(options.device)
            prepare_model(options.model)
            pipeline = SGPOPipeline.from_pretrained(
                options.model,
                bank,
                options.run,
                batch_size=options.batch_size,
                device=options.device,
                revision=options.revision,
                trust_bank=options.trust_bank,
                embedding_model=options.embedding_model,
                dtype=options.dtype,
                **_quantization(options),
            )
    except BankInUseError as error:
        raise BankError(f"The bank is in use by {error.holder}. {_copy_to_use(options)}") from error
    except BankError as error:
        raise BankError(f"{error} Or name another by `--bank`, or solve without: `--no_bank`.") from error
    given = {name: vars(options)[name] for name in LIMITS if vars(options)[name] is not None}
    pipeline.model.settings = replace(pipeline.model.settings, **given)
    _tell_bank(pipeline, options)
    return pipeline


def _shows_strategies(options: argparse.Namespace) -> bool:
    return not (options.no_bank or options.plain or options.strategy is not None)


def _copy_to_use(options: argparse.Namespace) -> str:
    """What to do where the bank is in use: its copy in the last checkpoint of the run can be read."""
    from transformers.trainer_utils import get_last_checkpoint

    from ..bank.files import BANK_DIRECTORY

    run = Path(options.bank or options.run or options.model)
    run = run.parent if run.name == BANK_DIRECTORY else run
    checkpoint = get_last_checkpoint(str(run)) if run.is_dir() else None
    if checkpoint is None:
        return "`--bank` takes a copy of it, which is in each checkpoint of the run. Or solve without: `--no_bank`."
    return f"`--bank` takes a copy of it, such as `--bank {checkpoint}`. Or solve without: `--no_bank`."


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of a build of PyTorch without such devices
        raise ConfigError(f"`--device {device}` cannot be used: {str(error).partition(chr(10))[0]}") from error


def _quantization(options: argparse.Namespace) -> dict[str, Any]:
    if not options.load_in_4bit:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config}


def _for_classes(strategies: "Sequence[Strategy]") -> str:
    """What the strategies were written for: a problem unlike these is one that the bank knows nothing about."""
    classes = sorted({strategy.problem_class for strategy in strategies})
    more = f" and {len(classes) - _CLASSES} other classes" if len(classes) > _CLASSES else ""
    return f" for {printable(', '.join(classes[:_CLASSES]), kept='')}{more}" if classes else ""


def _tell_bank(pipeline: "SGPOPipeline", options: argparse.Namespace) -> None:
    if pipeline.pulled is not None:
        print(f"Pulled {pipeline.pulled}.", file=sys.stderr)
    if not _shows_strategies(options):
        return
    if pipeline.bank is None:
        where = options.run or options.model
        text = f"There is no strategy bank in {where}: none is shown." if where else "No strategy bank: none is shown."
        if options.server is not None and options.run is None and not Path(options.model or "").is_dir():
            text = "No strategies of a bank are shown, and the default prompts are used: name the run by `--run`."
    else:
        strategies = pipeline.bank.strategies()
        trusted = sum(strategy.trust == "trusted" for strategy in strategies)
        text = f"Bank: {len(strategies)} strategies{_for_classes(strategies)}, {trusted} of them trusted, "
        text += "which may be shown." if trusted else "so none is shown: the model writes its strategy alone."
        from_hub = pipeline.pulled is not None and options.bank is None
        if options.trust_bank or (from_hub and (options.run is None or options.server is not None)):
            where = options.bank or pipeline.pulled
            text = f"Bank of {where}: {len(strategies)} strategies, {trusted} of them trusted there, as far as its "
            text += "author goes, which may be shown."
    print(text, file=sys.stderr)
