"""What keeps a test apart from others: its own working directory, Hugging Face home, environment and settings."""

import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate.commands.config.config_args
import datasets.config
import huggingface_hub.constants
import huggingface_hub.utils._cache_manager
import numpy as np
import torch


# Modules that make paths of `HF_HOME` when they are imported. All others ask these
_READERS = (
    huggingface_hub.constants,
    huggingface_hub.utils._cache_manager,
    datasets.config,
    accelerate.commands.config.config_args,
)
_PATHS = [
    (module, name, type(value), Path(value).relative_to(os.environ["HF_HOME"]))
    for module in _READERS
    for name, value in vars(module).items()
    if isinstance(value, str | Path) and Path(value).is_relative_to(os.environ["HF_HOME"])
]


@contextmanager
def hugging_face_home(home: Path) -> Iterator[None]:
    """For a while another Hugging Face home, for this process and those that it starts."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, HF_HOME=str(home)))
        for module, name, kind, path in _PATHS:
            stack.enter_context(patch.object(module, name, kind(home / path)))
        yield


@contextmanager
def isolated(directory: Path, home: Path, weights: Path) -> Iterator[None]:
    """
    Restores what a test may change of its process: working directory, environment, import path, random states, log
    levels, threads, and modules that it imported from its directory.

    Args:
        directory (`Path`):
            Its working directory.
        home (`Path`):
            Its Hugging Face home, an empty folder.
        weights (`Path`):
            Folder of converted weights, which all tests share.
    """
    weights.mkdir(exist_ok=True)
    (home / "trl_sgpo").symlink_to(weights)
    modules = {*sys.modules}
    before, path, threads = os.getcwd(), [*sys.path], torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    levels = [(logger, logger.level, logger.disabled) for logger in [logging.root, *named]]
    answers: Any = sys.modules.get("trl_sgpo.data.answers")
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ))
            stack.enter_context(hugging_face_home(home))
            if answers is not None:  # what was slow in one test is compared in the next one
                stack.enter_context(patch.multiple(answers, _SLOW=set(), _COUNTS=Counter()))
            os.chdir(directory)
            torch.manual_seed(0)
            yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for logger, level, disabled in levels:
            if logger.level != level:  # it clears the caches of all loggers
                logger.setLevel(level)
            logger.disabled = disabled
        for name in {*sys.modules} - modules:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(f"{directory}{os.sep}"):
                del sys.modules[name]
