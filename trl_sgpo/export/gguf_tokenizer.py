"""
The tokenizer of a GGUF file: whether it can be written, how it is, and whether it splits text as the model's does.

transformers does not read from a GGUF file how text is split, so what was written is read here as llama.cpp reads it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter, SpecialVocab, TokenType
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from ..errors import ModelError


OTHERWISE = (
    "Export it with `--merge` and convert that directory with llama.cpp's own `convert_hf_to_gguf.py`, which knows "
    "more models."
)

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split_by(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


# llama.cpp's name of the splitting of text before merges. A wrong one gives other tokens than in training
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "qwen2": _split_by(_QWEN2_SPLIT),
    "llama-bpe": _split_by(_LLAMA3_SPLIT),
}
_TEXT = ByteLevel()
_LLAMA3 = "llama-bpe"  # llama.cpp takes whole words of the vocabulary before merges, and puts BOS first, only for this

_PROBES = (
    "What IS 1 + 2? It's THREE, they'll say; WE'RE sure. ÄÖÜ Straße ÇA",
    "12345 = 10^4 + 2,345.00\t0x1F\r\n\r\n   x  := 3\n\n\n\t- [ ] a_b\n",
    "café naïve Ångström Привет 日本語 한국어 العربية ½ ² ﬁ",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u00a0\u2003 … “x” – \\frac{1}{2}$",
    " x",
    "x ",
    "",
)


def split_name(tokenizer: Any) -> str:
    """
    llama.cpp's name for how a tokenizer splits text.

    Raises:
        [`ModelError`]: The tokenizer is no byte-level BPE, splits in a way that has no name here, or changes text or
            adds tokens in a way that GGUF does not hold.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"Only fast tokenizers are written as GGUF. {OTHERWISE}")
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = saved["model"], _steps(saved["pre_tokenizer"], "pretokenizers")
    what = f"{model['type']}, split by {', '.join(step['type'] for step in steps) or 'none'}"
    if model["type"] == "BPE" and not model["byte_fallback"]:
        if unknown := [*_unknown_steps(saved, tokenizer)]:
            raise ModelError(f"This tokenizer ({what}) has {unknown[0]}, which GGUF does not hold. {OTHERWISE}")
        for name, known in _SPLITS.items():
            if len(steps) == len(known) and all(map(_is_step, steps, known)):
                return name
    raise ModelError(f"This tokenizer ({what}) is not written as GGUF. {OTHERWISE}")


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for each in part[key] for step in _steps(each, key)] if part["type"] == "Sequence" else [part]


def _is_step(step: dict[str, Any], known: dict[str, Any]) -> bool:
    return all(step.get(key) == value for key, value in known.items() if key != "trim_offsets")


def _processors(saved: dict[str, Any]) -> list[dict[str, Any]]:
    return _steps(saved["post_processor"], "processors")


def _added(saved: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The tokens that a tokenizer's templates put before and after a text."""
    before: list[str] = []
    after: list[str] = []
    for step in _processors(saved):
        if step["type"] == "TemplateProcessing":
            tokens = [part["SpecialToken"]["id"] if "SpecialToken" in part else "" for part in step["single"]]
            place = [*tokens, ""].index("")
            before, after = [*tokens[:place], *before], [*after, *tokens[place + 1 :]]
    return before, after


def _unknown_steps(saved: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """What changes text or adds tokens beside a split and merges, as phrases."""
    for step in _steps(saved["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            yield f"the normalizer {step['type']}"
    for step in _processors(saved):
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            yield f"the post-processor {step['type']}"
    before, after = _added(saved)
    if before not in ([], [tokenizer.bos_token]) or after not in ([], [tokenizer.eos_token]):
        yield f"a post-processor that adds {', '.join(map(str, before + after))}, not just BOS first and EOS last"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if saved["model"][key]:
            yield f"`{key}`"


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, directory: Path, vocab_size: int) -> None:
    """
    Writes a tokenizer.

    Args:
        writer ([`~gguf.GGUFWriter`]):
            Where to.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        directory (`Path`):
            Where it is saved.
        vocab_size (`int`):
            Tokens of the model, of which the tokenizer may name fewer.
    """
    words = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = [
        TokenType.UNUSED
        if index not in words
        else TokenType.NORMAL
        if index not in added
        else TokenType.CONTROL
        if added[index].special
        else TokenType.USER_DEFINED
        for index in range(vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(kinds)
    special = SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    before, after = _added(json.loads(tokenizer.backend_tokenizer.to_str()))
    special.add_special_token |= {"bos": bool(before), "eos": bool(after)}  # unsaid, they depend on the split
    special.add_to_gguf(writer, quiet=True)


def check_tokens(path: Path, tokenizer: Any) -> None:
    """
    Checks that llama.cpp splits text as a model's tokenizer does: probes, and the texts of all tokens.

    Args:
        path (`Path`):
            A GGUF file that [`write_tokenizer`] wrote.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.

    Raises:
        [`ModelError`]: A text has other tokens.
    """
    own = tokenizer.backend_tokenizer
    written, before, after = _read(path, own.normalizer)
    words = [text for token in own.get_vocab() if "\ufffd" not in (text := _TEXT.decode([token]))]
    added = [text for token in tokenizer.get_added_vocab() for text in (token, f"a{token}b", f"a {token}\n b")]
    texts, size = [*_PROBES, *added, *words], written.get_vocab_size()
    for text, one, other in zip(texts, own.encode_batch(texts), written.encode_batch(texts), strict=True):
        in_model = max(one.ids, default=0) < size  # a token beyond is one that the model cannot read either
        if in_model and one.ids != [*before, *other.ids, *after]:
            raise ModelError(
                f"The export failed its check: {path.name} has other tokens than the model for {text[:60]!r}. Nothing "
                f"was written. {OTHERWISE}"
            )


def _read(path: Path, normalizer: Any) -> tuple[Tokenizer, list[int], list[int]]:
    """The tokenizer of a GGUF file as llama.cpp reads it, and the tokens that it puts before and after a text."""
    fields = GGUFReader(path).fields

    def field(name: str, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return default if found is None else found.contents()

    words, kinds, split = field("tokens"), field("token_type"), field("pre")
    merges = [tuple(merge.split(" ", 1)) for merge in field("merges", [])]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=split == _LLAMA3))
    steps = {"type": "Sequence", "pretokenizers": _SPLITS[split]}
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": steps}))
    tokenizer.normalizer = normalizer
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        tokens = [word for word, its in zip(words, kinds, strict=True) if its == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, normalized=False, special=special) for token in tokens])
    before = [field("bos_token_id")] if field("add_bos_token", split == _LLAMA3) else []
    return tokenizer, before, [field("eos_token_id")] if field("add_eos_token", False) else []
