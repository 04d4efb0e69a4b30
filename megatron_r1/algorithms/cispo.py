"""CISPO: Clipped Importance Sampling Policy Optimization (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    loss = 1 / sum_i |o_i|  sum_i sum_t  -min(p / p_old, ratio_cap) A_i log p           the first factor a constant

The importance weight is clipped, not the update: every token keeps a gradient, also those that PPO's clip would drop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np

from megatron_r1.algorithms.base import Algorithm, Needs, TokenLoss, Tokens
from megatron_r1.algorithms.correction import METRICS as CORRECTION_METRICS
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.group_advantage import group_advantages
from megatron_r1.algorithms.token_weights import token_mean
from megatron_r1.bounds import NonNegative, at_least


@dataclass(frozen=True, kw_only=True)
class CISPO(Algorithm):
    """CISPO: the importance weight is clipped and every token keeps its gradient (arXiv 2506.13585)."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "clip_fraction": "share of tokens whose importance weight was at its cap",
        **CORRECTION_METRICS,
    }

    ratio_cap: Annotated[float, at_least(1)] = 5.0
    """Largest importance weight, 1 + epsilon_high (arXiv 2510.13786 finds 4 to 8 alike). There is none below."""
    deviation_floor: NonNegative = 1e-4
    """The least standard deviation that a group's rewards are divided by."""
    correction: Correction = field(default_factory=Correction)
    """For the policy that sampled, where it is not the one that is trained."""

    @property
    def needs(self) -> Needs:
        return Needs(correction=self.correction)

    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        return group_advantages(rewards_G, deviation_floor=self.deviation_floor)

    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        return token_mean(lengths)

    def token_loss(self, tokens: Tokens) -> TokenLoss:
        from megatron_r1.algorithms.token_losses import weighted_policy_loss

        return weighted_policy_loss(tokens, ratio_cap=self.ratio_cap, correction=self.correction)
