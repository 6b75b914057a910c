"""The contents of a bank in memory, and the search for strategies in them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from . import policy
from .neighbourhood import Neighbourhoods, unproven, withheld
from .strategy import Execution, Retrieved, Strategy
from .vectors import ClassVectors, nearest


EXACT = 10_000  # strategies, up to which comparing with all embeddings is as fast as an index

UNDECIDED = 0.75  # share of bank rows for strategies that are not trusted yet

Hits = list[tuple[str, float]]
ExecutionsOf = Callable[[str], list[tuple[Execution, str]]]


class Contents:
    """
    The strategies of a bank, and vectors of those that are not retired.

    Args:
        strategies (`Iterable[Strategy]`):
            The strategies.
        embeddings (`Mapping[str, np.ndarray]`):
            Strategy id → embedding of norm 1 and shape `(d,)`, of those that are not retired.
        max_share (`float`):
            Share of what training shows of a class that one strategy may make up while there are others.
    """

    def __init__(self, strategies: Iterable[Strategy], embeddings: Mapping[str, np.ndarray], max_share: float):
        self.max_share = max_share
        self.judged = False  # whether all trust states were computed since the contents were read
        self.strategies: dict[str, Strategy] = {}
        self.classes: dict[str, ClassVectors] = {}
        self.live: dict[str, ClassVectors] = {}  # the class of each strategy that is not retired
        self.neighbourhoods: dict[str, Neighbourhoods] = {}  # of classes that were retrieved from, until outcomes come
        self._shown = Counter[str]()  # how often strategies of a class were shown
        for strategy in strategies:
            self.put(strategy, embeddings.get(strategy.id))

    def put(self, strategy: Strategy, embedding: np.ndarray | None = None) -> None:
        """Add a strategy or replace a stored one. A new one needs its embedding unless it is retired."""
        key = strategy.id
        before = self.strategies.get(key)
        self._shown[strategy.problem_class] += strategy.shown - (before.shown if before else 0)
        self.strategies[key] = strategy
        if strategy.trust == "retired":
            if key in self.live:
                self.live.pop(key).remove(key)
            return
        if key not in self.live:
            assert embedding is not None
            self.live[key] = self.classes.setdefault(strategy.problem_class, ClassVectors(len(embedding)))
        self.live[key].put(strategy, embedding)

    def embedding(self, strategy_id: str) -> np.ndarray:
        """Embedding of a strategy that is not retired, shape `(d,)`."""
        return self.live[strategy_id].embedding(strategy_id)

    def similarity_to(self, problem_class: str, embeddings: np.ndarray) -> np.ndarray:
        """
        Cosine similarity of embeddings of shape `(m, d)` to the nearest candidate or trusted strategy of a class,
        shape `(m,)`, -1 if there is none.
        """
        if problem_class not in self.classes:
            return np.full(len(embeddings), -1.0)
        vectors = self.classes[problem_class]
        matrix = vectors.column("matrix")
        # einsum halves the time of products of one row, which most classes have in a step
        similarities = np.einsum("md,nd->mn", embeddings, matrix) if len(embeddings) == 1 else embeddings @ matrix.T
        similarities[:, vectors.with_trust(("quarantine",))] = -1
        return similarities.max(axis=1, initial=-1.0)

    def retrieve(
        self,
        embeddings: np.ndarray,
        k: int,
        scopes: Sequence[str | None],
        hidden: Sequence[set[str]],
        trust: Sequence[str],
        explore: int | None,
        search_index: Callable[[np.ndarray, int], list[Hits]],
        texts: Sequence[str],
        executions_of: ExecutionsOf,
    ) -> list[list[Retrieved]]:
        """
        Strategies for problems. The arguments are those of [`StrategyBank.retrieve`], for problems given by texts and
        by embeddings of shape `(m, d)`, and `None` for a scope of all classes. `executions_of` finds the executions of
        a class, as [`Ledger.executions_with_texts`] does. With `explore` nothing is withheld near problems, because
        outcomes are verified there and evidence must be able to change. Strategies that do worse than plain answers
        are left out always, since bank rows execute them.
        """
        together: dict[str | None, list[int]] = defaultdict(list)
        for row, (scope, _) in enumerate(zip(scopes, hidden, strict=True)):
            together[scope].append(row)
        draw = None if explore is None else np.random.default_rng(explore)
        shown = Counter[str]()  # by this call, of strategies and of classes
        retrieved: list[list[Retrieved]] = [[] for _ in scopes]
        width = 4 * k + 16
        for scope, rows in together.items():
            parts = self._parts(scope, trust)
            eligible = sum(len(part) for _, part in parts)
            all_near = self._nearest(embeddings[rows], parts, trust, width, search_index)
            for row, near in zip(rows, all_near, strict=True):
                judge = partial(self._without_harm, texts[row], executions_of) if draw is None else _all_of
                best = self._rank(*judge(self._may_be_shown(hidden[row], near)), k, draw, shown)
                if len(best) < k and eligible > width:
                    (near,) = nearest(embeddings[row : row + 1], parts, eligible)
                    best = self._rank(*judge(self._may_be_shown(hidden[row], near)), k, draw, shown)
                retrieved[row] = best
                for hit in best:
                    shown[hit.strategy.id] += 1
                    shown[hit.strategy.problem_class] += 1
        return retrieved

    def _parts(self, scope: str | None, trust: Sequence[str]) -> list[tuple[ClassVectors, np.ndarray]]:
        """The classes to search, and the rows of each with one of the trust states."""
        if scope is None:
            classes = list(self.classes.values())
        else:
            classes = [self.classes[scope]] if scope in self.classes else []
        return [(vectors, rows) for vectors in classes if len(rows := vectors.with_trust(trust))]

    def _nearest(
        self,
        embeddings: np.ndarray,
        parts: list[tuple[ClassVectors, np.ndarray]],
        trust: Sequence[str],
        n: int,
        search_index: Callable[[np.ndarray, int], list[Hits]],
    ) -> list[Hits]:
        eligible = sum(len(rows) for _, rows in parts)
        if eligible <= EXACT:
            return nearest(embeddings, parts, n)
        classes = {id(vectors) for vectors, _ in parts}
        fetched = search_index(embeddings, 2 * n * -(-len(self.live) // eligible))
        nearest_hits = [
            [
                (key, similarity)
                for key, similarity in hits
                if id(self.live.get(key)) in classes and self.strategies[key].trust in trust
            ][:n]
            for hits in fetched
        ]
        # The index does not filter by class and trust, so too few of its nearest entries may be eligible
        if few := [row for row, hits in enumerate(nearest_hits) if len(hits) < n]:
            for row, hits in zip(few, nearest(embeddings[few], parts, n), strict=True):
                nearest_hits[row] = hits
        return nearest_hits

    def _may_be_shown(self, problems: set[str], hits: Hits) -> Hits:
        """Hits that were not written for some problems and that do not harm."""
        found = [(hit, self.strategies[hit[0]]) for hit in hits]
        return [hit for hit, s in found if problems.isdisjoint(s.source_problems) and not policy.harmful(s)]

    def _without_harm(self, text: str, executions_of: ExecutionsOf, hits: Hits) -> tuple[Hits, set[str]]:
        """Hits that are not withheld for a problem, and the ids of those that are unproven near it."""
        class_of = {key: self.strategies[key].problem_class for key, _ in hits}
        for name in set(class_of.values()) - self.neighbourhoods.keys():
            self.neighbourhoods[name] = Neighbourhoods(executions_of(name))
        near = {name: self.neighbourhoods[name].near(text) for name in set(class_of.values())}
        return (
            [hit for hit in hits if not withheld(hit[0], near[class_of[hit[0]]])],
            {key for key, name in class_of.items() if unproven(key, near[name])},
        )

    def _rank(
        self, hits: Hits, behind: set[str], k: int, draw: np.random.Generator | None, shown: Counter[str]
    ) -> list[Retrieved]:
        strategies = [self.strategies[key] for key, _ in hits]
        if draw is None:
            utilities = [policy.utility(s.successes, s.trials) for s in strategies]
        else:
            utilities = _drawn_utilities(strategies, draw)
        ranked = [
            Retrieved(strategy, similarity, max(similarity, 0.0) * utility * policy.preference(strategy))
            for strategy, (_, similarity), utility in zip(strategies, hits, utilities, strict=True)
        ]

        def order(hit: Retrieved) -> tuple[bool, bool, float, float, str]:
            strategy, name = hit.strategy, hit.strategy.problem_class
            too_often = draw is not None and policy.shown_too_often(
                strategy.shown + shown[strategy.id], self._shown[name] + shown[name], self.max_share
            )
            return too_often, strategy.id in behind, -hit.score, -hit.similarity, strategy.id

        ranked.sort(key=order)
        return [ranked[row] for row in policy.diversify([self.embedding(hit.strategy.id) for hit in ranked], k)]

    def best(self, n: int) -> list[Strategy]:
        """The most useful strategies, as [`StrategyBank.best`] returns them."""
        live = [self.strategies[key] for key in self.live]
        shown = [strategy for strategy in live if strategy.trust != "quarantine" and not policy.harmful(strategy)]

        def order(s: Strategy) -> tuple[bool, float, int, str]:
            return s.trust != "trusted", -policy.utility(s.successes, s.trials) * policy.preference(s), -s.trials, s.id

        return sorted(shown, key=order)[:n]

    def sample(self, problem_class: str, k: int, seed: int, hidden: set[str]) -> list[Strategy]:
        """Strategies of a class to execute. The arguments are those of [`StrategyBank.sample`]."""
        vectors = self.classes.get(problem_class)
        members = [self.strategies[key] for key in sorted(vectors.ids)] if vectors else []
        members = [strategy for strategy in members if hidden.isdisjoint(strategy.source_problems)]
        draw = np.random.default_rng(seed)
        drawn = zip(members, _drawn_utilities(members, draw), strict=True)
        ranked = [strategy for strategy, _ in sorted(drawn, key=lambda pair: -pair[1])]
        undecided = [strategy for strategy in ranked if strategy.trust != "trusted"]
        trusted = [strategy for strategy in ranked if strategy.trust == "trusted"]
        picked = []
        for decide in draw.random(min(k, len(ranked))) < UNDECIDED:
            first, second = (undecided, trusted) if decide else (trusted, undecided)
            picked.append((first or second).pop(0))
        return picked


def _all_of(hits: Hits) -> tuple[Hits, set[str]]:
    return hits, set()


def _drawn_utilities(strategies: Sequence[Strategy], draw: np.random.Generator) -> list[float]:
    """Success rates drawn from their posteriors (Thompson sampling)."""
    successes = np.array([s.successes for s in strategies], dtype=float)
    trials = np.array([s.trials for s in strategies], dtype=float)
    return draw.beta(successes + 1, trials - successes + 1).tolist()
