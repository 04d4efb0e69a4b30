"""Group-relative advantage (DeepSeekMath, arXiv 2402.03300, section 4.1.2; DeepSeek-R1, arXiv 2501.12948, eq. 3)."""

from __future__ import annotations

import numpy as np

REWARD_BOUND = 1e20
"""A reward of a larger magnitude is treated as one that is not finite: advantages are fp32, and are multiplied."""
ROUNDING = 1e-8
"""Rewards with a smaller standard deviation differ by rounding only."""


def usable_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """bool[G]: rewards that an advantage can be computed from. None of a group is, if fewer than two of it would be."""
    usable_G = np.abs(np.asarray(rewards_G, dtype=np.float64)) <= REWARD_BOUND  # NaN is not
    return usable_G if usable_G.sum() >= min(2, usable_G.size) else np.zeros_like(usable_G)


def centred_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """r - mean(r), f64[G]; all zero if the rewards [G] are equal. NaN for a completion whose reward is not usable, and
    must be left out: the others' are those of a group without it."""
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if rewards_G.size == 0:
        raise ValueError("a group without completions has no advantages")
    usable_G = usable_rewards(rewards_G)
    advantages_G = np.full(rewards_G.shape, np.nan)
    if not usable_G.any():
        return advantages_G
    kept = rewards_G[usable_G]
    # The mean of large equal numbers may be another one.
    advantages_G[usable_G] = np.zeros_like(kept) if np.ptp(kept) == 0 else kept - kept.mean()
    return advantages_G


def group_advantages(rewards_G: np.ndarray, *, deviation_floor: float = 0.0) -> np.ndarray:
    """(r - mean) / max(std, deviation_floor) with the population standard deviation, f64[G]; all zero if the rewards
    differ by rounding only. NaN as in centred_rewards."""
    centred_G = centred_rewards(rewards_G)
    usable_G = ~np.isnan(centred_G)
    if not usable_G.any() or not centred_G[usable_G].any():
        return centred_G
    deviation = np.asarray(rewards_G, dtype=np.float64)[usable_G].std()
    if deviation < ROUNDING:
        return np.where(usable_G, 0.0, np.nan)
    return centred_G / max(deviation, deviation_floor)
