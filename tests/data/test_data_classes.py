import json
import logging
import zlib
from collections import Counter

import numpy as np
import pytest
import yaml
from datasets import Dataset

import trl_sgpo.data.classes
from trl_sgpo import SGPOConfig
from trl_sgpo.data.classes import CLASS_COLUMN, merge_small_classes, problem_classes, with_classes
from trl_sgpo.data.loading import load_data
from trl_sgpo.errors import DataError
from trl_sgpo.method.prompts import problem_text
from trl_sgpo.recipe import read_recipe


def embed(texts):
    return np.array([[float("apple" in text), float("pear" in text)] for text in texts])


PROMPTS = [[{"role": "user", "content": text}] for text in ("apple a", "pear a", "apple b", "pear b", "pear c")]


def never(*args):
    raise AssertionError


def test_classes_from_column():
    dataset = Dataset.from_dict({"prompt": PROMPTS, "problem_class": list("aabbb"), "level": [1, 1, 2, 2, 2]})
    assert problem_classes(dataset, None, never, 2, 0) == (list("aabbb"), set())
    assert problem_classes(dataset, "level", never, 2, 0) == (list("11222"), set())
    with pytest.raises(DataError, match=r"No column 'topic' .* prompt, problem_class, level"):
        problem_classes(dataset, "topic", never, 2, 0)


def test_classes_from_clusters(caplog):
    caplog.set_level(logging.INFO)
    classes, clusters = problem_classes(Dataset.from_dict({"prompt": PROMPTS}), None, embed, 2, 0)
    assert classes[0] == classes[2] != classes[1] == classes[3] == classes[4]
    assert set(classes) == clusters == {"cluster-0", "cluster-1"}
    assert "cluster-0" in caplog.text


def test_rows_without_class_are_clustered():
    dataset = Dataset.from_dict({"prompt": PROMPTS, "problem_class": ["fruit", None, "fruit", None, None]})
    classes, clusters = problem_classes(dataset, None, embed, 1, 0)
    assert classes == ["fruit", "cluster-0", "fruit", "cluster-0", "cluster-0"] and clusters == {"cluster-0"}


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


def hashed(texts):
    return np.array([np.random.default_rng(zlib.crc32(text.encode())).normal(size=4) for text in texts])


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("rows", [4, 5, 9, 40])
@pytest.mark.parametrize("named", [0, 3, 4])
def test_few_problems_without_a_class_make_classes_big_enough_for_a_block(
    tmp_path, monkeypatch, caplog, rows, block, named
):
    """As `trl-sgpo train` loads them, with the default of 16 clusters, which most of these are too few for."""
    path = tmp_path / "problems.jsonl"
    names = ["sums"] * (named if named >= block else 0)
    path.write_text(
        "".join(
            json.dumps(
                {"prompt": f"What is {i} + {i % 3}?", "solution": str(i + i % 3)}
                | ({"problem_class": (names + [None] * rows)[i]} if names else {})
            )
            + "\n"
            for i in range(rows)
        )
    )
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": "none",
        "dataset_name": str(path),
        "reward_funcs": ["answer_reward"],
        "output_dir": str(tmp_path / "run"),
        "transfer_block_size": block,
        "num_generations": 4,
        "per_device_train_batch_size": 4 * block,
        "bf16": False,
        "report_to": "none",
        "report_problems": 0,
    }
    recipe.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(trl_sgpo.data.classes, "load_embedder", lambda name: hashed)
    loaded = read_recipe(["--config", str(recipe)], "test")
    classes = with_classes(load_data(loaded)["train"], loaded.training)[CLASS_COLUMN]
    sizes = Counter(classes)
    assert min(sizes.values()) >= block
    assert not names or sizes["sums"] >= named
    if 0 < rows - len(names) < 16 * block:
        assert "`num_clusters` is 16" in caplog.text


@pytest.mark.filterwarnings("error")
def test_fewer_different_problems_than_clusters_give_no_warning():
    dataset = Dataset.from_dict({"prompt": PROMPTS * 2})
    assert set(problem_classes(dataset, None, embed, 4, 0)[0]) == {"cluster-0", "cluster-1"}


def test_too_few_problems_are_refused_naming_num_clusters(monkeypatch):
    monkeypatch.setattr(trl_sgpo.data.classes, "load_embedder", lambda name: hashed)
    args = SGPOConfig(bf16=False, report_to="none", transfer_block_size=2, num_generations=4, small_classes="error")
    with pytest.raises(DataError, match=r"`--transfer_block_size` or more data.*`num_clusters`"):
        with_classes(Dataset.from_dict({"prompt": ["a"]}), args)
    rows = Dataset.from_dict({"prompt": list("abcd"), "problem_class": ["x", "x", "y", None]})
    with pytest.raises(
        DataError, match=r"^1 of 3 problem classes .*: 'y' \(1\): use `--small_classes merge`"
    ) as refused:
        with_classes(rows, args)
    assert "num_clusters" not in str(refused.value)


@pytest.mark.parametrize(("rows", "repeats"), [(12, True), (16, False)])
def test_a_step_that_takes_more_problems_than_there_are_is_named(tmp_path, caplog, rows, repeats):
    args = SGPOConfig(
        str(tmp_path), transfer_block_size=2, num_generations=2, per_device_train_batch_size=32, bf16=False
    )
    data = Dataset.from_dict({"prompt": [f"What is {row}?" for row in range(rows)], "problem_class": ["a"] * rows})
    dataset = with_classes(data, args)
    with_classes(dataset, args)  # by the trainer again
    assert (
        caplog.messages
        == [
            "A step takes 16 problems, and there are 12: it repeats some of them. Lower "
            "`per_device_train_batch_size` or `gradient_accumulation_steps`, or add problems."
        ]
        * repeats
    )
