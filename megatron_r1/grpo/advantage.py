"""Group-relative advantage (DeepSeekMath, arXiv 2402.03300, section 4.1.2; DeepSeek-R1, arXiv 2501.12948, eq. 3)."""

from __future__ import annotations

from typing import Literal

import numpy as np


def group_advantages(rewards_G: np.ndarray, kind: Literal["grpo", "dr_grpo"] = "grpo") -> np.ndarray:
    """Advantages f64[G] of one group's rewards [G].

    grpo: (r - mean) / std with the population standard deviation; all zero if the group's rewards are equal.
    dr_grpo: r - mean (arXiv 2503.20783: no division, so that easy and hard questions weigh alike).
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if rewards_G.size == 0:
        raise ValueError("a group without completions has no advantages")
    centred_G = rewards_G - rewards_G.mean()
    if kind == "dr_grpo":
        return centred_G
    deviation = rewards_G.std()
    # Below this the rewards differ by rounding only.
    if deviation < 1e-8:
        return np.zeros_like(centred_G)
    return centred_G / deviation
