"""The strategy bank: the ledger as its record, the index for finding strategies, and the policy that joins them."""

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np

from ..errors import BankError
from . import policy
from .audit import control_tokens
from .background import BackgroundIndex
from .contents import Contents
from .embedding import Embedder, load_embedder
from .index import Index, break_seal, seal
from .ledger import SCHEMA_VERSION, Ledger, durable_replace
from .lock import BankLock
from .strategy import Execution, Outcome, Retrieved, Strategy, problem_id
from .vectors import ClassVectors


logger = logging.getLogger(__name__)

LEDGER = "ledger.sqlite"
INDEX = "chroma"
MANIFEST = "manifest.json"
CACHED_PROBLEMS = 100_000
DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_NOTHING = Execution("", "", "", 0, 0.0, 0.0)
FINGERPRINT_TEXT = "List what is given, find what is asked, then check the result."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with(strategy: Strategy, before: Execution | None, after: Execution | None, counts: bool = True) -> Strategy:
    """
    The strategy when its executions on a problem change from one to the other, `None` being none. Those on a problem
    it was written for do not speak for or against it; with `counts` false only what speaks changes. Sums are clipped
    because differences are rounded.
    """
    old, new = before or _NOTHING, after or _NOTHING
    changes: dict[str, Any] = {}
    if counts:
        trials = strategy.trials + new.trials - old.trials
        successes = strategy.successes + new.successes - old.successes
        changes = {"trials": trials, "successes": min(max(successes, 0.0), trials)}
    if not counts or new.problem not in strategy.source_problems:
        problems = strategy.problems + (new.trials > 0) - (old.trials > 0)
        solved = strategy.solved + new.successes / (new.trials or 1) - old.successes / (old.trials or 1)
        baseline = strategy.baseline + new.baseline / (new.trials or 1) - old.baseline / (old.trials or 1)
        changes["problems"] = problems
        changes["solved"] = min(max(solved, 0.0), problems)
        changes["baseline"] = min(max(baseline, 0.0), problems)
    return strategy.updated(**changes)


