"""The model's weights under their Hugging Face names, where they are: which rank holds which part of which tensor, and
the present numbers of the parts that this rank holds. Works for any TP/PP/VPP/EP/ETP layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_r1.config.shape import ModelShape
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.gather import gathered
from megatron_r1.weights.local import LocalTensor
from megatron_r1.weights.regions import Region, regions
from megatron_r1.weights.table import Entry


class WeightStream:
    """The weights as an engine's source (engines/source.py), tensors numbered as in `metadata`.

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
        """Whole tensors on rank 0 (gather.py); nothing on other ranks, which iterate too."""
        return gathered(self, self.bucket_bytes)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).tensor.device
