"""The clip of a policy ratio, as several algorithms have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_r1.bounds import Positive, above


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The ratio is clipped to [1 - low, 1 + high] (R1 paper, eq. 1; asymmetric as in DAPO, arXiv 2503.14476)."""

    low: Annotated[float, above(0, 1)] = 0.2
    """How far below 1 the ratio may go."""
    high: Positive = 0.2
    """How far above 1 the ratio may go."""
    dual: Annotated[float | None, above(1)] = None
    """If given, above 1: a token of negative advantage A loses at most dual * |A|, however much likelier it has become
    since it was sampled, and then has no gradient (dual clip, arXiv 1912.09729; often 3)."""
