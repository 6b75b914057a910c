"""A checkpoint goes on as what it was: a whole model, or an adapter of the same layers, rank and scale."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import evenness, problems, save_tiny_model
from peft import LoraConfig
from test_runs import config
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import safe_globals

from trl_sgpo import SGPOTrainer
from trl_sgpo.errors import ConfigError
from trl_sgpo.run.resuming import OptimizerBefore


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
OTHER = {
    "whole": (None, r"holds an adapter, and the whole model is trained: set `use_peft: true`"),
    "rank": ({"r": 8}, r"other settings \(`r` was 4, is 8\): set those of before"),
    "scale": ({"lora_alpha": 64}, r"other settings \(`lora_alpha` was 8, is 64\)"),
    "dora": ({"use_dora": True}, r"other settings \(`use_dora` was False, is True\)"),
    "layers": (
        {"target_modules": ["q_proj"]},
        r"of other layers \(4 weights differ, such as .*v_proj.*_modules`",
    ),
}


def resumed(model: str, out: Path, lora: dict | None, checkpoint: bool | None, **kwargs) -> SGPOTrainer:
    peft_config = None if lora is None else LoraConfig(**lora)
    args = config(out, save_strategy="steps", save_steps=1, **kwargs)
    trainer = SGPOTrainer(model, evenness, args, problems(), peft_config=peft_config)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("other", OTHER)
def test_an_adapter_goes_on_as_what_it_was(model, tmp_path, other):
    """Libraries load another scale without a word, and fail at the rest with messages of their own."""
    resumed(model, tmp_path, ADAPTER, None)
    change, message = OTHER[other]
    with pytest.raises(ConfigError, match=rf"checkpoint-1.*{message}.* or train without `resume_from_checkpoint`"):
        resumed(model, tmp_path, None if change is None else ADAPTER | change, True, max_steps=2)


def test_a_whole_model_does_not_go_on_as_an_adapter(model, tmp_path):
    resumed(model, tmp_path, None, None)
    with pytest.raises(ConfigError, match="holds a whole model, and an adapter is trained: set `use_peft: false`"):
        resumed(model, tmp_path, ADAPTER, True, max_steps=2)


def test_the_state_of_another_optimizer_is_refused(model, tmp_path):
    resumed(model, tmp_path, ADAPTER, None)
    with pytest.raises(ConfigError, match=r"checkpoint-1 holds the state of another optimizer.*set `optim` as it was"):
        resumed(model, tmp_path, ADAPTER, True, max_steps=2, optim="adafactor")


def test_an_adapter_of_the_same_layers_goes_on(model, tmp_path, caplog):
    """Also where they are named otherwise, with another dropout, and where its base has been moved."""
    resumed(model, tmp_path / "run", ADAPTER, None)
    moved = shutil.copytree(model, tmp_path / "moved" / Path(model).name)
    change = {"target_modules": r".*self_attn\.(q|v)_proj", "lora_dropout": 0.1}
    assert resumed(str(moved), tmp_path / "run", ADAPTER | change, True, max_steps=2).state.global_step == 2
    assert "was trained on" not in caplog.text


def test_an_adapter_does_not_go_on_on_another_base(model, tmp_path):
    resumed(model, tmp_path / "run", ADAPTER, None)
    same = save_tiny_model(tmp_path / "same")
    resumed(same, tmp_path / "run", ADAPTER, True, max_steps=2)
    other = save_tiny_model(tmp_path / "other")
    changed = AutoModelForCausalLM.from_pretrained(other)
    changed.get_input_embeddings().weight.data += 0.1
    changed.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"whose weights are not those of .*other: name that base"):
        resumed(other, tmp_path / "run", ADAPTER, True, max_steps=3)


def test_an_adapter_does_not_go_on_in_another_precision(model, tmp_path):
    resumed(model, tmp_path, ADAPTER, None)
    with pytest.raises(ConfigError, match=r"in another precision \(float32, now bfloat16\): set `dtype`"):
        resumed(model, tmp_path, ADAPTER, True, max_steps=2, model_init_kwargs={"dtype": "bfloat16"})


def test_the_best_model_is_that_of_the_highest_reward(tmp_path):
    for keys in ({"load_best_model_at_end": True}, {"save_strategy": "best"}):
        args = config(
            tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, **({"save_strategy": "steps"} | keys)
        )
        assert (args.metric_for_best_model, args.greater_is_better) == ("eval_reward", True)
    assert config(tmp_path).metric_for_best_model is None


def no_shape(state):
    for each in state["state"].values():
        each["exp_avg"] = torch.zeros(3)


def no_memory(state):
    for each in state["state"].values():
        each["exp_avg"] = torch.zeros(1).expand(each["exp_avg"].shape)


def no_steps(state):
    for each in state["state"].values():
        each["step"] = torch.zeros(0)


def no_rate(state):
    state["param_groups"][0]["lr"] = "x"


def no_number(state):
    state["param_groups"][0]["betas"] = (0.9, float("nan"))


def no_last_step(state):
    state["last_epoch"] = "x"


def no_method(state):
    state["step"] = 1


def no_generator(state):
    state.clear()


def another_generator(state):
    state["cpu"] = torch.zeros(3, dtype=torch.uint8)


def no_python_generator(state):
    state["python"] = 1


DAMAGED = {
    no_shape: ("optimizer.pt", "tensors of another shape"),
    no_memory: ("optimizer.pt", "tensors of another shape"),
    no_steps: ("optimizer.pt", "tensors of another shape"),
    no_rate: ("optimizer.pt", "has no valid `lr`"),
    no_number: ("optimizer.pt", "has no valid `betas`"),
    no_last_step: ("scheduler.pt", "has no valid `last_epoch`"),
    no_method: ("scheduler.pt", "has no valid `step`"),
    no_generator: ("rng_state.pth", "random numbers in .* is damaged"),
    another_generator: ("rng_state.pth", "random numbers in .* is damaged"),
    no_python_generator: ("rng_state.pth", "random numbers in .* is damaged"),
}


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("run")
    resumed(model, out, None, None)
    return out


@pytest.mark.parametrize("change", DAMAGED, ids=lambda change: change.__name__)
def test_a_state_that_was_changed_is_refused(model, stopped, tmp_path, change):
    """Kernels of an optimizer write beyond a tensor that is smaller than the weight: the process died by a signal."""
    name, message = DAMAGED[change]
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    path = out / "checkpoint-1" / name
    with safe_globals():
        state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(ConfigError, match=f"{message}.*: resume from another checkpoint"):
        resumed(model, out, None, True, max_steps=2)


@pytest.mark.parametrize("name", ["num_input_tokens_seen", "logging_steps", "save_steps", "train_batch_size"])
def test_a_state_of_the_trainer_of_other_types_is_refused(model, stopped, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    path = out / "checkpoint-1" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "x"}))
    with pytest.raises(ConfigError, match=r"trainer_state\.json is damaged"):
        resumed(model, out, None, True, max_steps=2)


def test_a_schedule_with_infinite_bounds_goes_on():
    """That of `reduce_lr_on_plateau` has a best value of infinity until the first evaluation."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    before = OptimizerBefore(optimizer, schedule)
    schedule.load_state_dict(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer).state_dict())
    before.check("checkpoint-1")
    schedule.best = float("nan")
    with pytest.raises(ConfigError, match="no valid `best`"):
        before.check("checkpoint-1")
