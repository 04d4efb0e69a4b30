"""Graded groups as training sequences, and the logprobs that an algorithm needs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.data.packing import unpack
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import gather_over_data
from megatron_r1.stages.grpo.usable import advantages_of
from megatron_r1.types import Completion, PackedMicrobatch, RolloutGroup, TrainingSequence

Rows = list[PackedMicrobatch]
Part = Sequence[tuple[RolloutGroup, np.ndarray]]
"""One minibatch: groups with the advantages f64[G] of their completions, NaN for one that is left out."""


def to_sequences(part: Part, algorithm: Algorithm, max_new_tokens: int) -> list[TrainingSequence]:
    """One minibatch's groups as training sequences: prompt and completion joined, each with its advantage, token
    weights normalised over the minibatch. Completions without an advantage are left out, of all of this."""
    kept = [
        (group.prompt_ids, completion, float(advantage))
        for group, advantages_G in part
        for completion, advantage in zip(group.completions, advantages_G, strict=True)
        if not np.isnan(advantage)
    ]
    if not kept:
        return []
    weights = algorithm.token_weights([len(completion.token_ids) for _, completion, _ in kept], max_new_tokens)
    return [
        _sequence(np.asarray(prompt, dtype=np.int32), completion, advantage, float(weight))
        for (prompt, completion, advantage), weight in zip(kept, weights, strict=True)
    ]


def _sequence(prompt: np.ndarray, completion: Completion, advantage: float, weight: float) -> TrainingSequence:
    length = len(completion.token_ids)
    zeros = np.zeros(len(prompt), dtype=np.float32)
    teacher = completion.teacher_logprobs
    return TrainingSequence(
        token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.int32),
        loss_mask=np.concatenate([np.zeros(len(prompt), bool), np.ones(length, bool)]),
        token_weight=np.concatenate([zeros, np.full(length, weight, dtype=np.float32)]),
        advantage=advantage,
        behaviour_logprobs=np.concatenate([zeros, completion.logprobs]).astype(np.float32),
        routes=completion.routes,
        teacher_logprobs=None if teacher is None else np.concatenate([zeros, teacher]).astype(np.float32),
    )


def add_logprobs(policy: Policy, minibatches: Sequence[Rows], algorithm: Algorithm) -> list[Rows]:
    """This rank's rows with the logprobs that the algorithm needs (Needs.old_pass, Needs.reference), before the first
    optimizer step on any of them. A collective."""
    needs = algorithm.needs
    flat = [row for rows in minibatches for row in rows]
    if needs.old_pass(len(minibatches)):
        old = policy.logprobs(flat)
        flat = [dataclasses.replace(row, old_logprobs=values[None]) for row, values in zip(flat, old, strict=True)]
    if needs.reference:
        with policy.reference_weights():
            reference = policy.logprobs(flat)
        flat = [
            dataclasses.replace(row, reference_logprobs=values[None])
            for row, values in zip(flat, reference, strict=True)
        ]
    rows = iter(flat)
    return [[next(rows) for _ in minibatch] for minibatch in minibatches]


def penalties_of(
    rows: Sequence[Rows], lengths: Sequence[Sequence[int]], algorithm: Algorithm
) -> list[dict[int, float]]:
    """By minibatch: what each sequence's reward loses by the algorithm's KL penalty, by its number; the same on every
    rank. `lengths`: of all sequences. A collective over data-parallel ranks."""
    return [_penalties(minibatch, known, algorithm) for minibatch, known in zip(rows, lengths, strict=True)]


def charge_kl(
    parts: Sequence[Part], penalties: Sequence[dict[int, float]], algorithm: Algorithm, max_new_tokens: int
) -> tuple[list[list[float]], list[np.ndarray]]:
    """Rewards less the penalties, and what follows from them: by minibatch the advantage of each of its sequences, and
    those of each group. A completion that was left out stays so."""
    of_sequences, advantages = [], []
    for part, lost in zip(parts, penalties, strict=True):
        charged: list[float] = []
        for group, before_G in part:
            kept_G = ~np.isnan(before_G)
            rewards_G = np.where(kept_G, algorithm.rewards(group, max_new_tokens), np.nan)
            first = len(charged)
            rewards_G[kept_G] -= [lost[first + place] for place in range(int(kept_G.sum()))]
            advantages.append(advantages_of(algorithm, rewards_G))
            charged += advantages[-1][kept_G].tolist()
        of_sequences.append(charged)
    return of_sequences, advantages


def _penalties(rows: Rows, lengths: Sequence[int], algorithm: Algorithm) -> dict[int, float]:
    """What each packed sequence's reward loses, by its number; the same on every rank."""
    kl = algorithm.needs.kl
    assert kl is not None
    old = unpack(rows, [row.old_logprobs for row in rows], lengths)
    reference = unpack(rows, [row.reference_logprobs for row in rows], lengths)
    own = {index: kl.penalty(old[index], reference[index]) for index in old}
    return {index: value for found in gather_over_data(own) for index, value in found.items()}


def refresh_now(done: int, minibatches: int, every: int) -> bool:
    """Whether a multiple of `every` (0: never) was passed by the last rollout's `minibatches` optimizer steps; `done`
    of them have been taken."""
    return every > 0 and done > 0 and done // every > (done - minibatches) // every
