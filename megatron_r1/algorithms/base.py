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

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.kl import KL
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.types import RolloutGroup

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run is otherwise, as far as an algorithm's rules ask for it."""

    minibatches: int
    """Optimizer steps per rollout."""
    max_new_tokens: int
    temperature: float
    sync_every: int = 1
    """Rollouts per weight sync. With 1, and one optimizer step per rollout, the policy that is trained is the one that
    sampled, but for the engine's numerics."""
    recorded_stale: bool = False
    """Nothing is sampled, and older weights than sync_every says sampled what was recorded."""

    @property
    def stale(self) -> bool:
        """Whether samples may be of older weights than the trainer has before a rollout's first step."""
        return self.sync_every > 1 or self.recorded_stale


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A packed row as an algorithm's loss sees it; all tensors [1, S], fp32 but for the bool `mask`.

    Position j is about the token that it predicts. Where the mask is False, values may be anything; the loop drops
    what a loss says there. A logprob that `Needs` does not ask for is zeros.
    """

    logprobs: Tensor
    """Of the policy that is trained; the only one with a gradient."""
    old_logprobs: Tensor
    """Of the policy before this rollout's first optimizer step, by the trainer: of a pass made then, or, at a rollout's
    only step without such a pass, the values of `logprobs`."""
    behaviour_logprobs: Tensor
    """Of the engine that sampled, with the weights that it had: with sync_every above 1 those of an earlier step."""
    reference_logprobs: Tensor
    teacher_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequence_mean: Callable[[Tensor], Tensor]
    """values -> at each token the mean of `values` over its sequence's trained tokens, without gradient; context-
    parallel ranks are summed over, so all of them must call it."""
    sequence_sum: Callable[[Tensor], Tensor]
    """The same with the sum."""
    stale: bool = False
    """Whether the engine may have sampled with older weights than the trainer had before the rollout's first step."""


class TokenLoss(NamedTuple):
    """`loss` [1, S] with gradient; `metrics` by name, detached [1, S], reported as means over trained tokens."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What must be known before an algorithm's loss (or its rewards) can be computed."""

    kl: KL | None = None
    """A reference policy: one more pass over a rollout, and a copy of the weights in host memory."""
    correction: Correction | None = None
    """For the policy that sampled; its rules are looked at, and whether old logprobs are asked for."""
    teacher: Teacher | None = None
    """Logprobs of a teacher, by a server of its own; then rewards are recorded and not trained on."""
    old: bool = False
    """Old logprobs by a pass of their own even if a rollout is trained on in one step."""

    @property
    def reference(self) -> bool:
        return self.kl is not None and self.kl.coef > 0

    @property
    def kl_in_reward(self) -> bool:
        return self.kl is not None and self.reference and self.kl.place == "reward"

    def old_pass(self, minibatches: int) -> bool:
        """Whether a pass is made for old logprobs before the first optimizer step on a rollout. With one step its own
        forward gives them; a ratio against the engine's probabilities needs none."""
        against_old = self.correction is None or self.correction.ratio_against == "trainer"
        return self.old or self.kl_in_reward or (minibatches > 1 and against_old)


@dataclass(frozen=True, kw_only=True)
class Algorithm(abc.ABC):
    """The base of every algorithm: what each must say, and the defaults of what few change.

    Without slots: on Python 3.11 a dataclass with slots cannot call super()."""

    METRICS: ClassVar[Mapping[str, str]] = {}
    """What token_loss reports, by name, in words; no name of RESERVED."""

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

    @abc.abstractmethod
    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        """f64[G], finite, of the G completions of a group that have a usable reward: two or more, but where a group has
        one completion only."""

    @abc.abstractmethod
    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        """f64[n]: the weight of each token of sequence i, which has lengths[i] trained tokens."""

    @abc.abstractmethod
    def token_loss(self, tokens: Tokens) -> TokenLoss:
        """The loss of each token, with gradient by tokens.logprobs, and the METRICS."""


RESERVED = frozenset({
    "step", "loss", "reward_mean", "entropy", "grad_norm", "lr", "skipped_steps", "length_mean",
    "mismatch", "mismatch_p99", "mismatch_max", "mismatch_kl_rollout", "mismatch_kl_trainer", "effective_samples",
    "routes_differ",
    "truncated", "zero_advantage_groups", "completions_left_out", "groups_left_out", "broken_parts",
    "groups_sampled", "sampling_rounds", "weight_version", "staleness", "completion_tokens", "tokens",
    "tokens_per_second", "seconds", "grading_timeouts", "grading_errors", "eval_accuracy",
})  # fmt: skip
"""Names in metrics.jsonl that mean something already: no part of a reward and no metric of an algorithm has one."""
