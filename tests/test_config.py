"""`SGPOConfig`: which geometries are accepted, and what the messages about the others suggest."""

import re
import warnings

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trl_sgpo.errors import ConfigError
from trl_sgpo.method.prompts import EXECUTION_PROMPT, STEPS_PROMPT, STRATEGY_PROMPT
from trl_sgpo.sgpo_config import SGPOConfig


properties = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.fixture
def config(tmp_path):
    """Makes a config whose local batch holds one block unless told otherwise."""

    def make(**kwargs):
        if "num_generations" in kwargs:
            block = kwargs.get("transfer_block_size", 2) * kwargs["num_generations"]
            kwargs.setdefault("per_device_train_batch_size", max(block, 1))
        return SGPOConfig(str(tmp_path), report_to="none", bf16=False, **kwargs)

    return make


def refusal(config, **kwargs):
    """Message of the error a configuration raises."""
    with pytest.raises(ConfigError) as caught:
        config(**kwargs)
    return str(caught.value)


def suggested_generations(message):
    """Values of `num_generations` a message suggests."""
    found = re.search(r"set num_generations to (?:at least )?(\d+)(?: or (\d+))?", message)
    assert found is not None, message
    return [int(value) for value in found.groups() if value is not None]


class TestDefaults:
    def test_are_valid(self, config):
        made = config()
        assert (made.transfer_block_size, made.num_generations, made.num_bank_rollouts) == (2, 8, 0)
        assert made.own_strategies == 4
        assert made.per_device_train_batch_size % (2 * 8) == 0
        assert made.execution_prompt == EXECUTION_PROMPT

    @pytest.mark.parametrize(("strategy_format", "template"), [("text", STRATEGY_PROMPT), ("steps", STEPS_PROMPT)])
    def test_template_follows_the_format(self, config, strategy_format, template):
        assert config(strategy_format=strategy_format).strategy_prompt == template

    def test_own_template_is_kept(self, config):
        assert config(strategy_prompt="Plan for {problem}", strategy_format="steps").strategy_prompt == (
            "Plan for {problem}"
        )

    def test_template_without_problem(self, config):
        assert "{problem} exactly once, got 0 times" in refusal(config, strategy_prompt="Plan it.")

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_warn_of_nothing(self, config, checkpointing):
        """transformers warns of the old names of activation checkpointing, which TRL's defaults use."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            made = config(gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": True})
        assert made.gradient_checkpointing is made.activation_checkpointing is checkpointing
        assert made.to_grpo().gradient_checkpointing is checkpointing
        assert made.gradient_checkpointing_kwargs == {"use_reentrant": True}


class TestSeveralProblems:
    def test_are_told_together(self, config):
        message = refusal(config, num_generations=7, temperature=0, small_classes="x", optim="y")
        assert message.startswith("SGPOConfig has 4 problems:")
        for words in ("num_generations (7)", "`temperature`", "`small_classes`", "y is not a valid OptimizerNames"):
            assert words in message


class TestGeometry:
    @given(K=st.integers(1, 5), n=st.integers(1, 5), b=st.integers(0, 4))
    @properties
    def test_valid_ones_are_accepted(self, config, K, n, b):
        assume(n * K >= 2)
        made = config(transfer_block_size=K, num_bank_rollouts=b, num_generations=n * K + b)
        assert made.own_strategies == n

    @given(K=st.integers(2, 6), b=st.integers(0, 4), G=st.integers(1, 24))
    @properties
    def test_suggested_generations_are_accepted(self, config, K, b, G):
        assume(G - b < K or (G - b) % K)
        message = refusal(config, transfer_block_size=K, num_bank_rollouts=b, num_generations=G)
        for number in (f"num_generations ({G})", f"transfer_block_size ({K})", f"num_bank_rollouts ({b})"):
            assert number in message
        suggestions = suggested_generations(message)
        assert len(suggestions) == 2
        for value in suggestions:
            made = config(transfer_block_size=K, num_bank_rollouts=b, num_generations=value)
            assert made.own_strategies * K + b == value

    @pytest.mark.parametrize(("b", "G"), [(0, 1), (3, 4), (1, 2)])
    def test_one_strategy_a_block(self, config, b, G):
        kwargs = {"transfer_block_size": 1, "num_bank_rollouts": b}
        message = refusal(config, num_generations=G, **kwargs)
        assert "at least 2 strategies" in message
        assert f"num_generations ({G})" in message
        assert f"({b}) leaves 1" in message
        (value,) = suggested_generations(message)
        assert config(num_generations=value, **kwargs).own_strategies == 2

    @pytest.mark.parametrize(("b", "G"), [(2, 2), (4, 3), (8, 8)])
    def test_no_strategy_a_block(self, config, b, G):
        kwargs = {"transfer_block_size": 1, "num_bank_rollouts": b}
        message = refusal(config, num_generations=G, **kwargs)
        for value in suggested_generations(message):
            assert config(num_generations=value, **kwargs).own_strategies >= 2

    @given(K=st.integers(1, 6), b=st.integers(0, 4), G=st.integers(1, 24))
    @properties
    def test_suggested_block_size_is_accepted(self, config, K, b, G):
        assume(G - b < K or (G - b) % K)
        message = refusal(config, transfer_block_size=K, num_bank_rollouts=b, num_generations=G)
        if "transfer_block_size to 1" in message:
            assert config(transfer_block_size=1, num_bank_rollouts=b, num_generations=G).own_strategies == G - b

    @pytest.mark.parametrize(("K", "b"), [(0, 0), (-1, 0), (2, -1)])
    def test_negative(self, config, K, b):
        message = refusal(config, transfer_block_size=K, num_bank_rollouts=b)
        assert message.endswith(f"got {K}, {b} and 0.")

    def test_bank_rows_need_a_bank(self, config):
        kwargs = {"num_generations": 6, "num_bank_rollouts": 2}
        message = refusal(config, use_bank=False, **kwargs)
        assert "`num_bank_rollouts` is 2 but `use_bank` is false" in message
        assert config(use_bank=True, **kwargs).own_strategies == 2
        assert config(use_bank=False, num_generations=6, num_bank_rollouts=0).own_strategies == 3

    @pytest.mark.parametrize("baseline", ["two_way", "strategy"])
    def test_baselines_over_problems_need_several(self, config, baseline):
        kwargs = {"num_generations": 4, "execution_baseline": baseline}
        message = refusal(config, transfer_block_size=1, **kwargs)
        assert repr(baseline) in message
        assert "transfer_block_size to 2 or more, or execution_baseline to 'problem'" in message
        assert config(transfer_block_size=2, **kwargs).execution_baseline == baseline
        assert config(transfer_block_size=1, num_generations=4, execution_baseline="problem").own_strategies == 4

    @given(K=st.integers(2, 5), b=st.integers(0, 3))
    @properties
    def test_one_strategy_a_problem_has_no_outcome_without_transfer(self, config, K, b):
        kwargs = {"transfer_block_size": K, "num_bank_rollouts": b, "num_generations": K + b}
        message = refusal(config, transfer_weight=0.0, **kwargs)
        assert "`transfer_weight` is 0" in message and "transfer_block_size to 1" in message
        (value,) = suggested_generations(message)
        assert config(transfer_weight=0.0, **(kwargs | {"num_generations": value})).own_strategies == 2
        assert config(transfer_weight=0.1, **kwargs).own_strategies == 1
        assert config(transfer_weight=0.0, **(kwargs | {"transfer_block_size": 1})).own_strategies == K
        assert config(transfer_weight=0.0, correctness_weight=0.0, **kwargs).own_strategies == 1

    def test_one_borrowed_strategy_has_no_outcome_without_correctness(self, config):
        message = refusal(config, num_generations=2, correctness_weight=0.0)
        assert "`correctness_weight` is 0" in message
        (value,) = suggested_generations(message)
        assert config(num_generations=value, correctness_weight=0.0).own_strategies == 2
        for kwargs in ({"correctness_weight": 0.1}, {"correctness_weight": 0.0, "transfer_weight": 0.0}):
            assert config(num_generations=2, **kwargs).own_strategies == 1
        assert config(num_generations=3, num_bank_rollouts=1, correctness_weight=0.0).own_strategies == 1


class TestLocalBatch:
    """A block must not be split between devices."""

    @given(K=st.integers(2, 4), n=st.integers(1, 3), groups=st.integers(1, 9), steps=st.integers(1, 3))
    @properties
    def test_suggested_product_is_accepted(self, config, K, n, groups, steps):
        G = K * n
        local = groups * G * steps
        assume(local % (K * G))
        kwargs = {"transfer_block_size": K, "num_generations": G}
        message = refusal(config, per_device_train_batch_size=groups * G, gradient_accumulation_steps=steps, **kwargs)
        for number in (f"({groups * G})", f"({steps}) = {local} rows", f"({K})", f"({G}) = {K * G}"):
            assert number in message
        product = int(re.search(r"so that it is (\d+)", message)[1])
        assert product > local
        assert config(per_device_train_batch_size=product, **kwargs).steps_per_generation == 1
        made = config(per_device_train_batch_size=1, gradient_accumulation_steps=product, **kwargs)
        assert made.steps_per_generation == product

    @given(K=st.integers(1, 3), n=st.integers(2, 3), b=st.integers(0, 2), batch=st.integers(1, 40))
    @properties
    def test_message_names_a_fix_whatever_the_batch(self, config, K, n, b, batch):
        kwargs = {"transfer_block_size": K, "num_generations": K * n + b, "num_bank_rollouts": b}
        assume(batch % (K * (K * n + b)))
        message = refusal(config, per_device_train_batch_size=batch, **kwargs)
        found = re.search(r"so that it is (\d+)", message)
        assert found is not None, message
        assert config(per_device_train_batch_size=int(found[1]), **kwargs).own_strategies == n

    def test_several_blocks_and_accumulation(self, config):
        made = config(per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=8)
        assert made.generation_batch_size == 32

    def test_errors_of_trl_are_config_errors(self, config):
        assert "auto_find_batch_size" in refusal(config, auto_find_batch_size=True)


class TestChoices:
    @pytest.mark.parametrize(
        ("name", "choices"),
        [
            ("small_classes", ["error", "merge"]),
            ("strategy_format", ["text", "steps"]),
            ("execution_baseline", ["problem", "strategy", "two_way"]),
        ],
    )
    def test_bad_choice(self, config, name, choices):
        message = refusal(config, **{name: "other"})
        assert f"`{name}`" in message
        assert "'other'" in message
        for choice in choices:
            assert choice in message
            assert getattr(config(**{name: choice}), name) == choice

    @pytest.mark.parametrize("name", ["max_strategy_length", "max_completion_length", "bank_capacity"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_lengths_and_capacity_are_positive(self, config, name, value):
        most = " and at most 131072" if name.endswith("length") else ""
        assert refusal(config, **{name: value}) == f"`{name}` must be at least 1{most}, got {value}."
        assert getattr(config(**{name: 1}), name) == 1

    def test_aggregation(self, config):
        message = refusal(config, multi_objective_aggregation="normalize_then_sum")
        assert "multi_objective_aggregation to 'sum_then_normalize'" in message


class TestGenerationBatchSize:
    """It counts the rows of all devices, as in TRL."""

    def test_gives_the_steps(self, config):
        made = config(num_generations=4, generation_batch_size=24)
        assert (made.per_device_train_batch_size, made.steps_per_generation) == (8, 3)
        assert made.to_grpo().steps_per_generation == 3

    def test_message_of_one_without_whole_blocks(self, config):
        message = refusal(config, num_generations=4, per_device_train_batch_size=4, generation_batch_size=12)
        assert "generation_batch_size" in message and "set generation_batch_size to 16" in message
        config(num_generations=4, per_device_train_batch_size=4, generation_batch_size=16)

    def test_what_trl_refuses(self, config):
        assert "divisible by the global batch size" in refusal(config, num_generations=4, generation_batch_size=12)
        message = refusal(config, num_generations=4, generation_batch_size=16, steps_per_generation=2)
        assert "'generation_batch_size' and 'steps_per_generation'" in message


class TestGenerationKwargs:
    @pytest.mark.parametrize(
        ("name", "value", "instead"),
        [
            ("max_new_tokens", 30, "`max_completion_length`.*`max_strategy_length`"),
            ("max_length", 30, "`max_completion_length`"),
            ("temperature", 0.5, "`temperature` of the configuration"),
            ("num_return_sequences", 2, "`num_generations`"),
            ("eos_token_id", 7, "`generation_config.json`"),
        ],
    )
    def test_setting_of_another_key_names_it(self, config, name, value, instead):
        message = refusal(config, generation_kwargs={name: value})
        assert re.search(f"`generation_kwargs` cannot set `{name}`: .*{instead}", message), message

    @pytest.mark.parametrize("name", ["max_tokens", "n"])
    def test_names_of_vllm(self, config, name):
        message = refusal(config, generation_kwargs={name: 2}, use_vllm=True)
        assert f"`generation_kwargs` cannot set `{name}`" in message

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *[("num_beams", 2), ("num_beam_groups", 2), ("do_sample", False), ("penalty_alpha", 0.6)],
            *[("constraints", [[5]]), ("force_words_ids", [[5]]), ("dola_layers", "low"), ("use_mtp", True)],
            *[("prompt_lookup_num_tokens", 2), ("assistant_early_exit", 1), ("stop_strings", ["."])],
            *[("token_healing", True), ("return_dict_in_generate", True)],
        ],
    )
    def test_what_cannot_train_is_named(self, config, name, value):
        assert f"`{name}` in `generation_kwargs`" in refusal(config, generation_kwargs={name: value})

    def test_unknown_name(self, config):
        assert "`min_new_token`" in refusal(config, generation_kwargs={"min_new_token": 3})

    @pytest.mark.parametrize(
        "given", [None, {}, '{"typical_p": 0.9}', {"num_beams": 1, "do_sample": True, "min_new_tokens": 2}]
    )
    def test_others_are_taken(self, config, given):
        config(generation_kwargs=given)


def test_the_home_directory_in_the_path_of_a_bank(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = SGPOConfig("~/run", bank_path="~/bank", bf16=False, report_to="none")
    assert (args.output_dir, args.bank_path) == (str(tmp_path / "run"), str(tmp_path / "bank"))
