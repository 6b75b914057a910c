"""The benchmark of what a bank is worth, small: its lessons, and all conditions on a model that has learnt nothing."""

import json
import random

import torch
from benchmarks import bank_worth
from transformers import LlamaForCausalLM

from trl_sgpo.compare.lab.model import lab_config, lab_tokenizer


def test_lessons_are_read_off_what_is_shown_or_guessed(tmp_path):
    tokenizer = bank_worth.with_new_words(lab_tokenizer(), tmp_path)
    known = lab_tokenizer().get_vocab()
    assert tokenizer.get_vocab() == known | {word: len(known) + n for n, word in enumerate(bank_worth.SYLLABLES)}
    conversation, rng = bank_worth.SETTINGS.conversation(tokenizer), random.Random(0)
    shown_all = 0
    for number in range(300):
        easy = number < 50
        lesson = bank_worth.lesson(rng, conversation, easy)
        assert len(lesson["input_ids"]) == len(lesson["labels"])
        trained = [label for label in lesson["labels"] if label != -100]
        request = tokenizer.decode(lesson["input_ids"][: lesson["labels"].index(trained[0])])
        written = tokenizer.decode(trained).partition(" <end>")[0]
        assert tokenizer.unk_token not in written and written.startswith("For lists ")
        words = written.removeprefix("For lists ").split(" then ")
        parts = [" then ".join(words[start : start + 2]) for start in range(0, len(words), 2)]
        found = all(f"lists {part}" in request for part in parts)
        assert found or not easy
        shown_all += found and not easy
    assert 0.65 < shown_all / 250 < 0.85


def test_names_are_new_words():
    known = lab_tokenizer().get_vocab()
    assert not [word for word in known for syllable in bank_worth.SYLLABLES if syllable in word]
    assert len(set(bank_worth.NAMES)) == len(bank_worth.NAMES) > 1_016


def test_what_a_strategy_does():
    assert bank_worth.does("For lists zor kab reverse then double", ("double", "reverse"))
    assert not bank_worth.does("For lists zor kab reverse then double", ("reverse", "rotate"))
    assert not bank_worth.does("For lists kab zor reverse", ("reverse", "reverse"))


def test_every_condition_is_measured(tmp_path):
    tokenizer = lab_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(lab_config(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = bank_worth.Sizes(lessons=64, classes=4, explored=4, steps=1, tested=2, distractors=(0, 3))
    output = tmp_path / "worth"
    bank_worth.main(["--model", str(tmp_path / "model"), "--output", str(output), "--seeds", "1"], sizes)
    found = json.loads(output.with_suffix(".json").read_text())
    right = {key: figures["strategies_shown"] for key, figures in found["figures"].items()}
    assert len(right) == 14 and right.pop("one | empty") == right.pop("two | empty") == 0
    assert [share for key, share in right.items() if "not asked" in key] == [1, 1, 1]
    assert all(figures["accuracy"]["problems"] == 8 for figures in found["figures"].values())
    assert found["runs"][0]["filling"]["executions"] == 36 * 4
    assert output.with_suffix(".md").read_text().count("\n| ") == 15
