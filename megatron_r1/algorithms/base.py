"""What an algorithm is: a frozen dataclass of its settings with pure functions from rewards to a loss.

    rewards_G    = algorithm.rewards(group, max_new_tokens)     what each completion of a group earned
    advantages_G = algorithm.advantages(rewards_G)              relative to its group
    weights_n    = algorithm.token_weights(lengths, ...)        of each sequence's tokens in the step's loss
    loss_S       = algorithm.token_loss(tokens)                 of each token, with its metrics

The step's loss is sum_t weight_t * loss_t over all tokens of the minibatch, whatever ranks and rows they lie in. The
loop (stages/grpo/loop.py) calls these and names no algorithm. Left out: sampling, packing, Megatron, files. Nothing
here imports torch until a loss is computed: the command line builds algorithms without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from megatron_r1.types import RolloutGroup

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run is otherwise, as far as an algorithm's rules ask for it."""

    minibatches: int
    """Optimizer steps per rollout; with one, the policy that is trained is the one that sampled."""
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A packed row as an algorithm's loss sees it; all tensors [1, S], fp32 but for the bool `mask`.

    Position j is about the token that it predicts. Where the mask is False, values may be anything; the loop drops
    what a loss says there. A logprob that `Needs` does not ask for is zeros.
    """

    logprobs: Tensor
    """Of the policy that is trained; the only one with a gradient."""
    old_logprobs: Tensor
    """Of the policy before this rollout's first optimizer step, by the trainer."""
    behaviour_logprobs: Tensor
    """Of the engine that sampled."""
    reference_logprobs: Tensor
    teacher_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequence_mean: Callable[[Tensor], Tensor]
    """values -> at each token the mean of `values` over its sequence's trained tokens, without gradient; context-
    parallel ranks are summed over, so all of them must call it."""


class TokenLoss(NamedTuple):
    """`loss` [1, S] with gradient; `metrics` by name, detached [1, S], reported as means over trained tokens."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What must be known before an algorithm's loss (or its rewards) can be computed."""

    reference: bool = False
    """Logprobs of a reference policy: one more pass over a rollout, and a copy of the weights in host memory."""
    reference_refresh_steps: int = 0
    """The reference policy becomes the current one every N optimizer steps; 0 keeps the start model."""
    old: bool = False
    """Old logprobs even if a rollout is trained on in one step."""
    teacher: bool = False
    """Logprobs of the algorithm's `teacher`, by a server of its own; then rewards are recorded and not trained on."""
    kl_in_reward: bool = False
    """`sequence_penalties` are taken from the rewards before advantages are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The base of every algorithm: the defaults of what few of them change."""

    METRICS: ClassVar[Mapping[str, str]] = {}
    """What token_loss reports, by name, in words."""

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def sampling_rounds(self) -> int:
        """How often a step may sample until it has its groups; above 1, groups that are not `worth_training` are
        replaced."""
        return 1

    def faults(self, setting: Setting) -> list[str]:
        """One sentence for each setting that cannot be, `algorithm.FIELD is VALUE; the law`, but for numbers out of the
        bounds that are written at their fields (bounds.py)."""
        return []

    def rewards(self, group: RolloutGroup, max_new_tokens: int) -> np.ndarray:
        """f64[G]: what is compared within the group; not finite for a completion that must be left out."""
        return np.array([reward.total for reward in group.rewards], dtype=np.float64)

    def worth_training(self, group: RolloutGroup) -> bool:
        """Whether the group can teach anything; asked where sampling_rounds is above 1."""
        return True

    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        """f64[G]; NaN for a completion that is left out (group_advantage.usable_rewards)."""
        raise NotImplementedError(f"{type(self).__name__}.advantages")

    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        """f64[n]: the weight of each token of sequence i, which has lengths[i] trained tokens."""
        raise NotImplementedError(f"{type(self).__name__}.token_weights")

    def token_loss(self, tokens: Tokens) -> TokenLoss:
        raise NotImplementedError(f"{type(self).__name__}.token_loss")

    def sequence_penalty(self, old_logprobs_T: np.ndarray, reference_logprobs_T: np.ndarray) -> float:
        """What a completion's reward loses for its T tokens' distance from the reference; see Needs.kl_in_reward."""
        raise NotImplementedError(f"{type(self).__name__}.sequence_penalty")
