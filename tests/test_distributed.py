"""Two processes with one transfer block each, DDP and FSDP2, do what one process does with two."""

from functools import cache

import pytest
import torch
from models import save_tiny_model
from ranks import FSDP, load, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_rank(model, tmp_path_factory):
    """What one rank does, by `scale_rewards`."""
    directory = tmp_path_factory.mktemp("one")
    return cache(lambda scale: load(directory / scale, 1, model, scale))


@pytest.fixture(scope="module", params=["group", "batch", "fsdp2"])
def results(request, model, one_rank, tmp_path_factory):
    scale_rewards = "batch" if request.param == "batch" else "group"
    environment = FSDP if request.param == "fsdp2" else {}
    one = one_rank(scale_rewards)
    two = load(tmp_path_factory.mktemp("ranks") / "two", 2, model, scale_rewards, **environment)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    return one, two


@pytest.mark.parametrize("method", ["kl", "distill", "contrast"])
def test_what_plain_answers_learn(model, tmp_path, method):
    """Two ranks learn what one learns. Contrasts are with strategies of a rank, so that one rank has more of them."""
    one = load(tmp_path / "one", 1, model, "group", INTERNALIZE=method)
    two = load(tmp_path / "two", 2, model, "group", INTERNALIZE=method)
    assert any("sgpo/lift" in log for log in two["logs"])
    if method == "contrast":
        assert any(log.get("sgpo/contrast_rows", 0) > 0 for log in two["logs"])
        return
    assert any(log.get("sgpo/internalize_loss", 0) > 0 for log in one["logs"]) or method == "distill"
    for name, step in one["steps"].items():
        torch.testing.assert_close(two["steps"][name], step, rtol=1e-3, atol=1e-5)


def test_a_copy_of_sharded_weights_is_refused(model, tmp_path):
    statuses, told = run(tmp_path, 2, model, "group", INTERNALIZE="kl", **FSDP)
    assert any(statuses) and "keeps a copy of the weights, which are sharded here" in told


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_resuming_goes_on_as_if_nothing_had_happened(model, tmp_path, environment):
    whole = load(tmp_path / "whole", 2, model, "group", ADAM="1", **environment)
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-2")
    resumed = load(tmp_path / "resumed", 2, model, "group", checkpoint, ADAM="1", **environment)
    for name, step in whole["steps"].items():
        torch.testing.assert_close(resumed["steps"][name], step, rtol=1e-4, atol=1e-6)
    assert max(step.abs().max() for step in whole["steps"].values()) > 1e-3
    assert resumed["bank"] == whole["bank"] and resumed["written"] == whole["written"]
    assert {row["step"] for row in resumed["rows"]} == {2}


def test_rank_0_sets_an_earlier_run_aside_and_the_others_wait(model, tmp_path):
    out = tmp_path / "two" / "run"
    ids = []
    for _ in range(2):
        load(tmp_path / "two", 2, model, "group")
        ids.append((out / "run.json").read_text())
        assert {path.read_text() for path in out.glob("checkpoint-*/run.json")} == {ids[-1]}
    (first,) = (out / "earlier").iterdir()
    assert (first / "run.json").read_text() == ids[0] != ids[1]
    for place in (first, out):
        assert sorted(path.name for path in place.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]


def test_all_ranks_end_at_an_infinite_reward_of_one(model, tmp_path):
    """With the same message, and after the checkpoint of the step before."""
    statuses, told = run(tmp_path / "two", 2, model, "group", ENDLESS="1")
    assert statuses == [0, 0], told[-6000:]
    first, second = ((tmp_path / "two" / f"error_{rank}.txt").read_text() for rank in range(2))
    assert first == second and "`endless` returned inf for the problem 'Kind" in first
    assert (tmp_path / "two" / "run" / "checkpoint-1" / "trainer_state.json").is_file()


def test_sharded_checkpoints_are_refused(model, tmp_path):
    """They would hold neither a model that others can load nor the bank."""
    sharded = FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    statuses, told = run(tmp_path / "two", 2, model, "group", **sharded)
    assert 1 in statuses
    assert "set `fsdp_state_dict_type: FULL_STATE_DICT`" in told


def in_order(rows):
    return sorted(rows, key=lambda row: (row["step"], row["prompt"], row["source"], row["strategy"]))


def test_advantages(results):
    """Each row has the same advantages, token by token."""
    one, two = (in_order(result["rows"]) for result in results)
    assert len(one) == len(two) == 48
    for mine, theirs in zip(one, two, strict=True):
        assert {**mine, "advantages": None} == {**theirs, "advantages": None}
        assert mine["advantages"] == pytest.approx(theirs["advantages"], abs=1e-5)
    assert max(max(map(abs, row["advantages"])) for row in one) > 0.1
    assert any(row["retrieved"] for row in one)


def test_gradients(results):
    """After steps of plain gradient descent all parameters have moved alike."""
    one, two = (result["steps"] for result in results)
    assert max(step.abs().max() for step in one.values()) > 1e-3
    for name, step in one.items():
        torch.testing.assert_close(
            two[name], step, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_generation(results):
    """The model writes the same, gathered layer by layer or whole."""
    one, two = (result["written"] for result in results)
    assert one == two
    assert len(set(map(tuple, one))) == 4 and all(one)


def test_bank(results):
    """The bank holds the same strategies with the same counts."""
    one, two = (result["bank"] for result in results)
    assert one == two
    assert len(one) > 1


def test_metrics(results):
    """What is logged is a mean over all ranks."""
    one, two = ([logs for logs in result["logs"] if "loss" in logs] for result in results)
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        names = {name for name in mine if name.startswith(("sgpo/", "reward")) or name == "grad_norm"}
        assert names == {name for name in theirs if name.startswith(("sgpo/", "reward")) or name == "grad_norm"}
        for name in names - {"sgpo/distinct_strategies"}:
            assert theirs[name] == pytest.approx(mine[name], abs=1e-3), name


def test_checkpoint_has_a_file_of_rollouts_for_each_rank(results):
    one, two = (result["checkpoint"] for result in results)
    assert {"rollouts_0.safetensors", "strategy_bank"} <= set(one)
    assert {"rollouts_0.safetensors", "rollouts_1.safetensors", "strategy_bank"} <= set(two)
