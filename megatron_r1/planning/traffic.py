"""How many bytes each trainer rank sends and each worker receives in a weight sync, without listing them.

A run's plan (resharding/plan.py) has a part for every tensor and worker: millions for a large model. Layers of a kind
hold the same in the same way, and so do the experts of a rank, so here one of each is looked at, and counted as often
as it comes. What a set of ranks holds together is spread as the plan spreads it, but a stage's layers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.holdings import (
    held_boxes,
    home,
    ranks_of_shard,
    shards_of,
    stage_ranks,
    wanted_boxes,
    wire_boxes,
)
from megatron_r1.planning.stages import Chunk, pipeline_chunks
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.parts import Numbers
from megatron_r1.resharding.senders import shares
from megatron_r1.weights.table import Entry, embedding_entry, head_entry, layer_entries

Lines = dict[tuple[int, ...], Numbers]
"""Ranks of a stage, by their place in it, that hold the same -> the bytes of it that each worker of a server wants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """`count` equal servers of `tensor` GPUs each."""

    count: int
    tensor: int
    expert_parallel: bool = False
    weight_bytes: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes `sent` by each of the trainer's ranks to all servers, int64[ranks], and `received` by each worker of one
    server, int64[workers]. `least_sent`: no choice of senders lets the busiest rank send less."""

    sent: Numbers
    received: Numbers
    least_sent: float


def lines_of_stage(
    shape: ModelShape,
    parallel: ParallelConfig,
    served: Served,
    chunks: Sequence[Chunk],
    of_layer: Mapping[bool, Lines],
) -> Lines:
    """What a pipeline stage of `chunks` has to send one server. `of_layer`: what a dense and a sparse layer has."""
    kinds = Counter(shape.is_moe_layer(layer) for chunk in chunks for layer in chunk.layers)
    found: Lines = {}
    for sparse, count in sorted(kinds.items()):
        for ranks, wanted in of_layer[sparse].items():
            found[ranks] = found.get(ranks, 0) + count * wanted
    ends = [embedding_entry(shape)] if any(chunk.embedding for chunk in chunks) else []
    if any(chunk.loss for chunk in chunks):
        ends.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((shape.hidden_size,),)))
        ends += [head] if (head := head_entry(shape)) is not None else []
    for entry in ends:
        _add(found, _lines(entry, shape, parallel, served), entry, shape, parallel)
    return found


def lines_of_layer(shape: ModelShape, parallel: ParallelConfig, served: Served, sparse: bool) -> Lines:
    """What one decoder layer has."""
    found: Lines = {}
    for entry in layer_entries(shape, "decoder.layers.0", "model.layers.0", sparse, experts=(0,)):
        lines = _lines(entry, shape, parallel, served)
        if entry.expert:
            _add_experts(found, lines, entry, shape, parallel, served)
        else:
            _add(found, lines, entry, shape, parallel)
    return found


def _lines(entry: Entry, shape: ModelShape, parallel: ParallelConfig, served: Served) -> Lines:
    """Shards of an entry that hold the same -> the bytes of it that each worker wants; of an expert that goes whole to
    one worker, as if the first had it."""
    moved = entry.expert and served.expert_parallel
    sizes = [itemsize for _, itemsize in wire_boxes(entry, served.weight_bytes)]
    wants: list[list[tuple[int, Box]]] = [[] for _ in range(served.tensor)]
    for rank in range(1 if moved else served.tensor):
        wants[rank] += wanted_boxes(
            entry, shape, rank, served.tensor, whole_expert=moved, weight_bytes=served.weight_bytes
        )
    found: Lines = {}
    for held in held_boxes(entry, shape, shards_of(entry, parallel), served.weight_bytes):
        line = found.setdefault(held.shards, np.zeros(served.tensor, np.int64))
        for worker, boxes in enumerate(wants):
            for tensor, box in boxes:
                if tensor == held.tensor and (common := held.box.meet(box)) is not None:
                    line[worker] += common.size * sizes[tensor]
    return found


def _add(
    found: Lines, lines: Lines, entry: Entry, shape: ModelShape, parallel: ParallelConfig, expert: int = 0
) -> None:
    """Shards become ranks."""
    stage = range(len(stage_ranks(0, parallel)))
    for shards, wanted in lines.items():
        holders = {rank for index in shards for rank in ranks_of_shard(entry, shape, parallel, index, stage, expert)}
        ranks = tuple(sorted(holders))
        found[ranks] = found.get(ranks, 0) + wanted


def _add_experts(
    found: Lines, lines: Lines, entry: Entry, shape: ModelShape, parallel: ParallelConfig, served: Served
) -> None:
    """All of a layer's experts: the ranks and the worker that have them differ, nothing else does."""
    assert shape.moe is not None
    ways = served.tensor if served.expert_parallel else 1
    experts = range(shape.moe.num_experts)
    homes = [(home(expert, shape, parallel.expert), home(expert, shape, ways)) for expert in experts]
    for (own, worker), count in Counter(homes).items():
        expert = -(-own * len(experts) // parallel.expert)  # the first that has its home there
        several = {shards: count * np.roll(wanted, worker) for shards, wanted in lines.items()}
        _add(found, several, entry, shape, parallel, expert)


def loads_of(lines: Lines, ranks: int) -> Numbers:
    """What each of a stage's `ranks` sends: where few can send they are asked first."""
    loads = np.zeros(ranks, np.int64)
    for holders in sorted(lines, key=lambda holders: (len(holders), holders)):
        own = np.array(holders)
        loads[own] += shares(loads[own], int(lines[holders].sum()))
    return loads


def least_load(lines: Lines, ranks: int) -> float:
    """A bound from below on the busiest rank's bytes, whoever sends what: of a set of ranks, all that only they hold,
    over their number. The sets are those of the lines, and all ranks."""
    if not lines:
        return 0.0
    holds = np.zeros((len(lines) + 1, ranks), bool)
    for row, holders in enumerate(lines):
        holds[row, list(holders)] = True
    holds[-1] = True
    demand = np.array([int(wanted.sum()) for wanted in lines.values()], float)
    outside = holds[:-1].astype(float) @ (~holds.T).astype(float)  # [line, set]: its ranks beside the set
    return float((demand @ (outside == 0) / holds.sum(1)).max())


def traffic(shape: ModelShape, parallel: ParallelConfig, served: Served) -> Traffic:
    """Of one sync. ConfigError if the trainer's layout does not hold the model."""
    kinds = {bool(shape.is_moe_layer(layer)) for layer in range(shape.num_layers)}
    of_layer = {sparse: lines_of_layer(shape, parallel, served, sparse) for sparse in kinds}
    size = len(stage_ranks(0, parallel))
    done: dict[object, tuple[Numbers, Numbers]] = {}
    least, stages = 0.0, []
    for chunks in pipeline_chunks(shape, parallel):
        kind = _kind(shape, chunks)
        if kind not in done:
            lines = lines_of_stage(shape, parallel, served, chunks, of_layer)
            everywhere = {ranks: served.count * wanted for ranks, wanted in lines.items()}
            done[kind] = loads_of(everywhere, size), np.sum(list(lines.values()), axis=0)
            least = max(least, least_load(everywhere, size))
        stages.append(done[kind])
    return Traffic(
        sent=np.concatenate([sent for sent, _ in stages]),
        received=np.sum([received for _, received in stages], axis=0),
        least_sent=least,
    )


def _kind(shape: ModelShape, chunks: list[Chunk]) -> tuple[int, int, bool, bool]:
    layers = [layer for chunk in chunks for layer in chunk.layers]
    sparse = sum(map(shape.is_moe_layer, layers))
    return len(layers), sparse, any(chunk.embedding for chunk in chunks), any(chunk.loss for chunk in chunks)
