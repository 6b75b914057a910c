"""Strategies and problems that lie in clusters, as those of real classes do, with embeddings made up in no time."""

import numpy as np

from trl_sgpo.bank import Strategy


DIMENSION = 384  # of all-MiniLM-L6-v2


class Clusters:
    """
    An embedder of made-up texts. A text `"… #n"` lies near the centre of its cluster, n modulo the number of clusters,
    and strategies and problems of one cluster look for each other.

    Args:
        clusters (`int`):
            Number of clusters. Each class gets eight of them.
        noise (`float`, *optional*, defaults to `0.7`):
            Standard deviation around a centre, by coordinate, where centres have 1.
    """

    def __init__(self, clusters: int, noise: float = 0.7):
        self.centres = np.random.default_rng(0).normal(size=(clusters, DIMENSION)).astype(np.float32)
        self.noise = noise
        self._known: dict[int, np.ndarray] = {}
        self.__name__ = "made-up clusters"

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> np.ndarray:
        if "#" not in text:
            return np.ones(DIMENSION, dtype=np.float32)
        number = int(text.rsplit("#", 1)[1])
        if number not in self._known:
            noise = np.random.default_rng(number).normal(size=DIMENSION).astype(np.float32)
            self._known[number] = self.centres[number % len(self.centres)] + self.noise * noise
        return self._known[number]

    def prepare(self, numbers: range) -> None:
        """Makes the vectors of strategies before the clock runs."""
        self([f"#{number}" for number in numbers])


def made_up(number: int, problem_class: str, **kwargs: object) -> Strategy:
    """A strategy that [`Clusters`] embeds."""
    return Strategy(f"strategy #{number}", problem_class, (), step=number, **kwargs)  # type: ignore[arg-type]
