"""The penalty for going away from a reference policy: which estimate of KL(policy || reference), and where it counts.

With d = log p_reference - log p_policy at a sampled token (Schulman, "Approximating KL divergence", 2020):

    k1 = -d            k2 = d^2 / 2            k3 = exp(d) - d - 1

All three are at their means an estimate of the divergence (k2 nearly). In a loss, what counts is the gradient: k2's has
the divergence's own gradient as its mean, k3's is near it where the policies are, k1's has the mean 0 and is refused.
In a reward only the value counts, and k1 is the usual choice (arXiv 2009.01325).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_r1.bounds import Natural, NonNegative

Estimator = Literal["k1", "k2", "k3"]

LOG_RATIO_BOUND = 20.0
"""Largest |log(p / q)| that a loss or a reward sees: a ratio of 4.9e8. fp32 overflows at 88.7, and sums over tokens
before that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KL:
    """How the reference policy holds the trained one back."""

    coef: NonNegative = 0.001
    """0: no reference policy at all."""
    estimator: Estimator = "k3"
    """Of the divergence at a token; the paper's is k3."""
    place: Literal["loss", "reward"] = "loss"
    """loss: coef * KL is added to each token's loss. reward: coef * the sum over a completion's tokens is taken from
    its reward, before rewards are compared within the group."""
    refresh_steps: Natural = 400
    """The reference policy becomes the current one every N optimizer steps; 0 keeps the start model."""

    def faults(self, field: str) -> list[str]:
        if self.coef > 0 and self.estimator == "k1" and self.place == "loss":
            return [
                f"{field}.estimator is k1 in the loss; the mean of its gradient is 0 whatever the reference policy is: "
                "use k2 or k3, or place reward"
            ]
        return []

    def penalty(self, old_logprobs_T: np.ndarray, reference_logprobs_T: np.ndarray) -> float:
        """coef * sum_t KL_t of one completion, in float64; what its reward loses with place reward."""
        policy_T, reference_T = (np.asarray(x, np.float64) for x in (old_logprobs_T, reference_logprobs_T))
        impossible_T = np.isneginf(policy_T) & np.isneginf(reference_T)
        with np.errstate(invalid="ignore"):
            d_T = np.where(impossible_T, 0.0, reference_T - policy_T).clip(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        estimates = {"k1": -d_T, "k2": d_T**2 / 2, "k3": np.expm1(d_T) - d_T}
        return self.coef * float(estimates[self.estimator].sum())
