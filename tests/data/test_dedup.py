"""Exact and near duplicates, in order, against similarities worked out by hand."""

import numpy as np
import pytest

from megatron_r1.data.dedup import SeenTexts
from megatron_r1.data.words import ngrams, words_of
from megatron_r1.stages.rejection.config import DedupConfig

CONFIG = DedupConfig(threshold=0.8, ngram=1, min_words=30)


def text(first, last):
    """Words first to last - 1: every word a set member of its own at ngram = 1."""
    return " ".join(f"w{number}" for number in range(first, last))


def results(texts, config=CONFIG, scopes=None):
    seen = SeenTexts(config)
    return [seen.add(one, scope=scope) for one, scope in zip(texts, scopes or [""] * len(texts))]


def test_words_are_what_two_spellings_share():
    assert words_of("The  Ångström, ﬁve-fold: 3+4!") == ["the", "ångström", "five", "-", "fold", "3", "+", "4"]
    assert words_of("今天 is 好") == ["今", "天", "is", "好"]
    assert list(ngrams(["a", "b", "c"], 2)) == ["a b", "b c"]
    assert list(ngrams(["a"], 2)) == [] == list(ngrams([], 0))


def test_the_same_words_are_a_duplicate_whatever_their_spelling():
    assert results(["So 3 + 4.", "so  3+4", "so 3-4", "SO 3 +4!"]) == [None, "duplicate", None, "duplicate"]


def test_exact_duplicates_are_those_of_one_problem():
    assert results(["it is B"] * 3, scopes=["p1", "p2", "p1"]) == [None, None, "duplicate"]
    assert results(["", "b"], scopes=["b", ""]) == [None, None], "scope and text are not run together"


@pytest.mark.parametrize(
    ("shared", "expected"),
    [(400, 0.0), (600, 0.0), (740, 1.0), (780, 1.0)],  # Jaccard 400/1200 = 0.33, 0.6, 0.86, 0.95 of 800 words each
)
def test_near_duplicates_are_found_by_similarity(shared, expected):
    found = []
    for trial in range(20):
        start = 10_000 * trial
        seen = SeenTexts(CONFIG)
        assert seen.add(text(start, start + 800)) is None
        found.append(seen.add(text(start + 800 - shared, start + 1600 - shared), scope="another problem"))
    assert np.mean([result == "near_duplicate" for result in found]) == pytest.approx(expected, abs=0.15)


def test_the_order_of_words_counts():
    words = text(0, 200).split()
    backwards = " ".join(reversed(words))
    assert results([text(0, 200), backwards], DedupConfig(threshold=0.8, ngram=1)) == [None, "near_duplicate"]
    assert results([text(0, 200), backwards], DedupConfig(threshold=0.8, ngram=2)) == [None, None]


def test_short_texts_are_compared_exactly_only():
    almost = [text(0, 29), text(0, 28) + " other"]
    assert results(almost) == [None, None]
    assert results(almost, DedupConfig(threshold=0.8, ngram=1, min_words=20)) == [None, "near_duplicate"]


def test_what_was_dropped_drops_nothing_else():
    """A chain: b is near a, c is near b (730/870) but not near a (670/930). Only what was kept counts."""
    a, b, c = text(0, 800), text(60, 860), text(130, 930)
    assert results([b, c]) == [None, "near_duplicate"]
    assert results([a, b, c]) == [None, "near_duplicate", None]


def test_zero_switches_near_duplicates_off():
    assert results([text(0, 800), text(1, 800)], DedupConfig(threshold=0.0)) == [None, None]


def test_the_same_texts_give_the_same_result_twice():
    rng = np.random.default_rng(0)
    texts = [text(start, start + 200) for start in rng.integers(0, 400, 60)]
    assert results(texts) == results(texts)
    assert results(texts).count(None) < 60
