"""A tokenizer that its library refuses, at which it panics, or that makes texts longer without end."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from models import save_tiny_model
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trl_sgpo.checks.growth import check_growth
from trl_sgpo.checks.splitting import MAX_WAYS, ways_of_matching
from trl_sgpo.cli.main import main
from trl_sgpo.errors import ModelError
from trl_sgpo.inference.pretrained import load_tokenizer
from trl_sgpo.inference.settings import TwoPhaseSettings


TOKENIZERS: dict[str, dict[str, Any]] = {
    "no such model": {"model": {"type": "X"}},
    "no pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a"}, "content": "b"}},
    "no vocabulary": {"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}},
    "a pattern without end": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}},
    "no characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAA"}},
    "strip beyond the text": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "x"},
                {"type": "Fuse"},
                {"type": "Strip", "content": "x", "start": 10**9, "stop": 10**9},
            ],
        }
    },
}
PROBLEM = "1 + 2 " + "a" * 40 + "!"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_line_and_status_2(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TOKENIZERS[name]))
    capfd.readouterr()
    status = main(["solve", "--model", str(tmp_path), "--no_bank", "--max_completion_length", "4", PROBLEM])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("trl-sgpo solve: error")]
    assert status == 2 and len(lines) == 1, lines


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def characters(longest: str) -> dict[str, Any]:
    table = (4).to_bytes(4, "little") + bytes(4) + b"a\0" + longest.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def template(*tokens: str, times: int = 1) -> dict[str, Any]:
    special = {"<s>": {"id": "<s>", "ids": [1] * times, "tokens": ["<s>"] * times}}
    single = [{"Sequence" if token == "A" else "SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


NORMALIZERS, SPLITTERS, PROCESSORS = "normalizer", "pre_tokenizer", "post_processor"
GROWING: list[dict[str, Any]] = [
    {NORMALIZERS: {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 1000}] * 400}},
    {NORMALIZERS: {"normalizers": [{"prepend": "a" * 1000}] * 400}},
    {NORMALIZERS: {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}},
    {NORMALIZERS: {"type": "Sequence", "normalizers": [replace({"Regex": "x*"}, "y")] * 40}},
    {NORMALIZERS: {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}},
    {NORMALIZERS: {"type": "Sequence", "normalizers": [replace({"String": " "}, "\ufdfa"), {"type": "NFKD"}] * 40}},
    {NORMALIZERS: {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 10**4}},
    {NORMALIZERS: characters("b" * 10**5)},
    {SPLITTERS: {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}},
    {PROCESSORS: template(*["<s>"] * 10**6, "A")},
    {PROCESSORS: template("<s>", "A", times=10**6)},
    {PROCESSORS: {"type": "Sequence", "processors": [template("A", "A")] * 40}},
    {"decoder": {"type": "Sequence", "decoders": [replace({"Regex": "."}, "bb")] * 60}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0, "b" * 10**7: 1}, "unk_token": "a"}},
    {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b" * 10**7, 0.0]], "unk_id": 0}},
    {"added_tokens": [{"id": 0, "content": "b" * 10**7}]},
]


@pytest.mark.parametrize("parts", GROWING, ids=range(len(GROWING)))
def test_a_tokenizer_that_makes_texts_longer(parts: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="use another model"):
        check_growth("evil", parts)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9},
        {"vocab": {"a": 0}, "max_input_chars_per_word": "x"},
        {"type": "Unigram", "vocab": [["a" * 129, -1.0]]},
    ],
)
def test_a_model_of_a_tokenizer_that_takes_long_for_a_word(model: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="for which its kind takes too long"):
        check_growth("evil", {"model": model})


def test_a_template_of_two_megabytes(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{# " + "a" * 2**21 + " #}{{ messages }}")
    with pytest.raises(ModelError, match="has more than 1,048,576 characters"):
        load_tokenizer(str(tmp_path))


def test_many_tokens_that_a_template_writes_after_a_reply(tmp_path: Path, ten_seconds_each: Any) -> None:
    save_tiny_model(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    loaded.add_tokens([f"token{number}" for number in range(2_000)])
    loaded.chat_template = (
        "{% for message in messages %}{{ message.content }} {% endfor %}"
        "{% if not add_generation_prompt %}{{ 'ab ' * 100000 }}{% endif %}"
    )
    conversation = TwoPhaseSettings().conversation(loaded)
    ten_seconds_each()
    assert conversation.turn([{"role": "user", "content": "1 + 2"}]).end == loaded.eos_token_id


def test_a_tokenizer_that_prepends_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GROWING[0]))
    assert main(["solve", "--model", str(tmp_path), "--no_bank", PROBLEM]) == 2
    assert "makes texts too long" in capsys.readouterr().err


def test_a_tokenizer_that_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path, chat=False)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {NORMALIZERS: replace({"Regex": r"[\s\S]"}, "")}))
    assert main(["solve", "--model", str(tmp_path), "--no_bank", PROBLEM]) == 2
    assert "makes no tokens of a prompt" in capsys.readouterr().err


SEQUENCE = {"type": "Sequence"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
USUAL: dict[str, dict[str, Any]] = {
    "Llama 2": {
        NORMALIZERS: SEQUENCE | {"normalizers": [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]},
        PROCESSORS: template("<s>", "A"),
        "decoder": SEQUENCE
        | {
            "decoders": [
                replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]
        },
    },
    "Llama 3": {
        SPLITTERS: SEQUENCE | {"pretokenizers": [{"type": "Split", "pattern": {"Regex": "a"}}, BYTES]},
        PROCESSORS: SEQUENCE | {"processors": [BYTES, template("<s>", "A")]},
        "decoder": BYTES,
    },
    "Qwen": {NORMALIZERS: {"type": "NFC"}, SPLITTERS: BYTES, PROCESSORS: BYTES, "decoder": BYTES},
    "BERT": {
        NORMALIZERS: {"type": "BertNormalizer"}, SPLITTERS: {"type": "BertPreTokenizer"},
        PROCESSORS: template("<s>", "A", "<s>"), "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
    "ALBERT": {
        NORMALIZERS: SEQUENCE
        | {
            "normalizers": [
                replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), {"type": "NFKD"},
                {"type": "StripAccents"}, {"type": "Lowercase"}, characters("صلى الله عليه وسلم"),
                replace({"Regex": " {2,}"}, " "),
            ]
        },
        SPLITTERS: {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        PROCESSORS: template("<s>", "A", "<s>"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_tokenizer(name: str) -> None:
    check_growth(name, USUAL[name])


SLOW = {
    "alternatives within a repetition": r"[a-z ](?:.|..){21}(?>.*)[^\n]|.|\n",
    "many repetitions": r"[a-z ]{0,55}[a-z ]{0,55}[a-z ]{0,55}[a-z ]{0,55}!",
    "a repetition of one": r"(?:a+)+$",
    "a repeated reference": r"(a*)\1*\1*b",
    "an interval that a sign repeats": r"[\w ]{1,3}+!",
    "optional intervals": r"\w{1}?" * 40 + "!",
    "a set in a set": r"[a[b]]*[ab]*[ab&&[a]]*[a]*c",
}
KNOWN = [  # of GPT-2, Llama 3, Qwen 2, GPT-4o, DeepSeek 3, Kimi K2, SmolLM, Seed, CLIP, BLOOM
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
    "[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*",
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\A +| +\z",
    r" {2,}",
    r"\s{2,}|[\n\r\t]",
    "[一-龥぀-ゟ゠-ヿ]+",
]


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder", "tekken.json"])
def test_a_pattern_that_is_slow_on_some_texts_only(name: str, place: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    if place == "tekken.json":
        (tmp_path / place).write_text(json.dumps({"config": {"pattern": SLOW[name]}, "vocab": []}))
    else:
        step = {"type": "Split", "pattern": {"Regex": SLOW[name]}, "behavior": "Isolated", "invert": False}
        step = step if place == "pre_tokenizer" else replace({"Regex": SLOW[name]}, "b")
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {place: step}))
    with pytest.raises(ModelError, match="which may match for ever"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("pattern", KNOWN)
def test_patterns_of_known_tokenizers(pattern: str) -> None:
    assert tokenizers.Regex(pattern)  # one that the library reads
    assert ways_of_matching(pattern) <= MAX_WAYS


@given(pattern=st.text("ab()[]{}|*+?^$.\\pdx12,&:=!<> ", max_size=24))
def test_any_pattern_is_counted_or_refused(pattern: str) -> None:
    try:
        assert ways_of_matching(pattern) >= 1
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("name", ["../../x", "", "a/b", ".hidden", None, 5 * "x" * 40])
def test_a_chat_template_whose_name_is_no_name_of_a_file(name: str | None, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "hello"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    load_tokenizer(str(tmp_path))
    templates[1]["name"] = name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    with pytest.raises(ModelError, match="has a chat template without a plain name"):
        load_tokenizer(str(tmp_path))


def vocabulary(model: Path, longest: int) -> None:
    """Replaces tokenizer.json by the files of a GPT-2 tokenizer."""
    (model / "tokenizer.json").unlink()
    words = ["<|endoftext|>", *bytes_to_unicode().values(), "a" * longest]
    (model / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (model / "merges.txt").write_text("#version: 0.2\n")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


@pytest.mark.parametrize("longest", [100, 50_000])
def test_a_long_token_in_a_vocabulary_of_another_form(longest: int, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    vocabulary(tmp_path, longest)
    if longest == 100:
        assert load_tokenizer(tmp_path).is_fast
        return
    with pytest.raises(ModelError, match="has a token of 50,000 characters"):
        load_tokenizer(tmp_path)


def test_a_long_token_that_the_settings_add(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"additional_special_tokens": ["b" * 50_000]}))
    with pytest.raises(ModelError, match="has a token of 50,000 characters"):
        load_tokenizer(tmp_path)
