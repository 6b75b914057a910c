"""The estimate of memory: against what training allocates, against published sizes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import evenness, hash_embedder, problems, save_tiny_model
from torch._C._profiler import _EventType
from torch.profiler._utils import traverse_dfs
from transformers import AutoConfig
from trl import get_peft_config, get_quantization_config

import trl_sgpo.cli.train
from trl_sgpo import SGPOTrainer, StrategyBank
from trl_sgpo.cli.main import main
from trl_sgpo.method.context_length import longest_requests
from trl_sgpo.method.conversation import Conversation
from trl_sgpo.method.rollout import Rollout
from trl_sgpo.recipe import Recipe, model_init_kwargs, read_recipe
from trl_sgpo.speed import generation
from trl_sgpo.vram.advice import cheapest_change
from trl_sgpo.vram.architectures import architectures, model_config
from trl_sgpo.vram.check import estimate_recipe
from trl_sgpo.vram.estimate import Estimate, Estimator, Lengths, rows_of_problems
from trl_sgpo.vram.simulate import SimulatedModel


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 2048,
}
FULL = ["--dtype", "float32", "--bf16", "false", "--gradient_checkpointing", "false", "--optim", "adamw_torch_fused"]
LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_dropout", "0", "--dtype", "bfloat16"]
QLORA = [*LORA, "--load_in_4bit", "true", "--use_bnb_nested_quant", "true", "--optim", "paged_adamw_8bit"]


TEACHING = [
    "--num_generations",
    "6",
    "--num_plain_rollouts",
    "2",
    "--per_device_train_batch_size",
    "6",
    "--internalize",
]


def guided_are_right(rollout: list[Rollout], **kwargs: Any) -> list[float]:
    """All rows of which plain answers can learn are right."""
    return [float(each.source != "plain") for each in rollout]


def small_recipe(model: str, tmp_path: Path, options: list[str]) -> Recipe:
    lengths = ["--max_strategy_length", "16", "--max_completion_length", "48", "--max_steps", "2"]
    rows = ["--num_generations", "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    quiet = ["--output_dir", str(tmp_path / "run"), "--save_strategy", "no", "--report_to", "none"]
    return read_recipe(["--model_name_or_path", model, *lengths, *rows, *quiet, *options], "test")


def trained_peak(trainer: SGPOTrainer) -> int:
    """Bytes of all tensors at the peak of two steps, the first of which makes the optimizer's states."""
    standing = {}
    for module in trainer.model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            standing[tensor.data_ptr()] = tensor.nbytes
            if hasattr(tensor, "quant_state"):
                state = tensor.quant_state
                standing[state.absmax.data_ptr()] = state.absmax.nbytes
                standing[state.state2.absmax.data_ptr()] = state.state2.absmax.nbytes
    return sum(standing.values()) + allocated_peak(trainer.train)


