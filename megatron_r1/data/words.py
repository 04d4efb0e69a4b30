"""Texts as words, for comparing them: what two tokenizers would cut differently is cut one way here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import regex

WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]"
    r"|[[\p{L}\p{M}\p{N}_]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]]+|[-+*/^=<>\p{Sm}]",
    regex.VERSION1,
)
"""A run of letters and digits, a character of a script without spaces, or a sign of arithmetic: 3 + 4 is not 3 - 4."""


def words_of(text: str) -> list[str]:
    """The words of `text`, compatibility-normalised and case-folded; punctuation and white space are left out."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(words: list[str], size: int) -> Iterator[str]:
    """Every run of `size` words, in order, as one string; none if there are fewer words, or none at all."""
    return (" ".join(words[start : start + size]) for start in range(len(words) - size + 1) if size)
