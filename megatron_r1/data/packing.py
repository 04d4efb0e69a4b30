"""Sequences into rows: the only place that shifts tokens against labels.

Rows carry whole sequences end to end; attention is kept inside each by cu_seqlens. Every data-parallel rank
gets the same number of rows, because Megatron's collectives count microbatches. Rows are cut to what they
hold (rounded up), so nothing is computed on padding that the layout does not need. Left out: normalisation
(token_weight arrives ready), splitting a row over context-parallel ranks (Megatron's), and moving arrays to a
device.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from megatron_r1.errors import DataError
from megatron_r1.types import PackedMicrobatch, TrainingSequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """What a row must look like. All in tokens.

    `segment_multiple`: each sequence is padded to a multiple of it inside its own segment (context
    parallelism over C ranks needs 2 * C). `row_multiple`: the row's length is a multiple of it (sequence
    parallelism over T tensor ranks needs T * C). `full_rows` gives every row exactly `tokens_per_microbatch`,
    for kernels that want one shape; otherwise rows end at the first allowed length. `rows_multiple`: every
    rank gets a multiple of so many rows (Megatron's interleaved pipeline needs the pipeline size). `vocab_size`:
    rows of the model's embedding, which every token must have one of (0: not checked).
    """

    tokens_per_microbatch: int
    row_multiple: int = 1
    segment_multiple: int = 1
    pad_id: int = 0
    full_rows: bool = False
    rows_multiple: int = 1
    vocab_size: int = 0

    @property
    def multiple(self) -> int:
        return math.lcm(self.row_multiple, self.segment_multiple)

    def __post_init__(self) -> None:
        if self.tokens_per_microbatch % self.multiple or self.tokens_per_microbatch <= 0:
            raise DataError(
                f"tokens_per_microbatch: {self.tokens_per_microbatch}; expected a positive multiple of "
                f"{self.multiple} (row_multiple {self.row_multiple}, segment_multiple "
                f"{self.segment_multiple})"
            )

    def segment_length(self, num_tokens: int) -> int:
        return _round_up(num_tokens, self.segment_multiple)


def pack(
    sequences: Sequence[TrainingSequence], layout: RowLayout, *, num_ranks: int = 1
) -> list[list[PackedMicrobatch]]:
    """Rows by data-parallel rank: `num_ranks` lists of equally many rows, every sequence in exactly one row.

    Rows at the same place of different ranks have similar lengths. Where there are fewer rows than places, a
    row of weight 0 fills up. DataError for a sequence that no row can hold, whose first token would be trained
    on, or with a token that the model does not have.
    """
    return [
        [lay_out(sequences, indices, layout) for indices in rows] for rows in plan_rows(sequences, layout, num_ranks)
    ]


def pack_rank(
    sequences: Sequence[TrainingSequence], layout: RowLayout, *, rank: int, num_ranks: int
) -> list[PackedMicrobatch]:
    """pack(...)[rank] without building the other ranks' rows."""
    return [lay_out(sequences, indices, layout) for indices in plan_rows(sequences, layout, num_ranks)[rank]]


def unpack(
    rows: Sequence[PackedMicrobatch], values: Sequence[np.ndarray], lengths: Sequence[int]
) -> Mapping[int, np.ndarray]:
    """Per-token results of one rank's rows, back in each sequence's own indexing.

    values: one f32[1, S] or f32[S] per row, entry j about the token predicted at position j. lengths: number
    of tokens of every sequence that was packed (all ranks). Returns {sequence index: f32[L]}, zero where the
    sequence is not trained on.
    """
    if len(rows) != len(values):
        raise ValueError(f"values: {len(values)} arrays for {len(rows)} rows; expected one each")
    result: dict[int, np.ndarray] = {}
    for row, row_values in zip(rows, values):
        flat = np.asarray(row_values, dtype=np.float32).reshape(-1)
        if len(flat) != row.num_tokens:
            raise ValueError(f"values: {len(flat)} entries for a row of {row.num_tokens} tokens")
        flat = np.where(row.loss_mask[0], flat, np.float32(0))
        for start, index in zip(row.cu_seqlens, row.sequence_indices):
            length = lengths[index]
            out = np.zeros(length, dtype=np.float32)
            out[1:] = flat[start : start + length - 1]
            result[index] = out
    return result


def with_advantages(row: PackedMicrobatch, advantages: Sequence[float]) -> PackedMicrobatch:
    """The row with other advantages: one for each sequence that was packed (all ranks)."""
    replaced = np.zeros_like(row.advantages)
    for (start, end), index in zip(pairwise(row.cu_seqlens), row.sequence_indices):
        replaced[0, start:end] = np.where(row.loss_mask[0, start:end], advantages[index], 0.0)
    return dataclasses.replace(row, advantages=replaced)


def split_minibatches(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """`items` (rollout groups, in order) as `count` runs whose sizes differ by at most one; some are empty where there
    are fewer items."""
    if count < 1:
        raise ValueError(f"{count} minibatches; there must be at least 1")
    edges = [len(items) * k // count for k in range(count + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def _check_sequence(index: int, sequence: TrainingSequence, layout: RowLayout) -> None:
    length = len(sequence)
    if length == 0 or layout.segment_length(length) > layout.tokens_per_microbatch:
        raise DataError(
            f"sequence {index}: {length} tokens ({layout.segment_length(length)} after padding to a "
            f"multiple of {layout.segment_multiple}); a row holds 1 to {layout.tokens_per_microbatch}; raise "
            "train.tokens_per_microbatch or shorten rollout.sampling.max_new_tokens"
        )
    largest, smallest = int(sequence.token_ids.max()), int(sequence.token_ids.min())
    if layout.vocab_size and not 0 <= smallest <= largest < layout.vocab_size:
        raise DataError(
            f"sequence {index}: token {largest if smallest >= 0 else smallest} is not in the model's vocabulary of "
            f"{layout.vocab_size} rows (config.json, vocab_size); tokenise again with the model's own tokenizer"
        )
    if sequence.loss_mask[0]:
        raise DataError(f"sequence {index}: loss_mask[0] is True; no position predicts the first token of a sequence")
    for name in ("loss_mask", "token_weight", *_LOGPROBS):
        array = getattr(sequence, name)
        if array is not None and len(array) != length:
            raise DataError(f"sequence {index}: {name} has {len(array)} entries for {length} tokens")


def plan_rows(sequences: Sequence[TrainingSequence], layout: RowLayout, num_ranks: int) -> list[list[list[int]]]:
    """Sequence indices by rank and row, of which `lay_out` makes pack(...); longest rows first, dealt round the ranks.
    DataError as `pack`."""
    for index, sequence in enumerate(sequences):
        _check_sequence(index, sequence, layout)
    lengths = [layout.segment_length(len(sequence)) for sequence in sequences]
    rows = _assign_to_rows(lengths, layout.tokens_per_microbatch, num_ranks * layout.rows_multiple)
    return [rows[rank::num_ranks] for rank in range(num_ranks)]


def _assign_to_rows(lengths: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """Sequence indices by row, longest row first; a multiple of `multiple` rows."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    tight = _best_fit(order, lengths, capacity)
    num_rows = _round_up(max(len(tight), 1), multiple)
    # Equal loads keep data-parallel ranks in step; they fit unless the rows are nearly full.
    rows = _spread_evenly(order, lengths, num_rows)
    if max(sum(lengths[i] for i in row) for row in rows) > capacity:
        rows = tight + [[] for _ in range(num_rows - len(tight))]
    return sorted(rows, key=lambda row: -sum(lengths[i] for i in row))


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each sequence into the fullest row that still holds it, or a new row."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), ascending
    for index in order:
        place = bisect_left(free, (lengths[index], -1))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (room - lengths[index], row))
    return rows


def _spread_evenly(order: Sequence[int], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Each sequence into the emptiest of num_rows rows."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for index in order:
        load, row = loads[0]
        heapreplace(loads, (load + lengths[index], row))
        rows[row].append(index)
    return rows


def lay_out(
    sequences: Sequence[TrainingSequence] | Mapping[int, TrainingSequence], indices: Sequence[int], layout: RowLayout
) -> PackedMicrobatch:
    """The row of the sequences with these indices."""
    segments = [layout.segment_length(len(sequences[i])) for i in indices]
    used = sum(segments)
    size = layout.tokens_per_microbatch if layout.full_rows else max(_round_up(used, layout.multiple), layout.multiple)
    edges = np.cumsum([0, *segments, *([size - used] if size > used else [])])
    token_ids = np.full((1, size), layout.pad_id, dtype=np.int64)
    labels = np.full((1, size), layout.pad_id, dtype=np.int64)
    loss_mask = np.zeros((1, size), dtype=bool)
    floats = {name: np.zeros((1, size), dtype=np.float32) for name in _FLOATS}
    position_ids = np.concatenate([np.arange(end - start) for start, end in pairwise(edges)])
    for start, index in zip(edges, indices):
        sequence = sequences[index]
        token_ids[0, start : start + len(sequence)] = sequence.token_ids
        here = slice(start, start + len(sequence) - 1)
        labels[0, here] = sequence.token_ids[1:]
        trained = np.asarray(sequence.loss_mask[1:], dtype=bool)
        loss_mask[0, here] = trained
        floats["advantages"][0, here] = np.where(trained, sequence.advantage, 0.0)
        for name in _FLOATS[1:]:
            array = getattr(sequence, name)
            if array is not None:
                floats[name][0, here] = np.where(trained, array[1:], 0.0)
    return PackedMicrobatch(
        routes=_routes(sequences, indices, edges, size),
        token_ids=token_ids,
        labels=labels,
        position_ids=position_ids[None].astype(np.int64),
        cu_seqlens=edges.astype(np.int32),
        loss_mask=loss_mask,
        sequence_indices=tuple(indices),
        **floats,
    )


def _routes(
    sequences: Sequence[TrainingSequence] | Mapping[int, TrainingSequence],
    indices: Sequence[int],
    edges: np.ndarray,
    size: int,
) -> np.ndarray | None:
    """i16[S, sparse layers, K]: those of the sequences at their tokens' positions, -1 elsewhere."""
    known = [routes for index in indices if (routes := sequences[index].routes) is not None]
    if not known:
        return None
    found = np.full((size, *known[0].shape[1:]), -1, dtype=np.int16)
    for start, index in zip(edges, indices):
        routes = sequences[index].routes
        if routes is not None:
            found[start : start + len(routes)] = routes
    return found


_LOGPROBS = ("behaviour_logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs")
_FLOATS = ("advantages", "token_weight", *_LOGPROBS)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
