"""A weight source whose matrices are sent in DeepSeek's FP8 form: e4m3 numbers and a scale for each square block.

Servers that were started from an FP8 folder take weights in that form; quantising before the transfer halves its bytes
and leaves nothing to do at the other end. Which weights have scales is read from that folder, so that sender and
server agree. Each rank quantises what it holds; where a block lies on several ranks, its largest magnitude is found
together first, so the numbers are those of the whole weight, to the bit. Works on the device where the tensors are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_r1.agreement import together, trainers
from megatron_r1.engines.source import ShardedSource
from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, block_amax, block_scales, quantise, scale_shape
from megatron_r1.weights.wire import ParamSpec


class QuantisedSource:
    """`source` with every weight whose scales are among `served` (the names of the servers' folder) quantised in
    blocks of `block` x `block`; its scales follow it, powers of two where that folder says so."""

    def __init__(
        self, source: ShardedSource, served: Collection[str], *, block: int, power_of_two: bool = False
    ) -> None:
        self._source, self._block, self._power_of_two = source, block, power_of_two
        self._specs = list(source.metadata())
        self._scaled = {name for name, _, _ in self._specs if name + SCALE_SUFFIX in served}
        self._scales: dict[int, torch.Tensor] = {}
        """While `reading`: the scales of tensors (by the source's number) that this rank holds a part of."""

    def metadata(self) -> Sequence[ParamSpec]:
        """As WeightSource; codes are e4m3, scales f32."""
        specs: list[ParamSpec] = []
        for name, dtype, shape in self._specs:
            if name in self._scaled:
                rows, columns = shape
                specs.append((name, FP8, shape))
                specs.append((name + SCALE_SUFFIX, torch.float32, scale_shape(rows, columns, self._block)))
            else:
                specs.append((name, dtype, shape))
        return specs

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._source:
            if name in self._scaled:
                codes, scales = quantise(tensor, block=self._block, power_of_two=self._power_of_two)
                yield name, codes
                yield name + SCALE_SUFFIX, scales
            else:
                yield name, tensor

    # ---- shard to shard

    @cached_property
    def _rows(self) -> list[tuple[int, bool]]:
        """By number in metadata(): the source's number of the tensor, and whether it is its scales that are meant."""
        rows = []
        for number, (name, _, _) in enumerate(self._specs):
            rows += [(number, False), (number, True)] if name in self._scaled else [(number, False)]
        return rows

    @property
    def shards(self) -> Sequence[Shard]:
        return self._shards

    @cached_property
    def _shards(self) -> list[Shard]:
        """Scales lie where their blocks do; those of a tensor with a block on several ranks on all that hold it."""
        numbers = {row: number for number, row in enumerate(self._rows)}
        found, holders = [], dict[int, set[int]]()
        for tensor, box, ranks in self._source.shards:
            found.append(Shard(numbers[tensor, False], box, ranks))
            if (tensor, True) in numbers and tensor not in self._straddled:
                found.append(Shard(numbers[tensor, True], blocks_of(box, self._block), ranks))
            elif (tensor, True) in numbers:
                holders.setdefault(tensor, set()).update(ranks)
        for tensor, ranks in holders.items():
            scales = whole(self.metadata()[numbers[tensor, True]][2])
            found.append(Shard(numbers[tensor, True], scales, tuple(sorted(ranks))))
        return sorted(found, key=lambda shard: shard.tensor)

    @cached_property
    def _straddled(self) -> list[int]:
        """Tensors of the source that are cut inside a block."""
        found = set()
        specs = self._specs
        for tensor, box, _ in self._source.shards:
            name, _, shape = specs[tensor]
            if name in self._scaled and box != whole(shape):
                inside = [(box.top, shape[0]), (box.bottom, shape[0]), (box.left, shape[1]), (box.right, shape[1])]
                if any(edge % self._block and edge != end for edge, end in inside):
                    found.add(tensor)
        return sorted(found)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Finds the scales of the present weights; a collective if a block lies on several ranks, which then fails on
        all if it fails on one."""
        with contextlib.ExitStack() as source:

            def look() -> dict[int, torch.Tensor]:
                source.enter_context(self._source.reading())
                return self._largest()

            amax = together(look) if self._straddled else look()
            if self._straddled:
                largest_of_all = torch.cat([amax[tensor].flatten() for tensor in self._straddled])
                if trainers() > 1:
                    dist.all_reduce(largest_of_all, dist.ReduceOp.MAX)
                parts = largest_of_all.split([amax[tensor].numel() for tensor in self._straddled])
                for tensor, part in zip(self._straddled, parts, strict=True):
                    amax[tensor] = part.view_as(amax[tensor])
            self._scales = {
                tensor: block_scales(largest, power_of_two=self._power_of_two) for tensor, largest in amax.items()
            }
            try:
                yield
            finally:
                self._scales = {}

    def _largest(self) -> dict[int, torch.Tensor]:
        """f32 [blocks, blocks] by tensor: the largest magnitudes of what this rank holds, 0 elsewhere. Of every tensor
        that is cut inside a block, of others only those that this rank has."""
        specs, rank = self._specs, dist.get_rank() if dist.is_initialized() else 0
        found = {tensor: self._zeros(specs[tensor][2]) for tensor in self._straddled}
        for tensor, box, ranks in self._source.shards:
            name, dtype, shape = specs[tensor]
            if name not in self._scaled or rank not in ranks:
                continue
            if tensor not in found:
                found[tensor] = self._zeros(shape)
            first = box.top - box.top % self._block
            for top in range(first, box.bottom, self._block):  # a row of blocks at a time
                strip = box._replace(top=max(box.top, top), bottom=min(box.bottom, top + self._block))
                values = self._source.read(tensor, strip).to(dtype).float()
                values = torch.nn.functional.pad(values, (box.left % self._block, 0))
                row, left = top // self._block, box.left // self._block
                largest = block_amax(values, self._block)[0]
                place = found[tensor][row, left : left + len(largest)]
                torch.maximum(place, largest.to(place.device), out=place)
        return found

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(scale_shape(shape[0], shape[1], self._block), device=self._source.device)

    @property
    def device(self) -> torch.device:
        return self._source.device

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        """As ShardedSource, while `reading`."""
        own, scales_meant = self._rows[tensor]
        name, dtype, _ = self._specs[own]
        if scales_meant:
            return self._scales[own][box.top : box.bottom, box.left : box.right]
        values = self._source.read(own, box)
        if name not in self._scaled:
            return values
        down, right = box.top % self._block, box.left % self._block
        blocks = blocks_of(box, self._block)
        divisor = self._scales[own][blocks.top : blocks.bottom, blocks.left : blocks.right]
        divisor = divisor.repeat_interleave(self._block, 0)[down : down + box.rows]
        divisor = divisor.repeat_interleave(self._block, 1)[:, right : right + box.columns]
        return values.to(dtype).float().div_(divisor).to(FP8)


def blocks_of(box: Box, block: int) -> Box:
    """The blocks of `block` x `block` that a box lies in."""
    return Box(box.top // block, -(-box.bottom // block), box.left // block, -(-box.right // block))
