"""On-policy distillation: the student samples, a teacher says how likely it finds each token (arXiv 2306.13649).

The loss is the reverse KL divergence from student to teacher at each token of the student's own samples. Its gradient
is a policy gradient with an advantage for each token, A_t = log p_teacher(t) - log p_student(t), and no baseline is
needed: tokens that the teacher finds likelier are made likelier. What a token does to the divergence of later ones is
left out, as in that paper. Rewards are recorded only. (Distillation on the teacher's samples is SFT: stages/sft.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from megatron_r1.algorithms.base import Algorithm, Needs, Setting, TokenLoss, Tokens
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.algorithms.token_weights import sequence_mean


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistill(Algorithm):
    """A teacher scores the student's own samples, token by token (arXiv 2306.13649)."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "kl": "log p_student - log p_teacher, an estimate of their divergence, nats per token"
    }

    teacher: Teacher = field(default_factory=Teacher)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=self.teacher)

    def faults(self, setting: Setting) -> list[str]:
        faults = []
        if setting.minibatches > 1:
            faults.append(
                f"minibatches is {setting.minibatches}; a teacher's loss is for samples of the present policy: use 1"
            )
        if setting.sync_every > 1:
            faults.append(
                f"sync_every is {setting.sync_every}; a teacher's loss is for samples of the present policy: use 1"
            )
        if setting.recorded_stale:
            faults.append(
                "train_only: its rollouts are of older weights than those that are trained from the second step on; a "
                "teacher's loss is for samples of the present policy: use rollouts of a run with keep_rollouts"
            )
        if setting.temperature != 1.0:
            faults.append(
                f"rollout.sampling.temperature is {setting.temperature}; a teacher scores samples of temperature 1: "
                "use 1.0"
            )
        return faults

    def advantages(self, rewards_G: np.ndarray) -> np.ndarray:
        return np.zeros(len(rewards_G))

    def token_weights(self, lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
        return sequence_mean(lengths)

    def token_loss(self, tokens: Tokens) -> TokenLoss:
        from megatron_r1.algorithms.token_losses import reverse_kl_loss

        loss, gap = reverse_kl_loss(tokens.logprobs, tokens.teacher_logprobs)
        return TokenLoss(loss, {"kl": gap})
