"""The tokenised examples of all files, in one memory-mapped file: a million of them are no Python objects.

A cache folder holds `tokens.bin` (i32, all examples end to end; a token that is trained on is stored as its bitwise
complement, a negative number, so that ids and loss mask are one array), `index.npz` (where each example starts, its
file, a hash of its question) and `counts.json`. Left out: writing it (example_cache.py), order and splits (mixture.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np

from megatron_r1.errors import DataError
from megatron_r1.types import TrainingSequence

TOKENS, INDEX, COUNTS = "tokens.bin", "index.npz", "counts.json"
TOKEN = np.dtype("<i4")

FlatBatch = tuple[np.ndarray, np.ndarray]
"""Examples end to end as they are stored, i32[sum of lengths], and their lengths i64[n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCounts:
    """What became of a file's lines: kept, longer than max_tokens, with a special token's text in a turn; and of how
    many of them each field that is not read was a part. `untrained`: earlier answers of the kept ones that the template
    does not write as they would have been sampled, and that are therefore not trained on."""

    kept: int
    too_long: int
    control_text: int
    not_read: Mapping[str, int] = field(default_factory=dict)
    untrained: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleStore:
    """An open cache folder with n examples.

    tokens i32[T], mapped; starts i64[n + 1], where each example starts in it; files i32[n], which file it is from;
    questions u64[n], equal for equal (normalised) turns before the answer; counts, one for each file. The folder's
    name is a hash of all that the content depends on.
    """

    folder: Path
    tokens: np.ndarray
    starts: np.ndarray
    files: np.ndarray
    questions: np.ndarray
    counts: tuple[FileCounts, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes open the folder themselves: a pickled memory map would be its content."""
        return open_cache, (self.folder,)

    def gather(self, indices: Sequence[int] | np.ndarray) -> FlatBatch:
        """The examples `indices`, copied out of the map."""
        starts, ends = self.starts[indices], self.starts[np.asarray(indices) + 1]
        flat = np.concatenate([self.tokens[start:end] for start, end in zip(starts, ends)])
        return flat, ends - starts


def open_cache(folder: Path) -> ExampleStore:
    """Open a folder that `build_cache` made. DataError if it is not whole."""
    try:
        counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        with np.load(folder / INDEX) as index:
            starts, files, questions = index["starts"], index["files"], index["questions"]
        size = (folder / TOKENS).stat().st_size
        if not len(starts) - 1 == len(files) == len(questions) or size != starts[-1] * TOKEN.itemsize or not size:
            raise ValueError(f"{TOKENS} has {size} bytes; {INDEX} describes {starts[-1] * TOKEN.itemsize}")
        return ExampleStore(
            folder=folder,
            tokens=np.memmap(folder / TOKENS, dtype=TOKEN, mode="r"),
            starts=starts,
            files=files,
            questions=questions,
            counts=tuple(FileCounts(**entry) for entry in counts),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(f"{folder}: not a whole cache of examples: {error}; remove it, it is made again") from error


def to_stored(token_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """i32[L], the stored form of one example."""
    return np.where(loss_mask, ~token_ids, token_ids).astype(TOKEN)


def training_sequences(batch: FlatBatch, loss: Literal["token_mean", "sequence_mean"]) -> list[TrainingSequence]:
    """The batch's examples with weights that sum to 1 over all its trained tokens.

    token_mean: 1 / (trained tokens of the batch). sequence_mean: 1 / (examples * the example's trained tokens).
    """
    flat, lengths = batch
    trained = flat < 0
    token_ids = np.where(trained, ~flat, flat)
    edges = np.cumsum(lengths)[:-1]
    parts = list(zip(np.split(token_ids, edges), np.split(trained, edges)))
    divisors = [
        np.count_nonzero(trained) if loss == "token_mean" else len(lengths) * np.count_nonzero(mask)
        for _, mask in parts
    ]
    return [
        TrainingSequence(
            token_ids=ids, loss_mask=mask, token_weight=np.where(mask, 1.0 / divisor, 0.0).astype(np.float32)
        )
        for (ids, mask), divisor in zip(parts, divisors)
    ]
