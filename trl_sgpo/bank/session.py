"""A trainer's use of a bank: retrieval before a rollout, outcomes after it, a commit after the optimizer step."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from ..errors import BankStorageError
from ..inference.retrieval import with_retrieved
from ..method.admission import outcomes, proposals
from ..method.credit import Credit
from ..method.problem import Problem
from ..method.prompts import ParsedStrategy
from ..method.rollout import Rollout, RolloutBatch, written_strategies
from ..method.transfer import BlockGeometry
from ..sgpo_config import SGPOConfig
from .bank import StrategyBank
from .files import BANK_DIRECTORY
from .shared import SharedBank
from .strategy import Outcome, Strategy, problem_id


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """
    Admitted strategies, outcomes and shown strategies of a rank's rollouts.

    Args:
        admitted (`list[Strategy]`):
            New strategies to store.
        outcomes (`list[Outcome]`):
            Outcomes of all executed strategies.
        shown (`list[str]`):
            Ids of the strategies that requests quoted.
    """

    admitted: list[Strategy]
    outcomes: list[Outcome]
    shown: list[str]


def in_blocks(values: list, size: int) -> list[list]:
    """Cuts a list into parts of `size`."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def _seed(*parts: int) -> int:
    return hash(parts) % 2**32


class BankSession:
    """
    The bank of a training run. Rank 0 holds it; on other ranks nothing is read or written.

    Args:
        bank ([`StrategyBank`], *optional*):
            A bank that is open already. If `None`, one is opened as `args` says. Ignored without `args.use_bank`.
        args ([`SGPOConfig`]):
            Configuration of the run.
        count_tokens (`Callable`):
            Number of tokens of a text. It is called from the first rollout on.

    Attributes:
        bank ([`StrategyBank`] or `None`): The bank, on rank 0 only.
    """

    def __init__(self, bank: StrategyBank | None, args: SGPOConfig, count_tokens: Callable[[str], int]):
        self.args, self.count_tokens = args, count_tokens
        self.starts_empty = bank is None and args.bank_path is None
        if not args.use_bank:
            bank = None
        if args.process_index > 0 and bank is not None:
            bank.close()  # one process may have a bank open
            bank = None
        if bank is None and args.use_bank and args.process_index == 0:
            bank = StrategyBank(
                args.bank_path or os.path.join(args.output_dir, BANK_DIRECTORY),
                embedding_model=args.embedding_model,
                capacity_per_class=args.bank_capacity,
                min_problems=args.bank_min_problems,
                tolerance=args.bank_tolerance,
                max_share=args.bank_max_share,
            )
        self.bank = bank
        self.shared: SharedBank | None = None
        if bank is not None and args.bank_server is not None:
            self.shared = SharedBank(bank, args.bank_server)
        self._admitted: list[Strategy] = []
        self._outcomes: list[Outcome] = []
        self._shown = Counter[str]()
        self.merged: dict[str, str] = {}  # classes that training merged with others
        self._too_long: dict[str, bool] = {}
        self._waits = False  # whether the last commit could not be written

    # Before a rollout

    def plan(self, problems: list[Problem], geometry: BlockGeometry, training: bool, step: int) -> RolloutBatch:
        """
        Retrieves strategies for problems, and draws the strategies of the bank that blocks execute.

        No problem is shown a strategy that was written for it. Candidates are shown in training only, where their
        outcomes are verified. Strategies of others that are far longer than `max_strategy_length` are left out.

        Args:
            problems (`list[Problem]`):
                Problems in block order.
            geometry ([`~trl_sgpo.method.transfer.BlockGeometry`]):
                Shape of the blocks.
            training (`bool`):
                Whether the rollouts are trained on.
            step (`int`):
                Optimizer steps so far, which seed the draws.
        """
        bank, args = self.bank, self.args
        if bank is None:
            return RolloutBatch.without_bank(problems, geometry)
        problems = with_retrieved(
            problems,
            bank,
            args.num_retrieved,
            args.bank_cross_class,
            trust=("trusted", "candidate") if training else ("trusted",),
            explore=_seed(args.seed, step) if training else None,
            merged=self.merged,
        )
        problems = [
            problem if all(map(self._fits, problem.retrieved)) else self._with_short(problem) for problem in problems
        ]
        drawn = [
            bank.sample(
                block[0].problem_class,
                k=geometry.bank,
                seed=_seed(args.seed, step, index),
                exclude={problem_id(problem.prompt) for problem in block},
            )
            if geometry.bank
            else []
            for index, block in enumerate(in_blocks(problems, geometry.problems))
        ]
        return RolloutBatch(problems, geometry, [[*filter(self._fits, block)] for block in drawn])

    def _with_short(self, problem: Problem) -> Problem:
        shown = zip(problem.retrieved, problem.similarities, strict=True)
        kept = [(strategy, similarity) for strategy, similarity in shown if self._fits(strategy)]
        return replace(
            problem,
            retrieved=tuple(each for each, _ in kept),
            similarities=tuple(similarity for _, similarity in kept),
        )

    def _fits(self, strategy: Strategy) -> bool:
        """Whether the model may have written the strategy: when it is encoded again, it can have more tokens."""
        if strategy.id not in self._too_long:
            longest = 2 * self.args.max_strategy_length + 32
            self._too_long[strategy.id] = self.count_tokens(strategy.text) > longest
            if self._too_long[strategy.id] and sum(self._too_long.values()) == 1:
                logger.warning(
                    "The bank has strategies with far more tokens than `max_strategy_length`, %d, which are not shown "
                    "or executed: raise it, or retire them (`trl-sgpo bank retire`).",
                    self.args.max_strategy_length,
                )
        return not self._too_long[strategy.id]

    # After rewards

    def observe(
        self, batch: RolloutBatch, rollouts: Sequence[Rollout], credit: Credit, model: str, step: int
    ) -> Observation:
        """
        Collects admitted strategies and outcomes from a rank's rollouts.

        Args:
            batch ([`~trl_sgpo.method.rollout.RolloutBatch`]):
                What was generated.
            rollouts (`Sequence[Rollout]`):
                Its rows.
            credit ([`~trl_sgpo.method.credit.Credit`]):
                Their verified outcomes.
            model (`str`):
                Name of the model that wrote the strategies.
            step (`int`):
                Optimizer step in which they are trained.
        """
        geometry = batch.geometry
        run = os.path.basename(os.path.normpath(self.args.output_dir))

        def strategy(parsed: ParsedStrategy, problem: Problem) -> Strategy:
            return Strategy(
                text=parsed.text,
                problem_class=problem.problem_class,
                source_problems=(problem_id(problem.prompt),),
                parents=tuple(shown.id for shown in problem.retrieved),
                model=model,
                run=run,
                step=step,
            )

        pairs = list(zip(written_strategies(rollouts), batch.written_for(), strict=True))
        written = in_blocks([strategy(parsed, problem) for parsed, problem in pairs], geometry.written)
        sound = [parsed.flaw is None for parsed, _ in pairs]
        executed = [
            [s.id for s in (*own, *drawn, *(own[slot % len(own)] for slot in range(len(drawn), geometry.bank)))]
            for own, drawn in zip(written, batch.bank, strict=True)
        ]
        texts = {problem_id(problem.prompt): problem.text for problem in batch.problems}
        problems = in_blocks([problem_id(problem.prompt) for problem in batch.problems], geometry.problems)
        classes = [problem.problem_class for problem in batch.problems[:: geometry.problems]]
        return Observation(
            proposals(
                written,
                credit.verified,
                geometry.own,
                credit.leaked,
                in_blocks(sound, geometry.written),
                self.args.bank_min_lift,
            ),
            [
                replace(outcome, text=texts[outcome.problem])
                for outcome in outcomes(executed, problems, classes, credit.verified, credit.plain)
            ],
            [shown.id for problem in batch.problems for shown in problem.retrieved],
        )

    def note(self, observation: Observation) -> None:
        """Keeps an observation until the next [`~BankSession.commit`]."""
        self._admitted += observation.admitted
        self._outcomes += observation.outcomes
        self._shown.update(observation.shown)

    # After the optimizer step

    def commit(self) -> None:
        """
        Writes what was noted since the last commit. What cannot be written now, as on a full disk, is kept for the
        next commit.
        """
        if self.bank is not None:
            try:
                self.bank.record(self._admitted, self._outcomes, self._shown)
            except BankStorageError as error:
                if not self._waits:
                    logger.warning(
                        f"{error} Training continues, and what it adds to the bank is kept in memory until it can be "
                        "written."
                    )
                self._waits = True
                return
            if self._waits:
                logger.warning(f"Training writes its bank again, with what was kept in memory: {self.bank.path}.")
            self._waits = False
        self._admitted, self._outcomes, self._shown = [], [], Counter()

    def end(self) -> None:
        """Writes what is left when training ends."""
        self.commit()
        if self.bank is not None and self._waits:
            logger.warning(
                f"{self.bank.path} could not be written: it lacks {len(self._outcomes)} outcomes and up to "
                f"{len(self._admitted)} strategies of the last steps."
            )

    def share(self, log_metric: Callable[[str, float], None]) -> None:
        """Sends trusted strategies to the server that jobs share, if there is one, and receives those of others."""
        if self.shared is not None:
            try:
                report = self.shared.sync()
            except BankStorageError as error:
                logger.warning(f"{error} Nothing is received from other jobs until the next sync.")
                return
            log_metric("sgpo/strategies_sent", float(report.sent))
            log_metric("sgpo/strategies_received", float(report.received))

    # Runs and checkpoints

    def set_aside_old_bank(self, earlier: Path) -> None:
        """
        Empties the default bank if an earlier run in `output_dir` left one, keeping a copy. Later calls have no
        effect: what is in the bank then is of this run.

        Args:
            earlier (`Path`):
                Folder for what the earlier run left.
        """
        bank, starts_empty = self.bank, self.starts_empty
        self.starts_empty = False
        if bank is None or not starts_empty or len(bank) == 0:
            return
        kept = earlier / BANK_DIRECTORY
        for number in count(2):
            if not kept.exists():
                break
            kept = kept.with_name(f"{BANK_DIRECTORY}-{number}")
        bank.snapshot(kept)
        logger.warning(
            f"{bank.path} holds {len(bank)} strategies of an earlier run. Training starts anew with an empty bank; "
            f"they are kept in {kept}. To continue with them, set `--bank_path {kept}`."
        )
        bank.clear()

    def save(self, directory: str | Path) -> None:
        """Writes a snapshot of the bank to a model's directory, unless the bank itself is there."""
        target = Path(directory).resolve() / BANK_DIRECTORY
        if self.bank is not None and target != Path(self.bank.path).resolve():
            self.bank.snapshot(target)
        else:
            self.commit()  # writes the bank again if its files were deleted

    def load(self, checkpoint: str | Path) -> None:
        """Replaces the content of the bank by the snapshot in a checkpoint of this run."""
        self.starts_empty = False
        if self.bank is None:
            return
        snapshot = Path(checkpoint) / BANK_DIRECTORY
        if snapshot.is_dir():
            self.bank.load_snapshot(snapshot)
        else:
            logger.warning(f"{checkpoint} holds no strategy bank: continuing with {self.bank.path}.")
