"""Texts without disguises: hidden characters, letters that look like others, words that are spelled out."""

import re
import unicodedata

from ..checks.terminal import BLANK


_LOOKALIKES = str.maketrans("асеһіјкмоԛрѕтԝхувнԁɡαερονικυ", "acehijkmoqpstwxybhdgaepoviku")
_SPELLED_OUT = re.compile(r"(?<!\w)(?:[a-z][ .*_-])+[a-z](?!\w)")


def visible(text: str) -> str:
    """The text in compatibility form (NFKC), without invisible characters."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn") and c not in BLANK)


def undisguised(text: str) -> str:
    """The text as [`visible`] leaves it, in lower case, without accents and letters of other alphabets."""
    text = visible(text).casefold().replace("’", "'")
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKD", text.translate(_LOOKALIKES))
    return "".join(c for c in text if unicodedata.category(c) != "Mn")


def joined(text: str) -> str:
    """The text with words that are spelled out, such as `p a r i s`, in one piece."""
    return _SPELLED_OUT.sub(lambda match: re.sub(r"[ .*_-]", "", match[0]), text)
