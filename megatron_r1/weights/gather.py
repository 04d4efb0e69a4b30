"""Whole tensors on the trainer's rank 0, a few at a time, by the plan that brings shards to vLLM's workers.

For readers that need a tensor whole: an engine of the user's own, and tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_r1.agreement import trainers
from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.resharding.plan import Piece, Shard, Want, make_plan
from megatron_r1.weights.wire import ParamSpec, exchange, num_bytes, wire_tensors


class Readable(Protocol):
    """Weights that each rank can read its own shards of (engines/source.py's ShardedSource)."""

    def metadata(self) -> Sequence[ParamSpec]: ...
    @property
    def shards(self) -> Sequence[Shard]: ...
    @property
    def device(self) -> torch.device: ...
    def reading(self) -> AbstractContextManager[object]: ...
    def read(self, tensor: int, box: Box) -> torch.Tensor: ...


def gathered(source: Readable, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the order of metadata() on rank 0, nothing on the others; a collective. Tensors of at most
    `bucket_bytes` together are gathered at once (one larger tensor alone). They may share the parameters' memory."""
    specs = list(source.metadata())
    shards: list[list[Shard]] = [[] for _ in specs]
    for shard in source.shards:
        shards[shard.tensor].append(shard)
    for batch in _batches(specs, bucket_bytes):
        found = _gather(
            source, batch.start, specs[batch], [own for each in shards[batch] for own in each], bucket_bytes
        )
        yield from ((specs[batch.start + number][0], tensor) for number, tensor in sorted(found.items()))


def _batches(specs: Sequence[ParamSpec], bucket_bytes: int) -> Iterator[slice]:
    first = size = 0
    for number, spec in enumerate(specs):
        if number > first and size + num_bytes(spec) > bucket_bytes:
            yield slice(first, number)
            first, size = number, 0
        size += num_bytes(spec)
    if specs:
        yield slice(first, len(specs))


def _gather(
    source: Readable, first: int, specs: Sequence[ParamSpec], shards: Sequence[Shard], bucket_bytes: int
) -> dict[int, torch.Tensor]:
    """Tensors by number in `specs`, which is the source's from number `first` on."""
    rank = dist.get_rank() if trainers() > 1 else 0
    found: dict[int, torch.Tensor] = {}

    def fill(piece: Piece, place: torch.Tensor) -> None:
        place.copy_(source.read(first + piece.tensor, piece.box))

    def take(piece: Piece, values: torch.Tensor) -> None:
        put(piece.tensor, piece.box, values)

    def put(tensor: int, box: Box, values: torch.Tensor) -> None:
        _, dtype, shape = specs[tensor]
        full = whole(shape)
        if box == full and tensor not in found:
            found[tensor] = values.to(dtype).reshape(shape)
            return
        if tensor not in found:
            found[tensor] = torch.empty(shape, dtype=dtype, device=source.device)
        rows = found[tensor].view(full.rows, full.columns)
        rows[box.top : box.bottom, box.left : box.right] = values

    own = [shard._replace(tensor=shard.tensor - first) for shard in shards]
    wants = [Want(shard.tensor, shard.box) for shard in own if 0 not in shard.ranks]

    def put_own() -> None:
        for tensor, box, ranks in own:
            if rank == 0 and 0 in ranks:
                put(tensor, box, source.read(first + tensor, box))

    with source.reading():
        tensors = wire_tensors(specs)
        plan = make_plan(tensors, own, [[wants]], bucket_bytes)
        exchange(plan, specs, tensors, source.device, fill, take, put_own)
    return found
