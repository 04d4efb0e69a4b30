"""Which of a text's words are in a language, by a detector (py3langid, 140 languages) that looks at each word with its
neighbours, so that a foreign clause is found inside a sentence and a short exclamation is not taken for Malagasy.

A long text is looked at in places: at most `LOOKS` of them, one drawn from each of as many equal stretches. The share
that comes of it has a standard error of at most 0.5 / sqrt(LOOKS) = 0.031, reached where half of the words are foreign
and a look says nothing about the next one, and of sqrt(0.1 * 0.9 / 128) = 0.027 where nine tenths are of one language.
The draw is the text's own, so the same text always has the same share, and nobody can write around it.
tools/measure_language.py measures the error on mixtures of real texts (docs/grpo.md). Left out: languages that a script
tells (language.py).
"""

from __future__ import annotations

import copy
import math
import random
import zlib
from collections.abc import Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

WINDOW = 3
"""Words to each side of a word that the detector sees with it."""

STRIDE = 2
"""Words that share one look of the detector."""

LOOKS = 256
"""Most looks at one text; an even number."""

CLEAR = 0.1
"""Half of the looks are enough where they find less than this share of words in the language, or out of it."""

DOUBT = 0.5
"""A word is the target language's where that has at least this share of the probability of the likeliest one."""

FEW_WORDS = 3
DOUBT_ABOUT_FEW = 0.1
"""The same for a text of fewer words than that: `Yes` and `OK` are words of thirty languages."""

# Loaded with the module: it writes a temporary file, which a grading worker may not do later. Not normalised:
# log-likelihoods of one text can be compared across identifiers.
DETECTOR = LanguageIdentifier.from_model_file(MODEL_FILE)


def likeliest_language(text: str) -> str:
    """The detector's label for a whole text, such as "en"."""
    return DETECTOR.classify(text)[0]


def words_in_language(runs: Sequence[Sequence[str]], language: str) -> float:
    """How many of the words are in `language`, one of the detector's: a number of words, or an estimate of it where
    they are too many to look at all. `runs`: words that stand together, in order."""
    total = sum(map(len, runs))
    looks = [(run, place) for run in runs for place in range(0, len(run), STRIDE)]
    doubt = DOUBT_ABOUT_FEW if total < FEW_WORDS else DOUBT
    if len(looks) <= LOOKS:
        return float(_looked_at(looks, language, doubt)[0])
    sample = _sample(looks, "\n".join(" ".join(run) for run in runs))
    own, looked = _looked_at(sample[::2], language, doubt)
    if CLEAR < own / looked < 1 - CLEAR:
        more = _looked_at(sample[1::2], language, doubt)
        own, looked = own + more[0], looked + more[1]
    return total * own / looked


def _looked_at(looks: Sequence[tuple[Sequence[str], int]], language: str, doubt: float) -> tuple[int, int]:
    """(words in the language, words) of the looks. All the words of a look are in the language, or none."""
    found: dict[str, bool] = {}
    own = looked = 0
    for run, place in looks:
        start = max(0, min(place - WINDOW, len(run) - 2 * WINDOW - 1))
        window = " ".join(run[start : max(place, WINDOW) + WINDOW + 1]).lower()
        if window not in found:
            found[window] = _is_in(window, language, doubt)
        num_words = min(STRIDE, len(run) - place)
        looked += num_words
        own += num_words * found[window]
    return own, looked


def _sample(looks: Sequence[tuple[Sequence[str], int]], text: str) -> list[tuple[Sequence[str], int]]:
    """One look out of each of LOOKS equal stretches, drawn by the text itself: nobody can write around it."""
    draw = random.Random(zlib.crc32(text.encode("utf-8", "surrogatepass")))
    width = len(looks) / LOOKS
    return [looks[min(int((stretch + draw.random()) * width), len(looks) - 1)] for stretch in range(LOOKS)]


def _is_in(window: str, language: str, doubt: float) -> bool:
    likeliest, best = DETECTOR.classify(window)
    if likeliest == language:
        return True
    # The detector's own probabilities: a softmax at temperature sqrt(bytes).
    temperature = math.sqrt(len(window.encode("utf-8", "surrogatepass")))
    return (_only(language).classify(window)[1] - best) / temperature >= math.log(doubt)


@cache
def _only(language: str) -> LanguageIdentifier:
    """The detector with one language, whose log-likelihood it then gives; it shares the other's tables."""
    one = copy.copy(DETECTOR)
    one.set_languages([language])
    return one
