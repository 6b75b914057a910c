"""
Files of an earlier version: a checkpoint resumes and a bank opens.

`fixtures/run_of_0_1_0.tar.xz` holds a tiny model and the output folder of three steps on it: a checkpoint after the
first step, in the middle of a generation batch, and a bank with its index. `expected.json` has what that version
logged, and the content of the bank after the last step.
"""

import json
import tarfile
from pathlib import Path

import pytest
from models import evenness, hash_embedder, problems
from peft import LoraConfig

from trl_sgpo import SGPOConfig, SGPOTrainer, StrategyBank
from trl_sgpo.cli.main import main
from trl_sgpo.inference.settings import TwoPhaseSettings


# The default of version 0.1.0
EXECUTION_PROMPT = "Now apply this strategy to the problem, step by step, and finish with the final answer."


ARCHIVE = Path(__file__).parent / "fixtures" / "run_of_0_1_0.tar.xz"


@pytest.fixture
def run(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def described(bank):
    return [[s.text, s.trust, s.trials, s.shown] for s in bank.strategies()]


def test_a_checkpoint_resumes_with_the_same_figures(run):
    """The remaining steps log what the earlier version logged: rollouts, optimizer, bank and random state are read."""
    expected = json.loads((run / "expected.json").read_text())
    trainer = SGPOTrainer(
        model=str(run / "model"),
        reward_funcs=evenness,
        args=SGPOConfig(
            str(run / "out"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_strategy_length=12,
            max_completion_length=12,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-3,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            seed=7,
            execution_prompt=EXECUTION_PROMPT,
        ),
        train_dataset=problems(),
        strategy_bank=StrategyBank(run / "out" / "strategy_bank", hash_embedder),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
        ),
    )
    trainer.train(resume_from_checkpoint=str(run / "out" / "checkpoint-1"))
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [logs["step"] for logs in logged] == [1, 2, 3]
    for found, wanted in zip(logged, expected["log"], strict=True):
        assert found.keys() - wanted.keys() <= {"sgpo/sampler_kl"} and not wanted.keys() - found.keys()
        for name in wanted.keys() - {"step_time"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert described(trainer.strategy_bank) == expected["strategies"]
    trainer.strategy_bank.close()


def test_a_bank_opens_and_finds_its_strategies(run):
    expected = json.loads((run / "expected.json").read_text())
    with StrategyBank(run / "out" / "strategy_bank", hash_embedder) as bank:
        assert described(bank) == expected["strategies"]
        assert bank.damage() == []
        (found,) = bank.retrieve(["Kind 0: what is 1 + 2?"])
        assert [hit.strategy.text for hit in found] == ["Add the first number to the other one."]


def test_answers_of_an_earlier_version_are_refused_with_the_way_to_go_on(run, capsys):
    """They do not say of which tokenizer, chat template, generation config and version they are."""
    rows = run / "problems.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 1 + 2?"}) + "\n")
    answers = run / "answers.jsonl"
    answers.write_text(json.dumps({"index": 0, "problem": "What is 1 + 2?", "made_by": "a9e4e38ad5c3385e"}) + "\n")
    command = ["solve", "--model", str(run / "model"), "--input", str(rows), "--output", str(answers), "--no_bank"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "an earlier version recorded no" in told and "chat_template" in told and "`--overwrite`" in told


def test_settings_without_newer_keys_are_read(run):
    settings = TwoPhaseSettings.load(run / "out" / "checkpoint-1")
    assert (settings.max_strategy_length, settings.max_completion_length) == (12, 12)
