"""A rollout is whole on rank 0 alone; every data-parallel rank gets its share of the sequences, and lays out its rows.

What crosses the network is each sequence once, and then to the ranks that share a data-parallel rank (tensor, context,
pipeline parallel). Which sequences stand in which row is data/packing.py's plan, as if every rank had packed them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.agreement import on_rank_zero
from megatron_r1.algorithms.base import Algorithm
from megatron_r1.data.packing import RowLayout, lay_out, plan_rows, split_minibatches, with_advantages
from megatron_r1.data.template import render_prompt
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.observe.rollouts import rollout_records
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.sequences import Part, Rows, charge_kl, penalties_of, to_sequences
from megatron_r1.stages.grpo.usable import advantages_of
from megatron_r1.types import RolloutGroup, TrainingSequence


@dataclass(slots=True, kw_only=True)
class Trained:
    """What a step trains on, on rank 0: its groups, and the advantage f64[G] of each completion (NaN where it was left
    out)."""

    groups: list[RolloutGroup]
    advantages: list[np.ndarray]

    @classmethod
    def of(cls, groups: list[RolloutGroup], algorithm: Algorithm, max_new_tokens: int) -> Trained:
        rewards = [algorithm.rewards(group, max_new_tokens) for group in groups]
        return cls(groups=groups, advantages=[advantages_of(algorithm, rewards_G) for rewards_G in rewards])

    def parts(self, count: int) -> list[Part]:
        """As `count` minibatches."""
        return split_minibatches(list(zip(self.groups, self.advantages, strict=True)), count)


def samples_shown(config: GRPOConfig, tokenizer: Tokenizer, step: int, trained: Trained) -> Iterator[dict[str, Any]]:
    """The step's rows of rollouts.jsonl."""
    return rollout_records(
        step=step,
        groups=trained.groups,
        advantages=[advantages_G.tolist() for advantages_G in trained.advantages],
        prompt_texts=[render_prompt(group.problem, config.data.template, tokenizer) for group in trained.groups],
        limit=config.rollouts_logged_per_step,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one data-parallel rank gets of a minibatch: the sequences of its rows by their numbers, which of them stand
    in which row, and the length of every sequence of the minibatch, other ranks' too."""

    sequences: dict[int, TrainingSequence]
    rows: list[list[int]]
    lengths: list[int]

    def lay_out(self, layout: RowLayout) -> Rows:
        return [lay_out(self.sequences, indices, layout) for indices in self.rows]


def shares_of(
    parts: Sequence[Part], algorithm: Algorithm, layout: RowLayout, max_new_tokens: int, num_ranks: int
) -> list[list[Share]]:
    """For each of `num_ranks` data-parallel ranks its share of each minibatch. A minibatch of which nothing is left to
    train on has no sequences."""
    shares: list[list[Share]] = [[] for _ in range(num_ranks)]
    for part in parts:
        sequences = to_sequences(part, algorithm, max_new_tokens)
        lengths = [len(sequence) for sequence in sequences]
        for own, rows in zip(shares, plan_rows(sequences, layout, num_ranks), strict=True):
            held = {index: sequences[index] for row in rows for index in row}
            own.append(Share(sequences=held, rows=rows, lengths=lengths))
    return shares


def with_kl_charged(
    rows: Sequence[Rows],
    lengths: Sequence[Sequence[int]],
    trained: Trained | None,
    algorithm: Algorithm,
    max_new_tokens: int,
) -> list[Rows]:
    """This rank's rows with the advantages that follow from rewards less the KL penalty; `trained`, on rank 0, gets
    them too. A collective."""
    penalties = penalties_of(rows, lengths, algorithm)

    def work() -> list[list[float]]:
        assert trained is not None
        charged, trained.advantages = charge_kl(trained.parts(len(rows)), penalties, algorithm, max_new_tokens)
        return charged

    charged = on_rank_zero(work)
    return [[with_advantages(row, values) for row in each] for each, values in zip(rows, charged, strict=True)]
