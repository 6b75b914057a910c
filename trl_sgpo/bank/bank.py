"""The strategy bank: the ledger as its record, contents in memory for the search, and the rules that change both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np

from ..errors import BankError
from .changes import Changes, expect_storable
from .embedding import Embedder, EmbeddingModel
from .export_files import read_export
from .files import LEDGER
from .hub import pull_bank
from .store import Store
from .strategy import DEFAULT_EMBEDDING_MODEL, Execution, ImportReport, Outcome, Retrieved, Strategy, problem_id


class StrategyBank:
    """
    Strategies with provenance, verified executions and trust, kept in a directory and retrieved for problems.

    The directory holds `ledger.sqlite`, the record. A bank of more than 10,000 strategies also has an index in
    `chroma/`, which is rebuilt from the record unless it is, byte for byte, what the bank left when it was closed. One
    process may have a bank open at a time.

    Args:
        path (`str` or `Path`):
            Directory of the bank. It is created if it does not exist.
        embedding_model (`str` or `Callable`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Name or path of a sentence-transformers model, or a function from `n` texts to an array of shape `(n, d)`.
            It is loaded when first needed. If it embeds differently from the one the bank was made with, all
            strategies are embedded again then.
        capacity_per_class (`int`, *optional*, defaults to `256`):
            Maximum number of strategies of each problem class.
        min_problems (`int`, *optional*, defaults to `4`):
            Number of distinct problems a strategy must have been executed on before it is trusted or retired.
        tolerance (`float`, *optional*, defaults to `0.2`):
            Share of other strategies' success rate by which a trusted strategy may fall short of it.
        max_share (`float`, *optional*, defaults to `0.25`):
            Share of what training shows of a class that one strategy may make up while there are others.

    Raises:
        [`~trl_sgpo.errors.BankError`]: If the record is damaged, is no strategy bank, or was written by a newer
            version, or if another process has the bank open.
    """

    def __init__(
        self,
        path: str | Path,
        embedding_model: str | Embedder = DEFAULT_EMBEDDING_MODEL,
        capacity_per_class: int = 256,
        min_problems: int = 4,
        tolerance: float = 0.2,
        max_share: float = 0.25,
    ):
        self.path = Path(path)
        self.capacity_per_class = capacity_per_class
        self.min_problems, self.tolerance, self.max_share = min_problems, tolerance, max_share
        self._embedder = EmbeddingModel(embedding_model)
        self._fingerprint: np.ndarray | None = None  # of the embedding model in use, once it was needed
        self._store = Store(self.path, max_share)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        path: str | Path,
        *,
        revision: str | None = None,
        repo_type: Literal["model", "dataset"] = "model",
        keep_trust: bool = False,
        token: str | None = None,
        **bank_kwargs: Any,
    ) -> Self:
        """
        Pull the strategies that were published with a model, or as a dataset, into a bank.

        As with any import, they are in quarantine and without counts, and earn trust only by executions verified here.
        Each one's `origin` is the repository and its commit.

        Args:
            repo_id (`str`):
                Name of the model or dataset, `"user/name"`.
            path (`str` or `Path`):
                Directory of the bank, which is made if it does not exist.
            revision (`str`, *optional*):
                Branch, tag or commit. If `None`, the latest commit.
            repo_type (`str`, *optional*, defaults to `"model"`):
                `"model"`, as `trl-sgpo push` and [`SGPOTrainer`] write, or `"dataset"`, as `trl-sgpo bank push` does.
            keep_trust (`bool`, *optional*, defaults to `False`):
                Whether to take over trust states and counts, for a bank of your own or of someone you trust.
            token (`str`, *optional*):
                Access token. If `None`, the one that `hf auth login` stored.
            **bank_kwargs:
                Passed on to [`StrategyBank`].

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the download fails, or what was pulled is damaged or no export.
        """
        with TemporaryDirectory(prefix="trl-sgpo-pull-") as temporary:
            directory, sha = pull_bank(
                repo_id, Path(temporary) / "export", revision=revision, repo_type=repo_type, token=token
            )
            strategies, executions, _ = read_export(directory)
        bank = cls(path, **bank_kwargs)
        try:
            bank.import_strategies(strategies, executions, keep_trust, origin=f"{repo_id}@{sha}")
        except BaseException:
            bank.close()
            raise
        return bank

    # Opening and closing

    def close(self) -> None:
        """Close the bank's files and let other processes open it."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Embedding

    @property
    def embedding_model(self) -> str:
        """Name of the embedding model in use."""
        return self._embedder.name

    def _name_embedding_model(self, name: str, cached_only: bool) -> None:
        """Use the model of this name, and if so only files of it that are in the Hub cache."""
        self._embedder.name, self._embedder.cached_only = name, cached_only

    @property
    def dimension(self) -> int | None:
        """Dimension of the embeddings, `None` before the embedding model of an empty bank was used."""
        return self._store.dimension

    def _check_embedding_model(self) -> None:
        """Embeds all strategies again if the model embeds differently from the one the bank was made with."""
        if self._fingerprint is None:
            self._fingerprint = self._store.use_model(self._embedder)

    def embed(self, texts: list[str]) -> np.ndarray:
        """
        Embeddings of `n` problem texts, of norm 1, `float32` of shape `(n, d)`. They are cached, so that an epoch over
        the same problems costs nothing.
        """
        if not texts:
            return np.zeros((0, self.dimension or 0), dtype=np.float32)
        self._check_embedding_model()
        return self._embedder.cached(texts)

    # Writing

    def add(self, strategies: Iterable[Strategy]) -> list[str]:
        """
        Store strategies and return the ids of those that are new in the bank.

        One whose id is stored already adds its source problems to it and nothing else. One that is a near-copy of a
        stored strategy of its class is skipped. A class that exceeds its capacity loses its least useful strategies.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text.
        """
        return self.record(strategies)

    def update(self, outcomes: Iterable[Outcome]) -> None:
        """
        Add the outcomes of verified executions to the counts of their strategies, and trust or retire them by these.
        Outcomes of strategies that are not in the bank are ignored.
        """
        self.record((), outcomes)

    def record(
        self,
        strategies: Iterable[Strategy],
        outcomes: Iterable[Outcome] = (),
        shown: Mapping[str, int] | None = None,
    ) -> list[str]:
        """
        Store strategies, as `add` does, and outcomes, as `update` does, in one transaction: all of it or nothing.
        Returns the ids of the strategies that are new in the bank.

        Args:
            strategies (`Iterable[Strategy]`):
                Strategies to store.
            outcomes (`Iterable[Outcome]`, *optional*):
                Outcomes, of these strategies or of those in the bank.
            shown (`Mapping[str, int]`, *optional*):
                Strategy id → how often it was shown with a problem since the last call.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text.
        """
        given, verified = list(strategies), list(outcomes)
        changes = self._changes(given)
        changes.admit(given)
        changes.count(verified)
        changes.show(shown or {})
        changes.judge(self.min_problems, self.tolerance, unchanged=bool(verified))
        changes.evict(self.capacity_per_class)
        return self._write(changes)

    def merge(self, strategies: Iterable[Strategy], executions: Iterable[Execution], judge: bool = True) -> list[str]:
        """
        Take over strategies with trust states, counts and executions, as from another bank of your own, in one
        transaction. Returns the ids of the strategies that are new in the bank.

        Source problems of a strategy that is stored already are united. On each problem the bank that executed the
        strategy more often wins, so that merging twice changes nothing. With `judge` false, new strategies keep the
        trust states of the other bank. Otherwise states follow from the executions, by the settings of this bank.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text.
        """
        taken = {strategy.id: strategy for strategy in strategies}
        given = list(taken.values())
        changes = self._changes(given)
        changes.admit(given, near_copies=True)
        changes.merge(execution for execution in executions if execution.strategy_id in taken)
        if judge:
            changes.judge(self.min_problems, self.tolerance)
        changes.evict(self.capacity_per_class)
        return self._write(changes)

    def import_strategies(
        self,
        strategies: Sequence[Strategy],
        executions: Iterable[Execution],
        keep_trust: bool = False,
        origin: str | None = None,
    ) -> ImportReport:
        """
        Add strategies of another bank in one transaction. [`~trl_sgpo.bank.exchange.import_bank`] reads them from an
        export and explains the arguments.
        """
        known = {strategy.id for strategy in strategies if self.get(strategy.id) is not None}
        if keep_trust:
            taken = strategies if origin is None else [replace(strategy, origin=origin) for strategy in strategies]
            added = self.merge(taken, executions)
        else:
            added = self.add(
                strategy.quarantined(origin or "import") for strategy in strategies if strategy.id not in known
            )
        new = set(added)
        absent = sum(self.get(strategy.id) is None for strategy in strategies)
        quarantined = sum(self._store.contents.strategies[key].trust == "quarantine" for key in added)
        return ImportReport(
            added=len(new),
            known=len(known - new),
            near_copies=absent,
            quarantined=quarantined,
            retired=len(strategies) - len(new | known) - absent,
        )

    def _changes(self, strategies: list[Strategy]) -> Changes:
        """Changes to be computed, with embeddings of the strategies that are not live."""
        expect_storable(strategies)
        live = self._store.contents.live
        absent = {strategy.id: strategy.text for strategy in strategies if strategy.id not in live}
        embeddings = {}
        if absent:
            self._check_embedding_model()
            embeddings = dict(zip(absent, self._embedder(list(absent.values())), strict=True))
        return Changes(self._store.contents, self._store.ledger.executions_on, embeddings)

    def _write(self, changes: Changes) -> list[str]:
        """Writes changes in one transaction. Returns the ids of the strategies that are new in the bank."""
        if not changes.strategies:
            self._store.restore_files()
            return []
        self._store.write(changes, self.embedding_model, self._fingerprint)
        live = self._store.contents.live
        return [key for key in changes.embeddings if key in changes.strategies and key in live]

    def retire(self, ids: Iterable[str]) -> None:
        """
        Retire strategies: they are kept on record and not shown or executed, until they are added again.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the bank has no strategy with one of these ids.
        """
        changes = Changes(self._store.contents, self._store.ledger.executions_on, {})
        for key in ids:
            if (strategy := self.get(key)) is None:
                raise BankError(
                    f"The bank in {self.path} has no strategy {key}: `trl-sgpo bank list` shows their ids."
                )
            changes.strategies[key] = strategy.updated(trust="retired")
        self._write(changes)

    def clear(self) -> None:
        """Remove all strategies. Take a [`~StrategyBank.snapshot`] first to keep them."""
        self._store.clear()
        self._fingerprint = None

    # Reading

    def __len__(self) -> int:
        return len(self._store.contents.live)

    def strategies(self) -> list[Strategy]:
        """All strategies but the retired ones."""
        return [self._store.contents.strategies[key] for key in self._store.contents.live]

    def retired(self) -> list[Strategy]:
        """The strategies that are kept on record only."""
        return [s for s in self._store.contents.strategies.values() if s.trust == "retired"]

    def get(self, strategy_id: str) -> Strategy | None:
        """The strategy with this id, also if it is retired, or `None`."""
        return self._store.contents.strategies.get(strategy_id)

    def note(self, key: str) -> str | None:
        """The text that `set_note` stored under a key, in snapshots too, or `None`."""
        return self._store.ledger.note(key)

    def set_note(self, key: str, value: str) -> None:
        """Store a short text under a key."""
        self._store.set_note(key, value)

    @property
    def made_with(self) -> str | None:
        """Name of the embedding model the stored embeddings come from, `None` in a bank that never held any."""
        made_with = self._store.ledger.embedder
        return None if made_with is None else made_with[0]

    def embeddings(self) -> dict[str, np.ndarray]:
        """Strategy id → embedding of norm 1 and shape `(d,)`, of all strategies but the retired ones."""
        return {key: self._store.contents.embedding(key) for key in self._store.contents.live}

    def executions(self, strategy_id: str) -> list[Execution]:
        """All verified executions of a strategy, one entry a problem."""
        return self._store.ledger.executions(strategy_id)

    def damage(self) -> list[str]:
        """Everything that is wrong with the record, found by a full check, one line each."""
        return self._store.ledger.damage()

    def best(self, n: int) -> list[Strategy]:
        """
        The `n` most useful strategies that may be shown: trusted ones first, then candidates. Among equally useful
        ones, the one executed more often comes first.
        """
        return self._store.contents.best(n)

    def retrieve(
        self,
        problems: list[str],
        k: int = 3,
        classes: Sequence[str | None] | None = None,
        exclude: list[set[str]] | None = None,
        cross_class: bool = False,
        trust: Sequence[str] = ("trusted",),
        explore: int | None = None,
    ) -> list[list[Retrieved]]:
        """
        Strategies to show with problems: similar, useful, different from each other, and not written for the problem.
        None of them does worse than plain answers by the executions on record.

        Args:
            problems (`list[str]` of length `m`):
                Texts of the problems.
            k (`int`, *optional*, defaults to `3`):
                Number of strategies a problem, or fewer if the bank holds fewer that fit.
            classes (`list[str]` of length `m`, *optional*):
                Class of each problem, to which its strategies must belong. If `None`, they may be of any class.
            exclude (`list[set[str]]` of length `m`, *optional*):
                For each problem the ids, by [`problem_id`], of problems whose strategies it must not see. If `None`,
                those written for a problem of the same text.
            cross_class (`bool`, *optional*, defaults to `False`):
                Whether strategies of other classes than `classes` may be shown too.
            trust (`Sequence[str]`, *optional*, defaults to `("trusted",)`):
                Trust states of the strategies to show. Training shows candidates too, whose outcomes it verifies.
            explore (`int`, *optional*):
                Seed with which utilities are drawn from their posteriors (Thompson sampling). Strategies shown more
                than their share then rank behind others. If `None`, posterior means rank them, always the same way.

        Returns:
            `list[list[Retrieved]]`: A list for each problem, the best first.
        """
        if not len(self) or not problems:
            return [[] for _ in problems]
        embeddings = self.embed(problems)  # first, because it may replace the contents
        return self._store.contents.retrieve(
            embeddings,
            k,
            scopes=[None] * len(problems) if classes is None or cross_class else classes,
            hidden=[{problem_id(problem)} for problem in problems] if exclude is None else exclude,
            trust=trust,
            explore=explore,
            search_index=self._store.index.query,
            texts=problems,
            executions_of=self._store.ledger.executions_with_texts,
        )

    def sample(self, problem_class: str, k: int, seed: int, exclude: set[str] | None = None) -> list[Strategy]:
        """
        `k` strategies of a class, or fewer if it has fewer, to execute as they are (bank rows). Three of four are not
        trusted yet, quarantined ones included, because their executions decide about their trust. Within either group
        strategies are drawn by their success rates (Thompson sampling), for a `seed` always the same. Strategies
        written for problems in `exclude`, ids by [`problem_id`], are left out.
        """
        return self._store.contents.sample(problem_class, k, seed, exclude or set())

    # Snapshots

    def snapshot(self, path: str | Path) -> None:
        """
        Write a complete copy of the record, with a manifest by which damage is found, to a directory, for instance in
        a checkpoint. A copy in it is replaced.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the directory is the bank's own.
        """
        self._store.snapshot(Path(path), self.embedding_model)

    def load_snapshot(self, snapshot_path: str | Path) -> None:
        """
        Replace the content of this bank by that of a snapshot, which is not changed.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the snapshot is incomplete or damaged. The bank then stays as it is.
        """
        self._store.load_snapshot(Path(snapshot_path))
        self._fingerprint = None

    @classmethod
    def restore(cls, path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """
        Open a bank that must exist already. The arguments are those of the constructor.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If there is no bank.
        """
        if not (Path(path) / LEDGER).is_file():
            raise BankError(
                f"{path} holds no strategy bank: name the directory that has a {LEDGER}, or create an empty bank with "
                "`StrategyBank(path)`."
            )
        return cls(path, *args, **kwargs)