class StrategyBank:
    """
    Strategies that proved themselves, kept in a directory and found again by the problems they may help.

    The directory holds `ledger.sqlite`, the record, and `chroma/`, an index that is rebuilt from the record unless it
    is, bit by bit, what the bank left when it was closed. One process may have it open at a time.

    Args:
        path (`str` or `Path`):
            Directory of the bank. It is created if it does not exist.
        embedding_model (`str` or `Callable`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Name or path of a sentence-transformers model, or a function from `n` texts to an array of shape `(n, d)`.
            It is loaded when first needed. If it embeds differently from the one the bank was made with, the bank is
            embedded anew then.
        capacity_per_class (`int`, *optional*, defaults to `256`):
            Maximum number of strategies of each problem class.
        min_problems (`int`, *optional*, defaults to `4`):
            Number of distinct problems a strategy must have been executed on before it is trusted or retired.
        tolerance (`float`, *optional*, defaults to `0.2`):
            Part of other strategies' success rate that a trusted strategy may fall short of it.
        max_share (`float`, *optional*, defaults to `0.25`):
            Part of what training shows of a class that one strategy may make up while others are there.

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
        self._embedder: Embedder | None = None
        if isinstance(embedding_model, str):
            self.embedding_model = embedding_model
        else:
            self.embedding_model = embedding_model.__name__
            self._embedder = embedding_model
        self._problem_embeddings: dict[str, np.ndarray] = {}
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = BankLock(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

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

        As with any import, they are in quarantine and without counts: only executions that are verified here speak
        for them. Each one's `origin` is the repository and its commit.

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
        from .exchange import import_bank
        from .hub import pull_bank

        with TemporaryDirectory(prefix="trl-sgpo-pull-") as temporary:
            directory, sha = pull_bank(
                repo_id, Path(temporary) / "export", revision=revision, repo_type=repo_type, token=token
            )
            bank = cls(path, **bank_kwargs)
            try:
                import_bank(bank, directory, keep_trust, origin=f"{repo_id}@{sha}")
            except BaseException:
                bank.close()
                raise
        return bank

    # Opening and closing

    def _open(self) -> None:
        self._ledger = Ledger(self.path / LEDGER)
        self.dimension: int | None = None
        self._fingerprint: np.ndarray | None = None  # of the embedder in use, once it was needed
        self._index: BackgroundIndex | None = None
        self._load_contents()

    def _load_contents(self) -> None:
        """Reads the ledger into memory."""
        embeddings, strategies = self._ledger.embeddings(), self._ledger.all()
        changed = [s for s in strategies if s.trust != "retired" and s.id not in embeddings]
        if changed:
            raise BankError(
                f"{self._ledger.path} was changed by something else: {len(changed)} strategies, as {changed[0].id}, "
                "do not have the ids of their texts. `trl-sgpo bank verify` lists them; restore a checkpoint's copy "
                "(`trl-sgpo train --resume_from_checkpoint true`)."
            )
        self._contents = Contents(strategies, embeddings, self.max_share)
        if embeddings:
            self.dimension = len(next(iter(embeddings.values())))

    def _use_index(self) -> BackgroundIndex:
        """
        The index, opened when first needed: as it is if it is as the ledger left it, else rebuilt from the ledger. One
        that failed since is rebuilt too, because training has to go on.
        """
        if self._index is not None and (error := self._index.failure()) is not None:
            self._drop_index(error)
        if self._index is None:
            directory, state, dimension = self.path / INDEX, self._ledger.state, self.dimension
            entries = self._entries(list(self._contents.live))
            assert dimension is not None

            def open_index() -> Index:
                if directory.exists():
                    if break_seal(directory, state):
                        return Index(directory, dimension)
                    logger.warning("%s was not closed or has changed since: rebuilding it from the ledger.", directory)
                return Index.rebuild(directory, dimension, *entries)

            self._index = BackgroundIndex(open_index)
        return self._index

    def _ask_index(self, embeddings: np.ndarray, n: int) -> list[list[tuple[str, float]]]:
        try:
            return self._use_index().query(embeddings, n)
        except BankError as error:
            self._drop_index(error)
            return self._use_index().query(embeddings, n)

    def _drop_index(self, error: BaseException) -> None:
        """Closes an index that failed, without a seal, so that the next one is made anew."""
        logger.warning("Rebuilding the index from the ledger. %s", error)
        if self._index is not None:
            self._index.close()
            self._index = None

    def _entries(self, ids: list[str]) -> tuple[list[str], np.ndarray, list[dict[str, str]]]:
        contents = self._contents
        embeddings = np.array([contents.embedding(key) for key in ids], dtype=np.float32)
        return ids, embeddings, [{"problem_class": contents.strategies[key].problem_class} for key in ids]

    def close(self) -> None:
        """Close the bank's files and let other processes open it."""
        self._close_files(sealing=True)
        self._lock.release()

    def _close_files(self, sealing: bool = False) -> None:
        index, self._index = self._index, None
        if index is not None and index.close() and sealing:
            seal(self.path / INDEX, self._ledger.state)
        self._ledger.close()

    def _remove_index(self) -> None:
        if (self.path / INDEX).exists():
            shutil.rmtree(self.path / INDEX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Embedding

    def _encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings of norm 1 by the model that the bank is embedded with."""
        if self._fingerprint is None:
            self._meet_embedder()
        return self._call_embedder(texts)

    def _call_embedder(self, texts: list[str]) -> np.ndarray:
        if self._embedder is None:
            self._embedder = load_embedder(self.embedding_model)
        embeddings = np.asarray(self._embedder(texts), dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(texts) or not np.isfinite(embeddings).all():
            raise BankError(
                f"The embedding model {self.embedding_model} gave an array of shape {embeddings.shape} for "
                f"{len(texts)} texts: it must give one finite vector a text."
            )
        if self._fingerprint is not None and embeddings.shape[1] != len(self._fingerprint):
            raise BankError(
                f"The embedding model {self.embedding_model} gave vectors of dimension {len(self._fingerprint)} first "
                f"and of dimension {embeddings.shape[1]} now: name a model that always gives the same."
            )
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def _meet_embedder(self) -> None:
        """Compares the embedder with the one the bank was made with. Names may mislead, so how it embeds decides."""
        fingerprint = self._call_embedder([FINGERPRINT_TEXT])[0]
        made_with = self._ledger.embedder
        if self._contents.strategies and made_with is not None:
            model, stored = made_with
            by_name = len(stored) == 0 and model == self.embedding_model and len(fingerprint) == self.dimension
            if not by_name and (stored.shape != fingerprint.shape or stored @ fingerprint < 0.999):
                self._embed_anew(model, fingerprint)
        self._fingerprint = fingerprint
        if self.dimension is None:
            self.dimension = len(fingerprint)

    def _embed_anew(self, model: str, fingerprint: np.ndarray) -> None:
        logger.warning(
            "The bank in %s was made with %s, and %s embeds differently: embedding it anew.",
            self.path,
            model,
            self.embedding_model,
        )
        strategies = self._contents.strategies
        embeddings = self._call_embedder([strategy.text for strategy in strategies.values()])
        if self._index is not None:
            self._index.close()
            self._index = None
        self._remove_index()
        self._ledger.set_embeddings(self.embedding_model, fingerprint, dict(zip(strategies, embeddings, strict=True)))
        self._load_contents()

    def embed(self, texts: list[str]) -> np.ndarray:
        """
        Embeddings of problem texts. They are remembered, so that an epoch over the same problems costs nothing.

        Args:
            texts (`list[str]` of length `n`):
                The texts.

        Returns:
            `np.ndarray` of shape `(n, d)`: Embeddings of norm 1, `float32`.
        """
        cache = self._problem_embeddings
        if missing := [text for text in dict.fromkeys(texts) if text not in cache]:
            cache.update(zip(missing, self._encode(missing), strict=True))
        if not texts:
            return np.zeros((0, self.dimension or 0), dtype=np.float32)
        embeddings = np.stack([cache[text] for text in texts])
        while len(cache) > CACHED_PROBLEMS:
            del cache[next(iter(cache))]
        return embeddings

    # Writing

    def add(self, strategies: Iterable[Strategy]) -> list[str]:
        """
        Store strategies.

        One whose id is stored already adds its source problems to it and nothing else. One that is a near-copy of a
        stored strategy of its class is skipped. A class that exceeds its capacity loses its least useful strategies.

        Args:
            strategies (`Iterable[Strategy]`):
                The strategies.

        Returns:
            `list[str]`: Ids of the strategies that are new in the bank.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text, or control tokens in it.
        """
        return self.record(strategies)

    def update(self, outcomes: Iterable[Outcome]) -> None:
        """
        Add the outcomes of verified executions to the counts of their strategies, and trust or retire them by these.

        Args:
            outcomes (`Iterable[Outcome]`):
                The outcomes. Those of strategies that are not in the bank are ignored.
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

        Args:
            strategies (`Iterable[Strategy]`):
                Strategies to store.
            outcomes (`Iterable[Outcome]`, *optional*):
                Outcomes, of these strategies or of those in the bank.
            shown (`Mapping[str, int]`, *optional*):
                Strategy id → how often it was shown with a problem since the last call.

        Returns:
            `list[str]`: Ids of the strategies that are new in the bank.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text, or control tokens in it.
        """
        changed, embeddings = self._admit(list(strategies))
        executions = self._count(changed, outcomes)
        stored = self._contents.strategies
        for key, times in (shown or {}).items():
            if (strategy := changed.get(key) or stored.get(key)) is not None:
                changed[key] = strategy.updated(shown=strategy.shown + times)
        self._judge(changed)
        self._evict(changed)
        if not changed:
            return []

        self._write(changed, embeddings, executions.values())
        return [key for key in embeddings if key in changed and key in self._contents.live]

    def _write(
        self, changed: dict[str, Strategy], embeddings: dict[str, np.ndarray], executions: Iterable[Execution]
    ) -> None:
        """One transaction in the ledger, which memory and index follow."""
        contents = self._contents
        if not contents.strategies:
            assert self._fingerprint is not None
            self._ledger.set_embeddings(self.embedding_model, self._fingerprint, {})
        added = [key for key, s in changed.items() if s.trust != "retired" and key not in contents.live]
        removed = [key for key, s in changed.items() if s.trust == "retired" and key in contents.live]
        index = self._use_index() if added or removed else None
        self._ledger.commit(
            [(strategy, embeddings[key]) for key, strategy in changed.items() if key not in contents.strategies],
            [strategy for key, strategy in changed.items() if key in contents.strategies],
            executions,
            index_changes=index is not None,
        )
        for key, strategy in changed.items():
            contents.put(strategy, embeddings.get(key))
        if index is not None:
            index.change(removed, *self._entries(added))

    def merge(self, strategies: Iterable[Strategy], executions: Iterable[Execution]) -> list[str]:
        """
        Take over strategies with trust states and counts, as from another bank of your own, in one transaction.

        Of a strategy that is stored already, source problems are united, and on each problem the bank that executed
        it more often is believed, so that merging twice changes nothing.

        Args:
            strategies (`Iterable[Strategy]`):
                The strategies, with their counts.
            executions (`Iterable[Execution]`):
                Their executions, which the counts are made of.

        Returns:
            `list[str]`: Ids of the strategies that are new in the bank.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If a strategy has no text, or control tokens in it.
        """
        taken = {strategy.id: strategy for strategy in strategies}
        changed, embeddings = self._admit(list(taken.values()), near_copies=True)
        written, theirs = [], [execution for execution in executions if execution.strategy_id in taken]
        ours = self._ledger.executions_on((execution.strategy_id, execution.problem) for execution in theirs)
        for execution in theirs:
            key = execution.strategy_id
            if key not in self._contents.strategies:
                written.append(execution)
            else:
                before = ours.get((key, execution.problem))
                if before is None or before.trials < execution.trials:
                    written.append(execution)
                    strategy = changed.get(key) or self._contents.strategies[key]
                    changed[key] = _with(strategy, before, execution)
        known = {key: strategy for key, strategy in changed.items() if key in self._contents.strategies}
        self._judge(known)
        changed |= known
        self._evict(changed)
        if not changed:
            return []
        self._write(changed, embeddings, written)
        return [key for key in embeddings if key in changed and key in self._contents.live]

    def _admit(
        self, strategies: list[Strategy], near_copies: bool = False
    ) -> tuple[dict[str, Strategy], dict[str, np.ndarray]]:
        """Strategies to write, by id, and embeddings of those that are new or return from retirement."""
        for strategy in strategies:
            if not strategy.text.strip():
                raise BankError("A strategy without text cannot be stored: drop it before it gets to the bank.")
            if tokens := control_tokens(f"{strategy.problem_class}\n{strategy.text}"):
                raise BankError(
                    f"A strategy with control tokens of chat templates ({', '.join(tokens)}) cannot be stored, since "
                    f"it would speak for others in a prompt: remove them from {strategy.text[:60]!r} and its class."
                )
        absent = {strategy.id: strategy.text for strategy in strategies if strategy.id not in self._contents.live}
        embeddings = dict(zip(absent, self._encode(list(absent.values())), strict=True)) if absent else {}
        copies = set() if near_copies else self._near_copies(strategies, embeddings)
        changed: dict[str, Strategy] = {}
        for strategy in strategies:
            key = strategy.id
            if key in copies:
                continue
            known = changed.get(key) or self._contents.strategies.get(key)
            if known is None:
                changed[key] = strategy
                continue
            problems = tuple(dict.fromkeys(known.source_problems + strategy.source_problems))
            trust = strategy.trust if known.trust == "retired" else known.trust
            if (problems, trust) != (known.source_problems, known.trust):
                new = set(problems) - set(known.source_problems)
                changed[key] = self._without_evidence(known.updated(source_problems=problems, trust=trust), new)
        return changed, embeddings

    def _near_copies(self, strategies: list[Strategy], embeddings: dict[str, np.ndarray]) -> set[str]:
        """Ids of new strategies that are near-copies of one in the bank or of an earlier one."""
        new: dict[str, dict[str, Strategy]] = defaultdict(dict)
        for strategy in strategies:
            if strategy.id in embeddings:
                new[strategy.problem_class].setdefault(strategy.id, strategy)
        copies: set[str] = set()
        for problem_class, members in new.items():
            vectors = np.array([embeddings[key] for key in members])
            copied = policy.near_copies(
                np.array([s.trust != "quarantine" for s in members.values()]),
                vectors @ vectors.T,
                self._contents.similarity_to(problem_class, vectors),
            )
            copies.update(key for key, copy in zip(members, copied, strict=True) if copy)
        return copies

    def _without_evidence(self, strategy: Strategy, problems: set[str]) -> Strategy:
        """The strategy as if it had not been executed on problems that it turned out to be written for."""
        for execution in self._ledger.executions_on((strategy.id, problem) for problem in problems).values():
            strategy = _with(strategy, execution, None, counts=False)
        return strategy

    def _count(self, changed: dict[str, Strategy], outcomes: Iterable[Outcome]) -> dict[tuple[str, str], Execution]:
        """Adds outcomes to the counts of their strategies, in `changed`. Returns the executions to write."""
        executions: dict[tuple[str, str], Execution] = {}
        strategies = self._contents.strategies
        known = [o for o in outcomes if o.trials and (o.strategy_id in changed or o.strategy_id in strategies)]
        stored = self._ledger.executions_on((outcome.strategy_id, outcome.problem) for outcome in known)
        for outcome in known:
            key = (outcome.strategy_id, outcome.problem)
            strategy = changed.get(key[0]) or strategies[key[0]]
            before = executions.get(key) or stored.get(key)
            after = Execution(
                *key,
                outcome.problem_class or strategy.problem_class,
                outcome.trials + (before.trials if before else 0),
                outcome.successes + (before.successes if before else 0),
                outcome.trials * outcome.baseline + (before.baseline if before else 0),
            )
            executions[key] = after
            changed[key[0]] = _with(strategy, before, after)
        return executions

    def _judge(self, changed: dict[str, Strategy]) -> None:
        """Gives each strategy, in `changed`, the trust state its executions speak for."""
        for key, strategy in changed.items():
            trust = policy.trust(strategy, self.min_problems, self.tolerance)
            if trust != strategy.trust:
                changed[key] = strategy.updated(trust=trust)

    def _evict(self, changed: dict[str, Strategy]) -> None:
        """Retires, in `changed`, what exceeds the capacity of a class."""
        touched: dict[str, list[Strategy]] = defaultdict(list)
        for strategy in changed.values():
            touched[strategy.problem_class].append(strategy)
        for name, strategies in touched.items():
            held = self._contents.classes.get(name) or ClassVectors(0)
            if len(held) + len(strategies) > self.capacity_per_class:
                for key in held.beyond(self.capacity_per_class, strategies):
                    changed[key] = (changed.get(key) or self._contents.strategies[key]).updated(trust="retired")

    def retire(self, ids: Iterable[str]) -> None:
        """
        Retire strategies for good: they are kept on record and not shown or tried, until they are added again.

        Args:
            ids (`Iterable[str]`):
                Their ids.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the bank has no such strategy.
        """
        changed = {}
        for key in ids:
            if (strategy := self.get(key)) is None:
                raise BankError(
                    f"The bank in {self.path} has no strategy {key}: `trl-sgpo bank list` shows their ids."
                )
            changed[key] = strategy.updated(trust="retired")
        if changed:
            self._write(changed, {}, ())

    def clear(self) -> None:
        """Remove all strategies. Take a [`~StrategyBank.snapshot`] first to keep them."""
        self._close_files()
        for name in (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm"):
            (self.path / name).unlink(missing_ok=True)
        self._remove_index()
        self._open()

    # Reading

    def __len__(self) -> int:
        return len(self._contents.live)

    def strategies(self) -> list[Strategy]:
        """All strategies but the retired ones."""
        return [self._contents.strategies[key] for key in self._contents.live]

    def retired(self) -> list[Strategy]:
        """The strategies that are kept on record only."""
        return [s for s in self._contents.strategies.values() if s.trust == "retired"]

    def get(self, strategy_id: str) -> Strategy | None:
        """The strategy with this id, be it retired, or `None`."""
        return self._contents.strategies.get(strategy_id)

    def note(self, key: str) -> str | None:
        """What was noted under a key, kept with the strategies and in snapshots, or `None`."""
        return self._ledger.note(key)

    def set_note(self, key: str, value: str) -> None:
        """Note a short text under a key."""
        self._ledger.set_note(key, value)

    @property
    def made_with(self) -> str | None:
        """Name of the embedding model the stored embeddings come from, `None` in a bank that never held any."""
        made_with = self._ledger.embedder
        return None if made_with is None else made_with[0]

    def embeddings(self) -> dict[str, np.ndarray]:
        """Strategy id → embedding of norm 1 and shape `(d,)`, of all strategies but the retired ones."""
        return {key: self._contents.embedding(key) for key in self._contents.live}

    def executions(self, strategy_id: str) -> list[Execution]:
        """All verified executions of a strategy, one entry a problem."""
        return self._ledger.executions(strategy_id)

    def damage(self) -> list[str]:
        """Everything that is wrong with the record, found by checking all of it, one line each."""
        found = self._ledger.damage()
        if len(self) and (difference := set(self._use_index().ids()) ^ self._contents.live.keys()):
            found.append(f"index and ledger differ in {len(difference)} strategies: remove {self.path / INDEX}")
        return found

    def best(self, n: int) -> list[Strategy]:
        """
        The most useful strategies, of those that problems may be shown: trusted ones first, then candidates.

        Args:
            n (`int`):
                How many. Of two equally useful ones, the one tried more often comes first.
        """
        shown = [strategy for strategy in self.strategies() if strategy.trust != "quarantine"]
        return sorted(
            shown, key=lambda s: (s.trust != "trusted", -policy.utility(s.successes, s.trials), -s.trials, s.id)
        )[:n]

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

        Args:
            problems (`list[str]` of length `m`):
                Texts of the problems.
            k (`int`, *optional*, defaults to `3`):
                Number of strategies a problem. There are fewer if the bank holds fewer that fit.
            classes (`list[str]` of length `m`, *optional*):
                Class of each problem, to which its strategies must belong. If `None`, they may be of any class.
            exclude (`list[set[str]]` of length `m`, *optional*):
                For each problem the ids, by [`problem_id`], of problems whose strategies it must not see. If `None`,
                those written for a problem of the same text.
            cross_class (`bool`, *optional*, defaults to `False`):
                Whether strategies of other classes than `classes` are welcome too.
            trust (`Sequence[str]`, *optional*, defaults to `("trusted",)`):
                Trust states of the strategies to show. Training shows candidates too, whose outcomes it verifies.
            explore (`int`, *optional*):
                Seed with which utilities are drawn from what the counts leave open, and strategies that were shown
                too often step back. If `None`, the best known ones are shown, always the same.

        Returns:
            `list[list[Retrieved]]`: A list for each problem, the best first.
        """
        if not len(self) or not problems:
            return [[] for _ in problems]
        embeddings = self.embed(problems)  # first, because it may embed the contents anew
        return self._contents.retrieve(
            embeddings,
            k,
            scopes=[None] * len(problems) if classes is None or cross_class else classes,
            hidden=[{problem_id(problem)} for problem in problems] if exclude is None else exclude,
            trust=trust,
            explore=explore,
            ask_index=self._ask_index,
        )

    def sample(self, problem_class: str, k: int, seed: int, exclude: set[str] | None = None) -> list[Strategy]:
        """
        Strategies of a class to execute as they are: three of four are not trusted yet, quarantined ones included,
        since verified executions are what decides about them. Of either kind good ones come often and untried ones
        sometimes (Thompson sampling).

        Args:
            problem_class (`str`):
                The class.
            k (`int`):
                How many. There are fewer if the class has fewer.
            seed (`int`):
                Seed of the draw.
            exclude (`set[str]`, *optional*):
                Ids, by [`problem_id`], of problems whose strategies are left out.
        """
        return self._contents.sample(problem_class, k, seed, exclude or set())

    # Snapshots

    def snapshot(self, path: str | Path) -> None:
        """
        Write a complete copy of the record, with a manifest by which damage is found.

        Args:
            path (`str` or `Path`):
                Directory of the copy, for instance in a checkpoint. A copy in it is replaced.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the directory is the bank's own.
        """
        directory = Path(path)
        if directory.resolve() == self.path.resolve():
            raise BankError(
                f"A snapshot cannot replace the bank it is taken of ({self.path}): name another directory."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._ledger.snapshot(directory / LEDGER)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "count": self._ledger.count(),
            "sha256": _sha256(directory / LEDGER),
            "embedding_model": self.embedding_model,
            "dimension": self.dimension,
        }
        temporary = directory / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(manifest, indent=2))
        durable_replace(temporary, directory / MANIFEST)

    def load_snapshot(self, snapshot_path: str | Path) -> None:
        """
        Replace the content of this bank by that of a snapshot.

        Args:
            snapshot_path (`str` or `Path`):
                Directory that `snapshot` wrote. It is not changed.

        Raises:
            [`~trl_sgpo.errors.BankError`]: If the snapshot is incomplete or damaged. The bank then stays as it is.
        """
        source = Path(snapshot_path)
        copy = self.path / (LEDGER + ".tmp")
        try:
            try:
                shutil.copyfile(source / LEDGER, copy)
                intact = json.loads((source / MANIFEST).read_text())["sha256"] == _sha256(copy)
            except (OSError, ValueError, KeyError) as error:
                raise BankError(
                    f"{source} is no complete snapshot of a strategy bank: {error}. Resume from another checkpoint."
                ) from error
            if not intact:
                raise BankError(
                    f"The snapshot in {source} was damaged or changed after it was written: its checksum is not the "
                    "one in its manifest. Resume from another checkpoint."
                )
            Ledger(copy).close()
            self._close_files()
            self._remove_index()
            for suffix in ("-wal", "-shm"):
                (self.path / (LEDGER + suffix)).unlink(missing_ok=True)
            durable_replace(copy, self.path / LEDGER)
        finally:
            copy.unlink(missing_ok=True)
        self._open()

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
