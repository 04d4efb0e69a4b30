"""The configuration of near-duplicate removal (data/dedup.py)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.bounds import Count, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """Exact duplicates of a problem's responses are always dropped; near ones of all responses by MinHash."""

    threshold: Share = 0.8
    """Jaccard similarity of the sets of word n-grams from which on two responses count as one; 0 does not look."""
    ngram: Count = 5
    """Words in each n-gram."""
    min_words: Count = 30
    """Shorter responses are compared exactly only: they have too few n-grams to tell anything."""
