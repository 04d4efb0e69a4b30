"""Which texts repeat an earlier one: exactly, or nearly by MinHash.

Near means that the sets of word n-grams have a Jaccard similarity of about the threshold or more: estimated from 128
minima (standard error 0.03 at 0.8) for the pairs that share one of 32 bands of four, which a pair at 0.8 fails to do
once in 20 million times. Left out: similarity of meaning.
"""

from __future__ import annotations

import hashlib

from rensa import RMinHash, RMinHashDeduplicator  # pyright: ignore[reportAttributeAccessIssue] - has no stubs

from megatron_r1.config.dedup import DedupConfig
from megatron_r1.data.words import ngrams, words_of

NUM_MINIMA = 128
NUM_BANDS = 32
SEED = 42
"""Of the hash functions: fixed, so that the same texts in the same order give the same result."""


class SeenTexts:
    """The texts that were kept so far: a digest (16 bytes) and a sketch (512 bytes) of each, never the text."""

    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._exact: set[bytes] = set()
        self._near = RMinHashDeduplicator(
            threshold=config.threshold or 1.0, num_perm=NUM_MINIMA, use_lsh=True, num_bands=NUM_BANDS, seed=SEED
        )

    def add(self, text: str, *, scope: str = "") -> str | None:
        """Keep `text` if it is new: None. Else "duplicate" (the same words as an earlier one of the same `scope`) or
        "near_duplicate" (of an earlier one of any scope)."""
        words = words_of(text)
        # Words hold no control characters, so no two different pairs are joined to the same string.
        digest = hashlib.blake2b(f"{scope}\0{' '.join(words)}".encode(), digest_size=16).digest()
        if digest in self._exact:
            return "duplicate"
        if self._config.threshold and len(words) >= self._config.min_words:
            sketch = RMinHash(NUM_MINIMA, SEED)
            sketch.update(list(ngrams(words, self._config.ngram)))
            if not self._near.add(digest.hex(), sketch):
                return "near_duplicate"
        self._exact.add(digest)
        return None
