"""GSPO: Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071): one ratio for a whole sequence.

    s_i = exp(1/|y_i| sum_t log(p / p_old))          loss = 1/G sum_i -min(s_i A_i, clip(s_i) A_i)

It was made for mixtures of experts, whose tokens' ratios jump when a token's experts change. The ratio's value is the
sequence's, its gradient flows through each token's own logprob (eq. 17 with the sequence's value): summed over the
sequence that is the gradient of eq. 5, and no collective stands in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from megatron_r1.algorithms.base import Algorithm, Needs, TokenLoss, Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.group_advantage import group_advantages
from megatron_r1.algorithms.grpo import CLIPPED_METRICS
from megatron_r1.algorithms.kl import KL
from megatron_r1.algorithms.token_weights import sequence_mean
from megatron_r1.bounds import NonNegative


@dataclass(frozen=True, kw_only=True)
class GSPO(Algorithm):
    """GSPO: the ratio of a whole sequence, for mixtures of experts (arXiv 2507.18071)."""

    METRICS: ClassVar[Mapping[str, str]] = CLIPPED_METRICS

    clip: Clip = field(default_factory=lambda: Clip(low=3e-4, high=4e-4))
    """A sequence's ratio is far nearer to 1 than a token's; the paper's values (section 5.1)."""
    kl: KL = field(default_factory=lambda: KL(coef=0.0))
    deviation_floor: NonNegative = 1e-4
    """The least standard deviation that a group's rewards are divided by."""
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
        from megatron_r1.algorithms.token_losses import sequence_clipped_loss

        return sequence_clipped_loss(tokens, self.clip, kl=self.kl, correction=self.correction)
