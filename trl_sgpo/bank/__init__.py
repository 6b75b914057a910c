"""The strategy bank: strategies that proved themselves, kept on disk and found again by the problems they may help."""

from .bank import StrategyBank
from .embedding import load_embedder
from .strategy import Execution, Outcome, Retrieved, Strategy, problem_id


__all__ = ["Execution", "Outcome", "Retrieved", "Strategy", "StrategyBank", "load_embedder", "problem_id"]
