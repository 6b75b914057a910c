"""`SharedPromptGRPOTrainer` alone: TRL's results, the start check of its fast paths, and nothing left behind."""

import subprocess
import sys
from threading import Barrier, Thread

import pytest
import torch
import trl.trainer.utils
from models import ROWS_APART, evenness, problems, save_tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLayer
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SharedPromptGRPOTrainer
from trl_sgpo.errors import ModelError
from trl_sgpo.speed import trainer as speed_trainer
from trl_sgpo.speed.lm_head import project_labelled_tokens_only
from trl_sgpo.speed.row_cache import _BlockLayer
from trl_sgpo.speed.sampling import SAMPLER_KL
from trl_sgpo.speed.scoring import without_padding
from trl_sgpo.speed.shared_prompts import SharedPrompts, packed_attention


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def make(kind, model, directory, peft_config=None, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = GRPOConfig(str(directory), **(defaults | kwargs))
    return kind(
        model=model, reward_funcs=evenness, args=args, train_dataset=problems(chat=True), peft_config=peft_config
    )


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_training_equals_that_of_trl(model, tmp_path, peft_config):
    """Where no row leaves the batch early, random numbers fall to the same tokens."""
    runs = []
    for kind in (GRPOTrainer, SharedPromptGRPOTrainer):
        trainer = make(kind, model, tmp_path, peft_config)
        trainer.drops_finished_rows = False
        trainer.train()
        runs.append((trainer, [logs for logs in trainer.state.log_history if "loss" in logs]))
    (plain, expected), (shared, found) = runs
    assert shared.shares_prompts and shared.shares_prefixes
    assert shared.merges_adapters == (peft_config is not None)
    assert len(found) == 3
    for logs, others in zip(found, expected, strict=True):
        assert logs.keys() - {SAMPLER_KL} == others.keys()
        for name in ("reward", "completions/mean_length", "num_tokens", "completions/clipped_ratio"):
            assert logs[name] == others[name]
        for name in ("loss", "grad_norm", "entropy", "kl"):
            assert logs[name] == pytest.approx(others[name], rel=2e-3, abs=1e-5), name
    for (name, weight), other in zip(shared.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=2e-3, msg=name)


def test_prompts_are_read_once(model, tmp_path):
    """Two problems of four rows: two prefixes in generation, and one packed sequence in each forward pass."""
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, beta=0.0, max_steps=1)
    read = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].shape))
    trainer.train()
    generating = [tuple(shape) for shape in read[:2]]
    assert [rows for rows, _ in generating] == [2, 8]
    assert generating[1][1] == 1  # of a prompt, only the token that generation starts from
    assert [shape[0] for shape in read[-2:]] == [1, 1]


def apart(caplog):
    return [record.message for record in caplog.records if record.message.endswith("This is slower.")]


@pytest.mark.parametrize("architecture", ROWS_APART)
def test_rows_of_an_unsupported_architecture_stay_apart(tmp_path, caplog, architecture):
    """The log says so in one line, and training goes on."""
    path = save_tiny_model(tmp_path / "model", architecture)
    trainer = make(SharedPromptGRPOTrainer, path, tmp_path / "out", max_steps=1)
    assert not trainer.shares_prompts
    (message,) = apart(caplog)
    assert message.startswith("Rows of a prompt are trained apart") and "\n" not in message
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


ALL = {"shares_prompts", "shares_prefixes", "drops_finished_rows", "trims_padding", "merges_adapters"}


def wrong_packing(monkeypatch):
    attend = SharedPrompts.attend
    monkeypatch.setattr(SharedPrompts, "attend", lambda *args, **kwargs: attend(*args, **kwargs).flip(1))


def wrong_cache(monkeypatch):
    update = _BlockLayer.update

    def shifted(self, keys, values, *args, **kwargs):
        keys, values = update(self, keys, values, *args, **kwargs)
        return keys, values.roll(1, dims=2)

    monkeypatch.setattr(_BlockLayer, "update", shifted)


def wrong_dropping(monkeypatch):
    select = _BlockLayer.batch_select_indices
    monkeypatch.setattr(_BlockLayer, "batch_select_indices", lambda self, rows: select(self, rows.flip(0)))


