"""Where a Hugging Face tensor's rows lie in Megatron's tensors. The row order is said here once, for whole tensors.

transforms.py does the same for one tensor-parallel shard in memory; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.shape import ModelShape
from megatron_r1.weights.table import Entry, checkpoint_key


@dataclass(frozen=True, slots=True)
class Segment:
    """`rows` rows of `entry.hf[part]` from `hf_row` on, found in Megatron's tensor from `row` on."""

    part: int
    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Placement:
    """An entry inside a torch_dist checkpoint: `key`'s slice at `leading` (None: the whole), in segments by `row`.

    `shape` is that of the slice, `global_shape` that of the key (one dimension more where `leading` is an expert).
    `unit` is the number of rows that belong together: pieces of a tensor are cut at its multiples.
    """

    entry: Entry
    key: str
    leading: int | None
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    unit: int


def place(entry: Entry, shape: ModelShape) -> Placement:
    key, expert = checkpoint_key(entry, shape)
    own = (sum(full[0] for full in entry.hf_shapes), *entry.hf_shapes[0][1:])
    experts = () if expert is None or shape.moe is None else (shape.moe.num_experts,)
    segments, unit = _query_groups(shape) if entry.kind == "qkv" else (_stacked(entry), 1)
    return Placement(entry, key, expert, own, (*experts, *own), tuple(segments), unit)


def _stacked(entry: Entry) -> list[Segment]:
    segments, row = [], 0
    for part, full in enumerate(entry.hf_shapes):
        segments.append(Segment(part, 0, row, full[0]))
        row += full[0]
    return segments


def _query_groups(shape: ModelShape) -> tuple[list[Segment], int]:
    """Megatron's order: for each query group its queries, its key, its value."""
    width = shape.head_dim
    queries = shape.num_heads // shape.num_kv_heads * width
    unit = queries + 2 * width
    segments = []
    for group in range(shape.num_kv_heads):
        row = group * unit
        segments.append(Segment(0, group * queries, row, queries))
        segments.append(Segment(1, group * width, row + queries, width))
        segments.append(Segment(2, group * width, row + queries + width, width))
    return segments, unit
