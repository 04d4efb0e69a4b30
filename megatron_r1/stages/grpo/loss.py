"""An algorithm's token loss as the loss of a packed row: masked, weighted, summed, with its metrics."""

from __future__ import annotations

from megatron_r1.algorithms.base import Algorithm, Tokens
from megatron_r1.model.policy_model import TokenScores
from megatron_r1.policy.batch import DeviceBatch
from megatron_r1.policy.policy import LossFunction, LossOutput
from megatron_r1.stages.sft.loss import mtp_loss


def policy_loss(algorithm: Algorithm, *, own_is_old: bool, stale: bool = False) -> LossFunction:
    """sum_t weight_t * loss_t, and the loss of the MTP layers on the sampled tokens if they are trained.

    `own_is_old`: this is a rollout's first and only optimizer step and no pass was made for old logprobs, so they are
    this forward's own; that is true whatever weights have sampled. Otherwise they are the batch's. `stale`: Tokens'."""

    def loss(scores: TokenScores, batch: DeviceBatch) -> LossOutput:
        logprobs, mask = scores.logprobs, batch.loss_mask
        tokens = Tokens(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if own_is_old else batch.old_logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            reference_logprobs=batch.reference_logprobs,
            teacher_logprobs=batch.teacher_logprobs,
            advantages=batch.advantages,
            mask=mask,
            sequence_mean=batch.sequence_mean,
            sequence_sum=batch.sequence_sum,
            stale=stale,
        )
        token_loss, metrics = algorithm.token_loss(tokens)
        detached = {
            **{name: value.detach() for name, value in metrics.items()},
            "entropy": scores.entropy.detach(),
        }
        # where, not multiply: positions outside the mask may hold anything.
        sums = {name: value.where(mask, 0.0).sum() for name, value in detached.items()}
        total = (token_loss.where(mask, 0.0) * batch.token_weight).sum()
        return LossOutput(total + mtp_loss(scores), sums)

    return loss