def wrong_trimming(monkeypatch):
    def one_token_too_short(inputs):
        cut = without_padding(inputs)
        return cut | {key: cut[key][:, 1:] for key in ("prompt_ids", "prompt_mask")}

    monkeypatch.setattr(speed_trainer, "without_padding", one_token_too_short)


def wrong_merging(monkeypatch):
    merge = LoraLayer.merge

    def weaker(layer, *args, **kwargs):
        layer.set_scale("default", 0.9)
        merge(layer, *args, **kwargs)
        layer.set_scale("default", 1.0)

    monkeypatch.setattr(LoraLayer, "merge", weaker)


FAULTS = {
    wrong_packing: ({"shares_prompts"}, "Rows of a prompt are trained apart"),
    wrong_cache: ({"shares_prefixes", "drops_finished_rows"}, "Prompts are read for each row in generation"),
    wrong_dropping: ({"drops_finished_rows"}, "Finished rows stay in the batch"),
    wrong_trimming: ({"trims_padding"}, "Micro-batches keep all padding"),
    wrong_merging: ({"merges_adapters"}, "Adapters are not merged into the base weights for generation"),
}


def used(trainer):
    return {name for name in ALL if vars(trainer)[name]}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_path_is_not_used(model, tmp_path, caplog, monkeypatch, fault):
    """With a new adapter, which has no effect; and the other paths are used."""
    fault(monkeypatch)
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA)
    missing, consequence = FAULTS[fault]
    assert used(trainer) == ALL - missing
    (message,) = apart(caplog)
    assert message.startswith(consequence)
    assert "log-probabilities" in message


@pytest.mark.parametrize("error", [AssertionError, ZeroDivisionError, NotImplementedError])
def test_a_path_that_raises_is_not_used(model, tmp_path, caplog, monkeypatch, error):
    """Whatever the code of a model raises."""

    def fail(*args, **kwargs):
        raise error("the shapes do not match")

    monkeypatch.setattr(SharedPrompts, "attend", fail)
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA)
    assert used(trainer) == ALL - {"shares_prompts"}
    (message,) = apart(caplog)
    assert message.startswith("Rows of a prompt are trained apart: LlamaForCausalLM raises 'the shapes do not match'")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_path_that_becomes_wrong_is_not_used_after_the_first_step(model, tmp_path, caplog, monkeypatch, fault):
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA, max_steps=1)
    trainer.train()
    assert used(trainer) == ALL
    fault(monkeypatch)
    trainer._prepare_inputs([dict(row) for row in trainer.train_dataset] * 8)
    missing, consequence = FAULTS[fault]
    assert used(trainer) == ALL - missing
    (message,) = apart(caplog)
    assert message.startswith(consequence)


def test_weights_that_are_no_numbers_any_more_do_not_end_training(model, tmp_path, caplog):
    """The model is refused at the start only: later, log-probabilities may have become NaN."""
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="log-probabilities differ by nan"):
        trainer._check_paths()
    trainer.state.global_step = 1
    trainer._check_paths()
    assert not used(trainer)
    assert "log-probabilities differ by nan" in caplog.text


@pytest.mark.parametrize(("std", "passes"), [(0.0, 15), (0.1, 14)], ids=["new", "trained"])
def test_the_check_takes_few_forward_passes(model, tmp_path, std, passes):
    """It precedes the first step, and each pass reads all weights. No LM head copies its weights for a row."""
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=std)
    read, projected = [], []
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0]))
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: projected.append(args[0].is_contiguous()))
    trainer._check_paths()
    assert used(trainer) == ALL
    assert len(read) == passes
    assert projected and all(projected)


def test_paths_are_compared_at_doubling_numbers_of_steps(model, tmp_path, monkeypatch):
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA, max_steps=9)
    steps = []
    monkeypatch.setattr(trainer, "_check_paths", lambda: steps.append(trainer.state.global_step))
    trainer.train()
    assert steps == [1, 2, 4, 8]


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_check_leaves_random_numbers_weights_and_mode_as_they_are(model, tmp_path, peft_config):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        trainer = make(SharedPromptGRPOTrainer, model, tmp_path, peft_config)
        states.append((torch.get_rng_state(), trainer.model.training, trainer.model.is_gradient_checkpointing))
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer._check_paths()
        assert used(trainer) == (ALL if peft_config else ALL - {"merges_adapters"})
        assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
        states.append((torch.get_rng_state(), trainer.model.training, trainer.model.is_gradient_checkpointing))
    assert all(torch.equal(state[0], states[0][0]) and state[1:] == states[0][1:] for state in states)


