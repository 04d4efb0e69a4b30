"""What ranks hold and workers want of the weights in a sync, from two layouts alone.

A run asks its ranks what they hold and vLLM what its workers want; the planner derives both from the layouts, the
servers' in the trainer's terms (vLLM splits attention heads, experts and matrices as Megatron does). In FP8
what DeepSeek's format quantises is one byte a number, and each tensor is followed by its scales, 4 bytes for a block of
128 x 128 (engines/quantised.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.decoding import FP8_BLOCK
from megatron_r1.planning.stages import pipeline_chunks
from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.resharding.layers import group_of_tensor
from megatron_r1.resharding.plan import Shard, Tensor, Want
from megatron_r1.weights.regions import regions
from megatron_r1.weights.table import Entry, build_table

VOCABULARY_UNIT = 64
"""vLLM fills a vocabulary up to a multiple of this before it splits it."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def sent_entries(shape: ModelShape) -> list[Entry]:
    """What servers are given: all but MTP layers."""
    return build_table(dataclasses.replace(shape, num_mtp_layers=0))


def wire_tensors(entries: Sequence[Entry], weight_bytes: int = 2) -> list[Tensor]:
    """The tensors on the wire, in their order: `weight_bytes` a number, 1 for FP8, 4 where it stays fp32."""
    found = []
    for entry in entries:
        suffixes = ("", "_scale_inv")[: tensors_of_part(entry, weight_bytes)]
        names = [name + suffix for name in entry.hf for suffix in suffixes]
        for name, (box, itemsize) in zip(names, wire_boxes(entry, weight_bytes), strict=True):
            found.append(Tensor(name, box.rows, box.columns, itemsize, group_of_tensor(name)))
    return found


def tensors_of_part(entry: Entry, weight_bytes: int) -> int:
    """A Hugging Face tensor is two on the wire where it has scales."""
    return 2 if weight_bytes == 1 and entry.fp8 else 1


def wire_boxes(entry: Entry, weight_bytes: int) -> list[tuple[Box, int]]:
    """(box, bytes a number) of each tensor of an entry on the wire."""
    size = 4 if entry.float32 else max(weight_bytes, 2)
    if tensors_of_part(entry, weight_bytes) == 1:
        return [(whole(full), size) for full in entry.hf_shapes]
    return [each for full in entry.hf_shapes for each in ((whole(full), 1), (blocks_of(whole(full)), 4))]


