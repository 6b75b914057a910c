"""What the package relies on in TRL and transformers beyond their documented interfaces."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from models import evenness, problems, save_tiny_model
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer.utils import generate_model_card

from trl_sgpo.hub.model_card import TrainingFacts
from trl_sgpo.speed.lm_head import project_labelled_tokens_only
from trl_sgpo.speed.scoring import without_padding


LOSS_TYPES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def fixed_rollout(prompts, trainer):
    """Two tokens of a first phase, one masked, two of a second one, different for each row."""
    rows = range(len(prompts))
    return {
        "prompt_ids": [[10 + row, 11, 12][: 2 + row % 2] for row in rows],
        "completion_ids": [[20 + row, 21, 22, 23 + row, 24][: 4 + row % 2] for row in rows],
        "logprobs": None,
        "env_mask": [[1, 1, 0, 1, 1][: 4 + row % 2] for row in rows],
        "extra": [f"row {row}" for row in rows],
    }


def by_parity(completions, **kwargs):
    return [float(index % 2) for index in range(len(completions))]


def make(model, directory, reward=by_parity, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = GRPOConfig(str(directory), **(defaults | kwargs))
    return GRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=problems(), rollout_func=fixed_rollout
    )


@pytest.fixture
def scored(model, tmp_path):
    """A trainer, ready to compute a loss, and a scored batch."""
    trainer = make(model, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [dict(trainer.train_dataset[index]) for index in (0, 0, 1, 1)]
    return trainer, rows, trainer._generate_and_score_completions(rows)


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("_generate_single_turn", ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_get_train_sampler", ["self", "dataset"]),
        ("_tokenize_prompts", ["self", "prompts"]),
        ("_log_completion_extra", ["self", "column", "values"]),
        ("_log_metric", ["self", "name", "value"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("compute_loss", ["self", "model", "inputs"]),
        (
            "_get_per_token_logps_and_entropies",
            ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
        ),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("_prepare_for_training", ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]),
        ("_load_best_model", ["self"]),
        ("init_hf_repo", ["self", "token"]),
        ("create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        ("push_to_hub", ["self", "commit_message", "blocking", "token", "revision"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_finish_current_push", ["self"]),
        ("_determine_best_metric", ["self", "metrics", "trial"]),
    ],
)
def test_signatures(method, parameters):
    """Methods called or overridden start with these parameters, and further ones have defaults."""
    found = inspect.signature(getattr(GRPOTrainer, method)).parameters
    assert list(found)[: len(parameters)] == parameters
    further = [parameter for name, parameter in found.items() if name not in parameters]
    assert all(each.default is not each.empty or each.kind == each.VAR_KEYWORD for each in further)


def test_rollout_func_is_an_argument():
    """Nothing here works without it. docs/design.md, "When TRL removes a hook", says what is done then."""
    parameters = inspect.signature(GRPOTrainer.__init__).parameters
    assert list(parameters)[:4] == ["self", "model", "reward_funcs", "args"]
    assert "rollout_func" in parameters


def test_a_save_pushes_through_the_methods_that_are_overridden(model, tmp_path, monkeypatch):
    """`_save_checkpoint` hands a complete checkpoint to `_push_from_checkpoint`, and the end of training waits."""
    seen = []
    monkeypatch.setattr(GRPOTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(
        GRPOTrainer,
        "_push_from_checkpoint",
        lambda self, folder: seen.append((Path(folder).name, (Path(folder) / "trainer_state.json").is_file())),
    )
    monkeypatch.setattr(GRPOTrainer, "_finish_current_push", lambda self: seen.append("waited"))
    make(model, tmp_path, push_to_hub=True, save_strategy="steps", save_steps=1).train()
    assert seen == [("checkpoint-1", True), "waited"]


def test_tags_of_a_card(model, tmp_path):
    """TRL's card opens with metadata that has tags."""
    trainer = make(model, tmp_path)
    trainer.create_model_card(tags=["mine"])
    card = (tmp_path / "README.md").read_text()
    assert {"mine", "trl", "grpo"} <= set(TrainingFacts().with_card(card).tags)


