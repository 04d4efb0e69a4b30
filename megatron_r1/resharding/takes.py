"""What servers take at a time: a layer each, and which ranks hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.parts import (
    BOTTOM,
    HOLDERS,
    ITEMSIZE,
    LEFT,
    RIGHT,
    TENSOR,
    TOP,
    WANT,
    WORKER,
    Numbers,
    Parts,
    ranges,
)
from megatron_r1.resharding.rounds import alike, layer_order


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight on the wire. `layer`: what a server completes together (a decoder layer, or a module beside them)."""

    name: str
    rows: int
    columns: int
    itemsize: int
    layer: str


class Shard(NamedTuple):
    """`box` of tensor number `tensor`, which each of the trainer's `ranks` holds."""

    tensor: int
    box: Box
    ranks: tuple[int, ...]


class Want(NamedTuple):
    """`box` of tensor number `tensor`, which goes into one place of one of a worker's parameters."""

    tensor: int
    box: Box


Wants = Sequence[Want] | Numbers
"""A worker's wants; as numbers int64[wants, 5]: tensor, top, bottom, left, right."""


def numbers_of(wants: Wants) -> Numbers:
    if isinstance(wants, np.ndarray):
        return wants
    return np.array([(tensor, *box) for tensor, box in wants], np.int64).reshape(-1, 5)


def takes(
    tensors: Sequence[Tensor],
    shards: Sequence[Shard],
    holders: Mapping[tuple[int, ...], int],
    servers: Sequence[Sequence[Wants]],
) -> Iterator[Parts]:
    """The parts that servers take at a time, in the order in which they do, each as its ranks hold it (`holders`: the
    number of each set of ranks); senders are not chosen yet. EngineError, naming the tensor, if nobody holds what a
    worker wants."""
    names = list(dict.fromkeys(tensor.layer for tensor in tensors))
    numbers = {name: number for number, name in enumerate(names)}
    layer_of = np.array([numbers[tensor.layer] for tensor in tensors], np.int64)
    itemsizes = np.array([tensor.itemsize for tensor in tensors], np.int64)
    held = np.array([(tensor, *box, holders[ranks]) for tensor, box, ranks in shards], np.int64).reshape(-1, 6)
    held = held[np.argsort(held[:, 0], kind="stable")]
    ranks_of: list[set[int]] = [set() for _ in names]
    for tensor, _, ranks in shards:
        ranks_of[layer_of[tensor]].update(ranks)
    layers = {number: frozenset(ranks) for number, ranks in enumerate(ranks_of)}
    wanted = _by_layer(layer_of, servers)
    orders = [layer_order(layers, number, len(servers), len(workers)) for number, workers in enumerate(servers)]
    for now in zip_longest(*orders):
        for several, taking in alike(now).items():
            wants = np.concatenate([wanted[server].of(layer) for server in taking for layer in several])
            parts = _meet(tensors, itemsizes, held, wants)
            if len(parts):
                yield parts


class _Wanted:
    """A server's wants: int64[wants, 7]: worker, number of the want, and the want; by layer, worker and number."""

    def __init__(self, layer_of: Numbers, workers: Sequence[Numbers], first: int) -> None:
        self._first = first
        table = np.concatenate(
            [
                np.column_stack([np.full(len(own), worker), np.arange(len(own)), own])
                for worker, own in enumerate(workers)
            ]
        )
        layers = layer_of[table[:, 2]]
        order = np.argsort(layers, kind="stable")
        self._table = table[order].astype(np.int32)
        self._starts = np.searchsorted(layers[order], np.arange(layer_of.max(initial=0) + 2))

    def of(self, layer: int) -> Numbers:
        """Those of a layer; workers are numbered over all servers."""
        own = self._table[self._starts[layer] : self._starts[layer + 1]].astype(np.int64)
        own[:, 0] += self._first
        return own


def _by_layer(layer_of: Numbers, servers: Sequence[Sequence[Wants]]) -> list[_Wanted]:
    found: list[_Wanted] = []
    first = 0
    for workers in servers:
        found.append(_Wanted(layer_of, [numbers_of(wants) for wants in workers], first))
        first += len(workers)
    return found


def _meet(tensors: Sequence[Tensor], itemsizes: Numbers, held: Numbers, wants: Numbers) -> Parts:
    """What each want has in common with each shard of its tensor."""
    first, end = (np.searchsorted(held[:, 0], wants[:, 2], side=side) for side in ("left", "right"))
    count = end - first
    which = np.repeat(np.arange(len(wants)), count)
    shard, want = held[ranges(first, count)], wants[which]
    table = np.zeros((10, len(want)), np.int64)
    table[WORKER], table[WANT], table[TENSOR] = want[:, 0], want[:, 1], want[:, 2]
    table[TOP], table[BOTTOM] = np.maximum(shard[:, 1], want[:, 3]), np.minimum(shard[:, 2], want[:, 4])
    table[LEFT], table[RIGHT] = np.maximum(shard[:, 3], want[:, 5]), np.minimum(shard[:, 4], want[:, 6])
    table[ITEMSIZE], table[HOLDERS] = itemsizes[want[:, 2]], shard[:, 5]
    common = (table[TOP] < table[BOTTOM]) & (table[LEFT] < table[RIGHT])
    parts, which = Parts(table[:, common]), which[common]
    sizes = (wants[:, 4] - wants[:, 3]) * (wants[:, 6] - wants[:, 5])
    found = np.bincount(which, parts.num_bytes // parts.table[ITEMSIZE], len(wants)).astype(np.int64)
    missing = sizes - found
    if missing.any():
        worst = int(np.flatnonzero(missing)[0])
        raise EngineError(
            f"weight sync: a server's worker wants {sizes[worst]} numbers of {tensors[wants[worst, 2]].name}, of which "
            f"the trainer's ranks hold {sizes[worst] - missing[worst]}"
        )
    return parts