def blocks_of(box: Box) -> Box:
    """The blocks that a box lies in."""
    return Box(box.top // FP8_BLOCK, -(-box.bottom // FP8_BLOCK), box.left // FP8_BLOCK, -(-box.right // FP8_BLOCK))


class Held(NamedTuple):
    """`box` of an entry's wire tensor number `tensor`, which lies in each of these shards."""

    tensor: int
    box: Box
    shards: tuple[int, ...]


def held_boxes(entry: Entry, shape: ModelShape, count: int, weight_bytes: int) -> list[Held]:
    """What lies in each of an entry's `count` shards. Scales lie where their blocks do; those of a tensor that is cut
    inside a block lie in all shards."""
    each = tensors_of_part(entry, weight_bytes)
    found = [
        Held(region.part * each, region.box, (index,))
        for index in range(count)
        for region in regions(entry, shape, index, count)
    ]
    if each == 1:
        return found
    scales: list[Held] = []
    for part, full in enumerate(entry.hf_shapes):
        own = [held for held in found if held.tensor == part * each]
        if any(cut_inside_a_block(held.box, whole(full)) for held in own):
            scales.append(Held(part * each + 1, blocks_of(whole(full)), tuple(range(count))))
        else:
            scales += [Held(held.tensor + 1, blocks_of(held.box), held.shards) for held in own]
    return found + scales


def cut_inside_a_block(box: Box, full: Box) -> bool:
    return any(edge % FP8_BLOCK and edge != end for edge, end in zip(box, full, strict=True))


def wanted_boxes(
    entry: Entry, shape: ModelShape, rank: int, tensor: int, *, whole_expert: bool, weight_bytes: int
) -> Iterator[tuple[int, Box]]:
    """(number of the wire tensor, box) of what a tensor-parallel worker takes of an entry; all of it if it is a
    `whole_expert` of this worker."""
    each = tensors_of_part(entry, weight_bytes)
    for part, box in _wanted(entry, shape, rank, tensor, whole_expert):
        yield part * each, box
        if each == 2:
            yield part * each + 1, blocks_of(box)


def _wanted(entry: Entry, shape: ModelShape, rank: int, tensor: int, whole_expert: bool) -> Iterator[tuple[int, Box]]:
    if whole_expert:
        yield from ((part, whole(full)) for part, full in enumerate(entry.hf_shapes))
    elif entry.kind == "vocabulary":
        box = whole(entry.hf_shapes[0])
        height = -(-box.rows // VOCABULARY_UNIT) * VOCABULARY_UNIT // tensor
        if (common := box.meet(Box(rank * height, (rank + 1) * height, 0, box.columns))) is not None:
            yield 0, common
    elif entry.kind == "qkv" and tensor > shape.num_kv_heads:
        for part, full in enumerate(entry.hf_shapes):  # several workers have the same key and value
            box = whole(full)
            count = tensor if part == 0 else shape.num_kv_heads
            index, height = rank * count // tensor, box.rows // count
            yield part, Box(index * height, (index + 1) * height, 0, box.columns)
    else:
        for region in regions(entry, shape, rank, tensor):
            yield region.part, region.box


def number_of_expert(entry: Entry) -> int:
    """Of an entry of a routed expert."""
    match = _EXPERT.search(entry.name)
    assert match is not None
    return int(match[1])


def home(expert: int, shape: ModelShape, ranks: int) -> int:
    """Which of `ranks` expert-parallel ranks has an expert."""
    assert shape.moe is not None
    return expert * ranks // shape.moe.num_experts


def shards_of(entry: Entry, parallel: ParallelConfig) -> int:
    """In how many shards the trainer has an entry."""
    return parallel.expert_tensor if entry.expert else 1 if entry.partition is None else parallel.tensor


def ranks_of_shard(
    entry: Entry, shape: ModelShape, parallel: ParallelConfig, index: int, ranks: range, expert: int = 0
) -> tuple[int, ...]:
    """Those of a stage's `ranks` that have shard `index`, in Megatron's order of them: tensor, context, data parallel;
    of an expert tensor, expert, data."""
    if entry.expert:
        first = home(expert, shape, parallel.expert) * parallel.expert_tensor
        return tuple(ranks[first + index :: parallel.expert_tensor * parallel.expert])
    return tuple(ranks) if entry.partition is None else tuple(ranks[index :: parallel.tensor])


def stage_ranks(stage: int, parallel: ParallelConfig) -> range:
    size = parallel.world_size // parallel.pipeline_parallel
    return range(stage * size, (stage + 1) * size)


def trainer_shards(shape: ModelShape, parallel: ParallelConfig, weight_bytes: int = 2) -> list[Shard]:
    """What lies on the trainer's ranks, by tensor."""
    stage_of = _stages(shape, parallel)
    shards, number = [], 0
    for entry in sent_entries(shape):
        ranks = stage_ranks(stage_of(entry), parallel)
        expert = number_of_expert(entry) if entry.expert else 0
        count = shards_of(entry, parallel)
        on = [ranks_of_shard(entry, shape, parallel, index, ranks, expert) for index in range(count)]
        for held in held_boxes(entry, shape, count, weight_bytes):
            holders = {rank for index in held.shards for rank in on[index]}
            shards.append(Shard(number + held.tensor, held.box, tuple(sorted(holders))))
        number += len(entry.hf) * tensors_of_part(entry, weight_bytes)
    return sorted(shards, key=lambda shard: shard.tensor)


def server_wants(
    shape: ModelShape, *, tensor: int, expert_parallel: bool = False, pipeline: int = 1, weight_bytes: int = 2
) -> list[list[Want]]:
    """What each worker of a server takes, in vLLM's order of them: tensor, then pipeline parallel."""
    layout = ParallelConfig(pipeline_parallel=pipeline, world_size=pipeline)
    stage_of = _stages(dataclasses.replace(shape, num_mtp_layers=0), layout)
    wants: list[list[Want]] = [[] for _ in range(tensor * pipeline)]
    number = 0
    for entry in sent_entries(shape):
        moved = entry.expert and expert_parallel
        own = [home(number_of_expert(entry), shape, tensor)] if moved else range(tensor)
        for rank in own:
            boxes = wanted_boxes(entry, shape, rank, tensor, whole_expert=moved, weight_bytes=weight_bytes)
            wants[stage_of(entry) * tensor + rank] += [
                Want(number + tensor_number, box) for tensor_number, box in boxes
            ]
        number += len(entry.hf) * tensors_of_part(entry, weight_bytes)
    return wants


def _stages(shape: ModelShape, parallel: ParallelConfig) -> Callable[[Entry], int]:
    """A function from entries to pipeline ranks."""
    chunks = pipeline_chunks(shape, parallel)
    of_layer = {layer: rank for rank, own in enumerate(chunks) for chunk in own for layer in chunk.layers}

    def stage_of(entry: Entry) -> int:
        if match := _LAYER.match(entry.name):
            return of_layer[int(match[1])]
        return 0 if entry.name.startswith("embedding") else parallel.pipeline_parallel - 1

    return stage_of
