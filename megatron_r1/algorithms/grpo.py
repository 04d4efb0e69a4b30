"""Group Relative Policy Optimization, the paper's algorithm (DeepSeek-R1, arXiv 2501.12948, section 2.1, eq. 1 to 3;
DeepSeekMath, arXiv 2402.03300).

    A_i = (r_i - mean(r)) / max(std(r), deviation_floor)                             over a group of G completions
    loss = 1/G sum_i 1/|o_i| sum_t [ -min(rho A_i, clip(rho) A_i) + coef * k3 ]      rho = p / p_old at token t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from megatron_r1.algorithms.base import Algorithm, Needs, TokenLoss, Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import METRICS as CORRECTION_METRICS
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.group_advantage import group_advantages
from megatron_r1.algorithms.kl import KL
from megatron_r1.algorithms.token_weights import sequence_mean
from megatron_r1.bounds import NonNegative

CLIPPED_METRICS = {
    "kl": "estimate of KL(policy || reference), nats per token; 0 without a reference policy",
    "clip_fraction": "share of tokens whose ratio was clipped, so that they gave no gradient",
    **CORRECTION_METRICS,
}


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """Group Relative Policy Optimization (DeepSeek-R1, eq. 1 to 3)."""

    METRICS: ClassVar[Mapping[str, str]] = CLIPPED_METRICS

    clip: Clip = field(default_factory=Clip)
    kl: KL = field(default_factory=KL)
    deviation_floor: NonNegative = 1e-4
    """The least standard deviation that a group's rewards are divided by. Scores of a reward model that differ less
    differ by its rounding; one rule's verdict among 16 answers deviates by 0.24."""
    correction: Correction = field(default_factory=Correction)
    """For the policy that sampled, where it is not the one that is trained."""

    @property
    def needs(self) -> Needs:
        return Needs(kl=self.kl, correction=self.correction)

    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        return group_advantages(rewards_G, deviation_floor=self.deviation_floor)

    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        return sequence_mean(lengths)

    def token_loss(self, tokens: Tokens) -> TokenLoss:
        from megatron_r1.algorithms.token_losses import clipped_loss

        return clipped_loss(tokens, self.clip, kl=self.kl, correction=self.correction)
