"""On-policy distillation: the student samples, the teacher says how likely it finds each token (arXiv 2306.13649).

The loss is the reverse KL divergence from student to teacher at each token of the student's own samples. Its gradient
is a policy gradient with an advantage for each token, A_t = log p_teacher(t) - log p_student(t), and no baseline is
needed: tokens that the teacher finds likelier are made likelier. What a token does to the divergence of later ones is
left out, as in that paper. (Distillation on the teacher's samples is SFT: stages/sft.py.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_r1.grpo.loss import reverse_kl_loss
from megatron_r1.model.policy_model import TokenScores
from megatron_r1.policy.batch import DeviceBatch
from megatron_r1.policy.policy import LossOutput
from megatron_r1.rollout.server import Engine
from megatron_r1.types import Completion, RolloutGroup

REQUESTS_AT_ONCE = 64


def add_teacher_logprobs(engine: Engine, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with every completion's tokens scored by the teacher's server, at temperature 1.

    EngineError if the server fails; ValueError for a sequence that has no room in it."""

    def score(group: RolloutGroup, completion: Completion) -> Completion:
        logprobs = engine.client.score([*group.prompt_ids.tolist(), *completion.token_ids.tolist()])
        return dataclasses.replace(completion, teacher_logprobs=logprobs[len(group.prompt_ids) :])

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        waiting = [[pool.submit(score, group, one) for one in group.completions] for group in groups]
        return [
            dataclasses.replace(group, completions=tuple(future.result() for future in futures))
            for group, futures in zip(groups, waiting, strict=True)
        ]


def distill_loss(scores: TokenScores, batch: DeviceBatch) -> LossOutput:
    """sum_t weight_t * log p_student(t) * (log p_student(t) - log p_teacher(t)), the bracket a constant.

    Its gradient is an estimate of the reverse KL divergence's; the metric kl is the mean of the bracket, an estimate of
    the divergence itself. The bracket is bounded (grpo.loss.TEACHER_GAP_BOUND).
    """
    logprobs, mask = scores.logprobs, batch.loss_mask
    token_loss, gap = reverse_kl_loss(logprobs, batch.reference_logprobs)
    detached = {
        "kl": gap,
        "entropy": scores.entropy.detach(),
        "clip_fraction": gap.new_zeros(gap.shape),
        "mismatch": (logprobs.detach() - batch.behaviour_logprobs).abs(),
    }
    sums = {name: value.where(mask, 0.0).sum() for name, value in detached.items()}
    return LossOutput((token_loss.where(mask, 0.0) * batch.token_weight).sum(), sums)
