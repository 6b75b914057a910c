"""The strategy bank: strategies with provenance, verified executions and trust, retrieved for problems."""

from .bank import StrategyBank
from .embedding import load_embedder
from .strategy import Execution, Outcome, Retrieved, Strategy, problem_id


__all__ = ["Execution", "Outcome", "Retrieved", "Strategy", "StrategyBank", "load_embedder", "problem_id"]
