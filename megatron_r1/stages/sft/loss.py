"""Supervised fine-tuning: next-token loss on the answers, one optimizer step a batch.

The loop of cold start, mixed SFT and distillation alike; only where batches come from differs. Normalisation is in the
batch's token weights. Left out: data readers and epochs (the caller's iterator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from megatron_r1.algorithms.token_losses import weighted_sum
from megatron_r1.data.packing import RowLayout, pack_rank
from megatron_r1.model.policy_model import TokenScores
from megatron_r1.policy.batch import DeviceBatch
from megatron_r1.policy.policy import LossOutput, Policy
from megatron_r1.policy.topology import data_parallel, sum_over_data
from megatron_r1.types import StepResult, TrainingSequence

MTP_LOSS_WEIGHT = 0.1
"""Weight of the multi-token-prediction loss (DeepSeek-V3, arXiv 2412.19437, section 4.2: 0.1 late in training)."""


def sft_loss(scores: TokenScores, batch: DeviceBatch) -> LossOutput:
    """-sum_t weight_t * logprob_t, plus MTP_LOSS_WEIGHT times the mean over MTP layers of their own such sum."""
    loss = -weighted_sum(scores.logprobs, batch.token_weight) + mtp_loss(scores)
    return LossOutput(loss, {"entropy": scores.entropy.detach().where(batch.loss_mask, 0.0).sum()})


def mtp_loss(scores: TokenScores) -> torch.Tensor | float:
    """-MTP_LOSS_WEIGHT * mean over MTP layers of sum_t weight_t * logprob_t, their weights shifted with their labels; 0
    where no MTP layer is trained."""
    loss: torch.Tensor | float = 0.0
    for logprobs, weights in zip(scores.mtp_logprobs, scores.mtp_weights, strict=True):
        loss = loss - MTP_LOSS_WEIGHT / len(scores.mtp_logprobs) * weighted_sum(logprobs, weights)
    return loss


def mean_loss(policy: Policy, sequences: Sequence[TrainingSequence], layout: RowLayout) -> float:
    """-sum_t weight_t * logprob_t over the sequences, without MTP layers. Every rank passes the same sequences."""
    rank, ranks = data_parallel()
    rows = pack_rank(sequences, layout, rank=rank, num_ranks=ranks)
    own = [
        float((scores * row.token_weight[0])[row.loss_mask[0]].sum(dtype="float64"))
        for row, scores in zip(rows, policy.logprobs(rows), strict=True)
    ]
    return -sum_over_data(sum(own))


def train_sft(
    policy: Policy,
    batches: Iterable[Sequence[TrainingSequence]],
    layout: RowLayout,
    on_step: Callable[[int, StepResult], None] | None = None,
    *,
    first_step: int = 0,
) -> None:
    """One optimizer step for each batch, counted from `first_step`. Every rank passes the same batches and trains on
    its own rows."""
    rank, ranks = data_parallel()
    for step, sequences in enumerate(batches, start=first_step):
        rows = pack_rank(sequences, layout, rank=rank, num_ranks=ranks)
        result = policy.step(rows, sft_loss)
        if on_step is not None:
            on_step(step, result)
