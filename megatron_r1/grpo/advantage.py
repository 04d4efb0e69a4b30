"""Group-relative advantage (DeepSeekMath, arXiv 2402.03300, section 4.1.2; DeepSeek-R1, arXiv 2501.12948, eq. 3)."""

from __future__ import annotations

from typing import Literal

import numpy as np

REWARD_BOUND = 1e20
"""A reward of a larger magnitude is treated as one that is not finite: advantages are fp32, and are multiplied."""
ROUNDING = 1e-8
"""Rewards with a smaller standard deviation differ by rounding only."""


def usable_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """bool[G]: rewards that an advantage can be computed from. None of a group is, if fewer than two of it would be."""
    usable_G = np.abs(np.asarray(rewards_G, dtype=np.float64)) <= REWARD_BOUND  # NaN is not
    return usable_G if usable_G.sum() >= min(2, usable_G.size) else np.zeros_like(usable_G)


def group_advantages(
    rewards_G: np.ndarray, kind: Literal["grpo", "dr_grpo"] = "grpo", deviation_floor: float = 0.0
) -> np.ndarray:
    """Advantages f64[G] of one group's rewards [G]; NaN for a completion whose reward is not usable, and must be left
    out. The others' are those of a group without it.

    grpo: (r - mean) / max(std, deviation_floor) with the population standard deviation; all zero if the group's rewards
    are equal. dr_grpo: r - mean (arXiv 2503.20783: no division, so that easy and hard questions weigh alike).
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if rewards_G.size == 0:
        raise ValueError("a group without completions has no advantages")
    usable_G = usable_rewards(rewards_G)
    if not usable_G.all():
        advantages_G = np.full(rewards_G.shape, np.nan)
        if usable_G.any():
            advantages_G[usable_G] = group_advantages(rewards_G[usable_G], kind, deviation_floor)
        return advantages_G
    if np.ptp(rewards_G) == 0:  # the mean of large equal numbers may be another one
        return np.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if kind == "dr_grpo":
        return centred_G
    deviation = rewards_G.std()
    if deviation < ROUNDING:
        return np.zeros_like(centred_G)
    return centred_G / max(deviation, deviation_floor)
