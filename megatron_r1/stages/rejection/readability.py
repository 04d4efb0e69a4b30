"""Whether a response may be shown to a model as an example of how to think and answer. Pure functions.

The paper drops chains of thought with mixed languages, long paragraphs and code blocks; repetition, cut-off samples and
missing tags are here because a sampled model has them too. Thresholds: config.rejection.FilterConfig.
"""

from __future__ import annotations

import re
from collections import Counter

from megatron_r1.data.words import ngrams, words_of
from megatron_r1.rewards.format import format_score
from megatron_r1.rewards.language import thought_of
from megatron_r1.rewards.prose import num_words, prose_of
from megatron_r1.stages.rejection.config import FilterConfig

FENCE = re.compile(r"```.*?(?:```|\Z)|^[ \t]*~~~.*?(?:^[ \t]*~~~|\Z)", re.DOTALL | re.MULTILINE)
BLANK_LINE = re.compile(r"\n[ \t]*\n")
LEAST_LINES = 8
LEAST_NGRAMS = 50
"""Shorter texts are not looked at for repetition: one line that comes twice would be too large a share."""
NGRAM = 10


def structural_reason(text: str, *, finish_reason: str) -> str | None:
    """Why a response is not a whole one: "truncated" (cut off at the most tokens), "missing_tags" (not exactly one
    thought and one answer, as the format reward demands), or None."""
    if finish_reason == "length":
        return "truncated"
    return None if format_score(text) == 1.0 else "missing_tags"


def prose_reason(text: str, config: FilterConfig, *, language_score: float, is_code: bool) -> str | None:
    """The first reason why a whole response does not read well, or None.

    In order: "mixed_language" (`language_score` is the language reward of `text`), "long_paragraph",
    "code_block" (not where `is_code`: the problem asks for a program), "repetition".
    """
    if language_score < config.min_language and _has_words(text, language_score):
        return "mixed_language"
    prose = FENCE.sub("", text)
    longest = max(map(len, BLANK_LINE.split(prose)))
    if config.max_paragraph_characters and longest > config.max_paragraph_characters:
        return "long_paragraph"
    if not config.code_blocks and not is_code and FENCE.search(text):
        return "code_block"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= LEAST_LINES and repeated_share(lines) > config.max_repeated_lines:
        return "repetition"
    if config.max_repeated_ngrams == 1:
        return None
    runs = list(ngrams(words_of(text), NGRAM))
    return "repetition" if len(runs) >= LEAST_NGRAMS and repeated_share(runs) > config.max_repeated_ngrams else None


def repeated_share(items: list[str]) -> float:
    """The share of `items` that are equal to an earlier one: 0 if all differ, below 1 always."""
    return 1 - len(Counter(items)) / len(items)


def _has_words(text: str, language_score: float) -> bool:
    """A thought in numbers and formulas alone scores 0 in every language; there is nothing in it to be mixed."""
    return language_score > 0 or num_words(prose_of(thought_of(text))) > 0
