"""Which examples are trained on, how often and in which order: index lists over the store, a function of the seed.

Training is one stream: the epochs laid end to end. A batch is the next `batch_sequences` of it, so it may reach over an
epoch's end, every optimizer step has equally many examples, and only the last batch of all may be shorter. A position
in the stream is therefore the whole state of a reader. Left out: reading (reader.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.data.examples import ExampleStore
from megatron_r1.errors import ConfigError

VALIDATION_STREAM = 0x56414C49
FILE_STREAM = 0x46494C45
"""Separate the validation draw's and the files' random numbers from the epochs' under one seed."""


def split_validation(store: ExampleStore, count: int, *, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Training examples i64 of each file, and `count` validation examples i64 with pairwise different questions.

    No example whose question is in validation is trained on. ConfigError if a file would have none left.
    """
    questions, first = np.unique(store.questions, return_index=True)
    drawn = np.random.default_rng([VALIDATION_STREAM, seed]).permutation(len(questions))[:count]
    trained = ~np.isin(store.questions, questions[drawn])
    groups = [np.flatnonzero(trained & (store.files == file)) for file in range(len(store.counts))]
    if len(drawn) < count or any(len(group) == 0 for group in groups):
        raise ConfigError(
            f"data.validation: {count} of {len(questions)} different questions leaves a file without examples to "
            "train on; lower it or give more data"
        )
    return groups, np.sort(first[drawn])


def examples_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many examples of each file an epoch has: `weights` as shares of sum(sizes), rounded by largest remainder.

    Without weights, all of each: `sizes`. ConfigError for a file whose share rounds to none.
    """
    if not weights:
        return list(sizes)
    exact = np.asarray(weights) / np.sum(weights) * sum(sizes)
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: sum(sizes) - int(counts.sum())]:
        counts[place] += 1
    if not counts.all():
        raise ConfigError(
            f"data.weights: {tuple(weights)} gives a file none of an epoch's {sum(sizes)} examples; raise its weight "
            "or drop the file"
        )
    return counts.tolist()


class TrainingOrder:
    """The stream of training examples. `total` is its length, `num_steps` the number of its batches."""

    def __init__(self, store: ExampleStore, config: SFTDataConfig) -> None:
        """Raises ConfigError where the validation examples or the weights leave nothing of a file."""
        self.groups, self.validation = split_validation(store, config.validation, seed=config.seed)
        self.counts = examples_per_epoch([len(group) for group in self.groups], config.weights)
        self.epoch_size = sum(self.counts)
        self.batch_sequences = config.batch_sequences
        self.total = self.epoch_size * config.epochs
        self.num_steps = -(-self.total // self.batch_sequences)
        self.identity: dict[str, Any] = {
            "examples": store.folder.name,
            "seed": config.seed,
            "validation": config.validation,
            "counts": self.counts,
        }
        """What must be equal for a position to mean the same example."""
        self._seed = config.seed
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def batch(self, position: int) -> np.ndarray:
        """The examples of the batch that starts at `position` < total, i64[n]; n is less than batch_sequences only
        at the stream's end."""
        end = min(position + self.batch_sequences, self.total)
        parts = []
        while position < end:
            epoch, place = divmod(position, self.epoch_size)
            parts.append(self._order(epoch)[place : place + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def epoch(self, number: int) -> np.ndarray:
        """All examples of epoch `number` in order, i64[epoch_size].

        A file's examples are dealt evenly: none is drawn again, in this epoch or a later one, before all were.
        """
        drawn = [self._draw(file, number) for file in range(len(self.groups))]
        return np.random.default_rng([self._seed, number]).permutation(np.concatenate(drawn))

    def _draw(self, file: int, epoch: int) -> np.ndarray:
        """The next counts[file] of the file's endless deal: one shuffled pass over it after the other."""
        group, count = self.groups[file], self.counts[file]
        first_pass, place = divmod(epoch * count, len(group))
        num_passes = -(-(place + count) // len(group))
        passes = [
            np.random.default_rng([FILE_STREAM, self._seed, file, first_pass + number]).permutation(group)
            for number in range(num_passes)
        ]
        return np.concatenate(passes)[place : place + count]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.epoch(epoch))
        return self._epoch[1]
