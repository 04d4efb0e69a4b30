"""Dr. GRPO: GRPO without its two biases (Liu et al., arXiv 2503.20783).

Rewards are not divided by the group's deviation, so that easy and hard questions weigh alike; and every token has the
same weight, 1 / (n * max_new_tokens) for n completions, so that length earns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from megatron_r1.algorithms.base import Algorithm, Needs, TokenLoss, Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.group_advantage import centred_rewards
from megatron_r1.algorithms.grpo import CLIPPED_METRICS
from megatron_r1.algorithms.kl import KL
from megatron_r1.algorithms.token_weights import constant


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Algorithm):
    """Dr. GRPO: no division by the deviation, one weight for all tokens (arXiv 2503.20783)."""

    METRICS: ClassVar[Mapping[str, str]] = CLIPPED_METRICS

    clip: Clip = field(default_factory=Clip)
    kl: KL = field(default_factory=lambda: KL(coef=0.0))
    """Off, as in the paper."""
    correction: Correction = field(default_factory=Correction)
    """For the policy that sampled, where it is not the one that is trained."""

    @property
    def needs(self) -> Needs:
        return Needs(kl=self.kl, correction=self.correction)

    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        return centred_rewards(rewards_G)

    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        return constant(lengths, max_new_tokens)

    def token_loss(self, tokens: Tokens) -> TokenLoss:
        from megatron_r1.algorithms.token_losses import clipped_loss

        return clipped_loss(tokens, self.clip, kl=self.kl, correction=self.correction)
