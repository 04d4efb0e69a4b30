"""DAPO: Decoupled clip and Dynamic sAmpling Policy Optimization (Yu et al., arXiv 2503.14476), whole.

- clip-higher: the clip is wider above (0.28) than below (0.2), so that unlikely tokens can rise;
- dynamic sampling: a group whose rewards are all equal teaches nothing and is replaced by another (eq. 11);
- token mean: every token of the minibatch weighs the same (eq. 12);
- overlong shaping: an answer in the last `overlong_share` of max_new_tokens loses up to `overlong_penalty` (eq. 13);
- no KL term.

Whether a group teaches anything is asked of its rewards before overlong shaping, as the paper asks its verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np

from megatron_r1.algorithms.base import Algorithm, Needs, TokenLoss, Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.group_advantage import group_advantages, usable_rewards
from megatron_r1.algorithms.grpo import CLIPPED_METRICS
from megatron_r1.algorithms.token_weights import token_mean
from megatron_r1.bounds import DECAY, Count, NonNegative
from megatron_r1.types import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class DAPO(Algorithm):
    """DAPO: clip-higher, dynamic sampling, token mean, overlong shaping (arXiv 2503.14476)."""

    METRICS: ClassVar[Mapping[str, str]] = CLIPPED_METRICS

    clip: Clip = field(default_factory=lambda: Clip(high=0.28))
    sampling_rounds: Count = 10
    """A step samples at most so often until it has prompts_per_step groups whose rewards differ; then it trains on
    those that it has. 1: no dynamic sampling."""
    overlong_share: Annotated[float, DECAY] = 0.2
    """The last share of max_new_tokens, in which an answer's reward falls (the paper: 4,096 of 20,480 tokens); 0: no
    overlong shaping."""
    overlong_penalty: NonNegative = 1.0
    """What an answer that fills max_new_tokens loses."""
    deviation_floor: NonNegative = 1e-4
    """The least standard deviation that a group's rewards are divided by."""
    correction: Correction = field(default_factory=Correction)
    """For the policy that sampled, where it is not the one that is trained."""

    @property
    def needs(self) -> Needs:
        return Needs(correction=self.correction)

    def rewards(self, group: RolloutGroup, max_new_tokens: int) -> np.ndarray:
        totals_G = np.array([reward.total for reward in group.rewards], dtype=np.float64)
        lengths_G = np.array([len(completion.token_ids) for completion in group.completions], dtype=np.float64)
        return totals_G + self.overlong_penalty * overlong(lengths_G, max_new_tokens, self.overlong_share)

    def worth_training(self, group: RolloutGroup) -> bool:
        rewards_G = np.array([reward.total for reward in group.rewards], dtype=np.float64)
        usable = rewards_G[usable_rewards(rewards_G)]
        return usable.size > 0 and bool(np.ptp(usable) > 0)

    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        return group_advantages(rewards_G, deviation_floor=self.deviation_floor)

    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        return token_mean(lengths)

    def token_loss(self, tokens: Tokens) -> TokenLoss:
        from megatron_r1.algorithms.token_losses import clipped_loss

        return clipped_loss(tokens, self.clip, correction=self.correction)


def overlong(lengths_G: np.ndarray, max_new_tokens: int, share: float) -> np.ndarray:
    """Eq. 13, f64[G] in [-1, 0]: 0 up to (1 - share) * max_new_tokens, then falling by a straight line to -1."""
    buffer = share * max_new_tokens
    if buffer <= 0:
        return np.zeros(np.shape(lengths_G))
    return -np.clip((np.asarray(lengths_G, np.float64) - (max_new_tokens - buffer)) / buffer, 0.0, 1.0)