def allocated_peak(run: Callable[[], Any]) -> int:
    """
    Bytes of all new tensors at the peak, from the profiler's record of every allocation and release. Unlike the size
    of the process it does not depend on what the machine's allocator and libraries keep.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = traverse_dfs(profile.profiler.kineto_results.experimental_event_tree())
    changes = [event for event in events if event.typed[0] == _EventType.Allocation]
    live: dict[int, int] = {}  # so that what was there before is not counted when it is released
    total = peak = 0
    for event in sorted(changes, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            live[address] = size
            total += size
        else:
            total -= live.pop(address, 0)
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", FULL), ("qwen3", LORA), ("qwen2", QLORA)]
    + [("llama", [*form, *TEACHING, method]) for form in (FULL, LORA) for method in ("distill", "contrast", "kl")],
)
def test_estimate_is_what_training_on_a_cpu_allocates(
    architecture: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = Conversation.parse  # full length, and not cut off
    monkeypatch.setattr(Conversation, "parse", lambda self, prompt, ids, truncated=False: parse(self, prompt, ids))
    model = save_tiny_model(tmp_path / "model", architecture, **SIZES)
    recipe = small_recipe(model, tmp_path, options)
    recipe.training.model_init_kwargs = model_init_kwargs(recipe) | {"revision": None}
    bank = StrategyBank(tmp_path / "bank", embedding_model=hash_embedder)
    trainer = SGPOTrainer(
        model,
        guided_are_right if "--internalize" in options else evenness,
        recipe.training,
        train_dataset=problems(),
        strategy_bank=bank,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
    )
    trainer.generation_config.suppress_tokens = trainer.eos_token_ids  # full length
    measured = trained_peak(trainer)
    shown = 0  # the bank is empty
    length = recipe.training.max_strategy_length
    (request,) = longest_requests(problems()["prompt"], 1, trainer.conversation, length, shown)
    turn = len(trainer.conversation.turn(problems()["prompt"][0]).bridge)
    estimate = Estimator(AutoConfig.from_pretrained(model), "cpu")(recipe, Lengths(len(request), 16, turn, 48))
    print(f"{architecture}: measured {measured}, estimated {estimate.peak} ({estimate.moment})")
    assert estimate.peak == pytest.approx(measured, rel=0.15), (estimate.parts, estimate.moments)


def test_estimate_is_what_generation_on_a_cpu_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large LM head, which no pass copies, and contexts that are read at once and in parts."""
    sizes = SIZES | {"vocab_size": 8192, "intermediate_size": 1024}
    path = save_tiny_model(tmp_path / "model", "llama", **sizes)
    args = small_recipe(path, tmp_path, FULL).training
    trainer = SGPOTrainer(
        path,
        evenness,
        args,
        train_dataset=problems(),
        strategy_bank=StrategyBank(tmp_path / "bank", embedding_model=hash_embedder),
    )
    trainer.generation_config.suppress_tokens = trainer.eos_token_ids  # full length
    requests = [[problem] * 100 for problem in range(3, 7)]
    contexts = [[*request, *range(10, 74)] for request in requests for _ in range(16)]
    model = SimulatedModel(AutoConfig.from_pretrained(path), torch.float32)
    measured = []
    for read_tokens in (2**20, 512):
        monkeypatch.setattr(generation, "READ_TOKENS", read_tokens)

        def generate() -> None:
            with torch.no_grad(), trainer.fast_generation(requests):
                trainer.generate(contexts, 24)

        measured.append(allocated_peak(generate))
        logit_bytes = 6 * 4  # as in the estimate, without a copy in 32 bits and with one for the suppressed tokens
        moments = model.generation(len(contexts), len(requests), 99, 65, 24, logit_bytes, keep_prefixes=False)
        print(f"{read_tokens}: measured {measured[-1]}, estimated {moments}")
        assert max(moments.values()) == pytest.approx(measured[-1], rel=0.15), moments
    assert measured[1] < 0.5 * measured[0]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("google/gemma-3-1b-it", 999_885_952),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
    ],
)
def test_architectures_have_their_published_number_of_parameters(name: str, parameters: int, tmp_path: Path) -> None:
    assert name in architectures()
    config, _ = model_config(name)
    recipe = small_recipe(name, tmp_path, QLORA)
    assert Estimator(config)(recipe, Lengths(32, 8, 8, 8)).parameters == parameters


