"""What ranks hold and workers want, from two layouts alone: for tests of plans, without ranks and servers.

A run asks its ranks what they hold and vLLM what its workers want; here both are derived from the layouts, the servers'
in the trainer's terms (vLLM splits attention heads, experts, matrices and vocabulary as Megatron does).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.stages import pipeline_chunks
from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.resharding.layers import group_of_tensor
from megatron_r1.resharding.plan import Shard, Tensor, Want
from megatron_r1.weights.regions import regions
from megatron_r1.weights.table import Entry, build_table

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def sent_entries(shape: ModelShape) -> list[Entry]:
    """What servers are given: all but MTP layers."""
    return build_table(dataclasses.replace(shape, num_mtp_layers=0))


def wire_tensors(entries: Sequence[Entry], itemsize: int = 2) -> list[Tensor]:
    """The Hugging Face tensors of `entries`, in their order, each number in `itemsize` bytes (fp32 where it stays
    so)."""
    found = []
    for entry in entries:
        for name, full in zip(entry.hf, entry.hf_shapes, strict=True):
            box = whole(full)
            size = 4 if entry.float32 else itemsize
            found.append(Tensor(name, box.rows, box.columns, size, group_of_tensor(name)))
    return found


def trainer_shards(shape: ModelShape, parallel: ParallelConfig) -> list[Shard]:
    """What lies on the trainer's ranks, in Megatron's order of them: tensor, context, data, pipeline parallel; for
    experts tensor, expert, data."""
    entries, stage_of = sent_entries(shape), _stages(shape, parallel)
    stage_size = parallel.world_size // parallel.pipeline_parallel
    shards, number = [], 0
    for entry in entries:
        first = stage_of(entry) * stage_size
        for index, count, ranks in _held(entry, shape, parallel, range(first, first + stage_size)):
            for region in regions(entry, shape, index, count):
                shards.append(Shard(number + region.part, region.box, ranks))
        number += len(entry.hf)
    return sorted(shards, key=lambda shard: shard.tensor)


def server_wants(
    shape: ModelShape, *, tensor: int, expert_parallel: bool = False, pipeline: int = 1
) -> list[list[Want]]:
    """What each worker of a server takes, in vLLM's order of them: tensor, then pipeline parallel."""
    layout = ParallelConfig(pipeline_parallel=pipeline, world_size=pipeline)
    stage_of = _stages(dataclasses.replace(shape, num_mtp_layers=0), layout)
    wants: list[list[Want]] = [[] for _ in range(tensor * pipeline)]
    number = 0
    for entry in sent_entries(shape):
        for rank in range(tensor):
            for part, box in _wanted(entry, shape, rank, tensor, expert_parallel):
                wants[stage_of(entry) * tensor + rank].append(Want(number + part, box))
        number += len(entry.hf)
    return wants


def _stages(shape: ModelShape, parallel: ParallelConfig):
    """A function from entries to pipeline ranks."""
    chunks = pipeline_chunks(shape, parallel)
    of_layer = {layer: rank for rank, own in enumerate(chunks) for chunk in own for layer in chunk.layers}

    def stage_of(entry: Entry) -> int:
        if match := _LAYER.match(entry.name):
            return of_layer[int(match[1])]
        return 0 if entry.name.startswith("embedding") else parallel.pipeline_parallel - 1

    return stage_of


def _held(
    entry: Entry, shape: ModelShape, parallel: ParallelConfig, ranks: range
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(shard index, number of shards, the ranks that hold it) among a stage's `ranks`."""
    if entry.expert:
        assert shape.moe is not None
        match = _EXPERT.search(entry.name)
        assert match is not None
        count = parallel.expert_tensor
        home = int(match[1]) * parallel.expert // shape.moe.num_experts
        ranks = ranks[home * count :: 1]
        step = parallel.expert_tensor * parallel.expert
    elif entry.partition is None:
        yield 0, 1, tuple(ranks)
        return
    else:
        count = step = parallel.tensor
    for index in range(count):
        yield index, count, tuple(ranks[index::step])


def _wanted(
    entry: Entry, shape: ModelShape, rank: int, tensor: int, expert_parallel: bool
) -> Iterator[tuple[int, Box]]:
    """(number of the Hugging Face tensor, box) of what a tensor-parallel worker takes of an entry."""
    match = _EXPERT.search(entry.name) if entry.expert and expert_parallel else None
    if match is not None:
        assert shape.moe is not None
        if int(match[1]) * tensor // shape.moe.num_experts == rank:
            yield from ((part, whole(full)) for part, full in enumerate(entry.hf_shapes))
    elif entry.kind == "qkv" and tensor > shape.num_kv_heads:
        for part, full in enumerate(entry.hf_shapes):  # several workers have the same key and value
            box = whole(full)
            count = tensor if part == 0 else shape.num_kv_heads
            index, height = rank * count // tensor, box.rows // count
            yield part, Box(index * height, (index + 1) * height, 0, box.columns)
    else:
        for region in regions(entry, shape, rank, tensor):
            yield region.part, region.box
