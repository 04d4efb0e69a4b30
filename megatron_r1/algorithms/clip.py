"""The clip of a policy ratio, as several algorithms have it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The ratio is clipped to [1 - low, 1 + high] (R1 paper, eq. 1; asymmetric as in DAPO, arXiv 2503.14476)."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    """If given, above 1: a token of negative advantage A loses at most dual * |A|, however much likelier it has become
    since it was sampled, and then has no gradient (dual clip, arXiv 1912.09729; often 3)."""

    def faults(self, field: str) -> list[str]:
        faults = []
        if not 0 < self.low <= 1 or not 0 < self.high < math.inf:
            faults.append(f"{field}.low {self.low} must be in (0, 1] and {field}.high {self.high} above 0")
        if self.dual is not None and not 1 < self.dual < math.inf:
            faults.append(f"{field}.dual is {self.dual}; it must be above 1, such as 3, or None")
        return faults
