"""A cheap deterministic embedder, and strategies that are far from each other under it."""

import zlib

import numpy as np

from trl_sgpo.bank import Strategy


EVERYONE = ("trusted", "candidate", "quarantine")
# Counts that support trust
PROVEN = {"trust": "trusted", "trials": 20, "successes": 20, "problems": 20, "solved": 20, "baseline": 10}


def hashed_words(texts: list[str]) -> np.ndarray:
    vectors = np.zeros((len(texts), 256), dtype=np.float32)
    for row, text in enumerate(texts):
        for word in text.casefold().split():
            vectors[row, zlib.crc32(word.encode()) % 256] += 1
    return vectors


def make(name: str, problem_class: str = "algebra", source: str = "s0", **kwargs) -> Strategy:
    return Strategy(f"{name} {name}one {name}two {name}three", problem_class, (source,), **kwargs)
