"""Stream the whole model as (Hugging Face name, tensor) from shards that lie on many ranks.

Every rank of the trainer iterates together. Entries are taken in buckets of bounded size; each holder sends its unique
shards of a bucket to rank 0 in one message, rank 0 puts them together and yields. Other ranks yield nothing. Replicas
(data and context parallel, norms under tensor parallel) send nothing. Works for any TP/PP/VPP/EP/ETP layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_r1.config.shape import ModelShape
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.local import LocalTensor
from megatron_r1.weights.regions import Region, regions
from megatron_r1.weights.table import Entry, shard_shape
from megatron_r1.weights.transforms import unshard


@dataclass(frozen=True, slots=True)
class _Piece:
    """Shard `index` of `count` of an entry, held by global rank `rank`."""

    entry: Entry
    index: int
    count: int
    rank: int

    @property
    def numel(self) -> int:
        return math.prod(shard_shape(self.entry, self.count))


class WeightStream:
    """A re-iterable stream of the model's weights in Hugging Face form.

    Constructing it and each iteration are collectives over all trainer ranks. `dtype` is that of everything but the
    fp32 entries (router bias). `metadata()` lists (name, dtype, shape) in the order of iteration, on every rank.
    """

    def __init__(
        self,
        tensors: Mapping[str, LocalTensor],
        table: Sequence[Entry],
        shape: ModelShape,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        include_mtp: bool = False,
    ) -> None:
        self._tensors, self._shape, self._dtype = tensors, shape, dtype
        self._rank = dist.get_rank()
        self._entries = [entry for entry in table if include_mtp or not entry.name.startswith("mtp.")]
        self._include_aliases = include_mtp
        self.bucket_bytes = bucket_bytes
        self.has_mtp = any(entry.name.startswith("mtp.") for entry in self._entries)
        self._holders = self._gather()
        pieces = {
            name: [_Piece(entry, index, len(found), found[index][0]) for index in sorted(found)]
            for entry, (name, found) in zip(self._entries, self._holders.items(), strict=True)
        }
        self._buckets = _buckets(self._entries, pieces, bucket_bytes, dtype.itemsize)

    def _gather(self) -> dict[str, dict[int, list[int]]]:
        """Of each entry, which ranks hold which shard: lists in their order."""
        names = [entry.name for entry in self._entries]
        mine = [
            (number, local.index, local.count)
            for number, name in enumerate(names)
            if (local := self._tensors.get(name)) is not None
        ]
        everyone: list[list[tuple[int, int, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        found: dict[str, dict[int, list[int]]] = {name: {} for name in names}
        counts = dict.fromkeys(names, 1)
        for rank, held in enumerate(everyone):
            for number, index, count in held:
                found[names[number]].setdefault(index, []).append(rank)
                counts[names[number]] = count
        for name, indices in found.items():
            if len(indices) != counts[name]:
                raise ValueError(f"no rank holds all shards of {name}")
        return found

    def _rows(self) -> Iterator[tuple[str, Entry, int]]:
        """(Hugging Face name, entry, which of its tensors), in the order of iteration."""
        for entry in self._entries:
            yield from ((name, entry, part) for part, name in enumerate(entry.hf))
            if self._include_aliases:
                yield from ((alias, entry, 0) for alias in entry.aliases)

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [
            (name, torch.float32 if entry.float32 else self._dtype, entry.hf_shapes[part])
            for name, entry, part in self._rows()
        ]

    # ---- shard to shard (resharding/): tensors are numbered as in metadata()

    @property
    def shards(self) -> Sequence[Shard]:
        """What lies on which ranks; the same on all."""
        return self._shards

    @cached_property
    def _shards(self) -> list[Shard]:
        numbers: dict[tuple[str, int], list[int]] = {}
        for number, (_, entry, part) in enumerate(self._rows()):
            numbers.setdefault((entry.name, part), []).append(number)
        return [
            Shard(number, region.box, tuple(ranks))
            for entry in self._entries
            for index, ranks in self._holders[entry.name].items()
            for region in regions(entry, self._shape, index, len(self._holders[entry.name]))
            for number in numbers[entry.name, region.part]
        ]

    @cached_property
    def _held(self) -> list[list[tuple[Region, LocalTensor]]]:
        """By tensor, this rank's regions of it and the parameter where they lie."""
        found: dict[str, list[list[tuple[Region, LocalTensor]]]] = {}
        for entry in self._entries:
            found[entry.name] = [[] for _ in entry.hf]
            if (local := self._tensors.get(entry.name)) is not None:
                for region in regions(entry, self._shape, local.index, local.count):
                    found[entry.name][region.part].append((region, local))
        return [found[entry.name][part] for _, entry, part in self._rows()]

    def reading(self) -> AbstractContextManager[object]:
        """Nothing to prepare."""
        return nullcontext()

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        """This rank's present numbers of a box that lies in one of its shards: [rows, columns], a view of the
        parameter. KeyError if it holds no such."""
        for region, local in self._held[tensor]:
            if region.box.meet(box) == box:
                rows = local.tensor.detach()  # anew: where weights lie may change
                rows = rows.view(len(rows), -1)
                row, column = region.row + box.top - region.box.top, region.column + box.left - region.box.left
                return rows[row : row + box.rows, column : column + box.columns]
        raise KeyError(f"rank {self._rank} holds no shard with {box} of {self.metadata()[tensor][0]}")

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self._buckets:
            received = self._exchange(bucket)
            if self._rank != 0:
                continue
            for pieces in bucket:
                entry = pieces[0].entry
                tensors = unshard(entry, self._shape, [received[piece.entry.name, piece.index] for piece in pieces])
                yield from zip(entry.hf, tensors, strict=True)
                if self._include_aliases:
                    yield from ((alias, tensors[0]) for alias in entry.aliases)

    def _exchange(self, bucket: list[list[_Piece]]) -> dict[tuple[str, int], torch.Tensor]:
        """Send this rank's pieces of the bucket to rank 0; there, return all pieces. One message a rank and dtype."""
        own: dict[tuple[str, int], torch.Tensor] = {}
        remote: dict[tuple[int, torch.dtype], list[_Piece]] = {}
        for piece in (piece for pieces in bucket for piece in pieces):
            dtype = torch.float32 if piece.entry.float32 else self._dtype
            if piece.rank != 0:
                remote.setdefault((piece.rank, dtype), []).append(piece)
            elif self._rank == 0:
                own[piece.entry.name, piece.index] = self._local(piece, dtype)
        requests, buffers = [], []
        for (rank, dtype), pieces in sorted(remote.items(), key=lambda item: (item[0][0], str(item[0][1]))):
            if self._rank == rank:
                flat = torch.cat([self._local(piece, dtype).flatten() for piece in pieces])
                requests.append(dist.P2POp(dist.isend, flat, 0))
            elif self._rank == 0:
                flat = torch.empty(sum(piece.numel for piece in pieces), dtype=dtype, device=self.device)
                requests.append(dist.P2POp(dist.irecv, flat, rank))
                buffers.append((flat, pieces))
        if requests:
            for work in dist.batch_isend_irecv(requests):
                work.wait()
        for flat, pieces in buffers:
            parts = flat.split([piece.numel for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                own[piece.entry.name, piece.index] = part.view(shard_shape(piece.entry, piece.count))
        return own

    def _local(self, piece: _Piece, dtype: torch.dtype) -> torch.Tensor:
        return self._tensors[piece.entry.name].tensor.detach().to(dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).tensor.device


def _buckets(
    entries: Sequence[Entry], pieces: Mapping[str, list[_Piece]], limit: int, itemsize: int
) -> list[list[list[_Piece]]]:
    """Consecutive entries in groups of at most `limit` bytes (one larger entry is a group of its own)."""
    buckets: list[list[list[_Piece]]] = []
    size = limit + 1
    for entry in entries:
        entry_bytes = entry.size * itemsize
        if size + entry_bytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(pieces[entry.name])
        size += entry_bytes
    return buckets
