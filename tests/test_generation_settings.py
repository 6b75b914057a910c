"""Settings of `generate`, the model's own and those of `generation_kwargs`: the same completions on every path."""

import json
from pathlib import Path

import pytest
import torch
from models import evenness, problems, save_tiny_model
from transformers import GenerationConfig
from trl import GRPOConfig

from trl_sgpo import SharedPromptGRPOTrainer
from trl_sgpo.speed import generation_settings


ENDS = list(range(0, 287, 8))
REQUESTS = [[5, 6, 7, 9]] * 6 + [[20, 21]] * 6
RESTS = [[9], [], [30, 31], [41], [42, 43, 44], [7, 9], [50], [51, 52, 53], [], [60, 61, 62, 63], [71], [30, 31]]
CONTEXTS = [request + rest for request, rest in zip(REQUESTS, RESTS, strict=True)]
ROWS_STAY = {
    "begin_suppress_tokens": ENDS,
    "exponential_decay_length_penalty": [2, 1.3],
    "guidance_scale": 1.5,
    "max_time": 1e-9,
    "min_new_tokens": 10,
}
PLAIN = {
    "bad_words_ids": [[9, 41], [6, 7, 9, 30]],
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 3.0,
    "min_length": 18,
    "no_repeat_ngram_size": 1,
    "prefill_chunk_size": 2,
    "sequence_bias": [[[7, 9, 12], 8.0]],
    "watermarking_config": {"bias": 8.0, "context_width": 3, "seeding_scheme": "lefthash"},
}
FAST = {
    "epsilon_cutoff": 0.0025,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "suppress_tokens": [8, 16, 24],
    "typical_p": 0.6,
}


def make(directory: Path, own: dict, **kwargs):
    """A trainer on a model whose `generation_config.json` has these values."""
    model = save_tiny_model(directory / "model")
    path = directory / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ENDS} | own))
    defaults = {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "num_generations": 4}
    args = GRPOConfig(str(directory / "out"), **(defaults | kwargs))
    return SharedPromptGRPOTrainer(model, evenness, args, train_dataset=problems())


def completions(trainer, fast: bool, sample: bool) -> list[list[int]]:
    torch.manual_seed(1)
    trainer.generation_config.do_sample = sample
    if not fast:
        return trainer.generate(CONTEXTS, 16)[0]
    with trainer.fast_generation(REQUESTS):
        return trainer.generate(CONTEXTS, 16)[0]


@pytest.mark.parametrize("where", ["file", "generation_kwargs"])
@pytest.mark.parametrize(("name", "value"), [*ROWS_STAY.items(), *PLAIN.items(), *FAST.items()])
def test_completions_are_those_of_plain_generation(tmp_path, name, value, where):
    """Also sampled ones, where no row leaves the batch, so that random numbers fall to the same tokens."""
    own, kwargs = ({name: value}, None) if where == "file" else ({}, {name: value})
    trainer = make(tmp_path, own, generation_kwargs=kwargs)
    plain = completions(trainer, fast=False, sample=False)
    assert len({len(row) for row in plain}) > 1 or name in ("max_time", "exponential_decay_length_penalty")
    assert completions(trainer, fast=True, sample=False) == plain
    if name not in FAST:
        assert completions(trainer, fast=True, sample=True) == completions(trainer, fast=False, sample=True)
    assert (trainer.shares_prefixes, trainer.drops_finished_rows) == (name not in PLAIN, name in FAST)


def test_completions_with_a_repetition_penalty_are_those_of_plain_generation(tmp_path):
    """Padding within a row counts for nothing, also where the padding token could be generated."""
    trainer = make(tmp_path, {}, repetition_penalty=3.0)
    assert trainer.shares_prefixes and trainer.drops_finished_rows
    trainer.model.get_output_embeddings().weight.data[2] *= 3  # the padding token's
    plain = completions(trainer, fast=False, sample=False)
    assert any(2 in row for row in plain)
    assert completions(trainer, fast=True, sample=False) == plain


def test_the_same_share_of_completions_reaches_the_limit(tmp_path):
    trainer = make(tmp_path, {"min_new_tokens": 5})
    at_limit = {}
    for fast in (False, True):
        rows = [row for _ in range(4) for row in completions(trainer, fast, sample=True)]
        at_limit[fast] = sum(len(row) == 16 for row in rows) / len(rows)
    assert at_limit[True] == at_limit[False] < 0.5


def test_a_path_that_is_not_used_is_named_once(tmp_path, caplog):
    make(tmp_path / "plain", {"no_repeat_ngram_size": 2})
    (record,) = [record.message for record in caplog.records if record.message.endswith("This is slower.")]
    assert record.startswith("Prompts are read for each row in generation") and "`no_repeat_ngram_size`" in record
    caplog.clear()
    make(tmp_path / "stay", {"min_new_tokens": 2})
    (record,) = [record.message for record in caplog.records if record.message.endswith("This is slower.")]
    assert record.startswith("Finished rows stay in the batch") and "`min_new_tokens`" in record


def test_values_without_an_effect_change_nothing(tmp_path):
    trainer = make(tmp_path, {"min_length": 0, "num_beams": 1, "guidance_scale": 1.0, "bad_words_ids": None})
    assert trainer.shares_prefixes and trainer.drops_finished_rows


INERT = {
    *(
        "max_length",
        "max_new_tokens",
        "early_stopping",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
    ),
    *("top_h", "eta_cutoff", "repetition_penalty", "length_penalty", "use_cache", "cache_config", "max_cache_len"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "max_matching_ngram_size"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile", "low_memory"),
    *("continuous_batching_config", "diversity_penalty", "num_beam_groups", "transformers_version"),
}
"""Settings that work token by token, that need another one to have an effect, or that are tested elsewhere."""


def test_every_setting_of_transformers_is_known():
    """A new one has to be put into one of these groups."""
    known = {*generation_settings.COUNTED, *generation_settings.WHOLE_PROMPTS, *FAST, *INERT}
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - known == set()
