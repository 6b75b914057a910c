"""How much longer the steps of a tokenizer make a text: its author may have written ones that grow it without end."""

import base64
import binascii
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import ModelError


MAX_GROWTH = 20_000  # characters or tokens for each character, and characters for each token
MAX_STEPS = 1_000
MAX_WORD, MAX_PIECE = 500, 128  # characters of a word of WordPiece, and of a token of Unigram
MAX_TEMPLATE = 2**20

# For one character, at most. What else makes a text longer has a field that says with what.
_FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 24, "ByteLevel": 5}


def check_growth(source: str | Path, tokenizer: dict[str, Any]) -> None:
    """
    Checks how much longer the steps of a tokenizer may make a text, and that its model takes a short time for it:
    WordPiece takes the cube of a word's length, and Unigram the length of a token, for each character.

    Args:
        source (`str` or `Path`):
            Its directory, for the message.
        tokenizer (`dict`):
            Content of its `tokenizer.json`.

    Raises:
        [`ModelError`]: A character may become more than 20,000, or a token has more, or there are too many steps, or
            words of WordPiece may have more than 500 characters, or tokens of Unigram more than 128.
    """
    model = tokenizer.get("model")
    if isinstance(model, dict):
        word = model.get("max_input_chars_per_word", 0)
        pieces = map(len, _tokens({"model": model})) if not isinstance(model.get("vocab"), dict) else ()
        if not isinstance(word, int) or word > MAX_WORD or max(pieces, default=0) > MAX_PIECE:
            raise ModelError(
                f"The tokenizer of {source} has words of more than {MAX_WORD} or tokens of more than {MAX_PIECE} "
                "characters, for which its kind takes too long: use another model."
            )
    for names in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        steps = list(chain.from_iterable(_mappings(tokenizer.get(name)) for name in names))
        if len(steps) > MAX_STEPS or math.prod(map(_growth, steps)) > MAX_GROWTH:
            raise ModelError(f"The {names[0]} of the tokenizer of {source} makes texts too long: use another model.")
    _check_longest(source, _tokens(tokenizer))


def check_loaded(source: str | Path, tokenizer: Any, from_json: bool) -> None:
    """
    The same for a tokenizer that was loaded, from files of any kind.

    Args:
        source (`str` or `Path`):
            Its directory, for the message.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        from_json (`bool`):
            Whether it was loaded from a `tokenizer.json` alone, which [`check_growth`] checked.

    Raises:
        [`ModelError`]: As [`check_growth`].
    """
    _check_longest(source, tokenizer.get_added_vocab())
    if len(str(tokenizer.chat_template)) > MAX_TEMPLATE:
        raise ModelError(
            f"The chat template of {source} has more than {MAX_TEMPLATE:,} characters: use another model."
        )
    if from_json:
        return
    if tokenizer.is_fast:
        check_growth(source, json.loads(tokenizer.backend_tokenizer.to_str()))
    else:
        _check_longest(source, tokenizer.get_vocab())


def _check_longest(source: str | Path, tokens: Iterable[str]) -> None:
    longest = max(map(len, tokens), default=0)
    if longest > MAX_GROWTH:
        raise ModelError(f"The tokenizer of {source} has a token of {longest:,} characters: use another model.")


def _growth(step: dict[str, Any]) -> float:
    """Factor by which a step makes a text longer. It is read from the fields, as the library needs no `type`."""
    kind = step.get("type")
    growth: float = _FORMS.get(kind, 1) if isinstance(kind, str) else 1
    growth *= 1 + len(str(step.get("prepend", "")))
    if isinstance(pattern := step.get("pattern"), dict) and "content" in step:
        content, literal = len(str(step["content"])), pattern.get("String")
        growth *= max(1, content / len(literal) if isinstance(literal, str) and literal else content + 1)
    if "replacement" in step or "prefix" in step:
        growth *= 2  # a sign before each word
    if isinstance(characters := step.get("precompiled_charsmap"), str):
        growth *= _longest_form(characters)
    if isinstance(specials := step.get("special_tokens"), dict):
        each = max((len(_list(token.get("ids"))) for token in _mappings(specials)), default=1)
        growth *= max(len(_list(step.get("single"))), len(_list(step.get("pair"))), 1) * max(each, 1)
    return growth


def _longest_form(characters: str) -> int:
    """Characters that one becomes by a table of sentencepiece: the size of a trie, the trie, and texts."""
    try:
        table = base64.b64decode(characters)
    except (binascii.Error, ValueError):
        return 1  # the library refuses it
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, max(len(text.decode(errors="replace")) for text in texts.split(b"\0")))


def _tokens(tokenizer: dict[str, Any]) -> Iterator[str]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary
    else:
        yield from (token for pair in _list(vocabulary) for token in _list(pair)[:1] if isinstance(token, str))
    yield from (str(token.get("content")) for token in _mappings(tokenizer.get("added_tokens")))


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    parts = [value]
    while parts:  # nested too deeply for a recursion
        part = parts.pop()
        if isinstance(part, dict):
            yield part
        parts.extend(part.values() if isinstance(part, dict) else _list(part))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
