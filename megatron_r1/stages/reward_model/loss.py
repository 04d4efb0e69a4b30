"""Reward model training: preference pairs, Bradley-Terry loss (paper, appendix B.2; arXiv 1706.03741).

    loss = mean over pairs of -log sigmoid(value(chosen) - value(rejected))

A pair's two responses need not lie in one packed row, nor on one rank: the values are computed first, and with them
the loss's exact gradient in each value,

    d loss / d value(chosen) = -sigmoid(value(rejected) - value(chosen)) / pairs = -d loss / d value(rejected)

The step then trains on the sum of those gradients times the values, which has the same
gradient in the weights. It costs one forward pass more and lets the pairs take any parallel layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.data.packing import RowLayout, pack_rank
from megatron_r1.model.policy_model import TokenValues
from megatron_r1.policy.batch import DeviceBatch
from megatron_r1.policy.policy import LossOutput, Policy
from megatron_r1.policy.topology import data_parallel, gather_over_data
from megatron_r1.types import StepResult, TrainingSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PairResult:
    """One step on pairs: the loss before it, the share of pairs ranked right, and the optimizer's result."""

    loss: float
    accuracy: float
    margin: float
    """Mean of value(chosen) - value(rejected)."""
    step: StepResult


def bradley_terry(chosen_P: np.ndarray, rejected_P: np.ndarray) -> tuple[float, np.ndarray]:
    """(loss, d loss / d value(chosen) f64[P]) of P pairs of values; d loss / d value(rejected) is its negative.

    loss = mean log(1 + exp(rejected - chosen)), without overflow for any difference."""
    difference = np.asarray(rejected_P, np.float64) - np.asarray(chosen_P, np.float64)
    loss = float(np.logaddexp(0.0, difference).mean())
    # sigmoid(x) = exp(-log(1 + exp(-x)))
    return loss, -np.exp(-np.logaddexp(0.0, -difference)) / len(difference)


def values_of(policy: Policy, sequences: Sequence[TrainingSequence], layout: RowLayout) -> np.ndarray:
    """The value of each sequence, f64[n]: that of its one token with a weight. Every rank passes and gets the same."""
    rank, ranks = data_parallel()
    rows = pack_rank(sequences, layout, rank=rank, num_ranks=ranks)
    own: dict[int, float] = {}
    for row, values in zip(rows, policy.values(rows), strict=True):
        starts = row.cu_seqlens[: len(row.sequence_indices)]
        ends = row.cu_seqlens[1 : len(row.sequence_indices) + 1]
        for index, start, end in zip(row.sequence_indices, starts, ends, strict=True):
            own[index] = float(values[start:end][row.loss_mask[0, start:end]].sum())
    everyone: dict[int, float] = {}
    for part in gather_over_data(own):
        everyone |= part
    return np.array([everyone[index] for index in range(len(sequences))])


def train_pairs(policy: Policy, sequences: Sequence[TrainingSequence], layout: RowLayout) -> PairResult:
    """One optimizer step. `sequences`: chosen, rejected, chosen, rejected, ... each with weight 1 at the token whose
    value counts."""
    values = values_of(policy, sequences, layout)
    chosen_P, rejected_P = values[0::2], values[1::2]
    loss, gradient_P = bradley_terry(chosen_P, rejected_P)
    weighted = [
        dataclasses.replace(sequence, token_weight=sequence.token_weight * np.float32(sign * gradient_P[number // 2]))
        for number, sequence in enumerate(sequences)
        for sign in (1.0 if number % 2 == 0 else -1.0,)
    ]
    rank, ranks = data_parallel()
    result = policy.step(pack_rank(weighted, layout, rank=rank, num_ranks=ranks), value_loss)
    return PairResult(
        loss=loss,
        accuracy=ranked_right(values),
        margin=float((chosen_P - rejected_P).mean()),
        step=result,
    )


def value_loss(scores: TokenValues, batch: DeviceBatch) -> LossOutput:
    """sum_t weight_t * value_t."""
    values = scores.values.where(batch.loss_mask, 0.0)
    return LossOutput((values * batch.token_weight).sum(), {"value": values.detach().sum()})


def ranked_right(values: np.ndarray) -> float:
    """Share of pairs (chosen, rejected, chosen, ...) whose chosen response has the higher value; a tie counts half."""
    chosen_P, rejected_P = values[0::2], values[1::2]
    return float((chosen_P > rejected_P).mean() + 0.5 * (chosen_P == rejected_P).mean())