def test_a_name_is_another_model_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a directory has the name of a model of the Hub, that is estimated there, and only there."""
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    recipe = small_recipe(name, tmp_path, LORA)
    peaks = []
    for folder in ("tiny", "smaller", "neither"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if folder != "neither":
            save_tiny_model(Path(name), num_hidden_layers=2 if folder == "tiny" else 1)
        peaks.append(estimate_recipe(recipe, "recipe.yaml", None, "cpu")["peak"])
    assert peaks[1] < peaks[0] < peaks[2]


@given(rows=st.integers(1, 24), group=st.integers(1, 12))
def test_rows_of_problems_are_those_of_a_micro_batch(rows, group) -> None:
    """All rows of it, neighbours by problem, and no micro-batch of the run has more problems."""
    counts = rows_of_problems(rows, group)
    assert sum(counts) == rows and max(counts) <= group
    assert all(count == group for count in counts[1:-1])
    starts = range(0, rows * group, rows)
    assert len(counts) == max((start + rows - 1) // group - start // group + 1 for start in starts)


def test_change_is_the_first_that_fits_and_recipe_stays_as_it_is(tmp_path: Path) -> None:
    recipe = small_recipe("any", tmp_path, FULL)
    tried = []

    def estimate(changed: Recipe) -> Estimate:
        tried.append(changed.training.per_device_train_batch_size)
        size = changed.training.per_device_train_batch_size * (1 if changed.training.gradient_checkpointing else 2)
        return Estimate({}, {"training": size * 2**30}, {}, 0, 0, Lengths(1, 1, 1, 1))

    change, changed = cheapest_change(recipe, 5, estimate)
    assert change == {"gradient_checkpointing": True} and changed.peak == 4 * 2**30
    change, _ = cheapest_change(recipe, 1.5, estimate)
    assert change["gradient_checkpointing"] and change["per_device_train_batch_size"] == 1
    assert change["gradient_accumulation_steps"] == 8
    assert cheapest_change(recipe, 0.5, estimate) is None
    assert recipe.training.per_device_train_batch_size == 4 and not recipe.training.gradient_checkpointing


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ("max_problem_tokens", {"max_problem_tokens": 150}),
        (
            "num_generations",
            {"num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        ),
    ],
)
def test_change_may_be_of_problems_or_of_their_rows(needed: str, expected: dict[str, int], tmp_path: Path) -> None:
    recipe = small_recipe("any", tmp_path, [*QLORA, "--max_problem_tokens", "200", "--transfer_block_size", "1"])
    before = recipe.script.max_problem_tokens, recipe.training.num_generations
    values = {"max_problem_tokens": before[0], "num_generations": before[1]}

    def estimate(changed: Recipe) -> Estimate:
        now = {"max_problem_tokens": changed.script.max_problem_tokens, **vars(changed.training)}[needed]
        return Estimate({}, {"training": (1 if now < values[needed] else 9) * 2**30}, {}, 0, 0, Lengths(1, 1, 1, 1))

    found = cheapest_change(recipe, 4, estimate)
    assert found is not None and found[0] == expected
    assert (recipe.script.max_problem_tokens, recipe.training.num_generations) == before


def test_rows_of_a_problem_stay_whole_blocks(tmp_path: Path) -> None:
    """4 rows are 1 strategy of each of 2 problems and 2 plain rows, and 2 would be none."""
    recipe = small_recipe("any", tmp_path, [*QLORA, "--num_plain_rollouts", "2"])
    tried: list[Recipe] = []

    def too_large(changed: Recipe) -> Estimate:
        tried.append(changed)
        return Estimate({}, {"training": 2**40}, {}, 0, 0, Lengths(1, 1, 1, 1))

    assert cheapest_change(recipe, 8, too_large) is None
    assert {changed.training.num_generations for changed in tried} == {4}
    for changed in tried:
        rows = changed.training.per_device_train_batch_size * changed.training.gradient_accumulation_steps
        assert rows % 8 == 0


def test_what_a_recipe_has_already_is_not_proposed(tmp_path: Path) -> None:
    tried: list[Recipe] = []

    def too_large(changed: Recipe) -> Estimate:
        tried.append(changed)
        return Estimate({}, {"training": 2**40}, {}, 0, 0, Lengths(1, 1, 1, 1))

    recipe = small_recipe("any", tmp_path, QLORA)
    assert cheapest_change(recipe, 8, too_large) is None
    assert tried and all(changed.training.optim is recipe.training.optim for changed in tried)


def test_too_large_recipe_is_refused_before_weights_load(tmp_path, monkeypatch, capsys) -> None:
    def load(name: str) -> str:
        raise AssertionError("weights were looked for")

    monkeypatch.setattr(trl_sgpo.cli.train, "fetch_model", load)
    recipe = ["train", "--model_name_or_path", "Qwen/Qwen2.5-0.5B-Instruct", "--output_dir", str(tmp_path)]
    recipe += ["--reward_funcs", "answer_reward", "--dataset_name", "reasoning_gym/gcd", *LORA]
    recipe += ["--per_device_train_batch_size", "16", "--gradient_checkpointing", "false", "--vram_gb", "6"]
    assert main(recipe) == 2
    message = capsys.readouterr().err
    assert "`vram_gb` of the recipe" in message and "--gradient_checkpointing true" in message
    with pytest.raises(AssertionError):
        main([*recipe, "--check_memory", "false"])


def test_command_prints_parts_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = save_tiny_model(tmp_path / "model")
    recipe.write_text(f"model_name_or_path: {model}\ndtype: bfloat16\noutput_dir: {tmp_path}/run\n")
    output = tmp_path / "estimate.json"
    assert main(["estimate", "--config", str(recipe), "--vram", "8", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "KV cache" in printed or "activations" in printed or "optimizer states" in printed
    assert "Fits into 8 GB" in printed
    (result,) = json.loads(output.read_text())
    assert result["fits"] and result["peak"] == sum(result["parts"].values()) == max(result["moments"].values())
    assert main(["estimate", "--config", str(recipe), str(recipe), "--vram", "0.1"]) == 1
    assert "no" in capsys.readouterr().out


def test_sizes_beyond_numbers_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 10**15}))
    (tmp_path / "model" / "model.safetensors").unlink()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {model}\noutput_dir: {tmp_path}/run\n")
    assert main(["estimate", "--config", str(recipe)]) == 2
    assert "describes no model that can be built" in capsys.readouterr().err
