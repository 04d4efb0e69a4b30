"""Which boxes of the Hugging Face tensors lie in a tensor-parallel shard of a Megatron parameter, and where there.

No torch: the planner asks too. Row orders are placement.py's; transforms.py makes shards in memory, and a test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_r1.config.shape import ModelShape
from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.weights.placement import place
from megatron_r1.weights.table import Entry


@dataclass(frozen=True, slots=True)
class Region:
    """`box` of the tensor `entry.hf[part]`, whose first number is at (row, column) of the shard."""

    part: int
    box: Box
    row: int
    column: int = 0


def regions(entry: Entry, shape: ModelShape, index: int, count: int) -> Iterator[Region]:
    """Those of shard `index` of `count` (a replicated entry is whole in each): disjoint, and all of the shard but the
    rows that fill up a vocabulary. Sizes divide as shard() demands."""
    boxes = [whole(full) for full in entry.hf_shapes]
    if entry.partition is None or count == 1:
        yield from _rows(entry, shape, boxes, 0, sum(box.rows for box in boxes))
    elif entry.partition == 1:
        (box,) = boxes
        width = box.columns // count
        yield Region(0, Box(0, box.rows, index * width, (index + 1) * width), 0)
    elif entry.kind == "gated":
        row = 0
        for part, box in enumerate(boxes):
            height = box.rows // count
            yield Region(part, Box(index * height, (index + 1) * height, 0, box.columns), row)
            row += height
    else:
        height = -(-sum(box.rows for box in boxes) // count)  # rounded up: a vocabulary is filled up
        yield from _rows(entry, shape, boxes, index * height, (index + 1) * height)


def _rows(entry: Entry, shape: ModelShape, boxes: list[Box], start: int, stop: int) -> Iterator[Region]:
    """What lies in rows [start, stop) of the whole Megatron parameter."""
    for segment in place(entry, shape).segments:
        first, last = max(segment.row, start), min(segment.row + segment.rows, stop)
        if first < last:
            top = segment.hf_row + first - segment.row
            box = Box(top, top + last - first, 0, boxes[segment.part].columns)
            yield Region(segment.part, box, first - start)
