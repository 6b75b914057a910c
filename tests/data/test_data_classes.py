import logging

import numpy as np
import pytest
from datasets import Dataset

from trl_sgpo.data.classes import merge_small_classes, problem_classes
from trl_sgpo.errors import DataError
from trl_sgpo.method.prompts import problem_text


def embed(texts):
    return np.array([[float("apple" in text), float("pear" in text)] for text in texts])


PROMPTS = [[{"role": "user", "content": text}] for text in ("apple a", "pear a", "apple b", "pear b", "pear c")]


def never(*args):
    raise AssertionError


def test_classes_from_column():
    dataset = Dataset.from_dict({"prompt": PROMPTS, "problem_class": list("aabbb"), "level": [1, 1, 2, 2, 2]})
    assert problem_classes(dataset, None, never, 2, 0) == list("aabbb")
    assert problem_classes(dataset, "level", never, 2, 0) == list("11222")
    with pytest.raises(DataError, match=r"No column 'topic' .* prompt, problem_class, level"):
        problem_classes(dataset, "topic", never, 2, 0)


def test_classes_from_clusters(caplog):
    caplog.set_level(logging.INFO)
    classes = problem_classes(Dataset.from_dict({"prompt": PROMPTS}), None, embed, 2, 0)
    assert classes[0] == classes[2] != classes[1] == classes[3] == classes[4]
    assert set(classes) == {"cluster-0", "cluster-1"}
    assert "cluster-0" in caplog.text


def test_rows_without_class_are_clustered():
    dataset = Dataset.from_dict({"prompt": PROMPTS, "problem_class": ["fruit", None, "fruit", None, None]})
    assert problem_classes(dataset, None, embed, 1, 0) == ["fruit", "cluster-0", "fruit", "cluster-0", "cluster-0"]


def test_problem_text():
    assert problem_text("a") == "a"
    assert problem_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "a"
    assert problem_text([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]) == "a"


def test_merge_small_classes():
    classes = ["x", "x", "y", "y", "z", "w"]
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0, 1], [0.1, 2], [3, 0]])
    assert merge_small_classes(classes, 1, "error", never) == classes
    assert merge_small_classes(classes, 2, "merge", lambda: vectors) == ["x", "x", "y", "y", "y", "x"]
    with pytest.raises(DataError, match=r"fewer than 2 problems: 'w' \(1\), 'z' \(1\): use `--small_classes merge`"):
        merge_small_classes(classes, 2, "error", never)
    for policy in ("error", "merge"):
        with pytest.raises(DataError, match=r"use a smaller `--transfer_block_size` or more data"):
            merge_small_classes(classes, 3, policy, never)