def test_links_of_a_card_to_where_a_run_was_tracked(tmp_path):
    places = {"wandb_url": "https://wandb.ai/me/p/runs/1", "trackio_url": "https://me-t.hf.space/?project=p&runs=r"}
    given = dict.fromkeys(inspect.signature(generate_model_card).parameters, "x")
    card = str(
        generate_model_card(**given | places | {"tags": [], "comet_url": "http://comet/1", "template_file": None})
    )
    badges = TrainingFacts().with_card(card).badges
    assert [re.search(r"\((.*)\)$", badge)[1] for badge in badges] == [*places.values(), "http://comet/1"]
    TrainingFacts(badges=badges).save(tmp_path)
    assert TrainingFacts.load(tmp_path).badges == badges
    assert TrainingFacts().with_card(card.replace("raw.githubusercontent.com", "evil.example")).badges == ()


def test_extras_of_a_rollout_reach_inputs_and_rewards(model, tmp_path):
    """Prompts arrive repeated; lists beyond the required keys come back in `inputs` and in reward arguments."""
    seen = {}

    def reward(completions, extra, solution, **kwargs):
        seen.update(extra=extra, solution=solution, env_mask="env_mask" in kwargs)
        return [0.0] * len(completions)

    trainer = make(model, tmp_path, reward)
    rows = [dict(trainer.train_dataset[index]) for index in (0, 0, 1, 1)]
    trainer._generate_and_score_completions(rows)
    assert [row["extra"] for row in rows] == ["row 0", "row 1", "row 2", "row 3"]
    assert seen == {"extra": [row["extra"] for row in rows], "solution": ["0", "0", "2", "2"], "env_mask": False}


def test_what_generate_returns(model, tmp_path):
    """It calls `rollout_func`, and is what could be overridden without it."""
    trainer = make(model, tmp_path)
    prompts = [trainer.train_dataset[index]["prompt"] for index in (0, 1)]
    given = fixed_rollout(prompts, trainer)
    prompt_ids, completion_ids, mask, completions, log_probs, extra, *images = trainer._generate(prompts)
    assert (prompt_ids, completion_ids, mask) == (given["prompt_ids"], given["completion_ids"], given["env_mask"])
    assert len(completions) == 2 and log_probs is None and extra == {"extra": ["row 0", "row 1"]}
    assert not any(images)


def test_env_mask_becomes_tool_mask(scored):
    """Masked tokens are attended to but not trained."""
    _, _, output = scored
    assert output["completion_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5] * 2
    assert (output["tool_mask"] * output["completion_mask"]).tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]] * 2
    assert output["advantages"].shape == (4,)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_advantages_broadcast(scored, loss_type):
    """(B, T) advantages that are constant in T equal (B,) ones, and what masked tokens carry does not matter."""
    trainer, _, output = scored
    trainer.loss_type = loss_type
    loss, gradients = loss_and_gradients(trainer, output)
    spread = output["advantages"].unsqueeze(1).repeat(1, output["completion_ids"].size(1))
    trained = output["completion_mask"] * output["tool_mask"]
    spread = torch.where(trained.bool(), spread, 1e6)
    same_loss, same_gradients = loss_and_gradients(trainer, {**output, "advantages": spread})
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-6
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-4, atol=1e-7)


