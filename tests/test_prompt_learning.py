"""Adapters that learn a prompt (prompt tuning, prefix tuning, P-tuning): trained, saved, resumed and used."""

from copy import deepcopy

import pytest
import torch
from models import evenness, problems, save_tiny_model
from peft import PeftType, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.errors import ConfigError, ModelError
from trl_sgpo.hub.publication import merge_adapter
from trl_sgpo.inference.model import TwoPhaseModel
from trl_sgpo.method.problem import as_problem
from trl_sgpo.method.requirements import check_model
from trl_sgpo.method.transfer import BlockGeometry
from trl_sgpo.speed.sampling import SAMPLER_KL


CONFIGS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}
COMMON = {
    "max_completion_length": 12,
    "num_generations": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=CONFIGS)
def make(request, model, tmp_path):
    def make(**kwargs):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_strategy_length": 12,
            "max_steps": 2,
            "save_strategy": "no",
            "use_bank": False,
        }
        args = SGPOConfig(**(COMMON | defaults | kwargs))
        peft_config = deepcopy(CONFIGS[request.param])
        return SGPOTrainer(model, evenness, args, problems(), peft_config=peft_config)

    return make


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def stronger(trainer):
    """So that the prompt changes what is generated."""
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, trainer.model.parameters()):
            weight *= 5


def test_prompts_are_trained_and_nothing_else(make, caplog):
    trainer = make()
    slower = [record.message for record in caplog.records if record.message.endswith("This is slower.")]
    assert slower == [
        "Rows of a prompt are trained and generated apart: prompt learning puts virtual tokens before a prompt. "
        "Results are the same. This is slower."
    ]
    assert not (trainer.shares_prompts or trainer.shares_prefixes or trainer.merges_adapters)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "prompt_encoder" in name}
    assert all(abs(log[SAMPLER_KL]) < 1e-6 for log in trainer.state.log_history if SAMPLER_KL in log)
    _, outcomes = trainer.execute_blocks([dict(row) for row in problems(2, 1)], BlockGeometry(2, 1, 0))
    assert len(outcomes) == 4


def test_what_is_sampled_is_what_is_trained(make):
    """Greedy tokens are the likeliest ones of the forward pass that training takes, in rows of any length."""
    trainer = make()
    stronger(trainer)
    trainer.generation_config.do_sample = False
    prompts = [[5, 6, 7, 8], [9, 10], [20, 21, 22, 23, 24, 25]]
    together = trainer.generate(prompts, 8)[0]
    trainer.model.eval()
    for prompt, row in zip(prompts, together, strict=True):
        assert trainer.generate([prompt], 8)[0] == [row]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([prompt + row])).logits
        assert logits[0, -len(row) - 1 : -1].argmax(dim=-1).tolist() == row
    assert "generate" not in vars(trainer.model)


def test_resumed_run_equals_an_uninterrupted_one(make, tmp_path):
    """PEFT saves what the encoder of P-tuning computes and not the encoder, so there is nothing to go on from."""
    whole = make(max_steps=3, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make(max_steps=3, save_strategy="steps", save_steps=1)
    if resumed.model.active_peft_config.peft_type == PeftType.P_TUNING:
        with pytest.raises(ConfigError, match="not the encoder"):
            resumed.train(resume_from_checkpoint=True)
        with pytest.raises(ConfigError, match=r"not the encoder.*`load_best_model_at_end` to false"):
            make(load_best_model_at_end=True, eval_strategy="no")
        return
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found = weights(resumed)
    assert resumed.state.global_step == 3
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())


def test_a_saved_adapter_writes_and_executes_as_in_training(make, model, tmp_path):
    trainer = make()
    trainer.train()
    stronger(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.generation_config.do_sample = False
    found = [as_problem(row) for row in problems(4)]
    requests = [trainer.conversation.request(problem.prompt) for problem in found]
    expected = trainer.generate(requests, 12)[0]
    saved = TwoPhaseModel.from_pretrained(str(tmp_path / "saved"))
    written = saved.write_strategies(found)
    assert [list(strategy.sampled) for strategy in written] == expected
    base = TwoPhaseModel.from_pretrained(model, saved.settings)
    assert [list(strategy.sampled) for strategy in base.write_strategies(found)] != expected
    assert len(saved.execute(found, written)) == 4
    with pytest.raises(ModelError, match="learns a prompt"):
        merge_adapter(tmp_path / "saved", model, tmp_path / "merged")


def test_prefix_tuning_with_gradient_checkpointing_is_refused(model, tmp_path):
    args = SGPOConfig(
        str(tmp_path), use_bank=False, **(COMMON | {"gradient_checkpointing": True, "num_generations": 8})
    )
    with pytest.raises(ConfigError, match="set `gradient_checkpointing` to false"):
        SGPOTrainer(model, evenness, args, problems(), peft_config=deepcopy(CONFIGS["prefix tuning"]))


@pytest.mark.parametrize("setting", ["use_vllm", "use_transformers_continuous_batching"])
def test_other_generation_is_refused(make, setting):
    trainer = make()
    vars(trainer.args)[setting] = True
    with pytest.raises(ConfigError, match=f"`{setting}`"):
        check_model(trainer)
