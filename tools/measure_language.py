"""How far the sampled language reward is from the full one, and how long it takes, on mixtures of two real texts.

    python tools/measure_language.py OWN.txt OTHER.txt --language en

OWN is text in `--language`, OTHER in another one that shares its script. Mixtures swap a share of the words, sentences
or paragraphs of OWN for OTHER's. One line each: what changes hands, the share that is foreign, the mean and the largest
difference between looking at LOOKS places and at all of them, and milliseconds a text.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_r1.rewards import detector
from megatron_r1.rewards.language import language_consistency

TEXTS = 20
SHARES = (0.05, 0.2, 0.5)
LENGTHS = (8_000, 200_000)
WORDS_OF = {"words": 1, "clauses": 7, "sentences": 15, "paragraphs": 120}
"""How many words in a row change hands."""


def mixture(own: Sequence[str], other: Sequence[str], *, piece: int, share: float, length: int, seed: int) -> str:
    """About `length` characters of pieces of `piece` words, a `share` of them from `other`."""
    draw = random.Random(seed)
    pieces, size = [], 0
    while size < length:
        words = other if draw.random() < share else own
        start = draw.randrange(len(words) - piece)
        pieces.append(" ".join(words[start : start + piece]))
        size += len(pieces[-1]) + 1
    return (". " if piece > 1 else " ").join(pieces)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How far the sampled language reward is from the full one.")
    parser.add_argument("own", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--language", default="en")
    parser.add_argument("--texts", type=int, default=TEXTS, help="mixtures of each kind")
    given = parser.parse_args(arguments)
    own, other = (path.read_text(encoding="utf-8").split() for path in (given.own, given.other))
    looks = detector.LOOKS
    print("length   pieces      foreign   mean error   largest   ms a text")
    for length, (name, piece), share in itertools.product(LENGTHS, WORDS_OF.items(), SHARES):
        errors, seconds = [], 0.0
        for seed in range(given.texts):
            text = f"<think>{mixture(own, other, piece=piece, share=share, length=length, seed=seed)}</think>"
            begun = time.process_time()
            sampled = language_consistency(text, given.language)
            seconds += time.process_time() - begun
            detector.LOOKS = sys.maxsize
            errors.append(sampled - language_consistency(text, given.language))
            detector.LOOKS = looks
        error, largest = np.mean(np.abs(errors)), np.max(np.abs(errors))
        milliseconds = 1000 * seconds / given.texts
        print(
            f"{length:7,d}  {name:11s} {share:5.0%}    {error:8.4f}    {largest:8.4f}    {milliseconds:7.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