def test_token_advantages_credit_tokens(scored):
    """Gradients of two parts of the tokens add up to that of all tokens."""
    trainer, _, output = scored
    trainer.loss_type = "dapo"
    whole = output["advantages"].unsqueeze(1).repeat(1, output["completion_ids"].size(1))
    first, second = whole.clone(), whole.clone()
    first[:, 2:], second[:, :2] = 0, 0
    parts = [loss_and_gradients(trainer, {**output, "advantages": part})[1] for part in (first, second)]
    _, together = loss_and_gradients(trainer, {**output, "advantages": whole})
    assert all(max(gradient.abs().max() for gradient in part.values()) > 1e-6 for part in parts)
    for name, gradient in together.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_cutting_off_padding_changes_nothing_but_work(scored, loss_type):
    """Columns that are padding in all rows of a micro-batch carry nothing: loss and gradients stay."""
    trainer, _, output = scored
    trainer.loss_type = loss_type
    length = output["completion_ids"].size(1)
    per_token = output["advantages"].unsqueeze(1).repeat(1, length)
    output = {**output, "advantages": per_token, "old_per_token_logps": torch.full((4, length), -5.0)}
    padded = dict(output)
    for key in ("prompt_ids", "prompt_mask"):
        padded[key] = torch.nn.functional.pad(output[key], (3, 0))
    for key in ("completion_ids", "completion_mask", "tool_mask", "advantages", "old_per_token_logps"):
        padded[key] = torch.nn.functional.pad(output[key], (0, 5))
    cut = without_padding(padded)
    shapes = {key: value.shape for key, value in cut.items()}
    assert shapes == {key: value.shape for key, value in output.items()}
    loss, gradients = loss_and_gradients(trainer, padded)
    same_loss, same_gradients = loss_and_gradients(trainer, cut)
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_scoring_trained_positions_only_changes_nothing_but_work(scored, monkeypatch):
    """`_use_triton` in `trl.trainer.utils` decides whether prompts are projected, and only that."""
    trainer, _, output = scored
    projected = []
    original = trl.trainer.utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden_states, *args):
            projected.append(len(hidden_states))
            return original.apply(hidden_states, *args)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counting)
    assert not _use_triton(torch.device("cpu"))
    loss, gradients = loss_and_gradients(trainer, output)
    with project_labelled_tokens_only(torch.device("cpu")):
        same_loss, same_gradients = loss_and_gradients(trainer, output)
    assert trl.trainer.utils._use_triton is _use_triton
    assert projected[1] == output["completion_mask"].sum() < projected[0]
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_a_stand_in_for_the_model_can_score(scored):
    """Scoring calls its model by keywords and reads two fields of what it returns; the loss has no other use of it."""
    trainer, _, output = scored
    seen = []

    def stand_in(**inputs):
        seen.append(inputs)
        outputs = trainer.model(**inputs)
        return SimpleNamespace(log_probs=outputs.log_probs, entropy=outputs.entropy)

    loss, _ = loss_and_gradients(trainer, output)
    assert torch.equal(trainer._compute_loss(stand_in, output).detach(), loss)
    assert [set(inputs) for inputs in seen] == [{"input_ids", "attention_mask", "labels", "fused_lm_head"}]
    labels = seen[0]["labels"]
    width = output["prompt_ids"].size(1)
    assert (labels[:, :width] == -100).all()
    assert torch.equal(labels[:, width:] != -100, output["completion_mask"].bool())


def test_labels_can_be_given_shifted(scored):
    """With `shift_labels`, scores stand where their labels do."""
    trainer, _, output = scored
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "fused_lm_head": True}
    expected = trainer.model(**inputs, labels=labels).log_probs
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(trainer.model(**inputs, shift_labels=shifted).log_probs[:, :-1], expected)


def test_trainer_state_is_written_last(model, tmp_path, monkeypatch):
    """A checkpoint with a `trainer_state.json` is complete."""
    present = []
    write = TrainerState.save_to_json

    def save_to_json(self, json_path):
        present.append({path.name for path in Path(json_path).parent.iterdir()})
        write(self, json_path)

    monkeypatch.setattr(TrainerState, "save_to_json", save_to_json)
    trainer = make(model, tmp_path, evenness, save_strategy="steps", save_steps=1)
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files
    assert present[0] == files - {"trainer_state.json"}


def test_buffered_rollouts_can_be_saved_as_tensors(model, tmp_path):
    """What later steps still train on is a list of dicts of tensors or None, one a slice; `_step` counts slices."""
    trainer = make(model, tmp_path, steps_per_generation=2)
    trainer.train()
    assert trainer._step == 1
    assert len(trainer._buffered_inputs) == 2
    for rollouts in trainer._buffered_inputs:
        assert {"prompt_ids", "completion_ids", "advantages", "tool_mask", "old_per_token_logps"} <= rollouts.keys()
        assert all(value is None or isinstance(value, torch.Tensor) for value in rollouts.values())
