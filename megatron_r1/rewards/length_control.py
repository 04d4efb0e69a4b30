"""Score differences of a pairwise judge, and how much of them is mere length. Pure functions.

Length control is the idea of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): fit what the judge
says by the difference in length, and ask what it would have said of equally long responses. Theirs is a logistic
regression with terms for models and instructions; here it is one least-squares slope over all pairs of a batch, since a
score difference is not a probability and responses have no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_r1.config.judge import PairConfig

LEAST_PAIRS = 20
"""With fewer pairs a slope says nothing and the differences stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Score differences in favour of the first response, one of each judgement that came to something: where the first
    was shown first (`in_order`), and where it was shown second (`swapped`). `lengths`: characters shown of each."""

    in_order: tuple[float, ...]
    swapped: tuple[float, ...]
    lengths: tuple[int, int]

    @property
    def difference(self) -> float | None:
        """Mean score difference in favour of the first, both orders weighing the same; None without both."""
        if not self.in_order or not self.swapped:
            return None
        return (float(np.mean(self.in_order)) + float(np.mean(self.swapped))) / 2


def preferred(comparison: Comparison, config: PairConfig) -> Literal["first", "second"] | None:
    """Which response is better by more than `min_gap`. None, undecided: if it is less, if the two orders disagree about
    who is ahead, or if one of them has no judgement."""
    difference = comparison.difference
    if difference is None or abs(difference) <= config.min_gap:
        return None
    if np.mean(comparison.in_order) * np.mean(comparison.swapped) <= 0:
        return None
    return "first" if difference > 0 else "second"


def control_length(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons without what length explains: d - slope * x, with x = tanh(length difference / its root mean
    square) and slope = sum(d x) / sum(x^2), so that equal lengths change nothing and swapping a pair its sign only.

    It assumes that among these pairs the longer response is better as often as not; where length and quality go
    together it takes away some quality too.
    """
    usable = [comparison for comparison in comparisons if comparison.difference is not None]
    if len(usable) < LEAST_PAIRS:
        return list(comparisons)
    gaps = np.array([one.lengths[0] - one.lengths[1] for one in usable], dtype=np.float64)
    spread = float(np.sqrt(np.mean(gaps**2)))
    if spread == 0:
        return list(comparisons)
    x = np.tanh(gaps / spread)
    slope = float(x @ np.array([one.difference for one in usable], dtype=np.float64) / (x @ x))

    def controlled(one: Comparison) -> Comparison:
        explained = slope * float(np.tanh((one.lengths[0] - one.lengths[1]) / spread))
        return dataclasses.replace(
            one,
            in_order=tuple(score - explained for score in one.in_order),
            swapped=tuple(score - explained for score in one.swapped),
        )

    return [controlled(one) for one in comparisons]
