"""Strategy-Guided Policy Optimization (SGPO) for TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .bank import StrategyBank
    from .inference.pipeline import SGPOPipeline
    from .sgpo_config import SGPOConfig
    from .sgpo_trainer import SGPOTrainer
    from .speed.trainer import SharedPromptGRPOTrainer

__all__ = ["SGPOConfig", "SGPOPipeline", "SGPOTrainer", "SharedPromptGRPOTrainer", "StrategyBank", "__version__"]

_MODULES = {
    "SGPOConfig": ".sgpo_config",
    "SGPOPipeline": ".inference.pipeline",
    "SGPOTrainer": ".sgpo_trainer",
    "SharedPromptGRPOTrainer": ".speed.trainer",
    "StrategyBank": ".bank",
}


def __getattr__(name: str) -> Any:
    # torch, trl and chromadb are imported on first use: importing the package and `trl-sgpo --help` stay fast
    if name in _MODULES:
        return vars(import_module(_MODULES[name], __name__))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