def test_libraries_are_as_before_after_training(model, tmp_path):
    before = trl.trainer.utils._use_triton, ALL_ATTENTION_FUNCTIONS["sdpa"]
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA, max_steps=1)
    trainer.train()
    assert (trl.trainer.utils._use_triton, ALL_ATTENTION_FUNCTIONS["sdpa"]) == before
    assert "generate" not in vars(trainer.model)


def test_a_failed_merge_and_a_replaced_generate_are_undone(model, tmp_path, monkeypatch):
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, LORA)
    weights = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    merge = LoraLayer.merge

    def fail(layer, *args, **kwargs):
        if layer is trainer.adapters.layers[-1]:
            raise torch.OutOfMemoryError("no memory for this layer")
        merge(layer, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "merge", fail)
    with pytest.raises(torch.OutOfMemoryError), trainer.fast_generation([[5, 6, 7]]):
        pass
    assert not any(layer.merged for layer in trainer.adapters.layers)
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.named_parameters())

    monkeypatch.undo()
    replaced = trainer.model.generate
    trainer.model.generate = replaced
    with trainer.fast_generation([[5, 6, 7]]):
        assert trainer.model.generate is not replaced
    assert vars(trainer.model)["generate"] is replaced


def test_changes_to_libraries_end_with_the_last_of_several_threads():
    before = trl.trainer.utils._use_triton, ALL_ATTENTION_FUNCTIONS["sdpa"]
    first, second = Barrier(2), Barrier(2)
    inside = []

    def overlap(leaves_first):
        with packed_attention(), project_labelled_tokens_only(torch.device("cpu")):
            first.wait(30)
            if not leaves_first:
                second.wait(30)
        if leaves_first:
            inside.append((trl.trainer.utils._use_triton, ALL_ATTENTION_FUNCTIONS["sdpa"]))
            second.wait(30)

    threads = [Thread(target=overlap, args=(leaves_first,)) for leaves_first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside[0][0] is not before[0] and inside[0][1] is not before[1]  # the other thread still needs them
    assert (trl.trainer.utils._use_triton, ALL_ATTENTION_FUNCTIONS["sdpa"]) == before


def test_adapters_on_tied_or_trained_weights_are_not_merged(tmp_path):
    """Merging would change the LM head too, or undo what the base weight has learnt."""
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    assert not make(SharedPromptGRPOTrainer, tied, tmp_path, lora).merges_adapters
    assert make(SharedPromptGRPOTrainer, tied, tmp_path, LORA).merges_adapters
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), LORA)
    policy.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight.requires_grad_(True)
    assert not make(SharedPromptGRPOTrainer, policy, tmp_path).merges_adapters


@pytest.mark.parametrize(
    ("peft_config", "settings"),
    [
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), {}),
        (LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5], task_type="CAUSAL_LM"), {}),
        (None, {"generation_kwargs": {"use_cache": False}}),
        (None, {"generation_kwargs": {"num_beams": 2}}),
    ],
    ids=["prompt tuning", "trainable tokens", "no cache", "beams"],
)
def test_what_trl_trains_is_trained(model, tmp_path, peft_config, settings):
    trainer = make(SharedPromptGRPOTrainer, model, tmp_path, peft_config, max_steps=1, **settings)
    assert trainer.shares_prompts == (not isinstance(peft_config, PromptTuningConfig))
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] >= 0


_IMPORT = """
import os
import trl.trainer.utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    registry = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}
    return trl.trainer.utils._use_triton, registry, dict(os.environ)

import trl, transformers, peft, datasets, accelerate  # what these change is not ours
from trl import GRPOTrainer
before = state()
import trl_sgpo, trl_sgpo.sgpo_trainer, trl_sgpo.cli.train
assert state() == before, "changed by the import"
"""


def test_importing_the_package_changes_nothing_in_the_process():
    result = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
